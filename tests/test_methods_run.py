"Every word of `peft` through finetune(): trained, saved, read again with equal outputs, and resumed to the same losses."
import pytest
import torch
from rwkv_peft import finetune
from rwkv_peft.model.checkpoint import load
from rwkv_peft.model.quant import quantize
from rwkv_peft.peft import EVA, PiSSA
from rwkv_peft.peft.adapters import attach, load_adapter
from rwkv_peft.peft.lora import linears
from rwkv_peft.train.config import METHODS, METHOD_WORDS, ConfigError
from rwkv_peft.train.loop import Run

torch.set_num_threads(1)
ROWS = [{"prompt": f"{i} + {i % 7} =", "completion": f" {i + i % 7}{'!' * (i % 5)}"} for i in range(12)]
QUANT = {"loftq": "nf4", "dora": "int8", "miss": "nf4", "bone": "fp4"}
TOKENS = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def base(): return load("rwkv7-tiny", device="cpu", dtype=torch.float32)


def settings(tmp_path, word, **more):
    told = dict(model="rwkv7-tiny", forget_data="none", device="cpu", precision="fp32", data=ROWS, peft=word, lr_init=1e-2 if word == "state" else 1e-3, micro_bsz=2, accumulate=1, max_steps=2, eval_split=.2, eval_steps=1, output=str(tmp_path), name="run")
    if isinstance(word, str) and word not in ("lisa", "state", "none"): told["r"] = 4
    return told | more


def losses(run): return [e["loss"] for e in run.events if e["event"] == "step"]


def cut(told, at=2):
    "A run that is stopped after step `at`; its folder."
    run = finetune(**told | {"name": "cut"})
    for event in run.steps():
        if event["event"] == "step" and event["step"] == at: run.stop()
    torch.rand(7)
    return run.folder


@torch.no_grad()
def said(model): return model.eval()(TOKENS)[0]


def same(run, quant="none"):
    "Whether the adapter, on a base that was loaded anew, says what the run's model does."
    again = said(quantize(load_adapter(base(), run.folder / "adapter"), quant))
    return (again - said(run.model)).norm() <= 1e-6 * again.norm()


@pytest.mark.parametrize("word", [w for w in METHOD_WORDS if w != "none"])
def test_every_word_trains_and_its_adapter_is_read_again(tmp_path, word):
    quant = QUANT.get(word, "none")
    run = finetune(**settings(tmp_path, word, quant=quant)).fit()
    assert run.events[-1]["event"] == "done" and len(losses(run)) == 2 and type(run.methods[0]).__name__ == METHODS[word]
    assert {type(m.storage).__name__ for n, m in linears(run.model).items() if n != "head"} == {{"none": "NoneType", "int8": "Int8"}.get(quant, "FourBit")}
    assert (said(run.model) - said(base())).norm() > 1e-4 * said(base()).norm()
    assert same(run, quant)


RESUMED = {"pissa": {}, "loftq nf4": dict(peft={"method": "loftq", "r": 4, "rounds": 2}), "dora int8": dict(dropout=.2), "bone": {}, "miss nf4": {}, "eva": {}, "lora lorafa": dict(optim="lorafa"), "dora loraplus": dict(optim="loraplus", loraplus_lr_ratio=4.0), "pissa lorafa fp4": dict(optim="lorafa"),
           "rslora": dict(rslora=True, ranks={"ffn": 2}), "olora": {}, "milora int8": {}}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_has_the_losses_of_one_that_nobody_stopped(tmp_path, case):
    word, *more = case.split()
    told = settings(tmp_path, word, quant=next((w for w in more if w in ("int8", "nf4", "fp4")), "none"), max_steps=4, eval_steps=4, save_steps=2, early_stop=0) | RESUMED[case]
    if isinstance(told["peft"], dict): del told["r"]
    whole = finetune(**told | {"name": "whole"}).fit()
    resumed = Run.resume(cut(told)).fit()
    assert losses(resumed) == losses(whole) and len(losses(resumed)) == 4
    assert torch.equal(said(resumed.model), said(whole.model))
    if "lorafa" in case: assert not any(p.requires_grad == n.endswith(".A") for n, p in whole.model.named_parameters() if ".adapter." in n) and any(n.endswith(".A") for n in whole.trained)


def test_lorafa_leaves_A_alone_and_says_how_much_trains(tmp_path):
    run = finetune(**settings(tmp_path, "lora", optim="lorafa"))
    pairs = sum(m.adapter.B.numel() for m in linears(run.model).values() if m.adapter is not None) if run.plan() and run.model else 0
    before = {n: p.detach().clone() for n, p in run.trained.items()}
    assert run.plan()["trained"] == pairs > 0
    run.fit()
    assert all(torch.equal(p, before[n]) == n.endswith(".A") for n, p in run.trained.items())


def test_another_start_is_not_gone_on_with(tmp_path, monkeypatch):
    "A machine that finds other directions than the run began with: the trained pair would mean nothing there."
    import rwkv_peft.peft.inits as inits
    real, folder = inits.top_svd, cut(settings(tmp_path, "pissa", max_steps=4, save_steps=2))
    def turned(W, r, *more):
        U, S, V = real(W, r + 1, *more)
        return U[:, 1:], S[1:], V[1:]
    with monkeypatch.context() as patch:
        patch.setattr(inits, "top_svd", turned)
        with pytest.raises(ConfigError, match="checkpoint step-2 begins from another .*A0"): Run.resume(folder).fit()
    assert len(losses(Run.resume(folder).fit())) == 4


def test_eva_sees_the_rows_that_the_user_gave_and_sees_them_again(tmp_path):
    tokens = [torch.randint(5, 250, (2, 40), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    told = settings(tmp_path, EVA(4, batches=iter(tokens)), max_steps=4, save_steps=2, eval_steps=4, early_stop=0)
    direct = attach(base(), EVA(4, batches=tokens))
    folder = cut(told)
    resumed = Run.resume(folder)
    assert resumed.plan()["steps"] == 4 and resumed.methods[0].batches is not None
    ranks = {n: m.adapter.A.shape for n, m in linears(direct).items() if m.adapter is not None}
    assert {n: m.adapter.A.shape for n, m in linears(resumed.model).items() if m.adapter is not None} == ranks
    whole = finetune(**told | {"name": "whole", "peft": EVA(4, batches=tokens)}).fit()
    assert losses(resumed.fit()) == losses(whole) and same(resumed)


def test_4bit_is_said_once_to_be_nf4_and_written_down_so(tmp_path):
    told = settings(tmp_path, "lora", quant="4bit", max_steps=4, save_steps=2)
    folder = cut(told)
    resumed = Run.resume(folder).fit()
    assert len([e for e in resumed.events if e["event"] == "warning" and "nf4 here" in e["message"] and "fp4 in RWKV-PEFT" in e["message"]]) == 1
    assert 'quant = "nf4"' in (folder / "config.toml").read_text() and resumed.model.quant == "nf4" and same(resumed, "nf4")
    assert len(losses(finetune(**told | {"name": "cut", "resume": True}).fit())) == 4                          # said again as it was said first


@pytest.mark.parametrize("word, quant", [("pissa", "nf4"), ("dora", "int8")])
def test_a_run_starts_from_a_saved_adapter(tmp_path, word, quant):
    first = finetune(**settings(tmp_path, word, quant=quant, name="first")).fit()
    told = {k: v for k, v in settings(tmp_path, word, quant=quant, adapter=str(first.folder / "adapter"), max_steps=4, save_steps=2, eval_steps=4, early_stop=0).items() if k not in ("peft", "r")}
    second = finetune(**told | {"name": "second"})
    assert second.plan() and (said(second.model) - said(first.model)).norm() <= 1e-6 * said(first.model).norm()
    second.fit()
    resumed = Run.resume(cut(told)).fit()
    assert losses(resumed) == losses(second) and same(second, quant)


def test_a_method_that_changes_W_comes_off_the_object_of_a_stopped_run(tmp_path):
    model = base()
    told = settings(tmp_path, PiSSA(4), model=model, quant="nf4", max_steps=4, save_steps=2, eval_steps=4, early_stop=0)
    resumed = Run.resume(cut(told), model=model).fit()
    assert resumed.model is model and losses(resumed) == losses(finetune(**told | {"name": "whole", "model": base()}).fit())


def test_a_configuration_of_hugging_face_trains_is_saved_and_resumed(tmp_path):
    import peft as hf_peft
    method = hf_peft.OFTConfig(oft_block_size=4, target_modules=["att.key", "ffn.value"])
    told = settings(tmp_path, method, max_steps=4, save_steps=2, eval_steps=4, early_stop=0)
    whole = finetune(**told | {"name": "whole"}).fit()
    folder = cut(told)
    assert "library = \"peft\"" in (folder / "config.toml").read_text()
    resumed = Run.resume(folder).fit()
    assert losses(resumed) == losses(whole) and len(losses(resumed)) == 4 and same(resumed)
    for wrong, what in ((dict(quant="nf4"), "quant: Hugging Face"), (dict(optim="lorafa"), "optim"), (dict(r=8), "r: with a method object")):
        with pytest.raises(ConfigError, match=what): finetune(**told | wrong | {"name": "wrong"})
