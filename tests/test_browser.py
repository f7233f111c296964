"""The magic as a person meets it: JupyterLab in Chromium, a run that is watched and stopped, and the notebook that Lab saved.
Off-screen cells have no text in Lab, so what is claimed about outputs is read from the saved file."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from playwright.sync_api import sync_playwright

SETUP = """
%load_ext rwkv_peft
import torch
from rwkv_peft import RWKV, RWKVConfig
torch.set_num_threads(1)
torch.manual_seed(0)
model = RWKV(RWKVConfig(n_layer=1, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))
rows = [{"prompt": f"<b>{i}</b> + 1 =", "completion": f" {i + 1}."} for i in range(20)]
"""
RUN = """
%%rwkv_finetune watched
model = model; data = rows
accumulate = 1; r = 2; eval_split = 0.2; max_steps = 1000000; eval_steps = 1000000
sample_prompts = ["<b>1</b> + 1 $=$"]
"""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def chromium():
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "chromium is missing: install it (apt-get install chromium), or name its path in the environment variable CHROMIUM"
    return found


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab over an empty folder with the notebook in it; its address."
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (SETUP, RUN, "run.report()['status']")]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}})
    (tmp_path / "work").mkdir()
    nbformat.write(book, tmp_path / "work/b.ipynb")
    (tmp_path / "config/labconfig").mkdir(parents=True)
    (tmp_path / "config/labconfig/default_setting_overrides.json").write_text(json.dumps(
        {"@jupyterlab/notebook-extension:tracker": {"autoStartDefaultKernel": True}, "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "HOME": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "OMP_NUM_THREADS": "1"}
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=", "--expose-app-in-browser", f"--ServerApp.root_dir={tmp_path / 'work'}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api"), 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill()


def answers(url):
    try: return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError: return False


def wait_for(true, timeout):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := true(): return found
        time.sleep(.2)
    raise TimeoutError


class Page:
    "The notebook in Lab, driven by Lab's own commands."

    def __init__(self, page, file): self.page, self.file = page, file
    def command(self, name): return self.page.evaluate(f"window.jupyterapp.commands.execute('{name}').then(() => 1)")

    def ready(self):
        "Whether a kernel waits; should Lab ask which one it is to be, the answer is the one it proposes."
        select = self.page.locator(".jp-Dialog button:has-text('Select')")
        if select.count(): select.first.click()
        return self.page.evaluate("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")

    def run(self, cell):
        self.page.evaluate(f"window.jupyterapp.shell.currentWidget.content.activeCellIndex = {cell}")
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-cell'); 1")

    def saved(self, cell):
        self.command("docmanager:save")
        return json.loads(self.file.read_text())["cells"][cell]

    def finished(self, cell): return wait_for(lambda: (found := self.saved(cell)).get("execution_count") and found, 60)


def brightness(page, selector, what):
    "From 0 to 255; not a number when Lab redrew the output in that moment, and the element is no longer on the page."
    colour = page.eval_on_selector(selector, f"""e => {{
        while (e && getComputedStyle(e).{what} == 'rgba(0, 0, 0, 0)') e = e.parentElement
        const numbers = e && getComputedStyle(e).{what}.match(/[0-9.]+/g)
        return numbers && numbers.slice(0, 3).map(Number)
    }}""")
    return sum(part * weight for part, weight in zip(colour, (.3, .59, .11))) if colour else float("nan")


def test_a_run_is_watched_stopped_and_kept(lab, tmp_path):
    file, hosts, failed = tmp_path / "work/b.ipynb", set(), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(f"{lab}/lab/tree/b.ipynb?reset")
        notebook = Page(page, file)
        wait_for(notebook.ready, 90)

        notebook.run(0)
        assert notebook.finished(0)["outputs"] == []
        notebook.run(1)
        card = page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-OutputArea-output").first
        seen = [wait_for(lambda: (text := card.inner_text()) and "tokens/s" in text and text, 30)]
        seen.append(wait_for(lambda: (text := card.inner_text()) != seen[0] and text, 30))          # it lives
        page.locator(".jp-Notebook .jp-Cell").nth(1).locator("svg polyline").first.wait_for(timeout=20_000)
        page.screenshot(path=tmp_path / "live.png")
        assert "■ stops" in seen[1] and "<b>1</b> + 1 $=$" in seen[1]                              # neither markup nor mathematics

        notebook.command("notebook:interrupt-kernel")
        wait_for(lambda: "stopped at step" in card.inner_text(), 30)
        outputs = notebook.finished(1)["outputs"]
        notebook.run(2)
        assert notebook.finished(2)["outputs"][0]["data"]["text/plain"] == ["'stopped'"]

        wait_for(lambda: abs(brightness(page, ".jp-OutputArea-output b", "color") - brightness(page, ".jp-OutputArea-output b", "backgroundColor")) > 100, 20)
        page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}).then(() => 1)")
        wait_for(lambda: brightness(page, ".jp-OutputArea-output b", "backgroundColor") < 60, 20)
        wait_for(lambda: brightness(page, ".jp-OutputArea-output b", "color") > 150, 20)              # light on dark now
        page.screenshot(path=tmp_path / "stopped.png")
        assert page.locator(".jp-OutputArea-output mjx-container").count() == 0
        browser.close()

    assert [sorted(o["data"]) for o in outputs] == [["text/html", "text/plain"], ["image/png", "text/plain"]]
    html = "".join(outputs[0]["data"]["text/html"])
    assert "stopped at step" in html and "%rwkv_finetune watched --resume" in html and "&lt;b&gt;1&lt;/b&gt;" in html and "drawing took" in html
    text = file.read_text()
    assert "http" not in text and "widget" not in text
    assert hosts == {lab.removeprefix("http://")} and not failed
    assert list((tmp_path / "work/runs/watched/checkpoints").iterdir())
