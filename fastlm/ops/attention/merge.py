"""Attention over several sets of keys from the attention over each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks

_OP = "merge_attention"


def _stacked(what: str, parts: Sequence[Tensor] | Tensor) -> Tensor:
    if isinstance(parts, Tensor):
        checks.floating(_OP, what, parts)
        if parts.dim() == 0 or parts.shape[0] == 0:
            checks.bad_value(_OP, what, "[n, ...] with n >= 1", list(parts.shape))
        return parts
    if not isinstance(parts, (list, tuple)):
        checks.bad_type(_OP, what, "a tensor or a list of tensors", type(parts).__name__)
    if not parts:
        checks.bad_value(_OP, what, "at least one tensor", "none")
    for i, part in enumerate(parts):
        checks.floating(_OP, f"{what}[{i}]", part)
        checks.same_device(_OP, f"{what}[{i}]", part, f"{what}[0]", parts[0])
        checks.same_dtype(_OP, f"{what}[{i}]", part, f"{what}[0]", parts[0])
        checks.shape(_OP, f"{what}[{i}]", part, parts[0].shape, f"as {what}[0]")
    return torch.stack(list(parts))


def _finite(outs: Any, lses: Any) -> bool:
    """Checked float32 lists on a CPU in which no part of any row attended to nothing."""
    if type(outs) not in (list, tuple) or type(lses) not in (list, tuple):
        return False
    if not outs or len(outs) != len(lses):
        return False
    for part in (*outs, *lses):
        if type(part) is not Tensor or part.dtype != torch.float32 or not part.is_cpu:
            return False
    shape, scores = outs[0].shape, lses[0].shape
    if any(x.shape != shape for x in outs) or any(x.shape != scores for x in lses):
        return False
    if len(shape) not in (3, 4) or scores != (*shape[:-3], shape[-2], shape[-3]):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    # to look is cheaper than to mask
    return scores.numel() > 0 and all(float(x.detach().min()) > -torch.inf for x in lses)


def _merged(outs: Any, lses: Any) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(*lses) if len(lses) == 2 else torch.stack(list(lses)).logsumexp(0)
    shares = [(x - total).exp().transpose(-1, -2)[..., None] for x in lses]
    merged = outs[0] * shares[0]
    for part, share in zip(outs[1:], shares[1:], strict=True):
        merged = torch.addcmul(merged, part, share)
    return merged, total


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from out and lse over each set.

    Same as, where every lse is finite:
        lse = torch.logsumexp(torch.stack(lses), 0)
        out = sum(o * (l - lse).exp().transpose(-1, -2)[..., None] for o, l in zip(outs, lses))

    A part with lse = -inf attended to nothing: it counts nothing and takes no gradient, whatever
    stands in its out, NaN included. Differentiable any number of times, through lse too.

    Args:
        outs: tensors [B, S, H, D] or [T, H, D] of one dtype, or one stacked [n, ...].
        lses: tensors [B, H, S] or [H, T], natural logarithm, or one stacked [n, ...]; as
            `attention(..., return_lse=True)` returns them. A sink must be in one of them only.

    Returns:
        (out, lse): the shape and dtype of one of outs and of lses. Where every part attended to
        nothing, 0 and -inf. Summed in float32, or float64 where an input is.

    Raises:
        ValueError: a shape differs from the above. TypeError: a dtype does.

    Source: the merge of online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867).
    """
    if _finite(outs, lses):
        return _merged(outs, lses)
    out, lse = _stacked("outs", outs), _stacked("lses", lses)
    checks.same_device(_OP, "lses", lse, "outs", out)
    if out.dim() not in (4, 5):
        checks.bad_value(_OP, "outs", "[B, S, H, D] or [T, H, D] each", list(out.shape[1:]))
    *batch, rows, heads, _ = out.shape
    checks.shape(_OP, "lses", lse, (*batch, heads, rows), "[n, B, H, S] or [n, H, T]")
    wide = torch.promote_types(torch.promote_types(out.dtype, lse.dtype), torch.float32)
    score = lse.to(wide)
    absent = score == -torch.inf
    nothing = absent.all(0)
    # a row of -inf alone would give NaN, in its gradient too
    total = torch.where(nothing, 0.0, score).logsumexp(0)
    share = torch.where(absent, 0.0, torch.exp(torch.where(absent, 0.0, score) - total))
    share = share.transpose(-1, -2)[..., None]
    value = out.to(wide).masked_fill(absent.transpose(-1, -2)[..., None], 0.0)
    merged = (value * share).sum(0)
    return merged.to(out.dtype), total.masked_fill(nothing, -torch.inf).to(lse.dtype)
