"The command line: values, one-line errors with exit code 2, a quick --help, and a run that Ctrl-C ends gracefully."
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rwkv_peft import RWKV, RWKVConfig, cli

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-c", "from rwkv_peft.cli import main; main()"]


def shell(capsys, *words):
    with pytest.raises(SystemExit) as end: cli.main(list(words))
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize("text, value", [
    ("8", 8), ("2e-4", 2e-4), ("true", True), ("lora", "lora"), ('"8"', "8"), ("[1, 2]", [1, 2]), ('{method = "lora", r = 4}', {"method": "lora", "r": 4}),
    ("my rows.jsonl", "my rows.jsonl"), ("2026-01-02", "2026-01-02"), ("", ""), ("__import__('os')", "__import__('os')"),
])
def test_values_are_toml_literals_or_bare_words(text, value):
    read = cli.literal(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("words, said", [
    (["tune", "nowhere.toml"], ["nowhere.toml", "no such settings file"]),
    (["tune", "model=rwkv7-tiny", "data=nowhere.jsonl"], ["nowhere.jsonl"]),
    (["tune", "lr_innit=3"], ["lr_innit", "'lr_init'"]),
    (["tune", "targets=[att"], ["[att", "brackets"]),
    (["tune", "what is this"], ["neither"]),
    (["tune"], ["Missing argument"]),
    (["tnue"], ["tnue"]),
    (["bench", "wkv", "--tokens", "0"], ["tokens"]),
    (["generate", "nowhere.pth", "--prompt", "x"], ["nowhere.pth"]),
])
def test_errors_are_one_line_on_stderr_and_code_2(capsys, words, said):
    code, out, err = shell(capsys, *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("rwkv-peft: ")
    assert all(piece in err for piece in said), err


def test_a_files_error_names_file_and_line(capsys, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('model = "rwkv7-tiny"\ndata = "x.jsonl"\nlr_schedule = "cosine"\n')
    code, out, err = shell(capsys, "tune", str(file))
    assert code == 2 and "my.toml line 3" in err and "'cos'" in err


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['rwkv-peft', '--help']\ntry:\n    from rwkv_peft.cli import main; main()\nexcept SystemExit: print(sorted({'torch', 'pydantic', 'IPython', 'numpy'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.rstrip().endswith("[]") and "tune" in said and "generate" in said


def test_demo_and_bench_hand_on_their_options(capsys, monkeypatch, tmp_path):
    from types import ModuleType
    called = []
    for name, functions in {"demo": {"run_demo": lambda **k: called.append(k)}, "wkv": {"bench_wkv": lambda **k: called.append(k), "wkv_table": lambda r: "a table"},
                            "step": {"bench_step": lambda **k: called.append(k), "step_table": lambda r: "a table"}}.items():
        module = ModuleType(f"rwkv_peft.bench.{name}")
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").touch()
    assert shell(capsys, "demo", "--data", "my.jsonl", "--model", "my.pth") == (0, "", "")
    assert shell(capsys, "bench", "wkv", "--tokens", "9")[:2] == (0, "a table\n")
    assert shell(capsys, "bench", "step", "--small", "--no-memory")[:2] == (0, "a table\n")
    assert called == [{"data": "my.jsonl", "model": "my.pth", "output": "runs"}, {"T": 9, "H": 12, "repeats": 7}, {"T": 512, "repeats": 5, "small": True, "memory": False}]


# ---------------------------------------------------------------- with a model

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with a small model of random weights, some rows, and settings for them."
    import torch
    from rwkv_peft.model.checkpoint import save
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    save(RWKV(RWKVConfig(n_layer=1, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8)), folder / "small.pth")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}."}) + "\n" for i in range(20)))
    (folder / "my.toml").write_text('model = "small.pth"\ndata = "rows.jsonl"\nname = "mine"\naccumulate = 1\neval_split = 0.2\neval_steps = 100000\nmax_steps = 100000\nr = 2\n')
    return folder


def test_tune_until_ctrl_c_then_resume(folder):
    events = folder / "runs/mine/events.jsonl"
    run = subprocess.Popen([*COMMAND, "tune", "my.toml"], cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (events.exists() and '"step", ' in events.read_text()) and time.monotonic() < end and run.poll() is None: time.sleep(.1)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "stopped at step" in out and "resume" in out and "Traceback" not in out + err, out + err
    last = [json.loads(line) for line in events.read_text().splitlines()][-1]
    assert last["event"] == "stopped" and (folder / f"runs/mine/checkpoints/step-{last['step']}").is_dir()

    again = subprocess.run([*COMMAND, "tune", "name=mine", "resume=true", f"max_steps={last['step'] + 2}"], cwd=folder, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0 and f"mine: done, step {last['step'] + 2}" in again.stdout, again.stdout + again.stderr
    assert (folder / "runs/mine/adapter/adapter_config.json").is_file()
    assert f"done · step {last['step'] + 2:,} of {last['step'] + 2:,}" in (folder / "runs/mine/report.html").read_text(encoding="utf-8")


def test_plan_and_generate(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, err = shell(capsys, "plan", "my.toml", "max_steps=7", "name=other")
    assert code == 0 and "steps: 7\n" in out and not (folder / "runs/other").exists()
    code, first, err = shell(capsys, "generate", "small.pth", "--prompt", "1 + 1 =", "--max-tokens", "8", "--seed", "1")
    from rwkv_peft.model.sample import Sampler
    model = RWKV.load("small.pth", device="cpu", dtype=torch.float32)
    assert code == 0 and first == "".join(model.generate("1 + 1 =", max_tokens=8, sampler=Sampler(seed=1))) + "\n"      # the text and nothing else
    assert err.startswith("small.pth: ") and "as float32 on" in err
    assert shell(capsys, "generate", "small.pth", "--prompt", "1 + 1 =", "--max-tokens", "8", "--seed", "1")[1] == first
    code, out, err = shell(capsys, "generate", "nowhere.pth", "--prompt", "")
    assert code == 2 and "prompt is empty" in err and err.count("\n") == 1
