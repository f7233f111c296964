"""The magic in a real kernel, seen through the messages that a notebook sees: the ipykernel that is installed, and two older ones, which are fetched.
One kernel of each serves all tests but the last two: starting one and importing torch takes longer than everything that is tested."""
import os
import re
import subprocess
import sys
import time

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

SETUP = """
%load_ext rwkv_peft
import threading, torch
from copy import deepcopy
from rwkv_peft import RWKV, RWKVConfig
torch.set_num_threads(1)
torch.manual_seed(0)
model = RWKV(RWKVConfig(n_layer=1, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))
rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}."} for i in range(8)]
"""
BODY = "model = deepcopy(model); data = rows\naccumulate = 1; r = 2; eval_split = 0.2; early_stop = 0\n"
LONG = BODY + "max_steps = 1000000; eval_steps = 1000000\n"
SHORT = BODY + "max_steps = 4; eval_steps = 2\n"


class Kernel:
    "A kernel, and the messages that each cell brought."

    def __init__(self, folder, older=""):
        self.manager = KernelManager(kernel_name="python3")
        path = os.pathsep.join(filter(None, [str(older), os.environ.get("PYTHONPATH"), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]))
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.folder, self.messages = folder, []

    def send(self, code):
        self.messages = []
        return self.client.execute(code)

    def until(self, wanted, timeout=60):
        "Collect messages until `wanted(message)` is true of one; that one."
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            message = self.client.get_iopub_msg(timeout=max(.1, end - time.monotonic()))
            self.messages.append(message)
            if wanted(message): return message
        raise TimeoutError

    def idle(self, sent):
        self.until(lambda m: m["msg_type"] == "status" and m["content"]["execution_state"] == "idle" and m["parent_header"].get("msg_id") == sent)
        while True:
            reply = self.client.get_shell_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == sent: return reply["content"]

    def run(self, code): return self.idle(self.send(code))

    def value(self, code):
        reply = self.run(code)
        assert reply["status"] == "ok", reply
        return self.of_kind("execute_result")[0]["content"]["data"]["text/plain"]

    def of_kind(self, *kinds): return [m for m in self.messages if m["msg_type"] in kinds]
    def bundles(self, mime): return [m["content"]["data"][mime] for m in self.of_kind("display_data", "update_display_data") if mime in m["content"]["data"]]
    def said(self): return "".join(m["content"]["text"] for m in self.of_kind("stream"))


@pytest.fixture(scope="module", params=["installed", "6.31.0", "7.3.0"])
def kernel(tmp_path_factory, request):
    older = ""
    if request.param != "installed":
        older = tmp_path_factory.mktemp("ipykernel")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile", "--target", older, f"ipykernel=={request.param}"], check=True)
    kernel = Kernel(tmp_path_factory.mktemp("kernel"), older)
    reply = kernel.run(SETUP)
    assert reply["status"] == "ok", reply
    assert request.param == "installed" or kernel.value("import ipykernel; ipykernel.__version__") == repr(request.param)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def is_png(html): return html.startswith('<img src="data:image/png;base64,')
def stepping(message): return "step " in str(message["content"].get("data", {}).get("text/plain", "")) and "loss" in str(message["content"]["data"])


def test_a_cell_waits_and_leaves_a_card_and_a_picture(kernel):
    reply = kernel.run("%%rwkv_finetune short\n" + SHORT)
    assert reply["status"] == "ok" and kernel.said() == ""
    card = kernel.bundles("text/html")[-2:]
    assert any("done" in html and "step 4 of 4" in html and "held-out loss" in html for html in card), card
    assert any(map(is_png, kernel.bundles("text/html"))) and len(kernel.of_kind("display_data")) == 2
    assert len({m["content"]["transient"]["display_id"] for m in kernel.of_kind("display_data", "update_display_data")}) == 2
    assert kernel.value("run is short, run.report()['status'], [t.name for t in threading.enumerate() if 'rwkv' in t.name]") == "(True, 'done', [])"
    assert (kernel.folder / "runs/short/adapter/adapter_model.safetensors").is_file()


def test_interrupt_saves_stops_and_can_be_resumed(kernel):
    sent = kernel.send("%%rwkv_finetune long\n" + LONG)
    kernel.until(stepping)
    kernel.manager.interrupt_kernel()
    reply = kernel.idle(sent)
    assert reply["status"] == "ok" and kernel.said() == "" and not kernel.of_kind("error")
    last = [html for html in kernel.bundles("text/html") if "stopped at step" in html][-1]
    stopped = int(re.search(r"stopped at step (\d+)", last)[1])
    assert stopped > 0 and "%rwkv_finetune long --resume" in last and any(map(is_png, kernel.bundles("text/html")))
    assert (kernel.folder / f"runs/long/checkpoints/step-{stopped}").is_dir()

    reply = kernel.run(f"%%rwkv_finetune long --resume\nmodel = deepcopy(model)\nmax_steps = {stopped + 3}")
    assert reply["status"] == "ok", reply
    assert any(f"step {stopped + 3} of {stopped + 3}" in html for html in kernel.bundles("text/html"))


def test_background_returns_at_once_and_only_one_run_lives(kernel):
    reply = kernel.run("%%rwkv_finetune behind --background\n" + LONG)
    assert reply["status"] == "ok" and kernel.value("behind is run and any('behind' in t.name for t in threading.enumerate())") == "True"
    kernel.until(stepping) if not any(map(stepping, kernel.messages)) else None
    reply = kernel.run("%%rwkv_finetune second\n" + SHORT)
    assert reply["status"] == "error" and reply["ename"] == "UsageError" and "'behind'" in reply["evalue"] and "behind.stop()" in reply["evalue"]
    assert kernel.value("1 + 1") == "2"
    reply = kernel.run("run.stop()\nawait run")
    assert reply["status"] == "ok" and kernel.said() == ""
    assert kernel.value("run.report()['status']") == "'stopped'"
    reply = kernel.run("%%rwkv_finetune second\n" + SHORT)
    assert reply["status"] == "ok"


def test_a_button_stops_a_run_in_the_background(kernel):
    "The click is the message that a front end sends; the main thread is idle."
    kernel.run("%%rwkv_finetune clicked --background\n" + LONG)
    kernel.until(stepping) if not any(map(stepping, kernel.messages)) else None
    kernel.run("import ipywidgets\nbutton = ipywidgets.Button(description='Stop')\nbutton.on_click(lambda _: clicked.stop())\nbutton.layout; button.comm.comm_id")
    comm = kernel.of_kind("execute_result")[0]["content"]["data"]["text/plain"].strip("'")
    kernel.client.shell_channel.send(kernel.client.session.msg("comm_msg", {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}))
    reply = kernel.run("await clicked\nclicked.report()['status']")
    assert reply["status"] == "ok" and kernel.said() == ""
    assert kernel.of_kind("execute_result")[0]["content"]["data"]["text/plain"] == "'stopped'"


def test_flags_of_a_script_are_a_body_and_the_run_is_found_by_its_name(kernel):
    (kernel.folder / "rows.jsonl").write_text("".join(f'{{"text": "{i} + 1 = {i + 1}"}}\n' for i in range(6)))
    reply = kernel.run("%%rwkv_finetune flags\npython train.py --load_model rwkv7-tiny --data_file rows.jsonl --data_type jsonl --ctx_len 32 \\\n --micro_bsz 2 --epoch_steps 2 --epoch_count 1 --peft lora --grad_cp 0 --n_layer 3")
    assert reply["status"] == "ok", reply
    assert "--n_layer" in kernel.said() and any("done" in html and "step 2 of 2" in html for html in kernel.bundles("text/html"))
    reply = kernel.run("%rwkv_attach flags")
    assert reply["status"] == "ok" and kernel.said() == "" and any("done" in html for html in kernel.bundles("text/html")) and any(map(is_png, kernel.bundles("text/html")))
    assert kernel.value("attached.report() == flags.report(), attached is flags") == "(True, False)"
    kernel.run("%rwkv_env")
    assert "front end" in kernel.said() and re.search(r"backend loop +yes", kernel.said())


def test_errors_reach_the_cell(kernel):
    reply = kernel.run("%%rwkv_finetune wrong\n" + SHORT + "lr_init = 'fast'")
    assert (reply["ename"], reply["evalue"][:12]) == ("UsageError", "body line 4:") and "\n" not in reply["evalue"]
    reply = kernel.run("%%rwkv_finetune diverged\n" + SHORT + "lr_init = 1e30; warmup_steps = 0; grad_clip = 0.0")
    assert reply["ename"] == "UsageError" and "lower lr_init" in reply["evalue"], reply
    assert any("✗ error" in html and "lr_init = " in html for html in kernel.bundles("text/html"))
    reply = kernel.run("%rwkv_attach diverged")
    assert reply["status"] == "ok" and any("✗ error" in html and "lr_init = " in html for html in kernel.bundles("text/html"))
    reply = kernel.run("def broken(*row): raise ZeroDivisionError('a fault of mine')")
    reply = kernel.run("%%rwkv_finetune faulty\n" + SHORT + "template = broken")
    assert reply["ename"] == "UsageError" and "ZeroDivisionError: a fault of mine" in reply["evalue"] and "\n" not in reply["evalue"]
    reply = kernel.run("import rwkv_peft.train.loop as loop\nwhole, loop.take_step = loop.take_step, broken")
    reply = kernel.run("%%rwkv_finetune faultier\n" + SHORT)
    kernel.run("loop.take_step = whole")
    assert reply["ename"] == "ZeroDivisionError" and len(reply["traceback"]) > 1
    assert kernel.value("[t.name for t in threading.enumerate() if 'rwkv' in t.name]") == "[]"


def test_a_restarted_kernel_leaves_a_run_to_go_on_with(tmp_path):
    "As a front end restarts it, in the middle of a run; what was saved by then is there, and the notebook from its first cell on again is enough."
    kernel = Kernel(tmp_path)
    try:
        assert kernel.run(SETUP)["status"] == "ok"
        kernel.run("%%rwkv_finetune torn --background\n" + LONG + "save_steps = 3")
        kernel.until(lambda m: list(tmp_path.glob("runs/torn/checkpoints/step-*")))
        kernel.manager.restart_kernel(now=False)
        kernel.client.wait_for_ready(timeout=60)
        saved = max(int(folder.name[5:]) for folder in tmp_path.glob("runs/torn/checkpoints/step-*"))
        assert kernel.run(SETUP)["status"] == "ok"
        reply = kernel.run(f"%%rwkv_finetune torn --resume\nmodel = deepcopy(model); max_steps = {saved + 2}")
        assert reply["status"] == "ok", reply
        assert kernel.value("[e['step'] for e in run.events if e['event'] == 'resumed'], run.report()['status']") == f"([{saved}], 'done')"
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)


def test_a_saved_notebook_keeps_card_and_picture_and_nothing_else(tmp_path):
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (SETUP, "%%rwkv_finetune kept\n" + SHORT, "run.report()['steps']")]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = book.cells[1].outputs
    assert [sorted(o.data) for o in outputs] == [["text/html", "text/plain"]] * 2 and is_png(outputs[1].data["text/html"])
    assert "done" in outputs[0].data["text/html"] and outputs[0].data["text/plain"].startswith("kept: done, step 4 of 4")
    assert "training from" in outputs[1].data["text/plain"] and book.cells[2].outputs[0].data["text/plain"] == "4"
    text = nbformat.writes(book)
    assert "http" not in text and "widget" not in text and len(text) < 120_000
