"""`policy_loss` and its gradient in one go, for plain tensors on a CPU.

Autograd's backward of a dozen operations on [B, T] takes longer than they do. Here the derivative
of each token's loss is computed beside it, and the backward is one product.

Saved: the derivatives by the log-probs [B, T], and each token's share of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...second_order import gradients
from . import reference


class Tokens(NamedTuple):
    """Constants, checked: [B, T] or [B, 1]."""

    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance: Tensor | None
    keep: Tensor | None
    loss_type: str
    clip_eps: tuple[float, float]
    dual_clip: float | None
    kl_coef: float
    kl_estimator: str
    entropy_coef: float


def _policy_term(logprobs: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The term without dual clip, and its derivative."""
    cost = -tokens.advantages
    if tokens.loss_type in ("reinforce", "rloo"):
        return cost * logprobs, cost
    old = logprobs if tokens.old_logprobs is None else tokens.old_logprobs
    low, high = tokens.clip_eps
    if tokens.loss_type == "gspo":
        change = reference.sequence_change(logprobs, old, tokens.keep)
    else:
        change = logprobs - old
    ratio = change.clamp(max=reference.MAX_LOG_RATIO).exp_()
    if tokens.loss_type == "cispo":
        slope = ratio.clamp_(1 - low, 1 + high).mul(cost)
        return slope * logprobs, slope
    # d ratio = ratio: the derivative of the first is the first itself
    free = ratio * cost
    clipped = ratio.clamp_(1 - low, 1 + high).mul(cost)
    passes = (free >= clipped).logical_and_(change <= reference.MAX_LOG_RATIO)
    return torch.maximum(free, clipped), torch.where(passes, free, 0.0)


def _kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    if estimator != "k3":
        value = reference.kl(logprobs, ref_logprobs, estimator)
        return value, reference.kl_slope(logprobs, ref_logprobs, estimator)
    change = ref_logprobs - logprobs
    difference = change.clamp(max=reference.MAX_LOG_RATIO)
    growth = torch.expm1(difference)
    slope = torch.where(change <= reference.MAX_LOG_RATIO, -growth, 0.0)
    return growth - difference, slope


class PolicyLoss(torch.autograd.Function):
    """sum of share * (loss of a token); share: a number, [] or [B, 1]. composed: the same by
    autograd, from log-probs and entropy, which further derivatives go through."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        tokens: Tokens,
        share: Any,
        composed: Callable[..., Tensor],
    ) -> Tensor:
        loss, slope = _policy_term(logprobs, tokens)
        if tokens.importance is not None:
            loss, slope = loss * tokens.importance, slope * tokens.importance
        if tokens.ref_logprobs is not None:
            value, change = _kl(logprobs, tokens.ref_logprobs, tokens.kl_estimator)
            loss = torch.add(loss, value, alpha=tokens.kl_coef)
            slope = torch.add(slope, change, alpha=tokens.kl_coef)
        if entropy is not None:
            loss = torch.sub(loss, entropy, alpha=tokens.entropy_coef)
        if tokens.keep is not None:
            loss, slope = (torch.where(tokens.keep, x, 0.0) for x in (loss, slope))
        loss = loss.expand_as(logprobs)  # gspo has one number per sequence
        ctx.coef, ctx.share, ctx.composed = tokens.entropy_coef, share, composed
        ctx.save_for_backward(logprobs, entropy, slope, tokens.keep)
        return (loss * share).sum() if isinstance(share, Tensor) else loss.sum() * share

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, entropy, slope, keep = ctx.saved_tensors
        needs, coef, share, composed = ctx.needs_input_grad[:2], ctx.coef, ctx.share, ctx.composed

        def both(dloss: Tensor, *_: Any) -> list[Tensor | None]:
            each = dloss * share
            dlogprobs = dentropy = None
            if needs[0]:
                dlogprobs = (slope * each).expand(logprobs.shape).contiguous()
            if needs[1]:
                dentropy = (-coef * each).expand(logprobs.shape)
                dentropy = dentropy.clone() if keep is None else torch.where(keep, dentropy, 0.0)
            return [dlogprobs, dentropy]

        def plain(*inputs: Any) -> tuple[Tensor, ...]:
            return (composed(*inputs),)

        found = gradients(both, plain, [dloss], [logprobs, entropy], [], needs)
        return *found, None, None, None
