"""Keyword arguments of the overloads of `cross_entropy` and `linear_cross_entropy`.

For type checkers alone; imported by none that runs.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor


class ScoreOptions(TypedDict, total=False):
    logit_softcapping: float | None
    logit_scale: float
    temperature: float
    group: Any
    vocab_start_index: int | None


class _Loss(ScoreOptions, total=False):
    reduction: str
    label_smoothing: float
    z_loss_weight: float
    token_weight: Tensor | None


class LossOptions(_Loss, total=False):
    ignore_index: int


class LinearLossOptions(_Loss, total=False):
    linear_bias: Tensor | None
    weight: Tensor | None
    ignore_index: int | None
    options: Any
    shift: int
