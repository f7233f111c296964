"Every page runs from top to bottom, its assertions with it."
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def test_pages_run():
    "`nbdev_test` runs the cells that are not marked slow, cuda or net, one process a page."
    ran = subprocess.run([Path(sys.executable).parent / "nbdev_test", "--n_workers", "2", "--do_print"], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-6000:]
