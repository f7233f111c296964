"The comparison of methods: a file that outlives an interrupt, runs that come out the same, figures that say no more than they can."
import json

import pytest
import torch

from rwkv_peft import RWKV, cli
from rwkv_peft.bench import methods as page
from rwkv_peft.bench.methods import ENTRIES, Task, apart, bench_methods, general_rows, methods_table, read_runs, run_method, summary, toy_task, write_runs
from rwkv_peft.data.records import Dataset


@pytest.fixture(scope="module")
def task():
    whole = toy_task()
    few = lambda data, n: Dataset(sorted(data, key=lambda e: len(e.tokens))[:n], data.tokenizer, data.facts)
    return Task(whole.model, few(whole.train, 24), few(whole.held_out, 4), few(whole.general, 2))


@pytest.fixture
def small(task, monkeypatch): monkeypatch.setattr(page, "toy_task", lambda: task)


def made(method, lr, losses, **more):
    return [{"method": method, "lr": lr, "seed": i, "steps": 4, "held_out": x, "general": 1.5 + i / 10, "numbers": 7, "bytes": {"weights": 2**20}, "prepare_s": 0., "seconds": 1., "place": 0} | more for i, x in enumerate(losses)]


def held(*runs): return {"facts": {"model": "m"}, "places": [], "before": {"held_out": 3., "general": 1.}, "runs": [r for part in runs for r in part]}


def test_an_interrupt_loses_one_run_and_what_is_held_is_not_run_again(small, tmp_path, monkeypatch):
    file, real, ran = tmp_path / "runs.json", page.run_method, []
    def breaking(*words):
        if len(ran) == 2: raise KeyboardInterrupt
        ran.append(words[:3])
        return real(*words)
    monkeypatch.setattr(page, "run_method", breaking)
    told = dict(names=["lora", "ln"], lrs=[1e-2], seeds=[0, 1], steps=1, file=file)
    with pytest.raises(KeyboardInterrupt): bench_methods(**told)
    kept = json.loads(file.read_text())
    assert [(r["method"], r["lr"], r["seed"]) for r in kept["runs"]] == ran == [("lora", 1e-2, 0), ("ln", 1e-2, 0)]
    monkeypatch.setattr(page, "run_method", real)
    said = []
    whole = bench_methods(**told, say=said.append)
    assert len(said) == 2 and whole["runs"][:2] == kept["runs"] and [(r["method"], r["seed"], r["place"]) for r in whole["runs"][2:]] == [("lora", 1, 1), ("ln", 1, 1)]
    assert json.loads(file.read_text()) == whole and [p.name for p in tmp_path.iterdir()] == ["runs.json"]
    assert whole["places"][0]["machine"]["versions"]["torch"] == torch.__version__ and set(whole["places"][0]) == {"commit", "machine"}
    before = file.read_bytes()
    assert bench_methods(**told, say=said.append) == whole and len(said) == 2 and file.read_bytes() == before


@pytest.mark.parametrize("name", ["lisa", "state", "lora-nf4"])
def test_a_run_comes_out_the_same_and_counts_its_numbers(task, name):
    one, other = (run_method(name, ENTRIES[name].lr, 3, 2, task) for _ in range(2))
    same = lambda run: {k: v for k, v in run.items() if k not in ("seconds", "prepare_s")}
    assert same(one) == same(other) and one["held_out"] > 0 and one["general"] > 0
    b, trained = one["bytes"], 4 * one["numbers"]
    assert b["gradients"] == trained and b["saved"] > 0 and b["optimizer"] >= (trained if name == "lisa" else 2 * trained) and (name == "lisa" or b["optimizer"] == 2 * trained)
    model = RWKV.load("rwkv7-tiny")
    plain = sum(p.nbytes for p in model.parameters())
    assert b["weights"] < plain if "nf4" in name else b["weights"] >= plain


def test_a_loss_that_is_not_finite_is_kept_and_not_chosen(task):
    run = run_method("full", 1e30, 0, 3, task)
    assert run["held_out"] is None and run["general"] is None and json.loads(json.dumps(run)) == run
    rows = summary(held(made("a", 1., [2., None]), made("a", .5, [2.5, 2.5])))
    assert [r["lr"] for r in rows] == [.5] and summary(held(made("a", 1., [None]))) == [] and "no run has ended" in methods_table(held(made("a", 1., [None])))


def test_summary_takes_the_rate_with_the_lowest_mean_among_those_with_all_seeds():
    rows = summary(held(made("a", 1., [2., 2.2, 2.4]), made("a", 2., [1.]), made("a", .5, [2.6, 2.8, 3.]), made("b", 1., [1.9])))
    assert [(r["method"], r["lr"], r["seeds"]) for r in rows] == [("b", 1., 1), ("a", 1., 3)]
    a, b = rows[1], rows[0]
    assert a["loss"] == pytest.approx(2.2) and a["loss_spread"] == pytest.approx(.2) and a["forgetting"] == pytest.approx(.6) and a["forgetting_spread"] == pytest.approx(.1)
    assert b["loss_spread"] is None and not apart(a, b) and not a["edge"] and "±0.200" in methods_table(held(made("a", 1., [2., 2.2, 2.4])))


def test_apart_means_more_than_two_spreads_of_both():
    row = lambda loss, spread: {"loss": loss, "loss_spread": spread}
    assert apart(row(1., .03), row(1.11, .04)) and not apart(row(1., .03), row(1.09, .04)) and not apart(row(1., None), row(9., .1))


def test_files_of_others_are_refused(small, tmp_path):
    file = tmp_path / "x.json"
    for text in ("{}", "[1]", "no json", '{"machine": {}, "results": {}, "check": []}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no runs of this benchmark"): bench_methods(["ln"], file=file)
        assert file.read_text() == text
    write_runs(held(made("a", 1., [2.])), file)
    assert read_runs(file) == held(made("a", 1., [2.]))
    with pytest.raises(ValueError, match="another task"): bench_methods(["ln"], file=file)


def test_general_prose_is_bundled_and_in_no_row_of_the_demo():
    rows = general_rows()
    assert len(rows) == 13 and {r["source"] for r in rows} == {"speeches", "novel"} and all(300 < len(r["text"]) <= 480 for r in rows) and len({r["name"] for r in rows}) == 13


def test_the_verb_runs_resumes_and_refuses(small, tmp_path, capsys):
    def shell(*words):
        with pytest.raises(SystemExit) as end: cli.main(["bench", "methods", *words])
        return end.value.code, *capsys.readouterr()
    words = ("--method", "ln", "--method", "state", "--lr", "0.01", "--seed", "4", "--steps", "1", "--json", str(tmp_path / "a.json"))
    code, out, err = shell(*words)
    assert code == 0 and "2 of 2" in err and "held-out" in out and len(json.loads((tmp_path / "a.json").read_text())["runs"]) == 2
    code, again, err = shell(*words)
    assert code == 0 and again == out and "of 2" not in err
    code, out, err = shell("--method", "loraa")
    assert code == 2 and out == "" and "loraa is not known: there are lora, " in err and "Traceback" not in err
