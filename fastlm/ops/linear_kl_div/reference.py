"""Divergence of two rows of log-probabilities and its gradient, in plain PyTorch, in place.

    forward   KL(p || q)     d/dz = q - p
    reverse   KL(q || p)     d/dz = q (log q - log p - KL)
    jsd       beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
                             d/dz = (1 - beta) q (log q - log m - KL(q || m))

p is the teacher, q = softmax(z) the student. A class of probability 0 adds 0 log 0 = 0, also where
the other one is 0 too (a masked vocabulary); p > 0 = q is infinite, as it should be. Everything
happens in the buffers that are handed over: a fresh chunk of logits would cost page faults each
time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_softmax(logits: Tensor, scale: float, out: Tensor) -> Tensor:
    """log softmax(scale * logits) over the last dimension, in `out`; the logits are spent."""
    if scale != 1:
        logits.mul_(scale)
    return torch.log_softmax(logits, -1, out=out)


def _expectation(probability: Tensor, values: Tensor, product: Tensor) -> Tensor:
    """sum p v as [N], where p = 0 adds nothing; p v in `product`, perhaps `values`."""
    total = torch.mul(probability, values, out=product).sum(-1)
    # 0 times infinity is rare, and to look is cheaper than to mask; a GPU would wait for it
    if total.device.type == "cpu" and not bool(total.isnan().any()):
        return total
    nothing = probability == 0
    values.masked_fill_(nothing, 0.0)
    return product.masked_fill_(nothing, 0.0).sum(-1)


def _forward_kl(log_q: Tensor, log_p: Tensor, a: Tensor, b: Tensor, with_gradient: bool) -> Tensor:
    p = torch.exp(log_p, out=a)
    value = _expectation(p, torch.sub(log_p, log_q, out=b), b)
    if with_gradient:
        log_q.exp_().sub_(p)
    return value


def _towards(log_q: Tensor, ratio: Tensor, a: Tensor, b: Tensor, with_gradient: bool) -> Tensor:
    """sum q ratio, where ratio is log q minus something whose own change does not count."""
    q = torch.exp(log_q, out=a)
    value = _expectation(q, ratio, b)
    if with_gradient:
        torch.mul(q, ratio.sub_(value[:, None]), out=log_q)
    return value


def divergence_(
    divergence: str,
    beta: float,
    log_q: Tensor,
    log_p: Tensor,
    scratch: tuple[Tensor, Tensor],
    with_gradient: bool,
) -> Tensor:
    """[N] of log-probabilities [N, V]; with gradient, that for z stands in log_q afterwards."""
    a, b = scratch
    if divergence == "forward":
        return _forward_kl(log_q, log_p, a, b, with_gradient)
    if divergence == "reverse":
        return _towards(log_q, torch.sub(log_q, log_p, out=log_p), a, b, with_gradient)
    torch.add(log_p, math.log(beta), out=a)
    torch.add(log_q, math.log1p(-beta), out=b)
    log_m = torch.logaddexp(a, b, out=b)
    p = torch.exp(log_p, out=a)
    of_teacher = _expectation(p, log_p.sub_(log_m), log_p)
    ratio = torch.sub(log_q, log_m, out=log_p)
    of_student = _towards(log_q, ratio, a, b, with_gradient)
    if with_gradient:
        log_q.mul_(1 - beta)
    return beta * of_teacher + (1 - beta) * of_student


def divergence(
    logits: Tensor,
    theirs: Tensor,
    factor: Tensor | None,
    divergence: str,
    beta: float,
    scale: float,
    *scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    """[N] of the logits [N, V] of student and teacher, and factor [N] times the gradient with
    respect to the student's; the logits are spent."""
    log_q, log_p = (
        log_softmax(x, scale, out) for x, out in zip((logits, theirs), scratch, strict=True)
    )
    spent = logits, theirs
    value = divergence_(divergence, beta, log_q, log_p, spent, factor is not None)
    if factor is not None:
        log_q.mul_(factor[:, None] * scale)
    return value, log_q
