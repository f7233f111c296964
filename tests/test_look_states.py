"Figures of memories against numbers computed another way: numpy, the model on each prefix, one write at a time, and what base and tuned model write themselves."
import math
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from markup import Markup
from rwkv_peft.kernels.loop import wkv6_loop, wkv7_loop
from rwkv_peft.look import states as look
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.sample import Sampler
from rwkv_peft.model.state import State, save_state
from rwkv_peft.model.tokenizer import Bytes
from rwkv_peft.notebook.sampler_lab import attempt
from rwkv_peft.notebook.state_lab import StateLab
from rwkv_peft.peft.adapters import attach
from rwkv_peft.peft.lora import MethodError
from rwkv_peft.peft.state_tuning import StateTuning, state_after
from rwkv_peft.train.folder import save_checkpoint

GREEDY = Sampler(temperature=0, presence=0, frequency=0)
EVIL = "</span><script>alert(1)</script>\x1b[31mred\x1b[0m \u202eright to left\u202c שלום $x$ 你好 & \" '"


def make(version="7", start=True, dtype=torch.float32, seed=0):
    "A model of bytes whose every tensor says something; with `start`, from a memory that isn't empty."
    torch.manual_seed(seed)
    ranks = {"7": dict(w_rank=4, a_rank=4, v_rank=4, g_rank=4), "6": dict(mix_rank=4, decay_rank=4), "5.2": {}}[version]
    model = RWKV(RWKVConfig(version, n_layer=2, n_embd=24, head_size=8, dim_ffn=40, vocab_size=257, **ranks))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2 * torch.randn_like(p))
        model.emb.weight.normal_()
    model = model.to(dtype)
    if start: attach(model, StateTuning({f"blocks.{i}.att.time_state": torch.randn(3, 8, 8, dtype=dtype) for i in range(2)}))
    return model


def safe(html, *, said):
    found = Markup(html)
    assert not {"script", "img", "style", "link"} & set(found.tags) and "\x1b" not in html and not re.search(r"https?://", html)
    for text in said: assert text in found.text
    return found


# ---------- the tuned memory

def test_every_source_gives_the_same_memory(tmp_path):
    model = make()
    want = torch.stack([block.att.time_state.detach() for block in model.blocks])
    (tmp_path / "run").mkdir()
    save_state(model, tmp_path / "run/state.pth")
    save_state(model, tmp_path / "turned.st", dtype=torch.float32)
    named = {f"blocks.{i}.att.time_state": want[i].double() for i in (1, 0)}
    for source in (model, tmp_path / "run", str(tmp_path / "run/state.pth"), tmp_path / "turned.st", named, want, State(want[:, 0], want[:, None], want[:, 0])):
        assert torch.equal(look.memory(source), want)


@pytest.mark.parametrize("source", [torch.zeros(2, 3, 8), torch.zeros(2, 3, 8, 4), {}, {"blocks.1.att.time_state": torch.zeros(1, 2, 2)}, make(start=False)])
def test_what_is_no_memory_is_refused(source):
    with pytest.raises(MethodError): look.memory(source)


def test_singular_values_are_numpys():
    S = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    want = np.linalg.svd(S.double().numpy(), compute_uv=False)
    assert np.allclose(look.spectrum(S), want, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.sampled_from([.1, .5, .9, 1.0]))
def test_directions_are_the_fewest_that_hold_the_share(values, share):
    s = sorted(values, reverse=True)
    total = sum(x * x for x in s)
    want = next((n for n in range(len(s) + 1) if sum(x * x for x in s[:n]) >= share * total - 1e-9), len(s)) if total else 0
    assert look.directions(torch.tensor(s, dtype=torch.float32), share).item() == want


def test_blocks_show_their_extremes():
    x = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(1))
    want = [[[max((v for row in m[i:i + 3] for v in row[j:j + 3]), key=abs) for j in range(0, 12, 3)] for i in range(0, 12, 3)] for m in x.tolist()]
    assert torch.equal(look.extremes(x, 4), torch.tensor(want))


def test_heads_that_are_not_finite_are_named_and_the_others_measured():
    S = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = look.spectrum(S)
    S[0, 1, 2, 2], S[1, 2, 0, 0] = math.nan, -math.inf
    values, hurt = look.spectrum(S), torch.tensor([[False, True, False], [False, False, True]])
    assert values[hurt].isnan().all() and torch.equal(values[~hurt], whole[~hurt])
    said = Markup(look.spectra(S)).text
    assert "layer 0, head 1; layer 1, head 2" in said and "nan" not in said and "inf" not in said.replace("finite", "")
    assert "not finite" not in Markup(look.spectra(torch.ones(1, 1, 2, 2))).text
    alt = look.mosaic(S).alt
    assert "layer 0, head 1; layer 1, head 2" in alt and "nan" not in alt
    assert "–" in Markup(look.spectra(torch.full((1, 2, 4, 4), math.nan))).text and look.mosaic(torch.full((1, 1, 4, 4), math.nan)).data


def test_the_mosaic_says_what_it_shows():
    S = torch.zeros(3, 5, 6, 6)
    S[1, 4], S[2, 0] = -2, 1
    image = look.mosaic(S)
    assert image.data[:4] == b"\x89PNG" and "3 layers by 5 heads" in image.alt and "layer 1, head 4 (norm 12)" in image.alt and "extreme" not in image.alt
    assert "1 layers by 1 heads, scale ±2;" in look.mosaic(S, -1, 0).alt              # the scale is the whole memory's
    assert "extreme of 3 × 3" in look.mosaic(S, cells=60).alt and "extreme of 6 × 6" in look.mosaic(S, cells=1).alt
    assert look.mosaic(torch.zeros(1, 1, 1, 1)).data
    for layer, head in ((3, None), (None, 5), (-4, 0)):
        with pytest.raises(MethodError, match="from 0"): look.mosaic(S, layer, head)


def test_growth_reads_the_checkpoints_of_a_run(tmp_path):
    norms = {10: 2.0, 9: 5.0, 100: 1.0}
    for step, size in norms.items():
        tensors = {f"blocks.{i}.att.time_state": torch.full((3, 4, 4), size * (i + 1) / 4) for i in range(2)}
        save_checkpoint(tmp_path, step, {**tensors, "blocks.0.att.key.adapter.A": torch.ones(2)}, {})
    found = look.growth(tmp_path)
    assert found.steps == [9, 10, 100] and torch.allclose(found.norms, torch.tensor([[[size] * 3, [2 * size] * 3] for size in (5., 2., 1.)]))
    assert "layer 1 from 10 to 2" in Markup(found._repr_html_()).text and len(repr(found)) < 200
    with pytest.raises(FileNotFoundError): look.growth(tmp_path / "none")
    save_checkpoint(tmp_path / "other", 1, {"blocks.0.att.key.adapter.A": torch.ones(2)}, {})
    with pytest.raises(MethodError, match="something else"): look.growth(tmp_path / "other")


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_beside_compares_with_a_prompt_read_from_nothing(version):
    model, bare = make(version), make(version, start=False)
    found = look.beside(model, "Once upon")
    S, tuned = state_after(bare, "Once upon").wkv[:, 0].double().numpy(), look.memory(model).double().numpy()
    assert np.allclose(found.distance, np.sqrt(((tuned - S) ** 2).sum((-1, -2))), rtol=1e-4)
    assert np.allclose(found.cosine, (tuned * S).sum((-1, -2)) / np.sqrt((tuned ** 2).sum((-1, -2)) * (S ** 2).sum((-1, -2))), atol=1e-5)
    assert np.allclose(found.read, np.sqrt((S ** 2).sum((-1, -2))), rtol=1e-4) and found.tokens == 10


# ---------- between base and tuned

@pytest.mark.parametrize("version", ["5.2", "7"])
def test_the_ends_of_the_strip_are_base_and_tuned(version):
    model, bare = make(version), make(version, start=False)
    found = look.strip(model, "hé", max_tokens=25)
    assert list(found.texts) == [0, .25, .5, .75, 1]
    assert found.texts[0.0] == "".join(bare.generate("hé", max_tokens=25, sampler=GREEDY)) != found.texts[1.0]
    assert found.texts[1.0] == "".join(model.generate("hé", max_tokens=25, sampler=GREEDY))
    assert look.strip(bare, [0, 5], source=look.memory(model), stops=[1], max_tokens=9).texts == {1.0: "".join(model.generate([0, 5], max_tokens=9, sampler=GREEDY))}


def test_a_half_is_a_half_for_a_run_of_tokens():
    model = make(dtype=torch.float64)
    half = make(start=False, dtype=torch.float64)
    attach(half, StateTuning({f"blocks.{i}.att.time_state": block.att.time_state.detach() / 2 for i, block in enumerate(model.blocks)}))
    tokens = torch.tensor([[0, 7, 3, 200]])
    assert torch.allclose(model(tokens, look.start_at(model, .5))[0], half(tokens)[0], atol=1e-5)      # a memory passes through float32


def test_a_strip_of_anything_is_text():
    found = look.Strip("<b>" + EVIL * 10, {0.0: "same " + EVIL, 1.0: "same other" + EVIL})
    tags = safe(found._repr_html_(), said=["<script>alert(1)</script>", "the last 200 of"])
    assert tags.tags.count("u") == 1
    assert Markup(look.departed("abc", "abc")).tags == ["bdi"] and Markup(look.departed("", "abc")).text == ""


# ---------- over a text

@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_evolution_is_what_the_model_remembers_of_each_prefix(version):
    model, ids = make(version), [0, 65, 3, 3, 256, 1, 90, 17]
    found = look.state_over(model, ids)
    S = [look.memory(model), *(state_after(model, ids[:t]).wkv[:, 0] for t in range(1, 9))]
    norm = lambda x: x.double().square().sum((-1, -2)).sqrt()
    assert torch.allclose(found.start.double(), norm(S[0]), rtol=1e-4)
    assert torch.allclose(found.norm.double(), torch.stack([norm(s) for s in S[1:]]), rtol=1e-4)
    assert torch.allclose(found.change.double(), torch.stack([norm(a - b) for a, b in zip(S[1:], S)]), rtol=1e-3, atol=1e-4)
    assert found.norm.shape == (8, 2, 3) and found.half_life.shape == (2, 3, 8) and (found.half_life > 0).all()


def test_half_lives_are_those_of_the_parameters():
    model = make("5.2")
    want = [math.log(2) / block.att.time_decay.detach().double().exp() for block in model.blocks]
    assert torch.allclose(look.state_over(model, "some text").half_life, torch.stack(want), rtol=1e-5)
    lives = look.state_over(make(), "some text").half_life                              # e^-0.5 is the most that version 7's sigmoid allows: -w <= e^-0.5
    assert lives.min() >= math.log(2) / math.exp(-.5) - 1e-6
    assert (.5 ** (1 / look.half_life(torch.tensor([-.25, -3.]))) - torch.tensor([-.25, -3.]).exp()).abs().max() < 1e-6


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_listening_changes_nothing_and_leaves_nothing(version):
    model, tokens = make(version), torch.tensor([[0, 9, 250, 4, 4]])
    before, heard = model(tokens)[0], []
    with look.listening(model, lambda layer, call: heard.append(layer), [1]): during = model(tokens)[0]
    with pytest.raises(ZeroDivisionError), look.listening(model, lambda layer, call: 1 / 0): model(tokens)
    assert heard == [1] and torch.equal(before, during) and torch.equal(before, model(tokens)[0])
    assert all("recurrence" not in vars(block.att) for block in model.blocks)


def test_listeners_stand_inside_each_other_and_hear_their_own_thread_only():
    model, tokens, outer, inner = make(), torch.tensor([[0, 9, 250]]), [], []
    def elsewhere():
        with torch.no_grad(): model(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]))
    with look.listening(model, lambda layer, call: outer.append((layer, len(call.r)))):
        with look.listening(model, lambda layer, call: inner.append((layer, len(call.r))), [1]): model(tokens)
        model(tokens)
        thread = threading.Thread(target=elsewhere)
        thread.start(), thread.join()
    assert inner == [(1, 3)] and outer == [(0, 3), (1, 3)] * 2
    assert all("recurrence" not in vars(block.att) for block in model.blocks)


def test_looks_at_one_model_from_many_threads_are_each_their_own():
    model, texts = make(), ["a", "some text", "another, longer text"]
    want, found, go = [look.state_over(model, t).norm for t in texts], {}, threading.Barrier(3)
    def work(i):
        go.wait()
        found[i] = [(look.state_over(model, texts[i]).norm, look.who_wrote(model, texts[i], 1, 2).shares().sum()) for _ in range(5)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(torch.equal(norm, want[i]) and abs(share - 1) < 1e-9 for i in range(3) for norm, share in found[i])
    assert all("recurrence" not in vars(block.att) for block in model.blocks)


# ---------- who wrote what

def alone(call, head, at):
    "What arrives at token `at` when only the start, or only token 0, 1, ... was written: the kernels' loop over rows with all other values zero."
    T, n = len(call.r), at + 2
    keep = torch.zeros(n, T, 1, 1, dtype=torch.float64)
    for i in range(1, n): keep[i, i - 1] = 1
    first = torch.zeros(n, 1, 1, 1, dtype=torch.float64)
    first[0] = 1
    many = lambda x: x.double().expand(n, *x.shape)
    v, start = many(call.v) * keep, many(call.start) * first
    if call.u is None: y = wkv7_loop(many(call.r), many(call.w), many(call.k), v, many(call.a), many(call.b), start)[0]
    else: y = wkv6_loop(many(call.r), many(call.w), many(call.k), v, call.u.double(), start)[0]
    return y[:, at, head]


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
@pytest.mark.parametrize("at", [0, 1, 11])
def test_contributions_are_single_writes_and_sum_to_what_is_read(version, at):
    model, ids, calls = make(version), [0, 65, 3, 3, 256, 1, 90, 17, 5, 6, 7, 8], {}
    with look.listening(model, calls.__setitem__): state_after(model, ids)
    for layer, head in ((0, 0), (1, 2)):
        found = look.who_wrote(model, ids, layer, head, at)
        assert torch.allclose(found.parts, alone(calls[layer], head, at), atol=1e-9)
        assert torch.allclose(found.parts.sum(0), found.y, rtol=1e-5, atol=1e-5 * found.y.abs().max().item())
        assert torch.equal(found.y, calls[layer].y[at, head].double()) and abs(found.shares().sum() - 1) < 1e-9


def test_a_model_of_bfloat16_is_read_up_to_its_rounding():
    found = look.who_wrote(make(dtype=torch.bfloat16), "some text", 1, 1)
    assert torch.allclose(found.parts.sum(0), found.y, atol=.02 * found.y.abs().max().item()) and look.state_over(make(dtype=torch.bfloat16), "ab").norm.isfinite().all()


def test_who_wrote_takes_places_from_the_end_and_refuses_others():
    model = make()
    assert torch.equal(look.who_wrote(model, "abc", -1, -1, -2).parts, look.who_wrote(model, "abc", 1, 2, 2).parts)
    for layer, head, at in ((2, 0, 0), (0, 3, 0), (0, 0, 4), (0, 0, -5)):
        with pytest.raises(MethodError, match="from 0"): look.who_wrote(model, "abc", layer, head, at)
    with pytest.raises(MethodError, match="no tokens"): look.state_over(model, [])


def test_a_text_of_anything_is_painted_as_text():
    model = make()
    found = look.state_over(model, EVIL)
    assert "script" in safe(str(found.ribbon()), said=["<script>alert(1)</script>", "你好", "\ufffd[31mred"]).text
    safe(found._repr_html_(), said=["half-lives"])
    writes = look.who_wrote(model, EVIL, 0, 0, -2)
    safe(writes._repr_html_(), said=["<script>alert(1)</script>", "read at token"])


def test_a_line_of_100000_characters_is_cut_and_says_so():
    T = 100_000
    tokens = Bytes().encode("<" * T)
    sizes = torch.rand(T, 2, 3, generator=torch.Generator().manual_seed(0))
    html = look.Evolution(tokens, Bytes(), sizes[0], sizes, sizes, torch.rand(2, 3, 8).double())._repr_html_()
    assert len(html) < 400_000 and "98,500 more tokens" in Markup(html).text
    writes = look.Writes(tokens, Bytes(), 0, 0, T - 9, torch.rand(T - 7, 8).double(), torch.zeros(8))
    html = writes._repr_html_()
    assert len(html) < 400_000 and "earlier tokens are not drawn (share " in Markup(html).text


def test_figures_of_many_layers_draw_some_and_say_so():
    S = torch.randn(24, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text = Markup(look.spectra(S)).text
    assert "5 of 24 layers" in text and "layer 23" in text and "layer 12" in text
    assert "5 of 24 layers" in Markup(look.Growth([1, 2], torch.rand(2, 24, 2))._repr_html_()).text


# ---------- the lab

class Handle:
    def __init__(self): self.shown = []
    def update(self, thing): self.shown.append(thing)


def test_a_lab_shown_twice_is_one_lab(monkeypatch):
    import IPython.display
    from ipywidgets.widgets import widget
    places = {}
    def display(thing, display_id=None, raw=False):
        if display_id: return places.setdefault(display_id if isinstance(display_id, str) else f"place {len(places)}", DisplayHandle(thing, len(places)))
    class DisplayHandle(Handle):
        def __init__(self, thing, i): self.display_id, self.shown = f"place {i}", [thing]
    monkeypatch.setattr(IPython.display, "display", display)
    lab = StateLab(make(), "hé", stops=(.5, 1), max_tokens=5)
    lab.show()
    slider, held = lab.slider, len(widget._instances)
    slider.value = .5
    lab.show()
    assert lab.slider is slider and len(widget._instances) == held and len(places) == 2
    slider.value = 0
    assert "0%" in Markup(places["place 0"].shown[-1]).text and len(places) == 2


def test_the_lab_redraws_what_its_controls_ask_for(monkeypatch):
    import IPython.display
    shown, handles = [], []
    def display(thing, display_id=None, raw=False):
        shown.append(thing)
        if display_id: handles.append(Handle())
        return handles[-1] if display_id else None
    monkeypatch.setattr(IPython.display, "display", display)
    model = make()
    lab = StateLab(model, "hé", stops=(.5, 1), max_tokens=20)
    lab._ipython_display_()
    sample, mosaic = handles
    assert list(lab.strip.texts) == [0, .5, 1] and "application/vnd.jupyter.widget-view+json" in shown[1] and "live kernel" in shown[1]["text/plain"]
    lab.slider.value = .35
    assert lab.texts[.35] == look.sample_at(model, "hé", .35, max_tokens=20) and "35%" in Markup(sample.shown[-1]).text and not mosaic.shown
    assert (lab.layer.label, lab.head.label) == ("all layers", "all heads")
    lab.layer.value, lab.head.value = 1, 2
    assert "1 layers by 1 heads" in mosaic.shown[-1].alt and len(sample.shown) == 1
    lab.layer.label = "all layers"
    assert "2 layers by 1 heads" in mosaic.shown[-1].alt
    calls = []
    monkeypatch.setattr("rwkv_peft.notebook.state_lab.sample_at", lambda *a: calls.append(a))
    lab.slider.value = .5
    lab.slider.value = .35
    assert not calls and len(sample.shown) == 3                                         # both were drawn before
    def fail(*a): raise RuntimeError("<b>lost</b>")
    monkeypatch.setattr("rwkv_peft.notebook.state_lab.sample_at", fail)
    lab.slider.value = .9
    assert "RuntimeError: <b>lost</b>" in Markup(sample.shown[-1]).text
    assert safe(attempt(lambda: (_ for _ in ()).throw(ValueError(EVIL))), said=["alert(1)"])
