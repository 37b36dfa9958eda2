"""The formulas of the policy losses, in plain PyTorch on [B, T]; autograd differentiates them.

What `op.py` hands over is checked, at least float32, and 0 wherever `keep` is False, so that
nothing behind the mask (NaN included) reaches a sum or a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, keep: Tensor) -> Tensor:
    """[B, T]: exp of the sequence's mean log-ratio in every token, whose gradient reaches that
    token's log-prob alone (GSPO-token; the same gradient as GSPO when the advantages are equal)."""
    count = keep.sum(-1, keepdim=True).clamp(min=1)
    mean = (logprobs - old_logprobs).detach().sum(-1, keepdim=True) / count
    return (logprobs - logprobs.detach() + mean).clamp(max=MAX_LOG_RATIO).exp()


def clipped(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None
) -> Tensor:
    """-min(r A, clip(r) A), and for A < 0 at most -dual_clip * A."""
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


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


def aggregate(values: Tensor, keep: Tensor, mode: str, max_length: int | None) -> Tensor:
    """One number from [B, T], 0 where not `keep`. Empty sums over nothing are 0, not NaN."""
    if mode == "token-mean":
        return values.sum() / keep.sum().clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        rows, columns = values.shape
        return values.sum() / max(1, rows * (columns if max_length is None else max_length))
    count = keep.sum(-1)
    sequences = (count > 0).sum().clamp(min=1)
    if mode == "seq-mean-token-mean":
        return (values.sum(-1) / count.clamp(min=1)).sum() / sequences
    return values.sum() / sequences  # seq-mean-token-sum


def token_weights(keep: Tensor, mode: str, max_length: int | None, dtype: torch.dtype) -> Tensor:
    """[B, T]: what `aggregate` multiplies each token's value with."""
    rows, columns = keep.shape
    count = keep.sum(-1, keepdim=True)
    sequences = (count > 0).sum().clamp(min=1)
    if mode == "token-mean":
        share = 1 / keep.sum().clamp(min=1).to(dtype)
    elif mode == "seq-mean-token-sum-norm":
        length = columns if max_length is None else max_length
        share = torch.full((), 1 / max(1, rows * length), dtype=dtype, device=keep.device)
    elif mode == "seq-mean-token-mean":
        share = 1 / (count.clamp(min=1) * sequences).to(dtype)
    else:  # seq-mean-token-sum
        share = 1 / sequences.to(dtype)
    return torch.where(keep, share, 0.0)
