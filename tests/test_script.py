"Scripts of RWKV-PEFT: read as a shell reads them, translated by what their flags did, and nothing run."
import shlex
import subprocess
import tomllib

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from rwkv_peft.cli import main
from rwkv_peft.train.config import Config, ConfigError
from rwkv_peft.train.script import NOT_SET, SEED, expand, is_script, read_flags, read_script, script_to_toml, split_lines

LEAST = "--load_model rwkv7-tiny --data_file rows.jsonl --data_type jsonl"


def converted(flags): return read_script(f"{LEAST} {flags}")
def setting(flags, name): return converted(flags).settings.get(name)


def refusal(text):
    with pytest.raises(ConfigError) as caught: read_script(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- as a shell reads

SHELL = r"""#!/bin/sh
load_model='models/base model.pth'   # a comment with 'a quote
export n=32
config='{"lora_load":"","lora_r":32,"lora_alpha":64,"lora_dropout":0.5}'
parts="time ln"
price='$n'
FOO=1 python train.py --load_model "$load_model" --data_file rows-${n}.jsonl \
    --proj_dir "out/it's $n" --peft lora --lora_config $config --train_parts $parts \
    --wandb "$price" --sft_field in\ put 'out"put' --data_type sft --sft_split 'train[:$9]'
"""


def test_words_are_those_of_bash():
    "bash itself is the oracle: a function in place of python prints its arguments."
    stand_in = 'python() { for word in "$@"; do printf "%s\\0" "$word"; done; }\n'
    told = subprocess.run(["bash", "-c", stand_in + SHELL], capture_output=True, check=True).stdout.decode().split("\0")[1:-1]
    flags, _ = read_flags(SHELL)
    assert [word for name, (_, words) in flags.items() for word in (f"--{name}", *words)] == told
    assert {name: line for name, (line, _) in flags.items()} == {"load_model": 7, "data_file": 7, "proj_dir": 8, "peft": 8, "lora_config": 8, "train_parts": 8, "wandb": 9, "sft_field": 9, "data_type": 9, "sft_split": 9}


def test_every_mark_of_that_script_arrives():
    found = read_script(SHELL).settings
    assert {k: found[k] for k in ("model", "data", "output", "name", "r", "alpha", "dropout", "train_parts", "sft_field", "sft_split")} == {
        "model": "models/base model.pth", "data": "rows-32.jsonl", "output": "out", "name": "it's 32", "r": 32, "alpha": 64.0, "dropout": .5, "train_parts": ["time", "ln"], "sft_field": ["in put", 'out"put'], "sft_split": "train[:$9]"}


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), max_size=12), min_size=1, max_size=4))
@hypothesis_settings(max_examples=200, deadline=None)
def test_quoted_words_come_back(words):
    "Whatever Python's own quoting writes is read back, as long as it's one line."
    words = ["python", *(w.replace("\n", " ").replace("\r", " ") for w in words)]
    [line] = split_lines(shlex.join(words))
    assert [word for w in line.words for word in expand(w, {}, 1)] == words


@given(st.text(max_size=80))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_in_a_sentence(text):
    for script in (text, f"{LEAST} {text}", f"x={text}\npython train.py {LEAST} --wandb $x"):
        try: found = read_script(script)
        except ConfigError as error: assert str(error)
        else:
            assert set(found.settings) <= set(Config.model_fields)
            assert tomllib.loads(script_to_toml(found)) == found.settings


@pytest.mark.parametrize("text, words", [
    ("echo hello", ["no flags"]),
    (f"x=$HOME/a\ntrue\npython train.py {LEAST} --proj_dir $x", ["line 1", "$HOME is not assigned"]),
    (f"python train.py {LEAST} --proj_dir $(pwd)", ["line 1", "worked out by the shell"]),
    (f"python train.py {LEAST} --proj_dir ${{x:-out}}", ["line 1", "worked out by the shell"]),
    (f"python train.py {LEAST} --proj_dir `pwd`", ["worked out by the shell"]),
    (f"python train.py {LEAST} --proj_dir 'out", ["line 1", "a quote is opened"]),
    (f"python train.py {LEAST}\n\npython train.py {LEAST}", ["line 3", "second command"]),
    (f"python train.py oops {LEAST}", ["line 1", "'oops' stands before every flag"]),
    (f"{LEAST} --lr_init fast", ["--lr_init 'fast' should be a number"]),
    (f"{LEAST} --micro_bsz 4 5", ["--micro_bsz takes one value, not 2"]),
    (f"{LEAST} --micro_bsz", ["takes one value, not none"]),
    (f"{LEAST} --micro_bsz 1.5", ["a whole number"]),
    (f"{LEAST} --peft lora --lora_config {{lora_r:8}}", ["JSON", "single quotes", '"lora_r": 8']),
    (f"{LEAST} --peft lora --lora_config '[8]'", ["JSON"]),
    (f"{LEAST}\n--peft loar", ["line 2", "did you mean 'lora'"]),
    (f"{LEAST} --peft bone --bone_config '{{\"bone_mode\":\"new\"}}'", ["mode 'new' is not known"]),
    (f"{LEAST} --quant fp8", ["fp8 is not here", "int8"]),
    (f"{LEAST} --train_type fullstate", ["fullstate"]),
    ("--load_model a.pth --peft lora", ["--data_file: is missing"]),
    ("--data_file a.jsonl --peft lora", ["--load_model: is missing"]),
    ("--load_model a.pth --data_file a --data_type numpy", ["--data_type numpy", "jsonl"]),
])
def test_refusals_say_where_and_what(text, words):
    said = refusal(text)
    assert all(word in said for word in words), said


def test_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in (f"touch a; {LEAST}", f"x=$(touch b)\npython train.py {LEAST}", f"{LEAST} --wandb '__import__(\"os\").mkdir(\"c\")'", f"touch d && python train.py {LEAST} > e | tee f &"): read_script(text)
    assert not list(tmp_path.iterdir())


def test_what_is_not_read_is_named():
    notes = " ".join(read_script(f"cd there\nCUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node 2 train.py {LEAST} --layers 3 --n_layer 12 --n_embd 768 --dropout 0.1 2>&1 | tee log\n--ctx_len 64\npython merge/merge.py --base_model x \\\n --ctx_len 9").notes)
    for word in ("line 1: `cd there`", "--nproc_per_node", "--layers is left out: RWKV-PEFT has no such flag", "--n_layer, --n_embd", "--dropout", "line 3: a shell doesn't count this line", "line 4: `python merge/merge.py"): assert word in notes, (word, notes)
    assert setting("\n--ctx_len 64", "ctx_len") == 64


# ---------------------------------------------------------------- what the flags did

@pytest.mark.parametrize("flags, expected", [
    ("--peft lora --lora_config '{\"lora_load\":\"\",\"lora_r\":4,\"lora_alpha\":8,\"lora_dropout\":0.1}'", {"peft": "lora", "r": 4, "alpha": 8.0, "dropout": .1, "train_parts": ["time", "ln"]}),
    ("--peft lora", {"peft": "lora", "r": 8, "alpha": 32.0, "dropout": .01}),                       # argparse's default table
    ("--peft pissa --pissa_config '{\"pissa_r\":32,\"svd_niter\":4}'", {"peft": "pissa", "r": 32}),
    ("--peft bone --bone_config '{\"bone_load\":\"\",\"bone_r\":32}'", {"peft": "bone", "r": 32}),          # S: block affine
    ("--peft bone --bone_config '{\"bone_mode\":\"bat\",\"bone_load\":\"\",\"bone_r\":64}'", {"peft": "bone", "r": 64}),
    ("--peft bone --bone_config '{\"bone_mode\":\"bone\",\"bone_load\":\"\",\"bone_r\":64}'", {"peft": "miss", "r": 64}),
    ("--peft disha --disha_config '{\"mode\":\"bone\",\"load\":\"\",\"r\":64}'", {"peft": "miss", "r": 64, "lr_schedule": "cos"}),
    ("--peft lisa --lisa_config '{\"lisa_r\":3,\"lisa_k\":100}' --accumulate_grad_batches 4", {"peft": {"method": "lisa", "layers": 3, "every": 25, "emb": True, "head": True}}),
    ("--peft lora --peft_config '{\"r\":16,\"lora_alpha\":32,\"lora_dropout\":0.05}'", {"peft": "lora", "r": 16, "alpha": 32.0, "dropout": .05, "train_parts": None}),
    ("--peft miss --peft_config '{\"r\":64}'", {"peft": "miss", "r": 64}),
    ("--peft adalora --peft_config '{\"init_r\":12}'", {"peft": {"library": "peft", "peft_type": "ADALORA", "init_r": 12}}),
    ("", {"peft": "none", "train_parts": None}),
    ("--train_type state --lr_init 1 --lr_final 0.01 --warmup_steps 10", {"peft": "state", "lr_init": 1.0, "lr_final": .01, "warmup_steps": 10, "train_parts": None}),
    ("--train_type infctx --chunk_ctx 512 --ctx_len 2048", {"train_type": "infctx", "chunk_ctx": 512, "ctx_len": 2048}),
    ("--peft lora --train_parts [\"time\",\"ln\"]", {"train_parts": ["time", "ln"]}),                # the README's form, as a shell leaves it: [time,ln]
    ("--peft lora --train_parts []", {"train_parts": None}),
    ("--peft lora --quant 4bit", {"quant": "fp4"}),
    ("--peft lora --quant nf4", {"quant": "nf4"}),
    ("--micro_bsz 8 --epoch_steps 1000 --epoch_count 3 --epoch_save 1", {"micro_bsz": 8, "accumulate": 1, "max_steps": 3000, "save_steps": 1000}),
    ("--micro_bsz 2 --epoch_steps 1000 --epoch_count 1 --devices 4 --accumulate_grad_batches 5", {"micro_bsz": 2, "accumulate": 20, "max_steps": 50, "devices": 4}),
    ("--peft lora --peft_config '{\"r\":8}' --epoch_steps 1001 --micro_bsz 10 --epoch_count 2", {"max_steps": 202}),       # documents: 101 batches an epoch
    ("", {"lr_init": 6e-4, "lr_final": 1e-5, "lr_schedule": "exp", "warmup_steps": 0, "ctx_len": 1024, "micro_bsz": 12, "max_steps": 500_000, "grad_cp": False, "l2wrap": 1e-4, "eval_split": 0.0}),
    ("--lr_init=1e-4 --lr-final 1e-6", {"lr_init": 1e-4, "lr_final": 1e-6}),
    ("--lr_init 1 --lr_init 2", {"lr_init": 2.0}),
    ("--lr_schedule cos --lr_final 0", {"lr_schedule": "cos", "lr_final": 0.0}),
    ("--lr_schedule wsd --lr_final 1e-5", {"lr_schedule": "cos", "lr_final": 0.0, "warmup_steps": 100}),
    ("--layerwise_lr 0 --weight_decay 0.01 --grad_cp 1 --random_seed 7", {"layerwise_lr": False, "weight_decay": .01, "grad_cp": True, "seed": 7}),
    ("--peft lora --precision tf32 --strategy deepspeed_stage_2_offload", {"precision": "fp32", "strategy": "deepspeed_stage_2_offload"}),
    ("--precision bf16", {"precision": None}),
    ("--peft lora --precision bf16 --accelerator cpu", {"precision": "bf16", "device": "cpu"}),
    ("--proj_dir out/a/b", {"output": "out/a", "name": "b"}),
    ("--wandb mine", {"log_with": "wandb"}),
    ("--data_type binidx --data_file pair --dataload get --magic_prime 101", {"dataload": "get", "magic_prime": 101, "loss_mask": "none", "long": None}),
    ("--data_type binidx --data_file pair --dataload only --loss_mask pad", {"dataload": "only", "loss_mask": "pad"}),
    ("--data_type binidx --data_file pair --dataload pad --loss_mask qa", {"dataload": "pad", "loss_mask": "qa", "mask_id": None}),
    ("--data_type binidx --data_file pair --dataload pad --loss_mask se --mask_id '{\"mask0\":\"a\",\"mask1\":\"b\"}'", {"mask_id": {"mask0": "a", "mask1": "b"}}),
    ("--data_type sft --data_file owner/name --sft_field query response --sft_split train[:9]", {"data": "hf://datasets/owner/name", "sft_field": ["query", "response"], "sft_split": "train[:9]", "template": "alpaca", "long": "cut"}),
    ("--data_type sft --data_file data/rows.json", {"data": "data/rows.json"}),
])
def test_flags_become_what_they_did(flags, expected):
    found = converted(flags).settings
    assert {name: found.get(name) for name in expected} == expected


def test_defaults_that_differ_from_ours_are_told():
    found = converted("--peft lora --r 3")
    notes = "\n".join(found.notes)
    for name, value in found.settings.items():
        if value != Config.model_fields[name].default and name not in ("model", "data", "peft"): assert name in notes, name
    assert "lr_init = 0.0006" in notes and "2e-4 for LoRA" in notes
    assert all(name in Config.model_fields for name in found.settings)


def test_each_flag_of_rwkv_peft_is_known_once():
    assert not set(SEED) & set(NOT_SET)
    for flag in NOT_SET: assert any(f"--{flag}" in note and "no such flag" not in note for note in converted(f"--{flag} 1").notes), flag


@pytest.mark.parametrize("flags", ["--peft lora", "--peft bone --bone_config '{\"bone_r\":8}' --data_type binidx --data_file pair --dataload pad --loss_mask pad --precision bf16 --strategy deepspeed_stage_1",
                                   "--peft disha --disha_config '{\"mode\":\"bat\",\"r\":8}' --op cuda", "--peft pissa --quant nf4", "--peft lisa", "", "--train_type state", "--train_type infctx --peft lora", "--peft miss --peft_config '{\"r\":8}'",
                                   "--peft adalora --peft_config '{\"init_r\":12}'", "--data_type sft --sft_field a b", "--data_type binidx --data_file pair --dataload get --magic_prime 11", "--data_type binidx --data_file pair --loss_mask se"])
def test_the_settings_are_settings_of_a_run(flags, tmp_path, monkeypatch):
    "`Config` takes them, from Python and from the TOML."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "pair.bin").write_bytes(b"")
    found = converted(flags)
    (tmp_path / "run.toml").write_text(script_to_toml(found), encoding="utf-8")
    assert Config.from_toml("run.toml").given == Config(**found.settings).given


def test_python_is_no_script():
    assert not is_script("model = 'rwkv7-tiny'\nr = 4") and not is_script("data = '''\n--load_model a'''\n") and not is_script("data = 'train.py'; r = 4") and not is_script("")
    assert is_script(SHELL) and is_script("  --load_model a") and is_script("load_model=a\npython3 -u train.py --x") and is_script("# why\n--peft lora")


# ---------------------------------------------------------------- the command

@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "User: {i} + 1?\\n\\nAssistant: {i + 1}"}}\n' for i in range(6)))
    (tmp_path / "run.sh").write_text(f"r=4\npython train.py {LEAST} --proj_dir out/mine --micro_bsz 2 --epoch_steps 2 --epoch_count 1 \\\n --peft bone --bone_config '{{\"bone_load\":\"\",\"bone_r\":4}}' --n_layer 2 --lr_init 1e-3 --ctx_len 64\n")
    return tmp_path


def command(*words):
    with pytest.raises(SystemExit) as left: main(list(words))
    return left.value.code


def test_convert_then_tune(rows, capsys):
    assert command("convert", "run.sh", "-o", "run.toml") == 0
    said = capsys.readouterr()
    assert said.out == "" and "--n_layer" in said.err and "before `rwkv-peft tune" not in said.err
    assert command("convert", "run.sh", "-o", "run.toml") == 2 and "is there already" in capsys.readouterr().err
    assert command("tune", "run.toml") == 0
    assert "mine: done, step 2 of 2" in capsys.readouterr().out and (rows / "out/mine/adapter").is_dir()


def test_convert_prints_and_names_what_is_missing(rows, capsys):
    (rows / "rows.jsonl").unlink()
    assert command("convert", "run.sh") == 0
    said = capsys.readouterr()
    assert tomllib.loads(said.out)["r"] == 4 and "rows.jsonl" in said.err.splitlines()[-1]
    (rows / "bad.sh").write_text("python train.py --load_model $X\n")
    assert command("convert", "bad.sh") == 2 and "bad.sh: line 1: $X is not assigned" in capsys.readouterr().err
    (rows / "bad.sh").write_bytes(b"\xff\xfe\x00")
    assert command("convert", "bad.sh") == 2 and "can't be read as text" in capsys.readouterr().err


# ---------------------------------------------------------------- JSON, and texts for others

@pytest.mark.parametrize("flags, words", [
    ("--peft lora --lora_config '{\"r\":4,\"alpha\":64}'", ["'r' is left out", "did you mean 'lora_r'", "'alpha' is left out", "did you mean 'lora_alpha'"]),
    ("--peft pissa --pissa_config '{\"pissa_rr\":4}'", ["'pissa_rr' is left out", "did you mean 'pissa_r'"]),
    ("--peft lisa --lisa_config '{\"layers\":4}'", ["'layers' is left out"]),
    ("--loss_mask se --mask_id '{\"mask2\":\"1\"}'", ["'mask2' is left out"]),
])
def test_an_unknown_key_is_named(flags, words):
    found = converted(flags)
    assert all(any(w in note and note.startswith("line 1: --") for note in found.notes) for w in words), found.notes
    assert "mask2" not in str(found.settings)


@pytest.mark.parametrize("flags, words", [
    ("--peft lora --lora_config '{\"lora_r\":\"8\"}'", "--lora_config: lora_r should be a whole number, not \"8\""),
    ("--peft lora --lora_config '{\"lora_alpha\":null}'", "--lora_config: lora_alpha should be a number, not null"),
    ("--peft lora --lora_config '{\"lora_r\":true}'", "lora_r should be a whole number, not true"),
    ("--peft pissa --pissa_config '{\"pissa_r\":null}'", "--pissa_config: pissa_r"),
    ("--peft lisa --lisa_config '{\"lisa_k\":\"x\"}'", "--lisa_config: lisa_k"),
    ("--peft bone --bone_config '{\"bone_r\":null}'", "r=None must be a whole number"),
    ("--peft lora --peft_config '{\"lora_alpha\":[]}'", "--peft_config: lora_alpha should be a number, not []"),
    ("--loss_mask se --mask_id '{\"mask0\":1}'", "--mask_id: mask0 should be a text, not 1"),
])
def test_a_value_of_another_type_is_refused_with_its_line(flags, words):
    said = refusal(f"\npython train.py {LEAST} {flags}")
    assert said.startswith("line 2: ") and words in said, said


def test_a_text_for_another_command_holds_no_flags():
    "bash is the oracle again: what python gets."
    script = f"""cat > x <<EOF
--lr_init 1
it's "open
EOF
cat <<-'END' > y
\t--load_model zzz
\tEND
python train.py {LEAST} --lr_init 2
"""
    stand_in = 'python() { for word in "$@"; do printf "%s\\0" "$word"; done; }; cat() { :; }\n'
    told = subprocess.run(["bash", "-c", stand_in + script.replace("> x", "").replace("> y", "")], capture_output=True, check=True).stdout.decode().split("\0")[1:-1]
    flags, notes = read_flags(script)
    assert [word for name, (_, words) in flags.items() for word in (f"--{name}", *words)] == told and flags["lr_init"] == (8, ["2"])
    assert any("line 2: what stands up to EOF" in n for n in notes) and any("line 6: what stands up to END" in n for n in notes)
    inside = read_script(f"sbatch <<EOF\n#!/bin/sh\npython train.py {LEAST} --lr_init 3\nEOF\n")      # a document that trains is read
    assert inside.settings["lr_init"] == 3 and inside.lines["lr_init"] == 3
