"The benchmarks: what a table and its file hold, the bars' numbers and exit codes, products counted against a formula, peers that agree or are listed."
import json
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rwkv_peft import RWKV, cli
from rwkv_peft.bench.check import BARS, check_table, save_figure, verdicts
from rwkv_peft.bench.generate import bench_generate, generate_figures, generate_table
from rwkv_peft.bench.peers import PEERS, absent_peers, bench_peer_operators, bench_peer_steps, peers_table
from rwkv_peft.bench import peers as peers_page
from rwkv_peft.bench.step import bench_variants, roofline, step_config
from rwkv_peft.bench.timing import interleaved
from rwkv_peft.bench.wkv import bench_growth, bench_wkv, growth_table, products, projections, wkv_table


def shell(capsys, *words):
    with pytest.raises(SystemExit) as end: cli.main(list(words))
    return end.value.code, *capsys.readouterr()


def flops(run):
    with FlopCounterMode(display=False) as counter: run()
    return counter.get_total_flops()


def test_the_roofline_is_the_frozen_products_and_nothing_else():
    c, T = step_config(small=True), 16
    layer = 4 * c.n_embd ** 2 + 2 * c.n_embd * c.dim_ffn
    assert flops(roofline(RWKV(c), T)) == 2 * 2 * T * (c.n_layer * layer + c.n_embd * c.vocab_size)
    assert flops(products(projections(64), T)) == 2 * 2 * T * 12 * 64 ** 2


def test_turns_are_taken_in_order():
    seen = []
    taken = interleaved({n: lambda n=n: seen.append(n) for n in "abc"}, 3)
    assert "".join(seen) == "abc" * 4 and all(len(s) == 3 for s in taken.values())


def test_wkv_result_and_table():
    result = bench_wkv(T=16, H=2, N=16, repeats=3)
    for row in result["rows"]: assert row["over_projections"] == pytest.approx(row["both_ms"] / result["projections_ms"])
    assert {"loop", "chunk"} <= {r["backend"] for r in result["rows"]} and "processors busy" in wkv_table(result)
    with pytest.raises(ValueError, match="version 5, 6 or 7"): bench_wkv(T=4, version="4")


def test_growth_compares_the_longest_with_the_shortest():
    result = bench_growth(lengths=[8, 32], heads=[1], repeats=3, N=16, T=8)
    ms = {r["size"]: r["both_ms"] for r in result["rows"] if r["backend"] == "chunk" and r["along"] == "tokens"}
    assert result["per_token"]["chunk"] == pytest.approx(ms[32] / 32 / (ms[8] / 8)) and "heads" in growth_table(result)


def test_checkpointing_keeps_the_gradient():
    row = bench_variants(T=16, repeats=1, small=True, kinds=["checkpointed"])["rows"][1]
    assert row["kind"] == "checkpointed" and row["cosine"] > 1 - 1e-9


def test_bars_are_those_agreed():
    assert {b.name: (b.bound, b.most, b.stretch) for b in BARS if b.name != "wkv7_linear"} == {
        "wkv7_over_projections": (.22, True, None), "wkv7_over_chunkwise": (40, False, None), "wkv6_over_recurrent": (25, False, None),
        "step_over_roofline": (1.25, True, 1.1), "step_over_rwkvtune": (12, False, 20), "step_over_rwkv7_hf": (12, False, 20),
        "int8_fast_over_roofline": (.8, True, .5), "int8_fast_cosine": (.995, False, None), "peak_mib": (900, True, 450), "peak_checkpointed_mib": (560, True, 250),
        "decode_over_package": (1, False, None), "decode_bandwidth": (.85, False, None), "int8_over_package": (2.5, False, None),
        "batch8_over_one": (4, False, None), "prefill_over_package": (1.5, False, None),
        "data_mb_per_second": (20, False, None), "data_memory_growth": (1.25, True, None),
        "ui_share": (.01, True, None), "ui_slower": (.05, True, None), "ui_stop_seconds": (.5, True, None), "ui_stop_steps": (1, True, None), "ui_open_seconds": (1, True, None), "ui_slider_ms": (100, True, None)}


@pytest.mark.parametrize("bar", BARS, ids=lambda b: b.name)
def test_each_bar_passes_at_its_bound_and_fails_beyond(bar):
    beyond = bar.bound * (1.001 if bar.most else .999)
    at = lambda x: next(r["passed"] for r in verdicts({bar.name: x}) if r["name"] == bar.name)
    assert at(bar.bound) is True and at(beyond) is False


def test_what_was_not_measured_is_said_and_a_stranger_refused():
    assert "not measured" in check_table(verdicts({}, "memory"))
    with pytest.raises(ValueError, match="wkv9"): verdicts({"wkv9": 1.})


@pytest.mark.parametrize("peak, code, word", [(900., 0, "holds"), (901., 1, "FAILS")])
def test_check_ends_with_1_when_a_bar_fails_and_keeps_its_files(capsys, monkeypatch, tmp_path, peak, code, word):
    module = ModuleType("rwkv_peft.bench.peaks")
    module.__dict__.update(bench_memory=lambda **k: k, memory_table=lambda r: "a table", memory_figures=lambda r: {"peak_mib": peak})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ended, out, _ = shell(capsys, "bench", "memory", "--check", "--json", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.png"))
    kept = json.loads((tmp_path / "a.json").read_text())
    assert ended == code and word in out and "a table" in out
    assert kept["results"]["memory"]["lengths"] == [512, 1024, 2048, 4096] and kept["machine"]["versions"]["torch"] == torch.__version__
    assert {r["name"]: r["measured"] for r in kept["check"]} == {"peak_mib": peak, "peak_checkpointed_mib": None}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_draws_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"): save_figure(verdicts({}), tmp_path / "a.png")


def test_fla_agrees_and_absent_peers_name_their_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rwkv7_hf", None)
    result = bench_peer_operators(T=32, H=2, repeats=1)
    assert {"ours", "fla recurrent", "fla chunkwise"} <= {r["name"] for r in result["rows"]} and all(r["difference"] < 1e-5 for r in result["rows"])
    assert PEERS["rwkv7-hf"][1] in result["absent"]["rwkv7-hf"] and PEERS["rwkv7-hf"][1] in peers_table(result)
    monkeypatch.setattr(peers_page.metadata, "distributions", lambda name: [])
    assert absent_peers() == {n: line for n, (_, line) in PEERS.items()}


def test_a_peer_that_disagrees_is_not_timed(monkeypatch):
    wrong = lambda r, w, k, v, a, b, state: (v * r.sum() * w.sum() * k.sum() * a.sum() * b.sum(), state)
    monkeypatch.setattr(peers_page, "peer_operators", lambda version: ({"wrong": wrong}, {}))
    with pytest.raises(RuntimeError, match="wrong differs"): bench_peer_operators(T=4, H=1, N=16, repeats=1)


def test_steps_of_peers_run_in_a_process_of_their_own():
    result = bench_peer_steps(T=16, repeats=2, small=True)
    assert result["rows"][0]["name"] == "ours" and result["rows"][0]["repeats"] == 2
    assert {r["name"] for r in result["rows"]} | set(result["absent"]) == {"ours", "rwkv7-hf", "rwkvtune"}


def test_generation_is_timed_beside_the_package():
    result = bench_generate(tokens=2, prompt=8, repeats=1, small=True)
    assert {"fp32", "batch 8", "prefill", "package", "package prefill"} <= {r["kind"] for r in result["rows"]}
    assert {"decode_over_package", "decode_bandwidth", "batch8_over_one", "prefill_over_package"} <= set(generate_figures(result)) and "GB/s" in generate_table(result)


@pytest.mark.parametrize("verb", ["wkv", "step", "generate", "memory"])
def test_every_verb_offers_the_same_three_options(capsys, verb):
    code, out, _ = shell(capsys, "bench", verb, "--help")
    assert code == 0 and all(option in out for option in ("--json", "--figure", "--check"))
