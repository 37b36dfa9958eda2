"""What the curves of a training run say, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROSE, FELL = 1.01, 0.99  # a change of 1% is more than the noise of 32768 tokens
LEAST = 4  # evaluations


def verdict(train: Sequence[float], held: Sequence[float], now: float | None = None) -> str:
    """One line for people.

    Args:
        train: average training loss at each evaluation, in nats per token. Dropout and label
            smoothing raise it, so that only its course is read.
        held: the held-out loss at the same times.
        now: the final loss on training text, measured as `held` is; None: the last of `train`.
    """
    now = train[-1] if now is None else now
    numbers = f"train {now:.2f}, held-out {held[-1]:.2f} nats/token"
    if not all(map(math.isfinite, [*train, *held])):
        return f"diverged: {numbers}; lower --lr or --clip"
    if len(held) < LEAST:
        return f"too few evaluations for a verdict: {numbers}"
    best, before = min(held), 2 * len(held) // 3 - 1
    both_rose = train[-1] > ROSE * min(train) and held[-1] > ROSE * best
    if both_rose:
        return (
            f"diverged: {numbers}; both rose, held-out from {best:.2f}, train from "
            f"{min(train):.2f}. Lower --lr, or a longer --warmup"
        )
    if held[-1] > ROSE * best:
        return (
            f"overfitting: {numbers}; the held-out loss was {best:.2f} before it rose. Use "
            "dropout, weight decay, --patience or more text"
        )
    if held[-1] < FELL * held[before]:
        return f"underfitting: {numbers}, still falling; a larger budget or model would help"
    if train[-1] < FELL * train[before]:
        return (
            f"overfitting: {numbers}; the training loss still falls, the held-out loss no longer. "
            "Use dropout, weight decay, --patience or more text"
        )
    if now < 0.8 * held[-1]:
        return (
            f"levelled off: {numbers}, far apart; dropout or more text would help, time would not"
        )
    return f"levelled off: {numbers}; a larger model or more text would help more than time"
