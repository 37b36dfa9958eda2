"""`pytest benchmarks/ --benchmark` times every case; without the flag each runs once, checked.

On top of pytest-benchmark: its own statistics and JSON hold our side of each case, `extra_info`
the whole row. The rows also go to benchmarks/results/<machine>.json, merged by case.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.bench import case as cases
from fastlm.bench import measure
from fastlm.bench.case import Case

RESULTS = Path(__file__).parent / "results"
THREADS = 2
ROUNDS = (5, 40)  # at least, at most
REPEAT_SECONDS = 2e-3  # a measurement shorter than this is repeated within the round

_rows = pytest.StashKey[dict[str, dict[str, Any]]]()
_started = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlm benchmarks")
    group.addoption(
        "--benchmark",
        action="store_true",
        dest="fastlm_benchmark",
        help="time the benchmarks; without it each runs once as a smoke test",
    )
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--no-memory", action="store_true", help="leave peak memory out")
    group.addoption(
        "--grid", action="store_true", help="every shape of the GRU, not the usual ones"
    )
    group.addoption(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="start no case later than this after the first; it is reported, not forgotten",
    )
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--threads", type=int, default=THREADS, help=f"CPU threads; default {THREADS}")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    config.stash[_rows] = {}
    if not hasattr(option, "benchmark_only"):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install pytest-benchmark")
    if option.fastlm_benchmark:
        option.benchmark_only = True
        # its table repeats ours; a comparison is only in its table
        if not (option.benchmark_compare or option.verbose > 0):
            option.benchmark_quiet = True
    elif not any(getattr(option, f"benchmark_{name}") for name in _TIMING_OPTIONS):
        option.benchmark_disable = True


_TIMING_OPTIONS = ("only", "enable", "skip", "json", "autosave", "save", "compare")


@pytest.fixture(autouse=True)
def _settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fixed seed and number of threads; the device must be there."""
    device = request.config.option.device
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.config.option.threads)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Keep the row of a case for the table and the results file."""

    def keep(case_id: str, row: dict[str, Any]) -> None:
        request.config.stash[_rows][case_id] = row

    return keep


@pytest.fixture
def race(
    request: pytest.FixtureRequest, benchmark: Any, record: Callable[[str, dict[str, Any]], None]
) -> Callable[[Case], None]:
    """Check a case, then time it against its baselines."""
    option = request.config.option

    def run(case: Case) -> None:
        started = request.config.stash.setdefault(_started, time.monotonic())
        reason = case.missing()
        if reason is None and time.monotonic() - started > option.time_limit:
            reason = "not timed: the time limit was reached"
        if reason is not None:
            record(case.id, {"note": reason})
            pytest.skip(reason)
        args = case.make(option.device)
        cases.verify(case, args)
        if benchmark.disabled:
            benchmark.pedantic(cases.step(case, case.ours, args))
            return
        sides = cases.make_sides(case, args, compiled=not option.no_compile)
        dtype = next(
            (a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()),
            torch.float32,
        )
        limits = cases.ceilings(case, dtype, option.device)
        timed = _race(benchmark, sides, limits, option)
        row = cases.row(case, timed, limits)
        if not option.no_memory:
            row["extra_bytes"] = _memory(request, case, sides, option.device)
        benchmark.extra_info.update(row)
        record(case.id, row)

    return run


def _race(benchmark: Any, sides: dict[str, Any], limits: dict[str, Any], option: Any) -> Any:
    """Time all sides in turn; ours inside pytest-benchmark's round, the others between rounds."""
    everything = {**sides, **{name: call for name, (call, _) in limits.items()}}
    for call, _ in limits.values():
        call()
    once = {name: measure.seconds(call, option.device) for name, call in everything.items()}
    repeat = max(1, int(REPEAT_SECONDS / once["ours"]))
    budget = float(option.benchmark_max_time) * len(everything)
    rounds = int(budget / (repeat * sum(once.values())))
    timed = cases.Race(everything, min(max(rounds, ROUNDS[0]), ROUNDS[1]), option.device, repeat)
    benchmark.pedantic(
        lambda: timed.run("ours"),
        setup=lambda: timed.run_until("ours"),
        rounds=timed.rounds,
    )
    timed.run_until("the end")
    return timed


def _memory(
    request: pytest.FixtureRequest, case: Case, sides: dict[str, Any], device: str
) -> dict[str, int | None]:
    if device == "cuda":
        return {side: measure.extra_memory(sides[side], device) for side in ("ours", "plain")}
    path = str(request.path)
    return {side: cases.peak_memory(path, case, side) for side in ("ours", "plain")}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    option = config.option
    torch.set_num_threads(option.threads)
    machine = measure.machine(option.device)
    terminalreporter.section(
        f"{machine['name']}, torch {machine['torch']}, {option.threads} threads, "
        f"kernels: {machine['cpu_isa'] if option.device == 'cpu' else option.device}"
    )
    for line in cases.table(rows):
        terminalreporter.write_line(line)
    timed = {case_id: row for case_id, row in rows.items() if "note" not in row}
    if option.fastlm_benchmark and timed:
        # the default number of threads in one file, another one in a file of its own
        threads = "" if option.threads == THREADS else f"-threads-{option.threads}"
        path = RESULTS / f"{machine['slug']}{threads}.json"
        _merge(path, machine, timed)
        terminalreporter.write_line(f"{len(timed)} rows in {os.path.relpath(path)}")


def _merge(path: Path, machine: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Replace the rows that were measured now, keep all others; never leaves half a file."""
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for case_id, row in rows.items():
        known["cases"][case_id] = {**row, "measured": now, "machine": machine}
    known["machine"] = machine["name"]
    known["cases"] = dict(sorted(known["cases"].items()))
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(json.dumps(known, indent=1) + "\n")
    draft.replace(path)
