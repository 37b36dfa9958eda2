"""K chosen classes of a row and one bucket for all others, in plain PyTorch, in place.

With u_k = z_k of the chosen classes and u_tail = log sum exp z of the others, the buckets'
probabilities are softmax(u), so a divergence of buckets has the gradient of a divergence of classes
with u as its logits, and

    dz_k = du_k      dz_v = du_tail exp(z_v - u_tail) for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def teacher_buckets(logprobs: Tensor, classes: int) -> Tensor:
    """Log-probabilities [N, K + 1] of sum 1, the last of what the K leave over."""
    mass = logprobs.exp().sum(-1, keepdim=True)
    # where every class is chosen what is left over is rounding
    covered = (logprobs != -torch.inf).sum(-1, keepdim=True) >= classes
    rest = (1 - mass).clamp(min=0).masked_fill(covered, 0)
    return torch.cat((logprobs, rest.log()), -1) - (mass + rest).log()


def _log_sum_exp(values: Tensor, scratch: Tensor) -> Tensor:
    """[N, 1]; -inf of nothing but -inf."""
    high = values.amax(-1, keepdim=True)
    high = torch.where(high == -torch.inf, 0.0, high)
    torch.sub(values, high, out=scratch).exp_()
    return scratch.sum(-1, keepdim=True).log_() + high


def student_buckets_(
    log_q: Tensor, index: Tensor, real: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, K + 1] and the last of them again, [N, 1], of log_q [N, V] and the
    teacher's classes [N, K]; where not `real` an index is padding, whose bucket has -inf. The
    chosen classes become -inf in log_q. An index out of range gives NaN."""
    classes = log_q.shape[-1]
    outside = (index < 0) | (index >= classes)
    index = index.clamp(0, classes - 1)
    chosen = log_q.gather(-1, index)
    chosen = chosen.masked_fill(~real, -torch.inf).masked_fill(outside, torch.nan)
    removed = torch.zeros_like(chosen).masked_fill(real, -torch.inf)
    # added, not written: padding may have the index of a class that is chosen
    log_q.scatter_add_(-1, index, removed)
    tail = _log_sum_exp(log_q, scratch)
    return torch.cat((chosen, tail), -1), tail


def spread_(log_q: Tensor, tail: Tensor, index: Tensor, real: Tensor, du: Tensor) -> None:
    """dz [N, V] of du [N, K + 1], written over what `student_buckets_` left in log_q."""
    index = index.clamp(0, log_q.shape[-1] - 1)
    tail = torch.where(tail == -torch.inf, 0.0, tail)
    log_q.sub_(tail).exp_().mul_(du[:, -1:])
    log_q.scatter_add_(-1, index, du[:, :-1].masked_fill(~real, 0))
