"""Policy-gradient losses of per-token log-probs: a composition of elementwise PyTorch on [B, T].

Contract: `reference.py` holds the formulas; this file checks, and cuts off what is behind the mask:
in the log-probs before any arithmetic, so that their gradient is 0 there, and in the tokens' losses
before they are summed. There is no torch op and no backend to choose: the tensors are [B, T], a
vocabulary smaller than what `token_logprobs` reads to make them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import checks, dispatch
from . import gradient, reference

# the aggregation of the paper (or of the implementation that gave the name)
AGGREGATION = {
    "reinforce": "token-mean",
    "rloo": "seq-mean-token-sum",
    "ppo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "gspo": "seq-mean-token-mean",
}
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
CLIPPED = ("ppo", "grpo", "dr_grpo", "bnpo", "dapo", "gspo")
ESTIMATORS = ("k1", "k2", "k3")


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def kept(tokens: Tensor, mask: Tensor | None, like: str, op: str) -> Tensor:
    """bool [B, T]; `like` is the name of `tokens`, which has that shape."""
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    checks.tensor(op, "mask", mask)
    checks.shape(op, "mask", mask, tokens.shape, f"as {like}")
    checks.same_device(op, "mask", mask, like, tokens)
    return mask if mask.dtype == torch.bool else mask != 0


def per_token(
    what: str,
    value: Tensor,
    keep: Tensor,
    per_sequence: bool = False,
    like: str = "logprobs",
    op: str = "policy_loss",
) -> Tensor:
    """[B, T], 0 outside `keep`; [B] is spread over the tokens where that is allowed."""
    return torch.where(keep, _checked(what, value, keep, per_sequence, like, op), 0.0)


def _checked(
    what: str,
    value: Tensor,
    tokens: Tensor,
    per_sequence: bool = False,
    like: str = "logprobs",
    op: str = "policy_loss",
) -> Tensor:
    """[B, T] as `tokens`, or [B, 1]; float32 at least."""
    checks.floating(op, what, value)
    checks.same_device(op, what, value, like, tokens)
    if per_sequence and value.dim() == 1:
        checks.shape(op, what, value, tokens.shape[:1], f"or [B, T] as {like}")
        value = value[:, None]
    else:
        checks.shape(op, what, value, tokens.shape, f"as {like}")
    return _at_least_float32(value)


def check_options(
    loss_type: str,
    clip_eps: tuple[float, float],
    dual_clip: float | None,
    kl_estimator: str,
    is_mode: str,
    is_cap: float | None,
    loss_agg_mode: str | None,
    max_length: int | None,
    op: str = "policy_loss",
) -> None:
    checks.one_of(op, "loss_type", loss_type, tuple(AGGREGATION))
    checks.one_of(op, "kl_estimator", kl_estimator, ESTIMATORS)
    checks.one_of(op, "is_mode", is_mode, ("truncate", "mask"))
    checks.one_of(op, "loss_agg_mode", loss_agg_mode, (None, *MODES))
    for what, value in zip(("clip_eps_low", "clip_eps_high"), clip_eps, strict=True):
        if not value >= 0:
            checks.bad_value(op, what, ">= 0", value)
    if is_cap is not None and not is_cap > 0:
        checks.bad_value(op, "is_cap", "> 0", is_cap)
    if max_length is not None and max_length < 1:
        checks.bad_value(op, "max_length", ">= 1", max_length)
    if dual_clip is not None:
        if loss_type not in CLIPPED:
            checks.bad_value(op, "dual_clip", f"None for loss_type {loss_type!r}", dual_clip)
        if not dual_clip > 1:
            checks.bad_value(op, "dual_clip", "> 1", dual_clip)


def policy_term(
    loss_type: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    keep: Tensor | None,
    clip_eps: tuple[float, float],
    dual_clip: float | None,
) -> Tensor:
    """Whatever stands outside `keep` (None: all are inside) has no part in the others."""
    if loss_type in ("reinforce", "rloo"):
        return -advantages * logprobs
    if loss_type == "cispo":
        weight = reference.token_ratio(logprobs, old_logprobs).detach()
        return -weight.clamp(1 - clip_eps[0], 1 + clip_eps[1]) * advantages * logprobs
    if loss_type == "gspo":
        ratio = reference.sequence_ratio(logprobs, old_logprobs, keep)
    else:
        ratio = reference.token_ratio(logprobs, old_logprobs)
    return reference.clipped(ratio, advantages, *clip_eps, dual_clip)


def policy_slope(
    loss_type: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_eps: tuple[float, float],
    dual_clip: float | None,
) -> Tensor:
    """d policy_term / d logprobs, of the types whose token does not depend on the others."""
    if loss_type in ("reinforce", "rloo"):
        return -advantages
    log_ratio = logprobs - old_logprobs
    ratio = reference.token_ratio(logprobs, old_logprobs)
    if loss_type == "cispo":
        return -ratio.clamp(1 - clip_eps[0], 1 + clip_eps[1]) * advantages
    slope = reference.clipped_slope(ratio, advantages, *clip_eps, dual_clip)
    return slope * reference.exp_slope(log_ratio)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    loss_type: str = "reinforce",
    clip_eps_low: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    is_ratio: Tensor | None = None,
    is_mode: str = "truncate",
    is_cap: float | None = None,
    loss_agg_mode: str | None = "token-mean",
    max_length: int | None = None,
) -> Tensor:
    """Policy-gradient loss of sampled tokens: policy term + KL penalty - entropy bonus, one number.

    Per token, with A the advantage, r = exp(logprob - old_logprob) and
    clip(r) = r within [1 - clip_eps_low, 1 + clip_eps_high]:

        reinforce, rloo                  -A * logprob
        ppo, grpo, dr_grpo, bnpo, dapo   -min(r * A, clip(r) * A)
        gspo                             the same, r = exp(mean of the sequence's log-ratios)
        cispo                            -clip(r) * A * logprob, no gradient through clip(r)

    The gradient of gspo reaches each token by its own A and `is_ratio` (GSPO-token); where these
    are equal within a sequence it is that of GSPO.

    The types in one line differ in the aggregation of their papers, which `loss_agg_mode=None`
    chooses; the default is "token-mean" for all, as in verl:

        token-mean               sum / number of tokens             reinforce ppo bnpo dapo cispo
        seq-mean-token-mean      mean over sequences of their mean  grpo gspo
        seq-mean-token-sum       mean over sequences of their sum   rloo
        seq-mean-token-sum-norm  sum / (B * max_length)             dr_grpo

    Sequences without a token do not count in the two means over sequences. A batch without any
    token has loss 0.

    Args:
        logprobs: [B, T], of the sampled tokens under the policy being trained; the gradient goes
            here and to `entropy`. Computed in float32 or wider.
        advantages: [B] or [B, T]; reward minus baseline. No gradient.
        old_logprobs: [B, T], under the policy at the start of the update; None: `logprobs` without
            gradient, r = 1. reinforce and rloo do not use it. No gradient.
        ref_logprobs: [B, T], under the reference of the KL penalty. No gradient.
        mask: [B, T]; 0 or False takes the token out, whatever stands there.
        clip_eps_high: `clip_eps_low` when None. DAPO's "clip higher" is 0.28.
        dual_clip: c > 1 bounds the loss of a token with A < 0 by -c * A.
        kl_coef, kl_estimator: adds kl_coef * kl_estimate(logprobs, ref_logprobs) to each token. As
            a loss k2 and k3 pull to the reference; the gradient of k1 is zero on average.
        entropy, entropy_coef: takes entropy_coef * entropy, [B, T], off each token.
        is_ratio: [B] or [B, T], probability under the trainer's old policy over that of the
            sampler; weighs the policy term. No gradient.
        is_mode, is_cap: "truncate" lowers a ratio above `is_cap` to it, "mask" sets it to 0.
        max_length: of "seq-mean-token-sum-norm"; T when None.

    Returns:
        [], float32, or float64 for float64 `logprobs`.

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.

    Source: REINFORCE, Williams 1992; PPO, arXiv:1707.06347; dual clip, arXiv:1912.09729; RLOO,
    arXiv:2402.14740; GRPO, arXiv:2402.03300; DAPO, arXiv:2503.14476; Dr. GRPO, arXiv:2503.20783;
    CISPO, arXiv:2506.13585; GSPO, arXiv:2507.18071; bnpo as in TRL; names of the aggregations as
    in verl; truncated importance sampling, Ionides 2008.
    """
    checks.floating("policy_loss", "logprobs", logprobs)
    checks.shape("policy_loss", "logprobs", logprobs, (None, None), "[B, T]")
    clip_eps = (clip_eps_low, clip_eps_low if clip_eps_high is None else clip_eps_high)
    check_options(
        loss_type, clip_eps, dual_clip, kl_estimator, is_mode, is_cap, loss_agg_mode, max_length
    )
    keep = None if mask is None else kept(logprobs, mask, "logprobs", "policy_loss")
    logprobs = _at_least_float32(logprobs)
    if keep is not None:
        logprobs = torch.where(keep, logprobs, 0.0)
    advantages = _checked("advantages", advantages, logprobs, per_sequence=True).detach()
    old = importance = ref = bonus = None
    if old_logprobs is not None:
        old = _checked("old_logprobs", old_logprobs, logprobs).detach()
    if is_ratio is not None:
        ratio = _checked("is_ratio", is_ratio, logprobs, per_sequence=True)
        importance = reference.importance(ratio, is_mode, is_cap)
    if kl_coef:
        if ref_logprobs is None:
            checks.bad_value("policy_loss", "ref_logprobs", "given with kl_coef", None)
        ref = _checked("ref_logprobs", ref_logprobs, logprobs).detach()
    if entropy_coef:
        if entropy is None:
            checks.bad_value("policy_loss", "entropy", "given with entropy_coef", None)
        bonus = _checked("entropy", entropy, logprobs)
    mode = AGGREGATION[loss_type] if loss_agg_mode is None else loss_agg_mode
    term = (loss_type, clip_eps, dual_clip, kl_coef, kl_estimator, entropy_coef)
    tokens = gradient.Tokens(advantages, old, ref, importance, keep, *term)
    composed = functools.partial(_composed, tokens, mode, max_length)
    # with and without a gradient, so that its bits are the same
    if dual_clip is None and dispatch.direct(logprobs, bonus):
        share = reference.share(logprobs, keep, mode, max_length)
        value = gradient.PolicyLoss.apply(logprobs, bonus, tokens, share, composed)
    else:
        value = composed(logprobs, bonus)
    # a constant in float64 does not widen the result
    return value.to(logprobs.dtype)


def _composed(
    tokens: gradient.Tokens,
    mode: str,
    max_length: int | None,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> Tensor:
    """The loss in PyTorch operations, which autograd differentiates."""
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    call = (tokens.loss_type, logprobs, old, tokens.advantages)
    loss = policy_term(*call, tokens.keep, tokens.clip_eps, tokens.dual_clip)
    if tokens.importance is not None:
        loss = loss * tokens.importance
    if tokens.ref_logprobs is not None:
        kl = reference.kl(logprobs, tokens.ref_logprobs, tokens.kl_estimator)
        loss = loss + tokens.kl_coef * kl
    if entropy is not None:
        loss = loss - tokens.entropy_coef * entropy
    if tokens.keep is not None:
        loss = torch.where(tokens.keep, loss, 0.0)
    return reference.aggregate(loss, tokens.keep, mode, max_length)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k3") -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token's two log-probs.

    With d = ref_logprobs - logprobs: k1 = -d; k2 = d**2 / 2; k3 = exp(d) - 1 - d. k1 and k3 are
    unbiased for tokens drawn from the policy; k2 and k3 are never negative.

    Args:
        logprobs, ref_logprobs: any shape, broadcast. Both receive gradients.
        estimator: "k1", "k2" or "k3".

    Returns:
        The broadcast shape, at least float32.

    Raises:
        ValueError: `estimator` is none of these. TypeError: an argument is no float tensor.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    checks.floating("kl_estimate", "logprobs", logprobs)
    checks.floating("kl_estimate", "ref_logprobs", ref_logprobs)
    checks.one_of("kl_estimate", "estimator", estimator, ESTIMATORS)
    return reference.kl(_at_least_float32(logprobs), _at_least_float32(ref_logprobs), estimator)
