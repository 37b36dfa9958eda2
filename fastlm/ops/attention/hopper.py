"""When the kernels of `gluon_kernels.py` take a call of the triton backend, and why not.

They are not a backend of their own: what they refuse runs in plain Triton. Gluon is experimental
in Triton and differs between versions, so the first call on a device is checked against the
reference; where that fails, nothing more is given to them, and the reason is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from . import reference

#: whether a GPU run has proven the kernels; until then they take calls only inside `use`
proven = False
_used = False

SIZES = (64, 128)
# TMA counts rows and heads in 32 bits, and `value_descriptor` rows up to 2^30
LONGEST = 1 << 30


@contextlib.contextmanager
def use(on: bool = True) -> Iterator[None]:
    """Inside, calls may go to kernels that no GPU has proven. For the whole process."""
    global _used
    before, _used = _used, on
    try:
        yield
    finally:
        _used = before


def refuses(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> str | None:
    """Why a call cannot go there; named are the other arguments of the torch op. A backward call
    has `dout` among them."""
    if not (proven or _used):
        return dispatch.NOT_PROVEN
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "it needs a GPU of compute capability 9.0"
    return refuses_call(q, k, v, **named) or _failed(q.device, q.dtype, q.shape[3])


def refuses_call(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> str | None:
    """The part of `refuses` that holds on every device."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "it takes bfloat16 and float16"
    if q.shape[3] != v.shape[3] or q.shape[3] not in SIZES:
        return "it takes heads of 64 or 128 elements, of v too"
    for what in ("alibi_slopes", "bias"):
        if named[what] is not None:
            return f"it has no {what}"
    if named["dropout_p"] > 0:
        return "it has no dropout"
    if not named["scale"] > 0:
        return "it needs a scale above 0"
    if "dout" in named:
        if named["lo"] is not None:
            return "its backward takes no intervals of keys"
        if named["softcap"] > 0:
            return "its backward has no softcap"
        starts = named["cu_seqlens_q"]
        padding = 64 if starts is None else 64 * starts.shape[0]
        if 2 * q.shape[0] * q.shape[2] * (q.shape[1] + padding) >= 1 << 31:
            return "its backward counts the padded rows of all heads in 32 bits"
    if q.numel() == 0 or k.numel() == 0:
        return "a tensor is empty"
    if max(q.shape[1], k.shape[1]) > LONGEST:
        return f"it takes at most {LONGEST} rows"
    for what, x in (("q", q), ("k", k), ("v", v)):
        steps = [x.stride(d) for d in range(3) if x.shape[d] > 1]
        if x.stride(3) != 1 or any(s % 8 or s <= 0 or s >= 1 << 34 for s in steps):
            return f"rows of {what} must be contiguous and start at multiples of 16 bytes"
    return None


_reasons: dict[tuple[torch.device, torch.dtype, int], str | None] = {}


def _failed(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Why the self-test failed, which runs once a device, dtype and head size."""
    key = (device, dtype, size)
    if key not in _reasons:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "its self-test must run before a capture: call it once outside"
        try:
            _reasons[key] = _self_test(*key)
        except Exception as error:  # whatever a compiler or driver of another version raises
            _reasons[key] = f"its self-test raised {type(error).__name__}: {error}"
    return _reasons[key]


def _self_test(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """A small call, forward and backward, against the reference; waits for the GPU."""
    from . import gluon_backward, gluon_kernels

    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, rows, heads, size, device=device, dtype=dtype, generator=generator)
        for rows, heads in ((200, 2), (333, 1), (333, 1), (200, 2))
    )
    given = (*(None,) * 8, size**-0.5, -1, 0, 0.0, 0.0)
    choices = reference.Options(*given)
    out, lse = gluon_kernels.forward(q, k, v, *given)
    grads = gluon_backward.backward(dout, None, q, k, v, out, lse, *given)[:3]
    q, k, v = (x.float() for x in (q, k, v))
    want = reference.forward(q, k, v, choices)
    needs = (False, False, False)
    exact = reference.backward(dout.float(), None, q, k, v, want[1], choices, needs)
    all_want = (*want, exact.q, exact.k, exact.v)
    for got, expected in zip((out, lse, *grads), all_want, strict=True):
        worst = float((got.float() - expected).abs().max() / expected.abs().max())
        if not worst <= 2e-2:
            return f"its self-test is off by {worst:.1e}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """The torch op's forward, for calls that `refuses` has no objection to."""
    from . import gluon_kernels

    return gluon_kernels.forward(q, k, v, *given)


def backward(*args: Any) -> tuple[Tensor, ...]:
    """The torch op's backward, for calls that `refuses` has no objection to."""
    from . import gluon_backward

    dout, dlse, q, k, v, out, lse, *given, needs = args
    saved = (x.contiguous() for x in (out, lse))
    dq, dk, dv, delta = gluon_backward.backward(dout, dlse, q, k, v, *saved, *given)
    slopes, sink, bias = (q.new_empty(0) for _ in range(3))
    choices = reference.Options(*given)
    if needs[1] and choices.sink is not None:
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        share = torch.exp(choices.sink.float()[:, None] - finite)
        sink = -(share * delta).sum((0, 2)).to(choices.sink.dtype)
    return dq, dk, dv, slopes, sink, bias
