"""One benchmark case: ours and its baselines, checked, then timed in turn in one process."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlm
import fastlm.nn
from fastlm import testing

from . import measure

Call = Callable[..., Any]
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """What to time: `ours(*args)` against `plain(*args)`, with `args = make(device)`.

    Floating tensors in `args` get gradients, and a step is forward and backward, unless `backward`
    is off. The check is `fastlm.testing.check` (or that of the outputs alone), or `check(args)`
    where results are random. `flops` and `traffic` (bytes) are what the mathematics cannot avoid.
    """

    op: str
    name: str
    make: Callable[[str], Arguments]
    ours: Call
    plain: Call
    needs: tuple[str, ...] = ()  # public names that `ours` calls, when not `op` alone
    backward: bool = True
    compiles: bool = True  # torch.compile of plain, in reasonable time
    others: dict[str, Call] = field(default_factory=dict)
    check: Callable[[Arguments], None] | None = None
    flops: float = 0.0
    traffic: float = 0.0
    unit_count: int = 0  # tokens in one call, where tokens/s is what one asks for
    reach: str = ""  # what this case is to reach, in words
    group: str = ""  # cases of one group get a geometric mean

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def missing(self) -> str | None:
        """Why this build of fastlm cannot run the case, or None."""
        for name in self.needs or (self.op,):
            try:
                functools.reduce(getattr, name.split("."), fastlm)
            except AttributeError:
                return f"not in this build: fastlm.{name}"
        return None


def step(case: Case, call: Call, args: Arguments) -> Callable[[], Any]:
    """A call without arguments that does one step and returns outputs and gradients."""
    if not case.backward:

        def forward() -> Any:
            with torch.no_grad():
                return call(*args)

        return forward
    leaves = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    upstream: list[Tensor] = []

    def both() -> Any:
        result = call(*leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not upstream:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            for o in outputs:
                noise = torch.randn(o.shape, generator=generator, device=o.device)
                upstream.append(noise.to(o.dtype))
        return outputs, torch.autograd.grad(outputs, inputs, upstream)

    return both


def verify(case: Case, args: Arguments) -> None:
    """Raise AssertionError when ours is less accurate than plain PyTorch."""
    if case.check is not None:
        case.check(args)
    elif case.backward:
        testing.check(case.ours, case.plain, args)
    else:
        with torch.no_grad():
            testing.check(case.ours, case.plain, args)


@dataclass
class Race:
    """Seconds of every side in every round; sides run one after the other, the order rotating."""

    sides: dict[str, Callable[[], Any]]
    rounds: int
    device: str = "cpu"
    repeat: int = 1  # calls per measurement
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seconds = {name: [] for name in self.sides}
        names = list(self.sides)
        self._order = [
            names[(r + i) % len(names)] for r in range(self.rounds) for i in range(len(names))
        ]

    def run(self, name: str) -> None:
        call = self.sides[name]
        self.seconds[name].append(measure.seconds(call, self.device, self.repeat))

    def run_until(self, name: str) -> None:
        """Time the sides that are due before `name` is, or all that are left."""
        while self._order and self._order[0] != name:
            self.run(self._order.pop(0))
        if self._order:
            self._order.pop(0)

    def ratio(self, name: str, to: str) -> measure.Spread:
        """How many times as long as `to` each round of `name` took."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return measure.spread([a / b for a, b in pairs])


def ceilings(case: Case, dtype: torch.dtype, device: str) -> dict[str, tuple[Call, float]]:
    """{name: (what to time, its FLOPs or bytes)} for the limits that the case can run into."""
    sides: dict[str, tuple[Call, float]] = {}
    if case.flops:
        size = 1024 if device == "cpu" else 8192
        sides["GEMM"] = measure.gemm(size, size, size, dtype, device)
    if case.traffic:
        sides["copy"] = measure.copy(128 if device == "cpu" else 1024, device)
    return sides


def share(
    case: Case, race: Race, limits: dict[str, tuple[Call, float]]
) -> tuple[str, float] | None:
    """The ceiling that binds and the share of it that ours reaches, both from this race."""
    needed = {"GEMM": case.flops, "copy": case.traffic}
    shares = {
        name: needed[name] / amount * race.ratio(name, "ours").median
        for name, (_, amount) in limits.items()
    }
    return max(shares.items(), key=lambda item: item[1], default=None)


def row(case: Case, race: Race, limits: dict[str, tuple[Call, float]]) -> dict[str, Any]:
    """The result of a race as plain numbers."""
    baselines = [name for name in race.sides if name != "ours" and name not in limits]
    ours = measure.spread(race.seconds["ours"])
    result: dict[str, Any] = {
        "rounds": race.rounds,
        "calls_per_round": race.repeat,
        "seconds": {
            name: vars(measure.spread(race.seconds[name])) for name in ("ours", *baselines)
        },
        "times": {name: vars(race.ratio(name, "ours")) for name in baselines},
        "reach": case.reach,
        "group": case.group,
    }
    if case.unit_count:
        result["tokens_per_second"] = case.unit_count / ours.median
    if (limit := share(case, race, limits)) is not None:
        result["ceiling"] = {"name": limit[0], "share": limit[1]}
    return result


# ---- peak memory, in a fresh process forked from one that has imported torch and nothing more


def load_cases(path: str) -> list[Case]:
    """`CASES` of a benchmark file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks its module up
    spec.loader.exec_module(module)
    return module.CASES


def _measure_memory(path: str, case_id: str, side: str, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    case = next(c for c in load_cases(path) if c.id == case_id)
    args = case.make("cpu")
    call = case.ours if side == "ours" else case.plain
    measure.return_freed_memory()
    pipe.send(measure.extra_memory(step(case, call, args)))


def peak_memory(path: str, case: Case, side: str) -> int | None:
    """Bytes that a CPU step of `side` holds at once beyond inputs, outputs and gradients."""
    if not measure.has_peak():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastlm.bench.case"])
    receive, send = context.Pipe(duplex=False)
    arguments = (path, case.id, side, torch.get_num_threads(), send)
    process = context.Process(target=_measure_memory, args=arguments)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise RuntimeError(f"fastlm.bench: measuring the memory of {case.id} failed") from None
    finally:
        process.join()


def make_sides(
    case: Case, args: Arguments, *, compiled: bool = True
) -> dict[str, Callable[[], Any]]:
    """Ours first, then the baselines, each called once so that nothing is timed cold."""
    calls = {"ours": case.ours, "plain": case.plain, **case.others}
    if compiled and case.compiles:
        calls["compile"] = torch.compile(case.plain, dynamic=False)
    sides = {name: step(case, call, args) for name, call in calls.items()}
    for run in sides.values():
        run()
    return sides


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """One line per case, then the geometric mean of each group."""
    header = ("case", "ours ms", "spread", "x plain", "x compile", "others", "MB ours/plain")
    lines: list[tuple[str, ...]] = [(*header, "of ceiling", "to reach")]
    groups: dict[str, list[float]] = {}
    for case_id, result in rows.items():
        if "note" in result:
            lines.append((case_id, result["note"], *[""] * 7))
            continue
        lines.append((case_id, *_cells(result)))
        if result["group"] and "plain" in result["times"]:
            groups.setdefault(result["group"], []).append(result["times"]["plain"]["median"])
    for group, ratios in groups.items():
        if len(ratios) > 1:
            mean = f"{measure.geometric_mean(ratios):.2f}"
            worst = f"least {min(ratios):.2f}"
            lines.append((f"geometric mean: {group}", "", "", mean, "", worst, "", "", ""))
    notes = {line[0] for line in lines if not any(line[2:])}
    widths = [max(len(ln[i]) for ln in lines if ln[0] not in notes or i == 0) for i in range(9)]
    return ["  ".join(c.ljust(w) for c, w in zip(ln, widths, strict=True)).rstrip() for ln in lines]


def _cells(result: dict[str, Any]) -> Sequence[str]:
    ours, times = result["seconds"]["ours"], result["times"]
    spread = (ours["high"] - ours["low"]) / ours["median"]
    ratio = {name: f"{value['median']:.2f}" for name, value in times.items()}
    others = " ".join(f"{n} {r}" for n, r in ratio.items() if n not in ("plain", "compile"))
    memory = result.get("extra_bytes", {})
    shown = ["-" if (b := memory.get(s)) is None else f"{b / 1e6:.1f}" for s in ("ours", "plain")]
    limit = result.get("ceiling")
    return (
        f"{ours['median'] * 1e3:.3g}",
        f"{spread:.0%}",
        ratio.get("plain", "-"),
        ratio.get("compile", "-"),
        others or "-",
        "/".join(shown) if memory else "-",
        f"{limit['share']:.0%} {limit['name']}" if limit else "-",
        result["reach"],
    )
