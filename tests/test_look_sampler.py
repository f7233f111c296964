"""The sampler's stages against the `rwkv` package and against transformers; recordings, what-ifs and re-runs against generating again."""
import numpy as np
import pytest
import torch
from rwkv_peft.model.sample import Sampler

torch.set_num_threads(1)


def rows():
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    tied = torch.randint(0, 4, (301,), generator=g).float()
    return {"plain": draw(300) * 3, "tied": tied, "flat": torch.zeros(257), "peaked": draw(1000) * 12, "large": draw(5003) * 2, "pair": torch.tensor([3., -1., 3., .5, 3.])}


SETTINGS = [dict(temperature=t, top_p=p, top_k=k) for t in (0, .5, 1., 1.7) for p in (0., .3, .85, 1.) for k in (0, 1, 7, 1000)]


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
        ours = [*Sampler(**settings).stages(logits.numpy(), {}).values()][-1]
        np.testing.assert_allclose(ours, theirs(logits, **settings), atol=1e-6, rtol=0, err_msg=str(settings))


def transformers_distribution(logits, temperature, top_p, top_k, prompt=(), repetition=1., bias=None, ban=()):
    "By transformers' own list of processors, in the order in which its `generate` puts them."
    from transformers import GenerationConfig, GenerationMixin
    class Model(GenerationMixin):
        config = type("C", (), {"is_encoder_decoder": False, "vocab_size": len(logits)})()
    settings = dict(repetition_penalty=repetition, suppress_tokens=list(ban) or None, sequence_bias=[[[t], b] for t, b in (bias or {}).items()] or None)
    warm = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature else dict(do_sample=False)
    config = GenerationConfig(**settings, **warm)
    config._pad_token_tensor = config._eos_token_tensor = config._bos_token_tensor = None
    ids = torch.tensor([list(prompt)])
    processors = Model()._get_logits_processor(config, input_ids_seq_length=len(prompt), encoder_input_ids=ids, prefix_allowed_tokens_fn=None, logits_processor=[], device="cpu")
    scores = processors(ids, logits.float()[None].clone())
    if not temperature: return torch.nn.functional.one_hot(scores.argmax(-1), len(logits))[0].numpy()
    return scores.softmax(-1)[0].numpy(), [type(p).__name__ for p in processors]


@pytest.mark.parametrize("name", rows())
def test_probabilities_in_hugging_faces_order_are_transformers(name):
    logits = rows()[name]
    for settings in SETTINGS:
        theirs = transformers_distribution(logits, **settings)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        ours = [*Sampler(**settings, order="hf").stages(logits.numpy(), {}).values()][-1]
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0, err_msg=str(settings))
