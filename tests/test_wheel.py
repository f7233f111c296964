"The wheel: built from a copy of the sources, installed into a fresh environment, and used where there is no compiler."
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TRY = """
import shutil, sys, torch, rwkv_peft
from rwkv_peft import RWKV
from rwkv_peft.kernels.native import native_status, source
from rwkv_peft.kernels.wkv import wkv7
assert rwkv_peft.__file__.startswith(sys.prefix), rwkv_peft.__file__
assert not any(map(shutil.which, ("cc", "gcc", "g++", "clang")))
usable, what = native_status()
assert usable and what.startswith("C++ for"), what
r, k, v, a = torch.randn(4, 2, 37, 3, 24)
w, b = -torch.rand(2, 2, 37, 3, 24)
fast, slow = (wkv7(r, w, k, v, a / 5, b / 5, backend=name)[0] for name in ("cpu", "loop"))
torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
assert source("wkv7.cpp", "forward").startswith("kernels/wkv7.cpp, lines")
model = RWKV.load("rwkv7-tiny")
print("".join(model.generate("Two plus two", max_tokens=3)).encode())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of the tracked files alone, so that nothing built in place slips in."
    copy = tmp_path_factory.mktemp("sources")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    ran = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."], cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    built, = (copy / "dist").glob("*.whl")
    return built


def test_wheel_holds_everything(wheel):
    inside, tracked = set(zipfile.ZipFile(wheel).namelist()), subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {f for f in tracked if f.startswith("rwkv_peft/")} | {f.replace("kernels/", "rwkv_peft/kernels/sources/") for f in tracked if f.startswith("kernels/")}
    assert not wanted - inside
    assert {name.split("_native_")[1].split(".")[0] for name in inside if "_native_" in name} == {"base", "avx2", "avx512"}


def test_wheel_works_without_a_compiler(wheel, tmp_path):
    "In an environment that borrows the big packages from this one, on a PATH that holds nothing but itself."
    venv.create(tmp_path / "env", with_pip=False)
    python, = (tmp_path / "env/bin").glob("python3")
    own, = (tmp_path / "env").glob("lib/python*/site-packages")
    ran = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", own, wheel], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (own / "borrowed.pth").write_text(str(Path(sys.prefix) / own.relative_to(tmp_path / "env")))
    ran = subprocess.run([python, "-c", TRY], cwd=tmp_path, env={"PATH": str(tmp_path / "env/bin"), "HOME": os.environ.get("HOME", "")}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_checkout_beside_the_notebook_does_not_hide_the_package(tmp_path):
    "Installed with `-e`, the package must be found also where a folder of its name lies: in the folder that holds the checkout."
    (tmp_path / "rwkv_peft").mkdir()
    said = subprocess.run([sys.executable, "-c", "import rwkv_peft; print(rwkv_peft.__file__)"], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout.strip().endswith("__init__.py"), said
