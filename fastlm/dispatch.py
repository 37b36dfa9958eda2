"""Which implementation of an op runs on a call, and why the others do not.

Every torch op of fastlm asks `select` once per call. A backend says no with a reason:
`unavailable` holds for the whole process (not built, no GPU), `refuses` reads shapes, dtypes and
strides of one call.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .second_order import transformed

# tried in this order; "torch" is PyTorch's own fused op, where it is the fastest
BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")

NOT_PROVEN = "no GPU run has proven it yet; force it with fastlm.use_backend"


def _takes_all(**_: object) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One backend of one op. A reason is a short clause; None means no objection."""

    forward: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    devices: tuple[str, ...]
    unavailable: str | None
    refuses: Callable[..., str | None]
    proven: bool  # False: takes calls only when forced


_PLAIN = (Tensor, torch.nn.Parameter)
_OPS: dict[str, dict[str, Implementation]] = {}
# by (op, "forward" or "backward"): those that may take a call which asks for no backend
_usual: dict[tuple[str, str], list[tuple[Implementation, Callable[..., Any]]]] = {}


class _Here(threading.local):
    """Of one thread: what `explain` has heard so far."""

    trace: list[Explanation] | None = None


_here = _Here()


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_FROM_ENVIRONMENT = _checked(os.environ.get("FASTLM_BACKEND") or None, "FASTLM_BACKEND")
_forced = _FROM_ENVIRONMENT
# the blocks of `use_backend` that are open, the latest last
_blocks: list[list[str | None]] = []
_blocks_lock = threading.Lock()


def register(
    op: str,
    backend: str,
    forward: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    unavailable: str | None = None,
    refuses: Callable[..., str | None] = _takes_all,
    proven: bool = True,
) -> None:
    """Add one backend of an op. `forward` and `backward` take the torch op's arguments in order;
    `refuses` takes them by name and must read metadata only."""
    _checked(backend, f"register({op!r}): backend")
    _usual.clear()
    _OPS.setdefault(op, {})[backend] = Implementation(
        forward, backward, devices, unavailable, refuses, proven
    )


def device_type(named: dict[str, Any]) -> str:
    for value in named.values():
        if isinstance(value, torch.Tensor):
            return value.device.type
    return "cpu"


def _objection(
    op: str, which: str, backend: str, named: dict[str, Any], forced: bool
) -> str | None:
    impl = _OPS[op].get(backend)
    if impl is None:
        return "not written"
    if impl.unavailable:
        return impl.unavailable
    if getattr(impl, which) is None:
        return f"has no {which}"
    if not impl.proven and not forced:
        return NOT_PROVEN
    device = device_type(named)
    if device not in impl.devices:
        return f"does not run on {device}"
    return impl.refuses(**named)


def _usual_of(op: str, which: str) -> list[tuple[Implementation, Callable[..., Any]]]:
    """Without those that refuse every call of this process: to ask them takes time."""
    found = _usual.get((op, which))
    if found is None:
        backends = (_OPS[op].get(name) for name in BACKENDS)
        found = [
            (impl, call)
            for impl in backends
            if impl is not None and impl.proven and not impl.unavailable
            if (call := getattr(impl, which)) is not None
        ]
        _usual[op, which] = found
    return found


def select(op: str, which: str, named: dict[str, Any]) -> Callable[..., Any]:
    """The implementation for this call; `which` is "forward" or "backward"."""
    forced = _forced
    if forced is None and _here.trace is None:
        device = device_type(named)
        for impl, call in _usual_of(op, which):
            if device in impl.devices and impl.refuses(**named) is None:
                return call
    if _here.trace is not None:
        _here.trace.append(_explain(op, which, named, forced))
    for backend in (forced,) if forced else BACKENDS:
        if _objection(op, which, backend, named, forced is not None) is None:
            return getattr(_OPS[op][backend], which)
    why = "".join(
        f"\n  {b}: {_objection(op, which, b, named, forced is not None)}"
        for b in ((forced,) if forced else BACKENDS)
    )
    raise RuntimeError(f"fastlm.{op}: no backend takes this {which} call{why}")


def forced() -> str | None:
    """The backend that `use_backend` or FASTLM_BACKEND asks for."""
    return _forced


def undisturbed() -> bool:
    """No backend is asked for, and nobody wants to know which one runs."""
    return _forced is None and _here.trace is None


def direct(*tensors: Tensor | None) -> bool:
    """Whether a call may go around the torch op, which takes longer than little work does: plain
    tensors on a CPU, no backend asked for, and no trace, mode or transform that would see the op.
    `explain` must still be told: `undisturbed`, or `note`."""
    for x in tensors:
        if x is not None and not (type(x) in _PLAIN and x.is_cpu):
            return False
    return (
        _forced is None
        and not torch.compiler.is_compiling()
        and not transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def preferred(op: str, which: str, named: dict[str, Any]) -> str | None:
    """The backend that would run this call, without running it."""
    return _explain(op, which, named, _forced).chosen


def note(op: str, chosen: str, others: dict[str, str]) -> None:
    """For `explain`: a choice made above the torch op, with the reasons against the others."""
    if _here.trace is not None:
        _here.trace.append(Explanation(op, "forward", {**others, chosen: None}, chosen))


@dataclass(frozen=True)
class Explanation:
    """What every backend says to one call of one torch op, and which one runs."""

    op: str
    which: str
    answers: dict[str, str | None]
    chosen: str | None

    def __str__(self) -> str:
        width = max(map(len, self.answers))
        lines = [f"{self.op} {self.which}: {self.chosen or 'no backend takes it'}"]
        for backend, reason in self.answers.items():
            mark = "runs" if backend == self.chosen else (reason or "would take it")
            lines.append(f"  {backend.ljust(width)}  {mark}")
        return "\n".join(lines)


def _explain(op: str, which: str, named: dict[str, Any], forced: str | None) -> Explanation:
    answers = {b: _objection(op, which, b, named, b == forced) for b in BACKENDS}
    order = (forced,) if forced else BACKENDS
    chosen = next((b for b in order if answers[b] is None), None)
    return Explanation(op, which, answers, chosen)


class Explanations(tuple[Explanation, ...]):
    """One entry per torch op that the call ran, in order; prints as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "plain PyTorch: no op of fastlm runs"


def explain(op: str, *args: Any, **kwargs: Any) -> Explanations:
    """Run the public function `op` once and say which backend took each step, and why not others.

    Args:
        op: the public name, as in `fastlm.explain("cross_entropy", logits, target)`.
        *args, **kwargs: the arguments of that call. It really runs, and saves for a backward pass
            if it would: that can decide who is faster.

    Returns:
        One `Explanation` per torch op that ran; the call's result is dropped.

    Raises:
        ValueError: fastlm has no function of that name. Else what the call itself raises, except
        that a call which no backend takes is explained instead.
    """
    import fastlm

    function = getattr(fastlm, op, None)
    if op not in fastlm.__all__ or not callable(function):
        raise ValueError(f"fastlm.explain: op must be a public function of fastlm, got {op!r}")
    before, trace = _here.trace, list[Explanation]()
    _here.trace = trace
    try:
        try:
            function(*args, **kwargs)
        except RuntimeError:
            if not trace or trace[-1].chosen is not None:
                raise
        return Explanations(trace)
    finally:
        _here.trace = before


class Report(dict[str, dict[str, str]]):
    """{op: {backend: state}}; prints as a table."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("op", *BACKENDS)]
        rows += [(op, *(row[b] for b in BACKENDS)) for op, row in self.items()]
        notes = sorted({c for r in rows[1:] for c in r[1:] if len(c) > 12})
        short = {reason: f"no [{i}]" for i, reason in enumerate(notes, 1)}
        cells = [tuple(short.get(c, c) for c in row) for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        return "\n".join(lines + [f"[{i}] {reason}" for i, reason in enumerate(notes, 1)])


def _state(impl: Implementation | None) -> str:
    if impl is None:
        return "-"
    if impl.unavailable:
        return impl.unavailable
    return "ready" if impl.proven else NOT_PROVEN


def backends() -> Report:
    """The state of every backend of every op: "ready", "-" (not written) or why it is off."""
    return Report(
        {op: {b: _state(impls.get(b)) for b in BACKENDS} for op, impls in sorted(_OPS.items())}
    )


def ready(op: str, device: str = "cpu") -> list[str]:
    """The backends of an op that can run on a device here, the unproven ones included."""
    impls = ((b, _OPS[op].get(b)) for b in BACKENDS)
    return [b for b, i in impls if i and not i.unavailable and device in i.devices]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op inside the block, or None for the usual order.

    "cpu" is the compiled kernels and products, of which an element depends on its row and its
    column alone; the usual order takes the library's products where those are faster.
    A call that the forced backend cannot take raises RuntimeError with the reason. The setting
    holds for the whole process, because autograd runs backward passes on threads of its own.
    """
    global _forced
    block = [_checked(name, "fastlm.use_backend: name")]
    with _blocks_lock:
        _blocks.append(block)
        _forced = name
    try:
        yield
    finally:
        with _blocks_lock:
            # not always the last: blocks of several threads may overlap
            _blocks[:] = [other for other in _blocks if other is not block]
            _forced = _blocks[-1][0] if _blocks else _FROM_ENVIRONMENT
