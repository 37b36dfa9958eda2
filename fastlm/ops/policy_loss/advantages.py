"""Advantages from rewards. Plain PyTorch, no gradient, no host synchronisation on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks


def _check_rewards(op: str, rewards: Tensor) -> None:
    checks.floating(op, "rewards", rewards)
    if not checks.readable(rewards):
        return
    bad = rewards.isnan()
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        checks.bad_value(op, "rewards", "free of NaN", f"NaN at {position}")


def _groups(op: str, rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> Tensor:
    """[N] int64: the group of each reward, a number below N."""
    checks.shape(op, "rewards", rewards, (None,), "[N]")
    if (group_size is None) == (group_ids is None):
        got = "neither" if group_size is None else "both"
        checks.bad_value(op, "one of group_size and group_ids", "given", got)
    count = rewards.shape[0]
    if group_size is not None:
        if group_size < 1 or count % group_size:
            checks.bad_value(op, "group_size", f"a divisor of the {count} rewards", group_size)
        return torch.arange(count, device=rewards.device) // group_size
    assert group_ids is not None
    checks.integer(op, "group_ids", group_ids)
    checks.shape(op, "group_ids", group_ids, rewards.shape, "as rewards")
    checks.same_device(op, "group_ids", group_ids, "rewards", rewards)
    ordered, order = group_ids.sort(stable=True)
    starts = torch.ones_like(order)
    starts[1:] = (ordered[1:] != ordered[:-1]).to(starts.dtype)
    return torch.empty_like(order).scatter_(0, order, starts.cumsum(0) - 1)


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    """[N]: the sum over its group, at each member."""
    return torch.zeros_like(values).index_add_(0, groups, values)[groups]


def _centered(exact: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """[N] less the mean of its group, exactly 0 where all of one are equal; the sizes of groups."""
    count = _sums(torch.ones_like(exact), groups)
    extremes = [
        torch.zeros_like(exact).scatter_reduce_(0, groups, exact, how, include_self=False)[groups]
        for how in ("amin", "amax")
    ]
    centered = exact - _sums(exact, groups) / count
    return torch.where(extremes[0] == extremes[1], 0.0, centered), count


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Each reward minus the mean of its group, over the group's standard deviation (GRPO).

    Args:
        rewards: [N], one per sampled sequence.
        group_size: consecutive rewards of one prompt; or
        group_ids: [N], any integers, equal within a group.
        normalize: False leaves the division out (Dr. GRPO).

    Returns:
        [N], dtype of `rewards`. The deviation is that of the sample (n - 1) plus 1e-6. A group of
        equal rewards, or of one, has advantage exactly 0.

    Raises:
        ValueError: a NaN reward (on the CPU, named), or groups that do not fit. TypeError: dtypes.

    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.2; Liu et al. 2025 (arXiv:2503.20783).
    """
    _check_rewards("group_advantages", rewards)
    groups = _groups("group_advantages", rewards, group_size, group_ids)
    centered, count = _centered(rewards.double(), groups)
    if normalize:
        variance = _sums(centered.square(), groups) / (count - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + 1e-6)
    return centered.to(rewards.dtype)


@torch.no_grad()
def leave_one_out_advantages(
    rewards: Tensor, *, group_size: int | None = None, group_ids: Tensor | None = None
) -> Tensor:
    """Each reward minus the mean of the others in its group (RLOO).

    Args:
        rewards: [N], one per sampled sequence.
        group_size: consecutive rewards of one prompt; or
        group_ids: [N], any integers, equal within a group.

    Returns:
        [N], dtype of `rewards`; exactly 0 in a group of equal rewards. A group of one has no other:
        its baseline is 0.

    Raises:
        ValueError: a NaN reward (on the CPU, named), or groups that do not fit. TypeError: dtypes.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    _check_rewards("leave_one_out_advantages", rewards)
    groups = _groups("leave_one_out_advantages", rewards, group_size, group_ids)
    exact = rewards.double()
    centered, count = _centered(exact, groups)
    # r less the mean of the other n - 1 is n / (n - 1) times r less the mean of all
    apart = centered * count / (count - 1).clamp(min=1)
    return torch.where(count > 1, apart, exact).to(rewards.dtype)


def _discounted(delta: Tensor, factor: float, factors: Tensor | None) -> Tensor:
    """A_t = delta_t + factor * A_{t+1}, or with the factors of each step; [B, T]."""
    if delta.shape[1] == 0:
        return torch.zeros_like(delta)
    columns = list(delta.unbind(1))
    if factors is None:
        for t in range(len(columns) - 2, -1, -1):
            columns[t] = torch.add(columns[t], columns[t + 1], alpha=factor)
        return torch.stack(columns, 1)
    each = factors.to(delta.dtype).unbind(1)
    for t in range(len(columns) - 2, -1, -1):
        columns[t] = torch.addcmul(columns[t], each[t], columns[t + 1])
    return torch.stack(columns, 1)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that a value function is trained on.

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1};  returns = A + V.
    Masked steps are passed over: t + 1 is the next step that is not masked.

    Args:
        rewards, values: [B, T].
        mask: [B, T]; 0 or False takes the step out, whatever stands there.
        last_value: [B], value after the last step; 0 by default (the episode ended).

    Returns:
        (advantages, returns): [B, T], dtype of `rewards`; 0 where masked. Not normalised.

    Raises:
        ValueError: a shape differs from the above. TypeError: a dtype does.

    Source: Schulman et al. 2016 (arXiv:1506.02438).
    """
    checks.floating("gae", "rewards", rewards)
    checks.floating("gae", "values", values)
    checks.shape("gae", "rewards", rewards, (None, None), "[B, T]")
    checks.shape("gae", "values", values, rewards.shape, "as rewards")
    keep = None
    if mask is not None:
        checks.tensor("gae", "mask", mask)
        checks.shape("gae", "mask", mask, rewards.shape, "as rewards")
        keep = mask != 0
    following = rewards.new_zeros(rewards.shape[0])
    if last_value is not None:
        checks.floating("gae", "last_value", last_value)
        checks.shape("gae", "last_value", last_value, rewards.shape[:1])
        following = last_value.to(rewards.dtype)
    values = values.to(rewards.dtype)
    after = torch.cat((values, following[:, None]), 1)
    if keep is None:
        advantages = _discounted(rewards + gamma * after[:, 1:] - values, gamma * lam, None)
        return advantages, advantages + values
    values = torch.where(keep, values, 0.0)
    steps = torch.arange(rewards.shape[1], device=rewards.device)
    # the next step that is not masked; that behind the last one is `following`
    next_kept = torch.where(keep, steps, rewards.shape[1]).flip(1).cummin(1).values.flip(1)
    next_kept = torch.cat((next_kept, next_kept.new_full((len(keep), 1), len(steps))), 1)[:, 1:]
    delta = rewards + gamma * after.gather(1, next_kept) - values
    delta = torch.where(keep, delta, 0.0)
    advantages = _discounted(delta, gamma * lam, torch.where(keep, gamma * lam, 1.0))
    advantages = torch.where(keep, advantages, 0.0)
    return advantages, advantages + values
