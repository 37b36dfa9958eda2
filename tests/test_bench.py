"""What the benchmarks measure with, and `fastlm bench model` on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlm
import fastlm.nn
from fastlm.bench import case as cases
from fastlm.bench import main, measure, model
from fastlm.bench.case import Case, Race
from fastlm.bench.tokens import zipf_tokens

needs_peak = pytest.mark.skipif(
    not measure.has_peak(), reason="this system does not let a process reset its peak memory"
)
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CASES = [
    Case(
        op="use_backend",  # any public name
        name="square",
        make=lambda device: (torch.randn(500, 1000, device=device),),
        ours=lambda x: x * x,
        plain=lambda x: x**2,
    ),
    Case(
        op="use_backend",
        name="sums",
        make=lambda device: (torch.randn(500, 1000, device=device),),
        ours=lambda x: (2 * x).exp().sum(),
        plain=lambda x: x.sum(),
    ),
]


def test_spread_and_geometric_mean() -> None:
    found = measure.spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.low, found.median, found.high, found.relative) == (2.0, 3.0, 4.0, 2 / 3)
    assert measure.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_zipf_tokens_are_in_range_repeatable_and_skewed() -> None:
    tokens = zipf_tokens(5000, 100, seed=1)
    assert tokens.dtype == "int64" and tokens.min() >= 0 and tokens.max() < 100
    assert (tokens == zipf_tokens(5000, 100, seed=1)).all()
    assert (tokens != zipf_tokens(5000, 100, seed=2)).any()
    counts = torch.bincount(torch.from_numpy(tokens), minlength=100)
    assert counts[:10].sum() > 3 * counts[50:60].sum()


def test_a_race_runs_every_side_in_every_round_in_rotating_order() -> None:
    ran: list[str] = []
    sides = {name: lambda name=name: ran.append(name) for name in ("ours", "a", "b")}
    race = Race(sides, rounds=3)
    for _ in range(race.rounds):
        race.run_until("ours")
        race.run("ours")
    race.run_until("the end")
    assert ran == ["ours", "a", "b", "a", "b", "ours", "b", "ours", "a"]
    assert all(len(seconds) == 3 for seconds in race.seconds.values())


def test_share_of_the_binding_ceiling() -> None:
    case = Case("op", "name", None, None, None, flops=100.0, traffic=1.0)  # type: ignore[arg-type]
    race = Race({"ours": print, "GEMM": print, "copy": print}, rounds=1)
    race.seconds = {"ours": [4.0], "GEMM": [1.0], "copy": [1.0]}
    # 100 FLOPs at 50 a second take 2 s of the 4
    limits = {"GEMM": (print, 50.0), "copy": (print, 1.0)}
    assert cases.share(case, race, limits) == ("GEMM", 0.5)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda path: path.stem)
def test_a_process_that_measures_memory_loads_every_file(path: Path) -> None:
    if "CASES" in path.read_text("utf-8"):
        assert all(isinstance(case, Case) for case in cases.load_cases(str(path)))


def test_a_wrong_result_is_not_timed() -> None:
    case = CASES[0]
    cases.verify(case, case.make("cpu"))
    wrong = Case(case.op, "wrong", case.make, lambda x: x * x * 1.01, case.plain)
    with pytest.raises(AssertionError, match="output 0"):
        cases.verify(wrong, wrong.make("cpu"))


def test_an_op_that_is_not_there_is_named() -> None:
    case = CASES[0]
    assert case.missing() is None
    missing = Case("flux_capacitor", "x", case.make, case.ours, case.plain)
    assert missing.missing() == "not in this build: fastlm.flux_capacitor"


@needs_peak
def test_peak_memory_is_what_a_step_holds_beyond_inputs_and_results() -> None:
    """exp(2 x) holds one tensor of the size of x beside the gradient, a plain sum none."""
    case, size = CASES[1], 500 * 1000 * 4
    ours, plain = (cases.peak_memory(__file__, case, side) for side in ("ours", "plain"))
    assert ours is not None and 0.7 * size < ours < 2.2 * size
    assert plain is not None and plain < 0.3 * size


def test_held_bytes_counts_a_storage_once() -> None:
    a = torch.zeros(10)
    assert measure.held_bytes({"a": [a, a[2:]], "b": (torch.zeros(5), 3)}) == 60


@needs_peak
def test_reset_peak() -> None:
    """In a fresh process, as benchmarks use it: a long-lived one has free memory resident."""
    code = (
        "import torch\n"
        "from fastlm.bench import measure\n"
        "measure.return_freed_memory()\n"
        "block = torch.ones(32 << 18)\n"
        "del block\n"
        "measure.reset_peak()\n"
        "before = measure.peak()\n"
        "block = torch.ones(32 << 18)\n"
        "assert measure.peak() - before > 30 << 20"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_table_has_one_line_a_case_and_a_mean() -> None:
    row = {
        "seconds": {"ours": {"median": 0.002, "low": 0.001, "high": 0.003}},
        "times": {"plain": {"median": 2.0}},
        "group": "g",
        "reach": ">= 1.8",
    }
    other = {**row, "times": {"plain": {"median": 8.0}}}
    lines = cases.table({"a": row, "b": other, "c": {"note": "not in this build: fastlm.c"}})
    assert len(lines) == 5
    assert lines[1].split() == ["a", "2", "100%", "2.00", "-", "-", "-", "-", ">=", "1.8"]
    assert lines[3].endswith("not in this build: fastlm.c")
    assert "4.00" in lines[4] and "least 2.00" in lines[4]


def test_flops_of_the_plain_model() -> None:
    # a head of 2 x 3 on one row, and the two GRU products of 2 x 6, each done three times
    assert model.flops(1, 1, 3, 2, 1.0) == 3 * 2 * (2 * 3 + 2 * 6 + 2 * 6)


TINY = ["model", "--batch", "2", "--seq", "4", "--vocab", "50", "--hidden", "8", "--steps", "2"]


@pytest.mark.skipif(
    not hasattr(fastlm, "linear_cross_entropy") or not hasattr(fastlm.nn, "EmbeddingGRU"),
    reason="not in this build: fastlm.linear_cross_entropy or fastlm.nn.EmbeddingGRU",
)
def test_bench_model_agrees_and_reports(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--threads", "1", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert list(result["variants"]) == list(model.VARIANTS)
    ours = result["variants"]["fastlm, fused Adam"]
    assert ours["loss_difference"] <= model.LOSS_TOLERANCE
    assert ours["tokens_per_second"] > 0 and set(ours["phase_seconds"]) == set(model.PHASES)
    text = model.report(result)
    assert "share of the floor" in text and "GFLOP/s measured between the steps" in text


def test_bench_rejects_bad_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["model", "--steps", "0"])
    assert stopped.value.code == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err
