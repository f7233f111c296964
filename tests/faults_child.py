"""Started by test_checkpoints_faults.py: one run, in forked processes that kill themselves at seeded instants until `kills` have died; each goes on where the last one fell. Prints where they fell. The same run untouched goes before.
An instant is the n-th of: a file forced to disk, a rename, the update of the weights, a line of events (half of it is written), a checkpoint's second file, a deletion."""
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
import torch
from rwkv_peft.data.records import read_data
from rwkv_peft.train.events import EventLog
from rwkv_peft.train.folder import checkpoints, holds_run, load_checkpoint
from rwkv_peft.train.loop import finetune

torch.set_num_threads(1)
told, kills, dice = json.loads(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
folder = Path(told["output"], told["name"])


def fall(): os.kill(os.getpid(), signal.SIGKILL)


def armed(place, name: str, left: int, half=None):
    "Puts a counter before `place.name`: at call number `left` the process falls."
    real, calls = getattr(place, name), [0]
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == left:
            if half: half(*args)
            fall()
        return real(*args, **kwargs)
    setattr(place, name, counted)


def half_a_line(log, said):
    with open(log.path, "ab", buffering=0) as file: file.write(json.dumps(said).encode()[:40])


INSTANTS = {"fsync": (os, "fsync", 12), "rename": (os, "replace", 6), "update": (torch.optim.AdamW, "step", 4), "line": (EventLog, "add", 9), "second file": (torch, "save", 3), "deletion": (shutil, "rmtree", 5)}
finetune(**told | {"name": "untouched"}).fit()                  # also imports what the forks need
fell, sessions = [], 0
while True:
    sessions += 1
    kind = dice.choice(list(INSTANTS)) if len(fell) < kills else None
    number = dice.randint(1, INSTANTS[kind][2]) if kind else 0
    child = os.fork()
    if not child:
        if kind: armed(*INSTANTS[kind][:2], number, half_a_line if kind == "line" else None)
        finetune(**({"name": told["name"], "output": told["output"], "resume": True} if holds_run(folder) else told)).fit()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status): fell.append([kind, number, checkpoints(folder)[-1:]])
    elif status or not kind: break
    for step in checkpoints(folder): load_checkpoint(folder, step)          # raises for a corrupt one
    if sessions > 4 * kills: break
print(json.dumps({"fell": fell, "sessions": sessions, "status": status}))
