"kernels/*.cpp under AddressSanitizer and UndefinedBehaviorSanitizer, called with many small random shapes through the package's own functions."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# One function per family of C functions, named `case_...`; it gets a random.Random and calls ours, forward and backward. Add more below: nothing else has to be told.
CASES = '''
import ctypes, os, random, sys, torch
sys.path.insert(0, sys.argv[4])
import test_fused
from rwkv_peft.kernels import native
lib = ctypes.CDLL(sys.argv[1])
native.library = lambda: (lib, "C++ under the sanitizers")
from rwkv_peft.kernels.native import wkv7_cpu
from rwkv_peft.kernels.native6 import wkv6_cpu
from rwkv_peft.kernels.cross_entropy import softmax_in_place
from rwkv_peft.kernels.few_rows import few_rows, few_rows_int8
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.step import step

def sizes(rng): return rng.randint(1, 3), rng.choice([1, 2, 15, 16, 17, 33]), rng.randint(1, 3), rng.choice([1, 3, 4, 13, 16, 20, 32, 64, 72])
def leaf(*shape): return torch.randn(*shape).requires_grad_()
def back(*outputs): sum(x.sum() for x in outputs).backward()

def recurrence(rng, form, others):
    B, T, H, N = sizes(rng)
    beginnings = leaf(B, H, N, N) if rng.random() < .5 else None, leaf(H, N, N) if rng.random() < .5 else None
    resets = torch.rand(B, T) < .2 if rng.random() < .5 else None
    back(*form(leaf(B, T, H, N), -10 ** torch.empty(B, T, H, N).uniform_(-3, 0 if form is wkv7_cpu else 4), leaf(B, T, H, N), leaf(B, T, H, N), *others(B, T, H, N), *beginnings, resets))

def case_wkv7(rng): recurrence(rng, wkv7_cpu, lambda B, T, H, N: ((key := torch.nn.functional.normalize(torch.randn(B, T, H, N), dim=-1)), -key))
def case_wkv6(rng): recurrence(rng, wkv6_cpu, lambda B, T, H, N: (leaf(H, N),))

def case_fused(rng):
    B, T, H, N = sizes(rng)
    piece, first_layer = rng.choice([("mix", False), ("before", False), ("before", True), ("after", False), ("relu", False)])
    tensors, wanted, rest = test_fused.arguments(piece, B, T, H, N, first_layer, rng.random() < .3)
    test_fused.run(test_fused.PIECES[piece][0], tensors, wanted, rest, torch.float32)

def case_few_rows(rng):
    M, K, N = rng.randint(1, 16), rng.randint(1, 90), rng.randint(1, 70)
    x, q = torch.randn(M, K), torch.randint(-127, 128, (N, K), dtype=torch.int8)
    few_rows(x, torch.randn(N, K))
    few_rows_int8(x, q, torch.rand(N))

def case_cross_entropy(rng):
    n, V = rng.randint(1, 9), rng.choice([1, 2, 17, 1023, 1025, 2100])
    softmax_in_place(torch.randn(n, V), torch.randint(V, (n,)), torch.rand(n))

def case_step(rng):
    N, H, layers = rng.choice([4, 16, 20, 64]), rng.randint(1, 3), rng.randint(1, 2)
    ranks = {f"{c}_rank": rng.randint(1, 20) for c in "wavg"}
    model = RWKV(RWKVConfig(n_layer=layers, n_embd=N * H, head_size=N, dim_ffn=rng.randint(1, 90), vocab_size=rng.randint(2, 40), **ranks))
    rows = rng.randint(1, 5)
    with torch.no_grad():
        _, state = model(torch.zeros(rows, 2, dtype=torch.long))
        assert step(model, torch.zeros(rows, 1, dtype=torch.long), state) is not None

seed = int(sys.argv[2])
torch.set_num_threads(2)
for name, case in [(n, f) for n, f in list(globals().items()) if n.startswith("case_")]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(int(sys.argv[3])): case(rng)
    print("done", name, flush=True)
os._exit(0)
'''


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="no g++ on Linux")
def test_no_access_outside_and_nothing_undefined(tmp_path):
    flags = Path("/proc/cpuinfo").read_text()
    wide = "-mavx512f -mavx512dq -mavx512bw -mavx512vl".split() if all(f"avx512{x}" in flags for x in ("f", "dq", "bw", "vl")) else []
    built = subprocess.run(["g++", "-std=gnu++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-w", "-fPIC", "-shared", "-fopenmp",
                            "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-mavx2", "-mfma", *wide, *map(str, sorted((ROOT / "kernels").glob("*.cpp"))),
                            "-o", str(tmp_path / "kernels.so")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    done = subprocess.run([sys.executable, "-c", CASES, str(tmp_path / "kernels.so"), "0", "25", str(ROOT / "tests")], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert done.stdout.count("done case_") == CASES.count("def case_") >= 6
