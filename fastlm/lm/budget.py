"""How long to train, and the learning rate by the share of it that is used."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import UsageError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """`amount` in seconds, steps or epochs."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|steps?|epochs?)", text.strip())
        if match is None or not 0 < float(match[1]) < math.inf:
            raise UsageError(f"budget must be like 90s, 10m, 500steps or 2epochs, got {text!r}")
        amount, unit = float(match[1]), match[2]
        if unit in _UNITS:
            return cls(amount * _UNITS[unit], "seconds")
        if unit.startswith("step"):
            return cls(math.ceil(amount), "steps")
        return cls(amount, "epochs")

    def resolve(self, steps_per_epoch: int) -> Budget:
        """Epochs as steps: afterwards the unit is seconds or steps."""
        if self.unit != "epochs":
            return self
        return Budget(max(1, round(self.amount * steps_per_epoch)), "steps")

    def share(self, steps: int, seconds: float) -> float:
        """The part that is used, 1 and above when nothing is left."""
        return (seconds if self.unit == "seconds" else steps) / self.amount

    def seconds_left(self, steps: int, seconds: float) -> float:
        if self.unit == "seconds":
            return max(0.0, self.amount - seconds)
        return (self.amount - steps) * seconds / steps if steps else float("nan")

    def __str__(self) -> str:
        return f"{self.amount:g}{'s' if self.unit == 'seconds' else ' ' + self.unit}"


SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate(
    peak: float,
    share: float,
    warmup: float,
    floor: float,
    schedule: str = "cosine",
    decay: float = 0.2,
) -> float:
    """Linear from 2% to `peak` over the first `warmup` of the budget, then down to `floor * peak`:
    as a cosine, as a line, not at all ("constant"), or as a line over the last `decay`, after the
    warm-up at most ("wsd").

    Source: warm-up, stable, decay: Hu et al. 2024 (arXiv:2404.06395).
    """
    if share < warmup:
        return peak * max(0.02, share / warmup)
    progress = min(1.0, (share - warmup) / (1.0 - warmup))
    if schedule == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule == "linear":
        height = 1.0 - progress
    elif schedule == "constant":
        height = 1.0
    else:
        height = min(1.0, (1.0 - min(share, 1.0)) / min(decay, 1.0 - warmup))
    return peak * (floor + (1.0 - floor) * height)
