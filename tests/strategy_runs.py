"""Started by test_strategies.py, alone or by torchrun: makes the runs that a JSON file lists, one after the other, each in a worker thread, and writes on rank 0 what each came to.
A run may be a resumed one (`resume`), stop after a step (`stop`, said to rank 0 alone), or lose a rank (`die`: [rank, step])."""
import json
import os
import sys
import threading
import warnings
from pathlib import Path
import torch
from rwkv_peft.train.loop import Run, finetune

torch.set_num_threads(1)


def walk(told: dict, found: list):
    stop, die = told.pop("stop", None), told.pop("die", None)
    folder = Path(told["output"], told["name"])
    run = Run.resume(folder, **told["resume"]) if "resume" in told else finetune(**told)
    try:
        for e in run.steps():
            if e["event"] == "step" and e["step"] == stop and run.rank == 0: run.stop()
            if die and e["event"] == "step" and [run.rank, e["step"]] == die: raise RuntimeError("this rank dies")
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)
    steps = [e for e in run.events if e["event"] == "step"]
    found.append({"world": run.world, "loss": [e["loss"] for e in steps], "norm": [e["grad_norm"] for e in steps], "tokens": [e["tokens"] for e in steps], "rows": [e["rows"] for e in steps],
                  "eval": [e["loss"] for e in run.events if e["event"] == "eval"], "end": run.events[-1]["event"], "rank": run.rank, "parameters": [type(p).__name__ for p in run.model.parameters()] == ["Parameter"] * len(list(run.model.parameters())),
                  "left": [k for m in run.model.modules() for k in vars(m) if "ds_" in k or "zero" in k], "whole": sum(p.numel() for p in run.model.parameters()), "LOCAL_RANK": os.environ.get("LOCAL_RANK")})


out, tasks = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
for i, told in enumerate(tasks):
    found, name = [], told["name"]
    thread = threading.Thread(target=walk, args=(told, found))
    thread.start()
    thread.join()
    if not found: os._exit(4)
    if found[0]["rank"] == 0: (out / f"{i}-{name}.json").write_text(json.dumps(found[0]))
