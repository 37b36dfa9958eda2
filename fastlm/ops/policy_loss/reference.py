"""The formulas of the policy losses, in plain PyTorch on [B, T]; autograd differentiates them.

What `op.py` hands over is checked and at least float32; log-probs and what is summed are 0 wherever
`keep` is False, so that nothing behind the mask (NaN included) reaches a sum or a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks

# exp(20) = 5e8: a ratio above it says nothing more, and infinity times a zero advantage is NaN
MAX_LOG_RATIO = 20.0


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) at tokens drawn from the policy."""
    if estimator == "k1":
        return logprobs - ref_logprobs
    if estimator == "k2":
        return 0.5 * (logprobs - ref_logprobs).square()
    difference = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    return (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()


def sequence_change(logprobs: Tensor, old_logprobs: Tensor, keep: Tensor | None) -> Tensor:
    """[B, 1]: the sequence's mean log-ratio."""
    change = logprobs.detach() - old_logprobs
    if keep is None:
        return change.sum(-1, keepdim=True) / max(1, change.shape[-1])
    count = keep.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(keep, change, 0.0).sum(-1, keepdim=True) / count


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, keep: Tensor | None) -> Tensor:
    """[B, T]: exp of the sequence's mean log-ratio in every token, whose gradient reaches that
    token's log-prob alone (GSPO-token; the same gradient as GSPO when the advantages are equal)."""
    mean = sequence_change(logprobs, old_logprobs, keep)
    return (logprobs - logprobs.detach() + mean).clamp(max=MAX_LOG_RATIO).exp()


def clipped(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None
) -> Tensor:
    """-min(r A, clip(r) A), and for A < 0 at most -dual_clip * A."""
    cost = -advantages  # one number per sequence, most often
    loss = torch.maximum(ratio * cost, ratio.clamp(1 - low, 1 + high) * cost)
    if dual_clip is None:
        return loss
    return torch.where(cost > 0, torch.minimum(loss, dual_clip * cost), loss)


def clipped_slope(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None
) -> Tensor:
    """d clipped / d ratio."""
    free = ratio * advantages <= ratio.clamp(1 - low, 1 + high) * advantages
    if dual_clip is not None:
        free &= (advantages >= 0) | (ratio <= dual_clip)
    return torch.where(free, -advantages, 0.0)


def exp_slope(log_ratio: Tensor) -> Tensor:
    """d exp(min(log_ratio, MAX_LOG_RATIO)) / d log_ratio."""
    return torch.where(log_ratio <= MAX_LOG_RATIO, log_ratio.clamp(max=MAX_LOG_RATIO).exp(), 0.0)


def kl_slope(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """d kl / d logprobs."""
    if estimator == "k1":
        return torch.ones_like(logprobs)
    if estimator == "k2":
        return logprobs - ref_logprobs
    difference = ref_logprobs - logprobs
    slope = -torch.expm1(difference.clamp(max=MAX_LOG_RATIO))
    return torch.where(difference <= MAX_LOG_RATIO, slope, 0.0)


def importance(ratio: Tensor, mode: str, cap: float | None) -> Tensor:
    """Weights of the policy term; no gradient."""
    ratio = ratio.detach()
    if cap is None:
        return ratio
    return ratio.clamp(max=cap) if mode == "truncate" else torch.where(ratio > cap, 0.0, ratio)


def aggregate(values: Tensor, keep: Tensor | None, mode: str, max_length: int | None) -> Tensor:
    """One number from [B, T], 0 where not `keep` (None: all are kept). Empty sums over nothing are
    0, not NaN."""
    if keep is None:
        if values.numel() == 0:
            return values.sum()
        if mode in ("token-mean", "seq-mean-token-mean"):
            return values.mean()
        if mode == "seq-mean-token-sum":
            return values.sum() / values.shape[0]
    elif mode == "token-mean":
        return values.sum() / keep.sum().clamp(min=1)
    if keep is None or mode == "seq-mean-token-sum-norm":
        rows, columns = values.shape
        return values.sum() / max(1, rows * (columns if max_length is None else max_length))
    count = keep.sum(-1)
    sequences = (count > 0).sum().clamp(min=1)
    if mode == "seq-mean-token-mean":
        return (values.sum(-1) / count.clamp(min=1)).sum() / sequences
    return values.sum() / sequences  # seq-mean-token-sum


def share(values: Tensor, keep: Tensor | None, mode: str, max_length: int | None) -> Tensor | float:
    """What `aggregate` multiplies the value of each kept token with: a number, [] or [B, 1]."""
    rows, columns = values.shape
    if mode == "seq-mean-token-sum-norm":
        return 1 / max(1, rows * (columns if max_length is None else max_length))
    if keep is None:
        return 1 / max(1, rows if mode == "seq-mean-token-sum" else rows * columns)
    if mode == "token-mean":
        if checks.readable(keep):
            return 1 / max(1, int(keep.count_nonzero()))
        return 1 / keep.sum().clamp(min=1).to(values.dtype)
    count = keep.sum(-1, keepdim=True)
    sequences = (count > 0).sum().clamp(min=1)
    if mode == "seq-mean-token-mean":
        return 1 / (count.clamp(min=1) * sequences).to(values.dtype)
    return 1 / sequences.to(values.dtype)  # seq-mean-token-sum


def token_weights(keep: Tensor, mode: str, max_length: int | None, dtype: torch.dtype) -> Tensor:
    """[B, T]: what `aggregate` multiplies each token's value with."""
    each = share(keep.to(dtype), keep, mode, max_length)
    # a number in float64 does not widen the result
    return torch.where(keep, each, torch.zeros((), dtype=dtype, device=keep.device)).to(dtype)
