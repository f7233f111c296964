"What training added, measured in another way: numpy's SVD over merged weights, pairs multiplied by hand, Hugging Face's own merge."
import copy
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from small import new_model, stir

import rwkv_peft
from rwkv_peft.look.deltas import Change, Deltas, advice, change_map, delta_card, delta_history, deltas, effective_rank, rank_to, share_near_top, spectrum
from rwkv_peft.model.checkpoint import load, official, save
from rwkv_peft.model.quant import quantize, rounded
from rwkv_peft.peft.adapters import AdapterError, attach, load_adapter, merge, save_adapter
from rwkv_peft.peft import Bone, DoRA, LISA, LoRA, MethodError, MiLoRA, MiSS, OLoRA, PiSSA, StateTuning, Train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save(new_model(), path)
    return path


def fresh(base, *methods, **options): return attach(load(base, "cpu", torch.float32), *methods, **options)
def array(x): return x.detach().double().numpy()
def sigma_of(D): return np.linalg.svd(D, compute_uv=False)


def same(change, D, W):
    "Singular values, size and share of a change, against the dense D by numpy."
    expected = sigma_of(D)
    assert np.allclose(change.sigma, expected[:len(change.sigma)], atol=2e-5 * expected[0]) and np.all(expected[len(change.sigma):] < 2e-5 * expected[0])
    assert math.isclose(change.relative, np.linalg.norm(D) / np.linalg.norm(W), rel_tol=1e-4)
    u, _, vt = np.linalg.svd(W)
    inside = np.linalg.norm(u[:, change.top:].T @ D @ vt[change.top:].T) ** 2 / np.linalg.norm(D) ** 2
    assert math.isclose(change.share, 1 - inside, abs_tol=1e-4)


METHODS = [LoRA(r=3), LoRA(r=4, alpha=7, rslora=True, ranks={"ffn.key": 9}), PiSSA(r=5, alpha=2), MiLoRA(r=3), OLoRA(r=3), MiSS(r=5), Bone(r=8), DoRA(r=3, alpha=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}{m.r}")
def test_every_method_as_merge_and_numpy_say(method, base, tmp_path):
    "From the model, and from its folder beside the base."
    torch.set_rng_state(torch.Generator().manual_seed(3).get_state())
    model = stir(fresh(base, method, Train("ln")))
    folder, before = save_adapter(model, tmp_path / "a"), torch.load(base, weights_only=True)
    chance, kept = torch.get_rng_state(), {n: x.clone() for n, x in model.state_dict().items()}
    by_model, by_folder = deltas(model), deltas(folder, base)
    assert torch.equal(chance, torch.get_rng_state()) and all(torch.equal(x, kept[n]) for n, x in model.state_dict().items())
    merged = merge(copy.deepcopy(model)).state_dict()
    assert [c.name for c in by_model.changes] == [c.name for c in by_folder.changes]
    for found in (by_model, by_folder):
        for c in found.changes:
            if c.part == "adapter": same(c, array(merged[f"{c.name}.weight"]) - array(before[f"{c.name}.weight"]), array(before[f"{c.name}.weight"]))
            else: assert len(c.sigma) == 0 and math.isclose(c.norm, (merged[c.name] - before[c.name]).double().norm().item(), rel_tol=1e-5)
        assert sum(c.part == "adapter" for c in found.changes) == 18
    by_hand = {n: sum(p.numel() for p in m.adapter.parameters()) for n, m in model.named_modules() if getattr(m, "adapter", None) is not None}
    assert all({c.name: c.numbers for c in found.changes if c.part == "adapter"} == by_hand for found in (by_model, by_folder))
    if hasattr(method, "rslora"): assert {(c.kind, c.r) for c in by_folder.changes if c.r} == {(c.kind, 9 if method.rslora and c.kind == "ffn.key" else method.r) for c in by_folder.changes if c.part == "adapter"}


def test_a_lora_is_scale_times_b_a_of_its_file(base, tmp_path):
    folder = save_adapter(stir(fresh(base, LoRA(r=3, alpha=5))), tmp_path / "a")
    t, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    for found in (deltas(folder, base), deltas(folder)):
        for c in found.changes:
            A, B = (array(t[f"base_model.model.{c.name}.lora_{e}.weight"]) for e in "AB")
            D = config["lora_alpha"] / config["r"] * B @ A
            assert np.allclose(c.sigma, sigma_of(D)[:3]) and math.isclose(c.norm, np.linalg.norm(D))
    assert found.changes[0].relative is None and found.changes[0].share is None and "adapter alone" in found.against
    assert deltas(folder, base).against == "the file base.pth"


def test_hugging_face_merges_to_the_same(base, tmp_path):
    "Our folder in their library, and their methods in our slots."
    hf_peft = pytest.importorskip("peft")
    from rwkv_peft.peft.interop import skeleton
    folder = save_adapter(stir(fresh(base, DoRA(r=3))), tmp_path / "a")
    bones = skeleton(load(base, "cpu", torch.float32))
    before = {n: m.weight.clone() for n, m in bones.named_modules() if isinstance(m, torch.nn.Linear)}
    theirs = dict(hf_peft.PeftModel.from_pretrained(bones, folder).merge_and_unload().named_modules())
    for c in deltas(folder, base).changes: same(c, array(theirs[c.name].weight) - array(before[c.name]), array(before[c.name]))
    for config in (hf_peft.LoHaConfig(r=2, target_modules=["att.key"]), hf_peft.LoraConfig(r=3, target_modules=["ffn.value"])):
        model = stir(fresh(base, config))
        saved = save_adapter(model, tmp_path / type(config).__name__)
        merged = {n: m.weight for n, m in copy.deepcopy(model.attached.foreign).merge_and_unload().named_modules() if isinstance(m, torch.nn.Linear)}
        for found in (deltas(model), deltas(saved, base)):
            assert len(found) == 3
            for c in found.changes: same(c, array(merged[c.name]) - array(before[c.name]), array(before[c.name]))
        assert found.changes[0].r == (3 if type(config).__name__ == "LoraConfig" else None)


@pytest.mark.parametrize("method", [Train("all"), LISA(layers=1), Train("emb")], ids=lambda m: type(m).__name__ + str(getattr(m, "parts", "")))
def test_trained_weights_are_counted_from_the_file(method, base, tmp_path):
    model, before = stir(fresh(base, method)), torch.load(base, weights_only=True)
    folder, whole = save_adapter(model, tmp_path / "a"), tmp_path / "whole.pth"
    now = official(model)
    torch.save({n: x.clone() for n, x in now.items()}, whole)
    found = deltas(model)
    for other in (deltas(folder, base), deltas(whole, base), deltas(merge(copy.deepcopy(model)), base)):
        for c in found.changes: assert other[c.name].norm == pytest.approx(c.norm) and np.allclose(other[c.name].sigma, c.sigma)
    assert {n for n in now if not torch.equal(now[n], before[n])} == {n for n in now if n.removesuffix(".weight") in {c.name for c in found.changes} or n in {c.name for c in found.changes}}
    for c in found.changes:
        key = c.name if c.name in now else f"{c.name}.weight"
        D, W = array(now[key]) - array(before[key]), array(before[key])
        assert math.isclose(c.relative, np.linalg.norm(D) / np.linalg.norm(W), rel_tol=1e-9) and c.numbers == W.size
        if len(c.sigma): same(c, np.squeeze(D), np.squeeze(W))


def test_states_are_counted_head_by_head_from_what_was_there(base, tmp_path):
    model = stir(fresh(base, StateTuning()), 1.0)
    found, state = deltas(model), array(model.blocks[2].att.time_state)
    assert len(found) == 3 * 4 and np.allclose(found["blocks.2.att.time_state[3]"].sigma, sigma_of(state[3])) and found.changes[0].relative is None
    save_adapter(model, tmp_path / "a")
    for place in (tmp_path / "a", tmp_path / "a" / "state.pth"): assert np.allclose(deltas(place)["blocks.2.att.time_state[3]"].sigma, sigma_of(state[3]))
    save(merge(model), tmp_path / "tuned.pth")
    more = stir(attach(load(tmp_path / "tuned.pth", "cpu", torch.float32), StateTuning("keep")), .1)
    c, D = deltas(more)["blocks.2.att.time_state[3]"], array(more.blocks[2].att.time_state)[3] - state[3]
    assert np.allclose(c.sigma, sigma_of(D)) and math.isclose(c.relative, np.linalg.norm(D) / np.linalg.norm(state[3]), rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_packed_base_is_the_one_that_is_told(kind, base, tmp_path):
    W = torch.load(base, weights_only=True)["blocks.1.att.key.weight"]
    Q = rounded(W, kind)
    model = quantize(stir(fresh(base, Bone(r=8))), kind)
    D, w = array(model.blocks[1].att.key.adapter.D), array(Q)
    by_hand = np.block([[w[8 * a:8 * a + 8, 8 * b:8 * b + 8] @ D[b] + D[b] for b in range(4)] for a in range(4)])
    folder = save_adapter(model, tmp_path / "a")
    for found in (deltas(model), deltas(folder, base)):
        same(found["blocks.1.att.key"], by_hand, w)
        assert kind in found.against and "packed" in found.against
    with pytest.raises(AdapterError, match="can't be told from the adapter alone"): deltas(folder)
    pissa = stir(quantize(fresh(base, PiSSA(r=3)), kind))
    A, B, A0, B0 = (array(getattr(pissa.blocks[1].att.key.adapter, k)) for k in ("A", "B", "A0", "B0"))
    found = deltas(save_adapter(pissa, tmp_path / "p"), base)
    same(found["blocks.1.att.key"], B @ A - B0 @ A0, array(W))                    # from the W of the file, not from what packing left of the rest
    assert "packed" not in found.against and np.allclose(deltas(pissa)["blocks.1.att.key"].sigma, found["blocks.1.att.key"].sigma)
    lora = stir(fresh(base, LoRA(r=3)))
    dense, packed = deltas(lora)["blocks.1.att.key"], deltas(quantize(lora, kind))["blocks.1.att.key"]
    assert torch.equal(dense.sigma, packed.sigma) and math.isclose(packed.base, np.linalg.norm(w), rel_tol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=0, max_size=20), st.floats(.05, .99))
def test_counts_of_directions(values, share):
    s = sorted((v if v > 1e-6 else 0.0 for v in values), reverse=True)
    sigma, energy = torch.tensor(s, dtype=torch.float64), [v * v for v in s]
    total = math.fsum(energy)
    brute = next((k for k in range(len(s) + 1) if math.fsum(energy[:k]) >= share * total * (1 - 1e-9)), 0) if total else 0
    assert abs(rank_to(sigma, share) - brute) <= (1 if total and any(abs(math.fsum(energy[:k]) / total - share) < 1e-9 for k in range(len(s))) else 0)
    p = np.array(energy) / total if total else np.zeros(0)
    expected = math.exp(-sum(x * math.log(x) for x in p if x > 0)) if total else 0
    assert math.isclose(effective_rank(sigma), expected, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("out, inside, r", [(1, 7, 1), (7, 1, 1), (5, 9, 9), (33, 20, 4), (90, 700, 3), (400, 300, 3)])
def test_thin_forms_agree_with_dense_ones(out, inside, r):
    "A rank above the smaller side, and a matrix large enough for the sketch of W's directions."
    g = torch.Generator().manual_seed(out)
    A, B, W = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, inside), (out, r), (out, inside)))
    W = W * torch.linspace(3, .1, inside)       # a spectrum with a slope
    D = (B @ A).numpy()
    both = sigma_of(D)
    assert np.allclose(spectrum((A, B))[:min(out, inside)], both[:len(spectrum((A, B)))], atol=1e-10 * both[0]) and np.allclose(spectrum(B @ A), both, atol=1e-10 * both[0])
    k = max(1, min(6, min(out, inside) // 5))
    u, _, vt = np.linalg.svd(W.numpy())
    expected = 1 - np.linalg.norm(u[:, k:].T @ D @ vt[k:].T) ** 2 / np.linalg.norm(D) ** 2
    assert math.isclose(share_near_top((A, B), W, k), expected, abs_tol=2e-3) and math.isclose(share_near_top(B @ A, W, k), expected, abs_tol=2e-3)


def made(used, r=64, side=256, part="adapter", norm=1.0, name="blocks.{}.att.key"):
    "Changes whose spectra are flat: nine tenths of 10 equal directions are 9."
    flat = lambda k: torch.ones(round(k / .9), dtype=torch.float64) if k else torch.zeros(3, dtype=torch.float64)
    return [Change(name.format(i), part, (side, side), r, r or 1, norm if k else 0.0, 10.0, flat(k)) for i, k in enumerate(used)]


def test_advice_is_a_rule():
    say = lambda *a, **k: advice(Deltas(made(*a, **k), "x", "y"))
    assert say([9, 9, 9, 9, 9]).startswith("r=64 paid, 9 used in the median matrix and at most 9 in nine of ten: r=16 would do.")
    assert "r=16 would do" in say([9] * 9 + [40]) and "would do" not in say([9] * 8 + [40, 40])      # one odd matrix in ten changes nothing, two do
    assert "a larger r may learn more" in say([54] * 5) and "the rank fits" in say([18, 27, 36])
    assert "could hold most of it" in say([9] * 5, r=None) and "no small rank" in say([90] * 5, r=None)
    assert advice(Deltas(made([0, 0]), "x", "y")) == "Nothing was added yet: every change is zero."
    assert "blocks.0.att.key isn't finite" in say([9], norm=math.nan)
    assert "tuned states use 9 of 64" in say([9, 9, 18], r=None, side=64, part="state", name="blocks.0.att.time_state[{}]") and "hint" in say([9])


def test_zero_and_broken_changes_are_shown(base):
    model = fresh(base, LoRA(r=3))
    found = deltas(model)
    assert all(c.norm == 0 and c.used == 0 and c.effective == 0 and c.share is None for c in found.changes) and "Nothing was added" in found._repr_html_()
    with torch.no_grad(): model.blocks[1].att.key.adapter.B[2, 1] = math.nan
    assert "blocks.1.att.key isn't finite" in advice(broken := deltas(model)) and "isn&#x27;t finite" in broken._repr_html_()


def test_a_run_over_its_checkpoints(tmp_path):
    "PiSSA's pair less the pair that W lost, of every step's file, by hand."
    run = rwkv_peft.finetune(model="rwkv7-tiny", data=[{"text": f"row {i} of a few"} for i in range(6)], peft="pissa", r=4, alpha=6, targets=["blocks.1.ffn.key", "blocks.4.att.key"], max_steps=4, save_steps=2, keep=5,
                             micro_bsz=2, accumulate=1, eval_split=0, lr_init=1e-3, name="run", output=str(tmp_path), device="cpu").fit()
    history = delta_history(run.folder)
    assert list(history.steps) == [2, 4]
    for step, found in history.steps.items():
        t = load_file(run.folder / "checkpoints" / f"step-{step}" / "trained.safetensors")
        for c in found.changes:
            A, B, A0, B0 = (array(t[f"{c.name}.adapter.{k}"]) for k in ("A", "B", "A0", "B0"))
            assert np.allclose(c.sigma, sigma_of(1.5 * (B @ A - B0 @ A0))[:len(c.sigma)], atol=1e-9) and c.r == 4 and c.relative > 0
    result, live = deltas(run.folder), deltas(run.model)
    for c in history.steps[4].changes: assert np.allclose(c.sigma, result[c.name].sigma, rtol=1e-5, atol=1e-9) and math.isclose(c.norm, live[c.name].norm, rel_tol=1e-5)
    (run.folder / "adapter").rename(tmp_path / "elsewhere")                                          # a run that was stopped has none: the settings tell the scale
    assert math.isclose(deltas(run.folder)["blocks.4.att.key"].norm, live["blocks.4.att.key"].norm, rel_tol=1e-5)
    assert "run</bdi>" in history._repr_html_() and all(Alts(history._repr_html_()).alts)
    evil = (tmp_path / "elsewhere").rename(tmp_path / "<script>x & \u202ey")
    html = deltas(evil, "rwkv7-tiny")._repr_html_()
    assert "<script" not in html and "<bdi>&lt;script&gt;x &amp; \u202ey</bdi>" in html
    save(load("rwkv7-tiny", "cpu", torch.float32), tmp_path / "same.pth")
    torch.save({n: x + 1 for n, x in torch.load(tmp_path / "same.pth", weights_only=True).items()}, tmp_path / "other.pth")
    assert deltas(run.folder, tmp_path / "same.pth", step=2).changes[0].norm == history.steps[2].changes[0].norm
    with pytest.raises(AdapterError, match="another base"): deltas(run.folder, tmp_path / "other.pth", step=2)
    with pytest.raises(FileNotFoundError, match="there are \\[2, 4\\]"): deltas(run.folder, step=3)


FOREIGN = {"loha": ("LoHaConfig", dict(r=2, modules_to_save=["blocks.0.ln1"])), "vera": ("VeraConfig", dict(r=4)), "lora": ("LoraConfig", dict(r=4, use_dora=True, use_rslora=True, rank_pattern={"ffn.key": 2}, alpha_pattern={"blocks.1.att.key": 7}))}
told = lambda found: [(c.name, c.part, c.shape, c.r, c.numbers, c.norm, c.base, c.sigma.tolist()) for c in found.changes]


@pytest.mark.parametrize("word", FOREIGN)
def test_a_run_of_hugging_faces_over_its_checkpoints(word, tmp_path):
    "That library's own merge of the live model while it trains, kept at each save, against what the folder says when all is over."
    hf_peft = pytest.importorskip("peft")
    names, (kind, options), seen = ["blocks.1.att.key", "blocks.4.ffn.key"], FOREIGN[word], {}
    config = getattr(hf_peft, kind)(target_modules=names, **options)
    run = rwkv_peft.finetune(model="rwkv7-tiny", data=[{"text": f"row {i} of a few"} for i in range(6)], peft=[config, "state"] if word == "vera" else config, max_steps=2, save_steps=1, keep=5,
                             micro_bsz=2, accumulate=1, eval_split=0, lr_init=1e-2, name="run", output=str(tmp_path), device="cpu")
    for event in run.steps():
        if event["event"] != "saved": continue
        theirs = copy.deepcopy(run.model.attached.foreign).double().merge_and_unload()
        seen[event["step"]] = {n: array(theirs.get_submodule(n).weight) for n in names} | {n: array(p) for n, p in run.model.named_parameters() if n.endswith(".time_state") or "ln1" in n}
    history, before = delta_history(run.folder), load("rwkv7-tiny", "cpu", torch.float32).state_dict()
    assert list(history.steps) == list(seen) == [1, 2] and {c.part for c in history.steps[1].changes} == {"adapter", *{"loha": ["weight"], "vera": ["state"]}.get(word, [])}
    for step, found in history.steps.items():
        assert [c.name for c in found.changes if c.part == "adapter"] == names
        for c in found.changes:
            if c.part == "weight": assert math.isclose(c.norm, np.linalg.norm(seen[step][c.name] - array(before[c.name])), rel_tol=1e-9)
            else: near_all(c.sigma, sigma_of(seen[step][c.name.split("[")[0]][int(c.name[-2])] if c.part == "state" else seen[step][c.name] - array(before[f"{c.name}.weight"])))
    first, last = map(told, history.steps.values())
    assert last == told(deltas(run.folder / "adapter", "rwkv7-tiny", near=False)) == told(deltas(run.folder, near=False)) != first
    there = (run.folder / "adapter").rename(tmp_path / "elsewhere")                                  # a run that was stopped has none
    assert told(deltas(run.folder, step=1, near=False)) == first and told(deltas(run.folder, near=False)) == last
    if word == "vera": frozen_by_the_folder(run.folder, there, last)
    if word == "loha": gone_on_with(there, names[0], tmp_path), refused(run.folder, tmp_path)


def near_all(sigma, expected): assert expected[0] > 1e-4 and np.allclose(sigma, expected[:len(sigma)], atol=1e-7 * expected[0]) and np.all(expected[len(sigma):] < 1e-7 * expected[0])


def frozen_by_the_folder(run, there, last):
    "VeRA's two matrices, had they come out otherwise where the run was trained."
    file = there.rename(run / "adapter") / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.vera_A": tensors["base_model.vera_A"].flip(0)}, file)
    assert told(deltas(run, step=2, near=False)) == told(deltas(run, near=False)) != last


def gone_on_with(adapter, name, tmp_path):
    "A run over an adapter's folder, whose method its settings don't name."
    run = rwkv_peft.finetune(model="rwkv7-tiny", data=[{"text": "one more row"}], adapter=str(adapter), max_steps=1, save_steps=1, micro_bsz=1, accumulate=1, eval_split=0, lr_init=1e-2, name="more", output=str(tmp_path), device="cpu").fit()
    (run.folder / "adapter").rename(tmp_path / "more_adapter")
    assert deltas(run.folder)[name].norm == deltas(tmp_path / "more_adapter", "rwkv7-tiny")[name].norm != deltas(adapter, "rwkv7-tiny")[name].norm


def refused(run, tmp_path):
    "Another base, and a checkpoint that lacks a tensor or has it in another shape."
    torch.save({n: x + 1 for n, x in official(load("rwkv7-tiny", "cpu", torch.float32)).items()}, tmp_path / "other.pth")
    with pytest.raises(AdapterError, match="another base"): delta_history(run, tmp_path / "other.pth")
    file = run / "checkpoints/step-2/trained.safetensors"
    tensors = load_file(file)
    odd = next(n for n in tensors if n.endswith("blocks.1.att.key.adapter.layer.hada_w1_a.default"))
    for changed in ({n: x for n, x in tensors.items() if n != odd}, tensors | {odd: tensors[odd][:, :1].clone()}):
        save_file(changed, file)
        with pytest.raises(AdapterError, match="don't hold the same parameters .*hada_w1_a"): deltas(run)


@pytest.mark.parametrize("out, inside, rank", [(640, 700, 640), (900, 513, 513), (600, 520, 7), (520, 600, 0)])
def test_a_large_dense_change_by_the_eigenvalues_of_its_square(out, inside, rank):
    "Against LAPACK's SVD, over nine decades: σ² to 13 digits of the largest, and the same effective rank and directions."
    g = torch.Generator().manual_seed(out)
    D = torch.randn(out, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, inside, generator=g, dtype=torch.float64) * torch.logspace(0, -9, inside, dtype=torch.float64)
    exact, ours = torch.as_tensor(sigma_of(D.numpy())), spectrum(D)
    assert ours.shape == exact.shape and (ours.square() - exact.square()).abs().max() <= 1e-13 * exact[0] ** 2 and ours.tolist() == sorted(ours.tolist(), reverse=True)
    assert math.isclose(effective_rank(ours), effective_rank(exact), rel_tol=1e-11) and [rank_to(ours, s) for s in (.5, .9, .99)] == [rank_to(exact, s) for s in (.5, .9, .99)]


class Alts(HTMLParser):
    "The words for pictures, and every address."
    def __init__(self, html):
        super().__init__()
        self.alts, self.sources, self.tags = [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("img", "svg"): self.alts.append(dict(attrs).get("alt") or dict(attrs).get("aria-label"))
        self.sources += [v for k, v in attrs if k in ("src", "href")]


def test_the_card_holds_all_it_shows(base):
    found = deltas(stir(fresh(base, LoRA(r=3), StateTuning(), Train("ln"))))
    seen = Alts(delta_card(found))
    assert len(seen.alts) == 2 and all(seen.alts) and seen.sources == [s for s in seen.sources if s.startswith("data:image/")] and not seen.tags & {"script", "style", "link"}
    most = max((c for c in found.changes if c.layer is not None and c.relative is not None), key=lambda c: c.relative)
    assert most.kind in change_map(found).alt and len(delta_card(found)) < 100_000


def test_what_does_not_fit_is_said_in_a_sentence(base, tmp_path):
    folder = save_adapter(stir(fresh(base, LoRA(r=3))), tmp_path / "a")
    other = tmp_path / "other.pth"
    save(new_model(seed=9), other)
    with pytest.raises(AdapterError, match="another base"): deltas(folder, other)
    with pytest.raises(MethodError, match="fits nothing that was trained here, such as 'blocks.0.att.receptance'"): deltas(load_adapter(load(base, "cpu", torch.float32), folder), targets="att.kex")
    quick, slow = deltas(folder, base, near=False).changes[0], deltas(folder, base).changes[0]
    assert quick.share is None and slow.share is not None and torch.equal(quick.sigma, slow.sigma) and quick.relative == slow.relative
    assert {c.kind for c in deltas(folder, targets=["att.key", "ffn"]).changes} == {"att.key", "ffn.key", "ffn.value"}
    with pytest.raises(MethodError, match="give what it is to be compared with"): deltas(new_model())
    with pytest.raises(MethodError, match="came from no file"): deltas(attach(new_model(), Train("head")))
    with pytest.raises(MethodError, match="is not the base it started from"): deltas(fresh(base, Train("head")), other)
    with pytest.raises(AdapterError, match="no run's folder"): deltas(folder, step=3)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"): delta_history(folder)
