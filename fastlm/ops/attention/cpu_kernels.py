"""The compiled CPU backend of `attention`: arguments into the form of csrc/attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks, extension
from .arguments import floats, last_contiguous

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> str | None:
    if q.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {checks.short(q.dtype)}"
    return None


def _options(
    lo: Tensor | None,
    hi: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Any, ...]:
    if lo is not None and hi is not None and lo.stride() != hi.stride():
        lo, hi = lo.contiguous(), hi.contiguous()
    slopes = floats(alibi_slopes)
    if bias is not None:
        if bias.dtype not in _DTYPES:
            bias = bias.float()
        # keys are read one after another, or are all the same
        if bias.stride(3) not in (0, 1) and bias.shape[3] > 1:
            bias = bias.contiguous()
    return (
        lo,
        hi,
        None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
        slopes if slopes is None or slopes.dim() == 2 else slopes[None],
        floats(sink),
        bias,
        0 if seed is None else int(seed),
        scale,
        left,
        right,
        softcap,
        dropout_p,
    )


def forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[3])
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    run = extension.raw("attention_forward")
    run(last_contiguous(q), last_contiguous(k), last_contiguous(v), *_options(*given), out, lse)
    return out, lse


def backward(*args: Any) -> tuple[Tensor, ...]:
    dout, dlse, q, k, v, out, lse, *given, needs = args
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # zeros: the bias is added to, and elements outside every mask are not reached
    slopes, sink, bias = (
        x.new_zeros(x.shape, dtype=torch.float32) if need and x is not None else None
        for x, need in zip(given[4:7], needs, strict=True)
    )
    extension.raw("attention_backward")(
        last_contiguous(dout),
        None if dlse is None else dlse.contiguous(),
        *(last_contiguous(x) for x in (q, k, v, out)),
        lse.contiguous(),
        *_options(*given),
        dq,
        dk,
        dv,
        slopes,
        sink,
        bias,
    )
    extra = (
        q.new_empty(0) if d is None else d.to(x.dtype)
        for d, x in zip((slopes, sink, bias), given[4:7], strict=True)
    )
    return dq, dk, dv, *extra
