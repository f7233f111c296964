"""The magic as a person meets it: JupyterLab in Chromium, a run that is watched and stopped, and the notebook that Lab saved.
Off-screen cells have no text in Lab, so what is claimed about outputs is read from the saved file."""
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from playwright.sync_api import sync_playwright
from rwkv_peft.notebook.attach import attach
from rwkv_peft.notebook.card import TextCard
from rwkv_peft.train.events import read_events
from rwkv_peft.train.folder import checkpoints

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
PANEL = """
%%rwkv_panel clicked
model = model
accumulate = 1; r = 2; eval_split = 0.2; max_steps = 1000000; eval_steps = 1000000
"""
LAB = """
from rwkv_peft.look.sampler import record
from rwkv_peft.model.sample import Sampler
from rwkv_peft.notebook.sampler_lab import SamplerLab
SamplerLab(record(model, "1 + 1 =", 24, Sampler(seed=0)))
"""
NOTEBOOKS = {"b.ipynb": (SETUP, RUN, "run.report()['status']"), "p.ipynb": (SETUP, PANEL, "panel.run and panel.run.report()['status']", LAB),
             "c.ipynb": (SETUP + RUN.replace("%%rwkv_finetune watched", "get_ipython().run_cell_magic('rwkv_finetune', 'left', '''") + "''')",)}
ARTEFACTS = Path(__file__).parent / "artefacts"          # screenshots, for people to look at; git ignores them
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def chromium():
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "chromium is missing: install it (apt-get install chromium), or name its path in the environment variable CHROMIUM"
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("browser")


def book_of(sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in sources],
                                    metadata={"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}})


@pytest.fixture(scope="module")
def lab(place):
    "A JupyterLab over a folder with the notebooks in it; its address."
    tmp_path = place
    (tmp_path / "work").mkdir()
    for name, sources in NOTEBOOKS.items(): nbformat.write(book_of(sources), tmp_path / "work" / name)
    for page in ("look/10_report", "look/60_runs", "notebook/50_sampler_lab"): shutil.copy(Path(__file__).parents[1] / "nbs" / f"{page}.ipynb", tmp_path / "work")
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


@contextmanager
def opened(lab, file):
    "A notebook in a browser, its kernel waiting: (page, `Page`, hosts that were asked, errors of the page). Closes the browser."
    hosts, failed = set(), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 1100})
        page.on("request", lambda r: hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(f"{lab}/lab/tree/{file.name}?reset")
        notebook = Page(page, file)
        wait_for(notebook.ready, 90)
        yield page, notebook, hosts, failed
        browser.close()


def picture(page, name):
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")


def brightness(page, selector, what):
    "From 0 to 255; not a number when Lab redrew the output in that moment, and the element is no longer on the page."
    colour = page.eval_on_selector(selector, f"""e => {{
        while (e && getComputedStyle(e).{what} == 'rgba(0, 0, 0, 0)') e = e.parentElement
        const numbers = e && getComputedStyle(e).{what}.match(/[0-9.]+/g)
        return numbers && numbers.slice(0, 3).map(Number)
    }}""")
    return sum(part * weight for part, weight in zip(colour, (.3, .59, .11))) if colour else float("nan")


def test_a_run_is_watched_stopped_and_kept(lab, place):
    file = place / "work/b.ipynb"
    with opened(lab, file) as (page, notebook, hosts, failed):

        notebook.run(0)
        assert notebook.finished(0)["outputs"] == []
        notebook.run(1)
        card = page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-OutputArea-output").first
        seen = [wait_for(lambda: (text := card.inner_text()) and "tokens/s" in text and text, 30)]
        seen.append(wait_for(lambda: (text := card.inner_text()) != seen[0] and text, 30))          # it lives
        page.locator(".jp-Notebook .jp-Cell").nth(1).locator("svg polyline").first.wait_for(timeout=20_000)
        picture(page, "live")
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
        picture(page, "stopped")
        assert page.locator(".jp-OutputArea-output mjx-container").count() == 0
        assert "training from" in page.locator(".jp-OutputArea-output img").get_attribute("alt")

    assert [sorted(o["data"]) for o in outputs] == [["text/html", "text/plain"]] * 2
    html = "".join(outputs[0]["data"]["text/html"])
    assert "stopped at step" in html and "%rwkv_finetune watched --resume" in html and "&lt;b&gt;1&lt;/b&gt;" in html and "drawing took" in html
    text = file.read_text()
    assert "http" not in text and "widget" not in text
    assert hosts == {lab.removeprefix("http://")} and not failed
    assert list((place / "work/runs/watched/checkpoints").iterdir())


def test_the_panel_is_clicked_through(lab, place):
    file = place / "work/p.ipynb"
    with opened(lab, file) as (page, notebook, hosts, failed):
        page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'}).then(() => 1)")
        notebook.run(0)
        notebook.finished(0)
        notebook.run(1)
        cell = page.locator(".jp-Notebook .jp-Cell").nth(1)
        output = cell.locator(".jp-OutputArea-output")
        button = lambda text: cell.locator(f"button:has-text('{text}'):visible").first
        field = lambda name: cell.locator(f".widget-inline-hbox:has(label:text-is('{name}')) input:visible").first
        tab = lambda title: cell.locator(f".lm-TabBar-tab:has-text('{title}')").click()

        field("data").wait_for(timeout=30_000)
        assert "is missing" in cell.inner_text()
        picture(page, "panel-opened")
        assert "Model, data" in cell.inner_text()
        field("data").fill("rows")
        field("data").press("Tab")
        button("Show row").click()
        wait_for(lambda: "Row 0 of" in cell.inner_text(), 30)
        picture(page, "panel-rows")
        tab("Method")
        picture(page, "panel-method")
        tab("All settings")
        cell.locator("input[placeholder^='a part']").fill("rate")
        wait_for(lambda: "twice the rate" in cell.inner_text() or "learning rate" in cell.inner_text(), 20)
        picture(page, "panel-settings")
        button("Plan").click()
        wait_for(lambda: "for tensors at the peak" in cell.inner_text(), 60)
        picture(page, "panel-plan")

        button("Start").click()
        told = lambda: output.nth(3).inner_text()
        first = wait_for(lambda: (text := told()) and "tokens/s" in text and text, 60)
        wait_for(lambda: told() != first and "tokens/s" in told(), 30)                         # it lives
        cell.locator("svg polyline").first.wait_for(timeout=20_000)
        picture(page, "panel-live")
        button("Pause").click()
        wait_for(lambda: "paused" in told(), 30)
        button("Resume").click()
        wait_for(lambda: "training" in told(), 30)
        button("Stop").click()
        wait_for(lambda: "stopped at step" in told(), 30)
        picture(page, "panel-stopped")
        stopped = int(told().split("stopped at step ")[1].split()[0])
        button("Resume").click()
        wait_for(lambda: "training" in told() and "tokens/s" in told(), 60)
        button("Stop").click()
        wait_for(lambda: "stopped at step" in told(), 30)
        assert int(told().split("stopped at step ")[1].split()[0]) > stopped
        tab("Chat")
        cell.locator("textarea:visible").first.fill("<b>1</b> + 1 =")
        button("Ask both").click()
        wait_for(lambda: "base" in output.nth(2).inner_text() and "<b>1</b>" in output.nth(2).inner_text(), 30)
        picture(page, "panel-chat")
        tab("Runs")
        picture(page, "panel-runs")
        tab("As a cell")
        picture(page, "panel-cell")
        page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}).then(() => 1)")
        tab("Method")
        picture(page, "panel-dark")
        notebook.run(2)
        assert notebook.finished(2)["outputs"][0]["data"]["text/plain"] == ["'stopped'"]
        outputs = notebook.saved(1)["outputs"]

        notebook.run(3)
        drawn = lambda: page.locator(".jp-Notebook .jp-Cell").nth(3).locator(".jp-OutputArea-output").last.inner_text()
        handle = page.locator(".jp-Notebook .jp-Cell").nth(3).locator(".noUi-handle").first
        handle.wait_for(timeout=30_000)
        before = wait_for(drawn, 30)
        for _ in range(4): handle.press("ArrowRight")
        wait_for(lambda: drawn() not in ("", before), 30)
        handle.scroll_into_view_if_needed()
        picture(page, "sampler-lab")

    kept = ["".join(o["data"].get("text/html", [])) for o in outputs]
    assert "data = rows" in kept[1] and "&lt;b&gt;1&lt;/b&gt;" in kept[2] and "stopped at step" in kept[3] and "<img" in kept[4] and len(outputs) == 5
    assert hosts == {lab.removeprefix("http://")} and not failed and "http" not in "".join(kept)


def test_a_closed_browser_leaves_the_run_going(lab, place):
    "The kernel trains on; the run is stopped from its folder, and has a checkpoint of its last step."
    folder = place / "work/runs/left"
    steps = lambda: [e["step"] for e in read_events(folder / "events.jsonl") if e["event"] == "step"] if (folder / "events.jsonl").exists() else []
    with opened(lab, place / "work/c.ipynb") as (_, notebook, _, _):
        notebook.run(0)
        wait_for(steps, 60)
    closed = steps()[-1]
    wait_for(lambda: steps()[-1] > closed + 3, 30)
    run = attach(folder, view=TextCard(io.StringIO()))
    run.stop()
    assert run.wait(30).progress.status == "stopped" and checkpoints(folder)[-1] == steps()[-1]


def test_the_same_notebook_passes_without_a_browser(tmp_path):
    book = book_of(NOTEBOOKS["p.ipynb"])
    NotebookClient(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}, store_widget_state=False).execute()
    shown = [o["data"]["text/plain"] for o in book.cells[1].outputs]
    assert "needs" in shown[0] or "while a kernel runs" in shown[0]
    assert "max_steps = 1000000" in shown[1] and not [o for cell in book.cells for o in cell.outputs if o["output_type"] == "error"]


@pytest.mark.parametrize("name", ["10_report", "60_runs", "50_sampler_lab"])
def test_a_notebook_that_nobody_trusts_yet_is_readable(lab, place, name):
    "JupyterLab takes scripts, SVG and odd styles out of the outputs of a notebook that came from elsewhere; ours must lose nothing by it."
    with opened(lab, place / f"work/{name}.ipynb") as (page, notebook, hosts, failed):
        assert page.evaluate("window.jupyterapp.shell.currentWidget.content.model.cells.get(0).trusted") is False
        page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.forEach(cell => cell.node.style.contentVisibility = 'visible')")
        for cell in range(0, len(json.loads(notebook.file.read_text())["cells"]), 4): page.evaluate(f"window.jupyterapp.shell.currentWidget.content.scrollToItem({cell})")
        drawn = wait_for(lambda: page.eval_on_selector_all(".jp-OutputArea-output img", "all => all.length && all.every(i => i.naturalWidth) && all.map(i => i.alt)"), 30) if name != "50_sampler_lab" else []
        assert all(len(words) > 20 for words in drawn)
        lines = page.eval_on_selector_all(".jp-OutputArea-output table td", "all => all.map(e => getComputedStyle(e).borderBottomStyle)")
        assert lines and set(lines) == {"solid"}
        picture(page, f"untrusted-{name}")
    assert hosts == {lab.removeprefix("http://")} and not failed
