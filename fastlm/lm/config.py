"""The settings of a training run, and how two sets of them differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .budget import SCHEDULES, Budget
from .errors import UsageError

PRECISIONS = ("float32", "bf16")
LARGEST = 2**31 - 1  # of whole numbers but seeds


def wrong_number(name: str, value: Any) -> str | None:
    """What an option can never mean, whichever it is: no finite number, or one beyond all sizes."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if isinstance(value, int) and name == "seed" and not -(2**63) <= value < 2**64:
        return f"must be in [-2**63, 2**64), got {value}"
    if isinstance(value, int) and name != "seed" and abs(value) > LARGEST:
        return f"must be at most {LARGEST:,}, got {value:,}"
    return None


def require_not_negative(**values: float) -> None:
    """Raises UsageError for one that is negative or NaN; infinity says never."""
    for name, value in values.items():
        if not value >= 0:
            raise UsageError(f"{name} must not be negative, got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """`warmup`, `floor`: shares of the budget and of `lr`. `patience`: evaluations without a better
    held-out score before training stops, None for never. `clip` 0 means no clipping. `accumulate`:
    the rows of a batch go through the model in so many parts; the gradient is that of the batch.
    `precision` "bf16": autocast of the forward; weights, optimizer and evaluation stay float32.
    `decay`: share of the budget in which "wsd" comes down."""

    budget: str = "90s"
    lr: float = 4e-3
    batch: int = 32
    seq: int = 64
    warmup: float = 0.02
    floor: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    evals: int = 10
    eval_tokens: int = 32768
    patience: int | None = None
    label_smoothing: float = 0.0
    accumulate: int = 1
    precision: str = "float32"
    schedule: str = "cosine"
    decay: float = 0.2

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        least_values = {"batch": 1, "seq": 1, "evals": 1, "eval_tokens": 2, "accumulate": 1}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UsageError(f"lr must be above 0, got {self.lr}")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise UsageError("warmup must be in [0, 1) and floor in [0, 1]")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.clip < math.inf):
            raise UsageError("weight_decay and clip must be finite and not negative")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"patience must be at least 1, got {self.patience}")
        if not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed must be in [-2**63, 2**63), got {self.seed}")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.batch % self.accumulate:
            raise UsageError(
                f"batch must be a multiple of accumulate ({self.accumulate}), got {self.batch}"
            )
        for name, known in {"precision": PRECISIONS, "schedule": SCHEDULES}.items():
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 < self.decay <= 1:
            raise UsageError(f"decay must be in (0, 1], got {self.decay}")


def difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys of two nested configurations that disagree, as `key: before -> now`."""
    lines: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in difference(a, b)]
        elif a != b:
            lines.append(f"{key}: {a} -> {b}")
    return lines
