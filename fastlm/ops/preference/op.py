"""Preference losses of sequence log-probs: compositions of elementwise PyTorch on [B].

Contract: `reference.py` holds the formulas; this file checks. There is no torch op and no backend
to choose: the work is in the log-probs, which `linear_token_logprobs` makes without the logits:

    logprobs = (linear_token_logprobs(hidden, weight, target) * mask).sum(-1)     [B]

Log-probs of the reference model get no gradient. Results are float32, float64 if any argument is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks
from ..cross_entropy.loss import REDUCTIONS, finite
from . import reference


def _ordinary(value: Tensor, first: Tensor) -> bool:
    """What needs no further look: the checks below take longer than the loss of a batch."""
    plain = type(value) is Tensor and value.is_cpu and value.dtype == torch.float32
    return plain and value.dim() == 1 and value.shape == first.shape


def _constant(value: Tensor) -> Tensor:
    return value.detach() if value.requires_grad else value


def _checked(op: str, named: dict[str, Tensor], free: Sequence[str] = ()) -> list[Tensor]:
    """The tensors, [B] as the first (those in `free` of any length), in one dtype."""
    first_name, first = next(iter(named.items()))
    if all(_ordinary(value, first) for value in named.values()):
        return list(named.values())
    dtype = torch.float32
    for what, value in named.items():
        checks.floating(op, what, value)
        if what in free or value is first:
            checks.shape(op, what, value, (None,), "[B]")
        else:
            checks.shape(op, what, value, first.shape, f"as {first_name}")
        checks.same_device(op, what, value, first_name, first)
        dtype = torch.promote_types(dtype, value.dtype)
    return [value.to(dtype) for value in named.values()]


def _options(op: str, reduction: str, beta: float, label_smoothing: float, most: float) -> None:
    checks.one_of(op, "reduction", reduction, REDUCTIONS)
    if finite(op, "beta", beta) <= 0:
        checks.bad_value(op, "beta", "positive", beta)
    if not 0 <= finite(op, "label_smoothing", label_smoothing) <= most:
        checks.bad_value(op, "label_smoothing", f"in [0, {most}]", label_smoothing)


def _nll(op: str, nll: Tensor | None, chosen: Tensor) -> Tensor:
    """What is added for the chosen completions, [] or [B]."""
    if nll is None:
        return -chosen
    checks.floating(op, "nll", nll)
    if nll.dim() > 0:
        checks.shape(op, "nll", nll, chosen.shape, "or [], as chosen")
    checks.same_device(op, "nll", nll, "chosen", chosen)
    return nll.to(chosen.dtype)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
) -> Tensor:
    """Direct preference optimisation: the policy should prefer `chosen` more than the reference.

    Same as, with the default options:
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)
        -torch.nn.functional.logsigmoid(beta * margin).mean()

    The other types, with e = label_smoothing:

        sigmoid   -(1 - e) logsigmoid(beta * margin) - e logsigmoid(-beta * margin)
        robust    (-(1 - e) logsigmoid(beta * margin) + e logsigmoid(-beta * margin)) / (1 - 2 e)
        hinge     max(0, 1 - beta * margin)
        ipo       (margin - 1 / (2 * beta))^2, of log-probs averaged over their tokens

    Args:
        chosen, rejected: [B], log-probs of the completions under the policy, summed over tokens,
            in nats; any float dtype.
        ref_chosen, ref_rejected: [B], under the reference. No gradient.
        beta: positive; strength of the pull to the reference.
        label_smoothing: in [0, 0.5], probability that a label is wrong; below 0.5 for "robust",
            0 for "hinge" and "ipo".
        reduction: "mean" (0 for an empty batch), "sum" or "none" for [B].

    Returns:
        [] or [B], float32, or float64 if any argument is.

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.

    Source: Rafailov et al. 2023 (arXiv:2305.18290); label smoothing, Mitchell 2023; robust,
    arXiv:2403.00409; hinge, arXiv:2305.10425; IPO, arXiv:2310.12036. Names as in TRL.
    """
    op = "dpo_loss"
    _options(op, reduction, beta, label_smoothing, 0.5)
    checks.one_of(op, "loss_type", loss_type, ("sigmoid", "robust", "hinge", "ipo"))
    if loss_type == "robust" and label_smoothing == 0.5:
        checks.bad_value(op, "label_smoothing", "below 0.5 for 'robust'", label_smoothing)
    if loss_type in ("hinge", "ipo") and label_smoothing != 0:
        checks.bad_value(op, "label_smoothing", f"0 for {loss_type!r}", label_smoothing)
    named = {"chosen": chosen, "rejected": rejected}
    named |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    chosen, rejected, ref_chosen, ref_rejected = _checked(op, named)
    margin = (chosen - _constant(ref_chosen)) - (rejected - _constant(ref_rejected))
    values = reference.pairwise(margin, loss_type, beta, label_smoothing)
    return reference.reduce(values, reduction)


def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    nll: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Contrastive preference optimisation: DPO without a reference, and a likelihood term.

    Same as, with the default options:
        (-torch.nn.functional.logsigmoid(beta * (chosen - rejected)) + cpo_alpha * -chosen).mean()

    Args:
        chosen, rejected: [B], log-probs of the completions, summed over tokens, in nats.
        beta: positive.
        cpo_alpha: weight of the likelihood term; 0 takes it out.
        nll: [] or [B], the likelihood term, with gradient; None: -chosen, as in the paper. TRL has
            the mean over all tokens of the chosen completions.
        label_smoothing: in [0, 0.5], as in `dpo_loss`.
        reduction: as in `dpo_loss`.

    Returns, Raises: as `dpo_loss`.

    Source: Xu et al. 2024 (arXiv:2401.08417).
    """
    op = "cpo_loss"
    _options(op, reduction, beta, label_smoothing, 0.5)
    finite(op, "cpo_alpha", cpo_alpha)
    chosen, rejected = _checked(op, {"chosen": chosen, "rejected": rejected})
    values = reference.pairwise(chosen - rejected, "sigmoid", beta, label_smoothing)
    likelihood = None if nll is None else _nll(op, nll, chosen)
    if cpo_alpha != 0 and likelihood is None:
        values = torch.sub(values, chosen, alpha=cpo_alpha)
    elif likelihood is not None and cpo_alpha != 0:
        values = values + cpo_alpha * likelihood
    return reference.reduce(values, reduction)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Simple preference optimisation: mean log-probs as rewards, apart by a margin.

    Same as, with the default options:
        -torch.nn.functional.logsigmoid(beta * (chosen - rejected) - gamma).mean()

    Args:
        chosen, rejected: [B], log-probs of the completions, averaged over their tokens, in nats.
        beta: positive.
        gamma: the margin, in units of beta * log-prob (`simpo_gamma` of TRL; beta times the
            authors' `gamma_beta_ratio`).
        label_smoothing: in [0, 0.5], as in `dpo_loss`.
        reduction: as in `dpo_loss`.

    Returns, Raises: as `dpo_loss`.

    Source: Meng et al. 2024 (arXiv:2405.14734).
    """
    op = "simpo_loss"
    _options(op, reduction, beta, label_smoothing, 0.5)
    finite(op, "gamma", gamma)
    chosen, rejected = _checked(op, {"chosen": chosen, "rejected": rejected})
    margin = beta * (chosen - rejected) - gamma
    values = reference.pairwise(margin, "sigmoid", 1.0, label_smoothing)
    return reference.reduce(values, reduction)


def orpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    nll: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Odds-ratio preference optimisation: likelihood of the chosen, and its odds over the rejected.

    Same as, with the default options:
        odds = lambda logprobs: logprobs - torch.log(-torch.expm1(logprobs))
        (-chosen - beta * torch.nn.functional.logsigmoid(odds(chosen) - odds(rejected))).mean()

    Args:
        chosen, rejected: [B], log-probs of the completions, averaged over their tokens, in nats;
            below 0 (0 and above count as -eps of the dtype, where the odds are infinite).
        beta: positive, weight of the odds ratio (the paper's lambda).
        nll: [] or [B], the likelihood term, with gradient; None: -chosen.
        reduction: as in `dpo_loss`.

    Returns, Raises: as `dpo_loss`.

    Source: Hong et al. 2024 (arXiv:2403.07691), equations 6 and 7.
    """
    op = "orpo_loss"
    _options(op, reduction, beta, 0.0, 0.5)
    chosen, rejected = _checked(op, {"chosen": chosen, "rejected": rejected})
    ratio = reference.log_odds(chosen) - reference.log_odds(rejected)
    values = _nll(op, nll, chosen) + beta * reference.pairwise(ratio, "sigmoid", 1.0, 0.0)
    return reference.reduce(values, reduction)


def kto_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Kahneman-Tversky optimisation: good and bad completions that need not come in pairs.

    Same as, with the default options:
        baseline = kl.detach().mean().clamp(min=0)
        good = 1 - torch.sigmoid(beta * ((chosen - ref_chosen) - baseline))
        bad = 1 - torch.sigmoid(beta * (baseline - (rejected - ref_rejected)))
        torch.cat((desirable_weight * good, undesirable_weight * bad)).mean()

    Args:
        chosen, ref_chosen: [B1], log-probs of the good completions, summed over tokens, in nats,
            under policy and reference.
        rejected, ref_rejected: [B2], the same of the bad ones; B1 or B2 may be 0. The reference
            gets no gradient.
        kl: estimate of KL(policy || reference), the baseline: log-ratios [n] of completions with
            the prompts of others (their mean is taken; average over processes first where there
            are several), [] or a number. Below 0 counts as 0. No gradient.
        beta: positive.
        desirable_weight, undesirable_weight: of the good and the bad completions.
        reduction: "mean" over the B1 + B2, 0 if there are none; "sum"; "none" for [B1 + B2].

    Returns, Raises: as `dpo_loss`.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306); names as in TRL.
    """
    op = "kto_loss"
    _options(op, reduction, beta, 0.0, 0.5)
    weights = (
        finite(op, "desirable_weight", desirable_weight),
        finite(op, "undesirable_weight", undesirable_weight),
    )
    named = {"chosen": chosen, "rejected": rejected}
    named |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    good, bad, ref_good, ref_bad = _checked(op, named, free=("rejected", "ref_rejected"))
    checks.shape(op, "ref_rejected", ref_bad, bad.shape, "as rejected")
    if isinstance(kl, Tensor):
        checks.floating(op, "kl", kl)
        checks.same_device(op, "kl", kl, "chosen", chosen)
        if kl.dim() > 1 or kl.numel() == 0:
            checks.bad_value(op, "kl", "[] or [n], n > 0", list(kl.shape))
        baseline = kl.detach().to(good.dtype).mean()
    else:
        baseline = good.new_full((), finite(op, "kl", kl))
    values = reference.kto(
        good - _constant(ref_good), bad - _constant(ref_bad), baseline.clamp(min=0), beta, weights
    )
    return reference.reduce(values, reduction)


def reward_loss(
    chosen_reward: Tensor,
    rejected_reward: Tensor,
    *,
    margin: Tensor | float = 0.0,
    center_rewards_coefficient: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Bradley-Terry loss of a reward model: minus the log-probability of the preferences.

    Same as:
        loss = -torch.nn.functional.logsigmoid(chosen_reward - rejected_reward - margin)
        (loss + center_rewards_coefficient * (chosen_reward + rejected_reward) ** 2).mean()

    Args:
        chosen_reward, rejected_reward: [B], any float dtype.
        margin: [B] or a number by which the rewards should differ at least. No gradient.
        center_rewards_coefficient: pulls the rewards to zero mean; 0: off.
        reduction: as in `dpo_loss`.

    Returns, Raises: as `dpo_loss`.

    Source: Bradley & Terry 1952; margin, Llama 2 (arXiv:2307.09288), equation 2; centring,
    Eisenstein et al. 2023 (arXiv:2312.09244). Names as in TRL.
    """
    op = "reward_loss"
    checks.one_of(op, "reduction", reduction, REDUCTIONS)
    finite(op, "center_rewards_coefficient", center_rewards_coefficient)
    named = {"chosen_reward": chosen_reward, "rejected_reward": rejected_reward}
    if isinstance(margin, Tensor):
        named["margin"] = margin.detach()
    else:
        finite(op, "margin", margin)
    chosen, rejected, *margins = _checked(op, named)
    difference = chosen - rejected - (margins[0] if margins else margin)
    values = reference.pairwise(difference, "sigmoid", 1.0, 0.0)
    if center_rewards_coefficient != 0:
        values = values + center_rewards_coefficient * (chosen + rejected).square()
    return reference.reduce(values, reduction)
