"""The sampler's stages against the `rwkv` package and against transformers; recordings, what-ifs, re-runs and trees against generating again; the lab in a kernel."""
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from markup import Markup
from rwkv_peft.look import sampler as look
from rwkv_peft.look.sampler import Recording, beside, branches, inspect, load_recording, record, redraw, rerun, save_recording, seen_before, stages_of, state_at, tree, what_if
from rwkv_peft.model.files import CheckpointError
from rwkv_peft.model.rwkv import RWKV, RWKVConfig
from rwkv_peft.model.sample import SampleError, Sampler, generate, softmax
from rwkv_peft.model.tokenizer import Bytes, World

torch.set_num_threads(1)


def rows():
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    tied = torch.randint(0, 4, (301,), generator=g).float()
    return {"plain": draw(300) * 3, "tied": tied, "flat": torch.zeros(257), "peaked": draw(1000) * 12, "large": draw(5003) * 2, "pair": torch.tensor([3., -1., 3., .5, 3.])}


SETTINGS = [dict(temperature=t, top_p=p, top_k=k) for t in (0, .5, 1., 1.7) for p in (0., .3, .85, 1.) for k in (0, 1, 7, 1000)]
last = lambda stages: [*stages.values()][-1]


@pytest.fixture
def theirs(monkeypatch):
    "The distribution from which the `rwkv` package would draw, caught where it draws."
    from rwkv.utils import PIPELINE
    caught = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: caught.append(p.copy()) or 0)
    def distribution(logits, **settings):
        PIPELINE.sample_logits(None, logits.clone(), **settings)
        return caught.pop()
    return distribution


@pytest.mark.parametrize("name", rows())
def test_probabilities_are_the_rwkv_packages(theirs, name):
    logits = rows()[name]
    for settings in SETTINGS:
        ours = last(Sampler(**settings).stages(logits.numpy(), {}))
        np.testing.assert_allclose(ours, theirs(logits, **settings), atol=1e-6, rtol=0, err_msg=str(settings))


def test_low_temperatures_are_exact_and_the_rwkv_packages_where_its_powers_are(theirs):
    finite = 0
    for name, logits in {**rows(), "wide": torch.randn(65536, generator=torch.Generator().manual_seed(1)) * .2}.items():
        for T in (1e-45, 1e-6, .02, .05, .1, .3):
            ours = last(Sampler(temperature=T, top_p=.85).stages(logits.numpy(), {}))
            with np.errstate(all="ignore"): other = theirs(logits, temperature=T, top_p=.85, top_k=0)
            if float(softmax(logits.numpy()).max()) ** (1 / T) > 1e-30:                       # there its powers stay in float32
                finite += 1
                np.testing.assert_allclose(ours, other, atol=1e-6, rtol=0, err_msg=f"{name} {T}")
            kept = last(Sampler(top_p=.85).stages(logits.numpy(), {})) > 0
            exact = np.where(kept, (logits.double().numpy() - logits.double().max().item()) / T, -np.inf)
            np.testing.assert_allclose(ours, np.exp(exact) / np.exp(exact).sum(), atol=1e-5, rtol=0, err_msg=f"{name} {T}")
    assert 10 < finite < 42


@pytest.mark.parametrize("T", [5e-324, 1e-42, 1e-30, .05, 1e30, 1e300])
def test_any_temperature_can_be_drawn_from_in_hugging_faces_order(T):
    for shift in (-500, 0, 500):                                                        # where zero lies says nothing
        scores = rows()["plain"].numpy() + np.float32(shift)
        scores[5] = -np.inf
        ours = last(Sampler(temperature=T, top_p=1, order="hf").stages(scores, {}))
        exact = np.exp((scores.astype(np.float64) - float(scores.max())) / np.float64(max(T, 1e-40)))
        np.testing.assert_allclose(ours, exact / exact.sum() if T < 1e29 else (scores > -np.inf) / 299, atol=1e-4, rtol=0)


def transformers_distribution(logits, temperature=1., top_p=1., top_k=0, prompt=(), repetition=1., bias=None, ban=()):
    "By transformers' own list of processors, in the order in which its `generate` puts them."
    from transformers import GenerationConfig, GenerationMixin
    class Model(GenerationMixin):
        config = type("C", (), {"is_encoder_decoder": False, "vocab_size": len(logits)})()
    settings = dict(repetition_penalty=repetition, suppress_tokens=list(ban) or None, sequence_bias=[[[t], b] for t, b in (bias or {}).items()] or None)
    warm = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature else dict(do_sample=False)
    config = GenerationConfig(**settings, **warm)
    config._pad_token_tensor = config._eos_token_tensor = config._bos_token_tensor = None
    ids = torch.tensor([list(prompt)], dtype=torch.int64)
    processors = Model()._get_logits_processor(config, input_ids_seq_length=len(prompt), encoder_input_ids=ids, prefix_allowed_tokens_fn=None, logits_processor=[], device="cpu")
    assert len(processors) == (repetition != 1) + bool(ban) + bool(bias) + (bool(temperature) and (temperature != 1) + (top_k > 0) + (top_p < 1))
    scores = processors(ids, logits.float()[None].clone())
    return (scores.softmax(-1) if temperature else torch.nn.functional.one_hot(scores.argmax(-1), len(logits)))[0].numpy()


@pytest.mark.parametrize("name", rows())
def test_probabilities_in_hugging_faces_order_are_transformers(name):
    logits = rows()[name]
    for settings in SETTINGS:
        ours = last(Sampler(**settings, order="hf").stages(logits.numpy(), {}))
        np.testing.assert_allclose(ours, transformers_distribution(logits, **settings), atol=1e-6, rtol=0, err_msg=str(settings))


def test_repetition_bias_and_ban_are_transformers():
    logits = rows()["plain"]
    likely = logits.argsort(descending=True)[:6].tolist()
    given = dict(repetition=1.4, bias={likely[1]: 2.5, 299: -1.}, ban=(likely[0], 7))
    for settings in (dict(temperature=.7, top_p=.9, top_k=40), dict(temperature=0)):
        sampler = Sampler(**settings, **given, presence=0, frequency=0, order="hf")
        ours = last(sampler.stages(logits.numpy(), {likely[2]: 1., 11: 0.}, prompt=[likely[3], 5, 5]))
        np.testing.assert_allclose(ours, transformers_distribution(logits, **settings, **given, prompt=[likely[3], 5, 5, likely[2], 11]), atol=1e-6, rtol=0)
    for wrong in (dict(order="vllm"), dict(repetition=0.)):
        with pytest.raises(SampleError, match=next(iter(wrong))): Sampler(**wrong)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = RWKV(RWKVConfig(n_layer=2, n_embd=32, head_size=16, dim_ffn=64, vocab_size=257, w_rank=8, a_rank=8, v_rank=8, g_rank=8))
    with torch.no_grad():
        for p in model.parameters(): p += .2 * torch.randn_like(p)
    return model


SAMPLER = Sampler(temperature=1.2, top_p=.9, presence=.4, frequency=.3, decay=.97, seed=4)


@pytest.fixture(scope="module")
def story(model): return record(model, "Once upon", 39, SAMPLER, stop=(), every=7)


def test_a_recording_is_what_generate_writes(model, story):
    written = generate(model, "Once upon", 39, SAMPLER, stop=())
    "".join(written)
    assert story.tokens == written.tokens and story.finished == "length" and sorted(story.states) == [0, 7, 14, 21, 28, 35]
    read = [*story.prompt, *story.tokens]                                            # the scores and states, by reading all tokens again
    with torch.no_grad(): logits = model(torch.tensor([read[:-1]]))[0][0, len(story.prompt) - 1:]
    torch.testing.assert_close(story.logits, logits, atol=2e-4, rtol=0)
    bits = -logits.double().log_softmax(-1).gather(1, torch.tensor(story.tokens)[:, None])[:, 0] / np.log(2)
    np.testing.assert_allclose(story.surprise, bits, atol=1e-3)
    with torch.no_grad(): state = model(torch.tensor([read[:len(story.prompt) + 17]]))[1]
    torch.testing.assert_close(state_at(story, 17).wkv, state.wkv, atol=1e-4, rtol=0)


def test_stages_are_what_a_slow_computation_says(story):
    i = 20
    stages = {s.name: s for s in stages_of(story, i)}
    scores, counts = story.logits[i].double(), {}
    for t in story.tokens[:i]:
        counts = {k: n * .97 for k, n in counts.items()}
        counts[t] = counts.get(t, 0) + (0 if t - 1 in b" \t0123456789" else 1)
    lowered = scores.clone()
    for t, n in counts.items(): lowered[t] -= .4 + n * .3
    own, p = scores.softmax(0), lowered.softmax(0)
    kept, mass = [], 0.
    for t in p.argsort(descending=True).tolist():
        kept, mass = [*kept, t], mass + p[t].item()
        if mass >= .9: break
    heated = torch.zeros(257, dtype=torch.float64)
    heated[kept] = p[kept] ** (1 / 1.2)
    heated /= heated.sum()
    assert list(stages) == ["model", "ban", "penalise", "softmax", "top_p", "top_k", "temperature"] and seen_before(story, i) == pytest.approx(counts)
    assert stages["top_p"].left == len(kept) and stages["top_p"].kept == pytest.approx(mass, abs=1e-5) and stages["top_p"].own == pytest.approx(own[kept].sum().item(), abs=1e-5)
    np.testing.assert_allclose(stages["temperature"].p, heated, atol=1e-6)
    entropy = lambda q: float(-(q[q > 0] * q[q > 0].log2()).sum())
    for name, q in {"model": own, "penalise": p, "temperature": heated}.items(): assert stages[name].entropy == pytest.approx(entropy(q), abs=1e-4)
    assert [t for t, *_ in stages["model"].top] == own.argsort(descending=True)[:10].tolist()


OTHERS = [dict(temperature=0), dict(temperature=2.), dict(top_p=.3), dict(top_k=2), dict(presence=2.), dict(decay=.5, frequency=1.5), dict(order="hf"), dict(order="hf", repetition=1.5), dict(bias={33: 9.}), dict(top_p=.9)]


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_what_if_tells_where_a_new_text_leaves_the_old(model, story, change):
    "The same seed, generated anew with the other settings."
    other = replace(SAMPLER, **change)
    anew = generate(model, "Once upon", 39, other, stop=())
    "".join(anew)
    parting = next((i for i, (a, b) in enumerate(zip(story.tokens, anew.tokens)) if a != b), None)
    found = what_if(story, other)
    assert found.first == parting and found.token == (None if parting is None else anew.tokens[parting]) and (change != dict(top_p=.9) or parting is None)
    assert rerun(story, 0, other).tokens[:len(anew.tokens)] == anew.tokens
    assert ("stands on the old text" in str(found._repr_html_())) == (parting is not None)


@pytest.mark.parametrize("i", [0, 1, 7, 20, 38])
def test_going_on_from_any_token_writes_the_same(story, i):
    again = rerun(story, i)
    assert again.tokens == story.tokens and torch.equal(again.logits, story.logits) and torch.equal(again.rng, story.rng) and again.begin == i
    assert rerun(again, 30).tokens == story.tokens and list(redraw(again, SAMPLER)) == story.tokens[i:]


def test_going_on_with_other_settings_or_further(story):
    new = rerun(story, 20, replace(SAMPLER, temperature=0), max_tokens=50)
    assert new.tokens[:20] == story.tokens[:20] and len(new) == 50 and new.finished == "length" and story.sampler == SAMPLER and len(story) == 39
    assert what_if(new, new.sampler).first is None
    with pytest.raises(SampleError, match="max_tokens=5"): rerun(story, 20, max_tokens=5)
    with pytest.raises(SampleError, match="0 to 38"): rerun(story, 39)


def test_a_text_that_ends_or_meets_a_stop(model):
    ended = record(model, "a", 500, replace(SAMPLER, bias={0: 6.}), stop=())
    assert ended.finished == "end" and ended.tokens[-1] == 0 and len(ended) < 500 and rerun(ended, len(ended) - 1).tokens == ended.tokens
    assert "∎" in str(inspect(ended, -1)) and branches(ended, -1, n=3, depth=3)
    text = ended.text
    stopped = record(model, "a", 500, replace(SAMPLER, bias={0: 6.}), stop=(text[2],))
    assert stopped.finished == "stop" and rerun(stopped, 1).tokens == stopped.tokens
    with pytest.raises(SampleError, match="max_tokens"): record(model, "a", 0)


def test_a_tree_holds_the_probabilities_of_its_texts(model, story):
    i, found = 11, branches(story, 11, n=3, depth=2, tail=4)
    assert [b.token for b in found][:3] == np.argsort(-stages_of(story, i)[-1].p, kind="stable")[:3].tolist() and sum(b.drawn for b in found) == 1
    for b in found:
        ids, seen = [*story.prompt, *story.tokens[:i], b.token], {**seen_before(story, i)}
        look.count(seen, b.token, story.tokenizer.token_bytes(b.token), SAMPLER.decay)
        with torch.no_grad(): scores = model(torch.tensor([ids]))[0][0, -1].numpy()
        p = last(SAMPLER.stages(scores, seen))
        for c in b.branches:
            assert c.p == pytest.approx(p[c.token], abs=1e-4) and c.total == pytest.approx(b.p * p[c.token], abs=1e-4)
            if c.token: assert c.tail == "".join(generate(model, [*ids, c.token], 4, replace(SAMPLER, temperature=0), stop=()))
    assert str(tree(story, i)).count("← drawn") == 2


def test_beside_is_the_difference_of_two_readings(model):
    torch.manual_seed(3)
    tuned = RWKV(model.config)
    tuned.load_state_dict(model.state_dict())
    with torch.no_grad(): tuned.head.weight += .3 * torch.randn_like(tuned.head.weight)
    text = "The <b>sea</b> is a large place. " * 3                                    # longer than a piece of 64
    x, ids = beside(model, tuned, text), [0, *Bytes().encode(text)]
    with torch.no_grad(): a, b = (m(torch.tensor([ids]))[0][0, :-1].double().log_softmax(-1).numpy() for m in (model, tuned))
    np.testing.assert_allclose(x.kl, (np.exp(b) * (b - a)).sum(-1) / np.log(2), atol=1e-4)
    at = np.arange(len(ids) - 1)
    np.testing.assert_allclose(x.surprise, -np.stack([a[at, ids[1:]], b[at, ids[1:]]], 1) / np.log(2), atol=1e-3)
    for t in (0, 63, 64, 70):
        order = lambda row: np.argsort(-row, kind="stable").tolist()
        assert x.favourites[t].tolist() == [a[t].argmax(), b[t].argmax()] and x.ranks[t].tolist() == [order(a[t]).index(b[t].argmax()), order(b[t]).index(a[t].argmax())]
        assert x.changes[t][0][0] == (np.exp(b[t]) - np.exp(a[t])).argmax() and x.changes[t][3][0] == (np.exp(b[t]) - np.exp(a[t])).argmin()
        with torch.no_grad(): raw = [m(torch.tensor([ids]))[0][0, t].double().numpy() for m in (model, tuned)]
        higher = (raw[1] - raw[1].mean()) - (raw[0] - raw[0].mean())                    # logits as the heads give them, each from its mean
        assert abs(x.logits[t] - higher[ids[t + 1]]) < 1e-4 and all(abs(up - higher[token]) < 1e-4 for token, _, _, up in x.changes[t])
    shifted = RWKV(model.config)
    shifted.load_state_dict(model.state_dict())
    shifted.head.register_parameter("bias", torch.nn.Parameter(torch.full((257,), 5.)))             # all logits higher by 5 say nothing else
    assert np.abs(beside(model, shifted, "ab").logits).max() < 1e-4
    assert len(beside(model, tuned, "ab", max_tokens=5).tokens) in range(3, 8) and "<b>sea" in safe(x._repr_html_()).text
    assert beside(model, model, "ab").kl.max() == 0
    with pytest.raises(SampleError, match="vocabularies"): beside(model, RWKV(replace(model.config, vocab_size=300)), "ab")


def test_a_recording_survives_its_file(model, story, tmp_path):
    strange = replace(story, sampler=replace(SAMPLER, ban=(3, 4), bias={5: -1.5}), stop=("\n\nUser:",))
    back = load_recording(save_recording(strange, tmp_path / "a.safetensors"), model)
    for name in ("prompt", "tokens", "sampler", "stop", "max_tokens", "every", "begin", "finished"): assert getattr(back, name) == getattr(strange, name), name
    assert rerun(replace(back, sampler=SAMPLER, stop=()), 12).tokens == story.tokens
    alone = load_recording(tmp_path / "a.safetensors")
    assert str(inspect(alone, 3)) == str(inspect(strange, 3)) and what_if(alone, SAMPLER).sampler == SAMPLER
    with pytest.raises(SampleError, match="load_recording"): rerun(alone, 3)
    half = record(model, "Once upon", 9, SAMPLER, stop=(), dtype=torch.float16)
    assert half.tokens == story.tokens[:9] and half.logits.dtype == torch.float16 and "float16" in str(what_if(half, SAMPLER)._repr_html_())
    for damage in ({"prompt": torch.zeros(1)}, {"tokens": torch.zeros(3, dtype=torch.int64)}):
        look.write_tensors({"logits": torch.zeros(2, 257)} | damage, tmp_path / "b.safetensors", {"rwkv_peft.recording": json.dumps({"sampler": {}})})
        with pytest.raises(CheckpointError, match="b.safetensors is no recording"): load_recording(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="vocabulary of 257"): load_recording(tmp_path / "a.safetensors", RWKV(replace(model.config, vocab_size=300)))


def safe(html):
    "`html` read, without scripts, handlers or addresses in it."
    seen = Markup(html)
    assert not {"script", "style", "link", "iframe"} & set(seen.tags) and not any(k.startswith("on") or k in ("src", "href") for k, _ in seen.attributes)
    return seen


def test_any_token_is_shown_as_text():
    "Markup, escapes, right-to-left text and pieces of characters as tokens of a World text."
    T = World()
    ids = T.encode("<script>alert(1)</script> \x1b[31mred \u202eabc שלום مرحبا 漢 & \"'`\r\n\t∎") + [229, 65529, 65534, 0]
    logits = torch.full((len(ids), 65536), -9.)
    logits[torch.arange(len(ids)), torch.tensor(ids)] = 2.
    made = Recording([0, *T.encode("<img src=x onerror=1>" + "x" * 1000)], ids, logits, torch.stack([look._noted(np.random.RandomState(i)) for i in range(len(ids))]), {}, Sampler(seed=1), T)
    for html in (made._repr_html_(), *(inspect(made, i) for i in (0, 9, 14, 25, -4, -3, -2, -1)), what_if(made, Sampler(temperature=3., top_p=1.))._repr_html_()):
        page = safe(html)
        assert "\x1b" not in page.text and len(html) < 100_000
    for i, t in enumerate(ids): safe(look._shown(look.piece(T, t)))
    assert "aren't shown" in safe(made._repr_html_()).text and "<script" in "".join(look.piece(T, t) for t in ids)
    assert [look.piece(T, t) for t in (0, 229, 65534)] == ["∎", "\\xe4", "<65534>"]


def test_a_slider_message_updates_the_picture_in_a_kernel(tmp_path):
    "As a front end does it: the message of a slider goes in, a picture under the same display comes out."
    from jupyter_client.manager import start_new_kernel
    from queue import Empty
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), env={**os.environ, "OMP_NUM_THREADS": "1"})
    def until(wanted):
        while True:
            message = client.get_iopub_msg(timeout=60)
            assert message["msg_type"] != "error", message["content"]["traceback"]
            if wanted(message): return message["content"]
    def set_slider(id, value): client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": id, "data": {"method": "update", "state": {"value": value}, "buffer_paths": []}}))
    try:
        client.execute("""
from rwkv_peft import RWKV
from rwkv_peft.look.sampler import record
from rwkv_peft.notebook.sampler_lab import SamplerLab
from rwkv_peft.model.sample import Sampler
lab = SamplerLab(record(RWKV.load("rwkv7-tiny"), "The sea is", 30, Sampler(top_p=.9, seed=3)), token=4, slice=0)
lab.show()
print(lab.settings["temperature"].model_id, lab.token.model_id)""")
        shown = until(lambda m: m["msg_type"] == "display_data" and "display_id" in m["content"].get("transient", {}))
        ids = until(lambda m: m["msg_type"] == "stream" and re.fullmatch(r"\w{32} \w{32}\s*", m["content"]["text"]))["text"].split()
        update = lambda text: until(lambda m: m["msg_type"] == "update_display_data" and text in m["content"]["data"]["text/html"])
        assert "Token 4:" in shown["data"]["text/html"] and "temperature 1<" in shown["data"]["text/html"]
        for id, value, text in ((ids[0], 0, "temperature 0<"), (ids[0], 2.5, "first difference is token"), (ids[1], 9, "Token 9:")):
            set_slider(id, value)
            assert update(text)["transient"] == shown["transient"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_the_labs_comparison_goes_on_in_slices(story):
    from rwkv_peft.notebook.sampler_lab import SamplerLab
    lab = SamplerLab(story, token=3, slice=0)                                         # no event loop here: all slices at once
    assert lab.found.compared is None and lab.found.first is None and "same random numbers" in lab.drawn
    for change in (dict(top_p=.3), dict(order="hf", temperature=2.)):
        for name, value in change.items(): lab.settings[name].value = value
        assert (lab.found.first, lab.found.token) == (what_if(story, lab.sampler).first, what_if(story, lab.sampler).token)
    lab.token.value = 17
    lab.again.click()
    assert lab.recording.tokens == rerun(story, lab.token.value, lab.sampler).tokens and lab.recording.begin == lab.token.value and f"The first {lab.recording.begin} tokens" in lab.drawn
    lab.back.click()
    assert lab.recording is story and lab.sampler == SAMPLER and lab.token.max == 38
