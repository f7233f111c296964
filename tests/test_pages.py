"Every page runs from top to bottom, its assertions with it."
import os
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
pages = sorted(p for p in root.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(root)))
def test_page_runs(page):
    "In a process of its own, since a kernel's page registers its operators under the names that the library uses. Cells marked slow, cuda or net are left out."
    ran = subprocess.run([Path(sys.executable).parent / "nbdev_test", "--path", page, "--n_workers", "0", "--do_print"], cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
