"Labs over tokens, deltas and checkpoints: what a moved control shows is what the plain function makes; blocks and histograms as numpy has them; evil names stay text; widgets don't pile up."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from markup import Markup
from safetensors.torch import save_file
from small import new_model, stir

from rwkv_peft import LoRA, RWKV, RWKVConfig, attach, finetune, read_data, save_adapter
from rwkv_peft.data.rows import DataError
from rwkv_peft.look.checkpoint import checkpoint_card
from rwkv_peft.look.deltas import delta_card, delta_history, deltas
from rwkv_peft.look.tokens import compare, loss_ribbon, read_losses
from rwkv_peft.model.checkpoint import save
from rwkv_peft.model.files import CheckpointError
from rwkv_peft.notebook import CheckpointLab, DeltaLab, TokenLab
from rwkv_peft.notebook import look_labs
from rwkv_peft.notebook.look_labs import block_extremes, kind_card, spread_of, tensor_card, tensor_picture

EVIL = "<script>alert(1)</script>$x$\"'"


class Screen:
    "What IPython's display was given: things in order, and for each place on the screen what it shows now."
    def __init__(self): self.things, self.places = [], {}
    def display(self, thing, display_id=None, raw=False):
        self.things.append(thing)
        if not display_id: return None
        handle = Handle(self, f"place {len(self.places)}" if display_id is True else display_id)
        handle.update(thing)
        return handle


class Handle:
    def __init__(self, screen, display_id): self.screen, self.display_id = screen, display_id
    def update(self, thing): self.screen.places[self.display_id] = thing


@pytest.fixture
def screen(monkeypatch):
    found = Screen()
    monkeypatch.setattr("IPython.display.display", found.display)
    return found


def bytes_model(seed=3):
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig("7", n_layer=2, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3 * torch.randn_like(p))
    return model.requires_grad_(False)


def only(screen):
    "The one picture on the screen."
    assert len(screen.places) == 1
    return screen.places["place 0"]


def shown_twice(lab, screen, move):
    "A second show is the same lab in two places: no new widgets, one picture, and it still moves."
    from ipywidgets.widgets import widget
    held = len(widget._instances)
    lab.show()
    before = only(screen)
    move()
    assert len(widget._instances) == held and only(screen) != before
    views = [t for t in screen.things if isinstance(t, dict)]
    assert len(views) == 2 and views[0] == views[1] and "live kernel" in views[0]["text/plain"]


def test_tokens(screen, monkeypatch):
    base, tuned = bytes_model(), bytes_model(4)
    data = read_data([{"text": "one"}, {"text": EVIL}, {"text": "three"}], base.tokenizer)
    lab = TokenLab(base, data, tuned)
    lab._ipython_display_()
    assert only(screen) == loss_ribbon(read_losses(base, data[0]), data.where(0)) and lab.row.max == 2
    lab.row.value = 1
    assert only(screen) == loss_ribbon(read_losses(base, data[1]), data.where(1))
    lab.which.value = "tuned"
    assert only(screen) == loss_ribbon(read_losses(tuned, data[1]), data.where(1))
    lab.which.value = "difference"
    assert only(screen) == compare(base, tuned, data[1], name=data.where(1))
    page = Markup(only(screen))
    assert "script" not in page.tags and "<" in page.text
    monkeypatch.setattr(look_labs, "read_losses", lambda *a: 1 / 0)
    lab.which.value = "base"                                                     # read before
    assert only(screen).startswith("<div") and "ZeroDivisionError" not in only(screen)
    lab.row.value = 2
    assert "ZeroDivisionError" in only(screen)
    shown_twice(lab, screen, lambda: setattr(lab.row, "value", 0))


def test_tokens_of_texts_and_of_nothing(screen):
    base = bytes_model()
    lab = TokenLab(base, ["ab", "é"])
    lab.show()
    lab.row.value = 1
    assert only(screen) == loss_ribbon(read_losses(base, "é"), "row 1") and len(lab.box.children) == 1
    with pytest.raises(DataError, match="empty"): TokenLab(base, [])


def test_deltas(screen, tmp_path, monkeypatch):
    save(bytes_model(), tmp_path / "base.pth")
    run = finetune(model=str(tmp_path / "base.pth"), data=[{"text": f"{EVIL} {i}"} for i in range(6)], peft="lora", r=4, lr_init=1e-2, max_steps=4, save_steps=2, keep=9, micro_bsz=2, accumulate=1,
                   eval_split=0, name="run", output=str(tmp_path / "runs"), device="cpu", precision="fp32").fit()
    folder = run.folder
    lab = DeltaLab(folder)
    lab.show()
    assert only(screen) == delta_card(deltas(folder, step=4, near=False)) and list(lab.steps) == [4]
    lab.step.value = 2
    two = deltas(folder, step=2, near=False)
    assert only(screen) == delta_card(two)
    lab.kind.value = "ffn.key"
    assert only(screen) == kind_card(two, "ffn.key")
    page = Markup(only(screen))
    assert "blocks.1.ffn.key" in page.text and "att.key" not in page.text and page.tags.count("b") == 1 and all(page.values("alt"))
    monkeypatch.setattr(look_labs, "deltas", lambda *a, **k: 1 / 0)              # both were measured before
    shown_twice(lab, screen, lambda: setattr(lab.step, "value", 4))
    assert DeltaLab(delta_history(folder)).at(2).changes[0].norm == two.changes[0].norm
    for kind in ("ffn.key", "att.nothing"):
        page = Markup(kind_card(replace(two, source=EVIL), kind))
        assert EVIL in page.text and kind in page.text and "script" not in page.tags
    with pytest.raises(FileNotFoundError, match="no checkpoint"): DeltaLab(tmp_path)


def test_checkpoints(screen, tmp_path, monkeypatch):
    model = new_model()
    tensors = {n: x.contiguous() for n, x in model.state_dict().items()}
    path = save(model, tmp_path / "m.pth")
    lab = CheckpointLab(path)
    lab.show()
    assert screen.things[0] == checkpoint_card(path, values=False)
    assert lab.tensor.value.startswith("blocks.0.") and only(screen) == tensor_card(lab.tensor.value, tensors[lab.tensor.value])
    lab.tensor.value = "blocks.1.ffn.key.weight"
    assert only(screen) == tensor_card("blocks.1.ffn.key.weight", tensors["blocks.1.ffn.key.weight"])
    lab.filter.value = "att.k_a"
    assert list(lab.tensor.options) == [f"blocks.{i}.att.k_a" for i in range(3)] and only(screen) == tensor_card("blocks.0.att.k_a", lab.tensors["blocks.0.att.k_a"])
    drawn = []
    monkeypatch.setattr(look_labs, "tensor_card", lambda name, x: drawn.append(name) or tensor_card(name, x))
    lab.filter.value = "blocks.2.att.k_a"
    assert drawn == ["blocks.2.att.k_a"]                                         # once
    lab.filter.value = "nowhere"
    assert "nowhere" in only(screen)
    lab.filter.value = EVIL
    assert lab.tensor.value is None and "script" not in Markup(only(screen)).tags and "alert(1)" in Markup(only(screen)).text
    shown_twice(lab, screen, lambda: setattr(lab.filter, "value", ""))
    assert set(CheckpointLab(model).tensors) >= set(tensors)
    with pytest.raises(CheckpointError): CheckpointLab(tmp_path / "none.pth")


def test_a_checkpoint_reads_only_what_is_asked(screen, tmp_path, monkeypatch):
    "Of a file with a name that nobody would choose; other tensors' numbers are never looked at."
    save_file({EVIL: torch.tensor([[1., float("nan")], [3., -4.]]), "other": torch.zeros(3)}, tmp_path / "x.safetensors")
    asked, real = [], look_labs.values_of
    monkeypatch.setattr(look_labs, "values_of", lambda x: asked.append(tuple(x.shape)) or real(x))
    monkeypatch.setattr("rwkv_peft.look.checkpoint.values_of", lambda x: 1 / 0)
    lab = CheckpointLab(tmp_path / "x.safetensors")
    lab.show()
    assert asked == [tuple(lab.tensors[lab.tensor.value].shape)]
    lab.filter.value = "script"
    page = Markup(only(screen))
    assert asked[-1] == (2, 2) and lab.tensor.value == EVIL
    assert EVIL in page.text and "-4 to 3" in page.text and "script" not in page.tags and "not finite" in page.text
    assert any("3 numbers" in alt for alt in page.values("alt"))


def test_an_adapters_folder_and_what_cannot_be_read(screen, tmp_path):
    folder = save_adapter(stir(attach(new_model(), LoRA(r=3))), tmp_path / "a")
    lab = CheckpointLab(folder)
    lab.show()
    assert "lora_A" in only(screen) and screen.things[0] == checkpoint_card(folder)
    (tmp_path / "gift.pth").write_bytes(b"\x80\x04cbuiltins\nprint\n(X\x04\x00\x00\x00evilstR.")
    lab = CheckpointLab(tmp_path / "gift.pth")
    lab.controls()
    assert "no tensor" in lab.drawn() and not lab.tensors


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 70), st.integers(0, 9))
def test_blocks_are_numpys(rows, columns, most, seed):
    x = np.random.default_rng(seed).normal(size=(rows, columns))
    expected = [[max(b.ravel(), key=abs) for b in np.array_split(band, min(most, columns), 1)] for band in np.array_split(x, min(most, rows))]
    assert np.array_equal(block_extremes(torch.tensor(x), most), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_histogram_in_pieces_is_numpys(dtype):
    x = (3 * torch.randn(7, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    counts, edges = spread_of(x, 12, piece=5)
    expected = np.histogram(x.double().numpy().ravel(), 12)
    assert np.array_equal(counts, expected[0]) and np.array_equal(edges, expected[1]) and counts.sum() == 77


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor(3.), torch.full((2, 2), torch.nan), torch.full((2, 3), torch.inf), torch.zeros(4, 5), torch.zeros(0, 4), torch.ones(2, 3, 4), torch.tensor([[1.5]]), torch.ones(1, 1, 9), torch.tensor([True])], ids=lambda x: str(tuple(x.shape)))
def test_every_tensor_has_a_card(x):
    page = Markup(tensor_card("odd", x))
    assert ("img" in page.tags) == bool(x.isfinite().any()) and str(x.numel()) in page.text and all(page.values("alt"))
    assert (tensor_picture(x) is None) == ("img" not in page.tags)
