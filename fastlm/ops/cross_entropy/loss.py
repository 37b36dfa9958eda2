"""From row statistics to a loss: what `cross_entropy` and `linear_cross_entropy` share.

loss of a row = token_weight * ( on_logprob * log p[target] + on_weighted_sum * sum w log p
                                 + on_lse_square * lse^2 )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ..row_statistics import parallel, small
from ..row_statistics.op import Statistics, Wanted
from ..row_statistics.parallel import ParallelStatistics, Shard

REDUCTIONS = ("none", "mean", "sum")
AUX = ("lse", "z_loss", "entropy", "argmax", "accuracy")


def finite(op: str, what: str, value: Any) -> float:
    """A number known before the call runs; a tensor here would lose its gradient."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        checks.bad_type(op, what, "a number", type(value).__name__)
    if not -math.inf < value < math.inf:  # torch.compile does not know math.isfinite
        checks.bad_value(op, what, "finite", value)
    return float(value)


def scores(
    op: str, temperature: float, logit_scale: float, logit_softcapping: float | None
) -> tuple[float, float]:
    """(scale, softcap) of the row statistics."""
    temperature = finite(op, "temperature", temperature)
    if temperature <= 0:
        checks.bad_value(op, "temperature", "positive", temperature)
    softcap = 0.0
    if logit_softcapping is not None:
        softcap = finite(op, "logit_softcapping", logit_softcapping)
        if softcap <= 0:
            checks.bad_value(op, "logit_softcapping", "positive or None", softcap)
    return finite(op, "logit_scale", logit_scale) / temperature, softcap


@dataclass(frozen=True)
class Loss:
    """Checked options of one loss."""

    op: str
    reduction: str
    label_smoothing: float
    z_loss_weight: float
    scale: float
    softcap: float
    ignore_index: int
    aux: tuple[str, ...]

    def wanted(self, soft: bool) -> Wanted:
        return Wanted(
            entropy="entropy" in self.aux,
            weighted_sum=soft or self.label_smoothing > 0,
            argmax="argmax" in self.aux or "accuracy" in self.aux,
        )


def checked(
    op: str,
    *,
    reduction: str,
    label_smoothing: float,
    z_loss_weight: float,
    temperature: float,
    logit_scale: float,
    logit_softcapping: float | None,
    ignore_index: int,
    return_aux: Sequence[str],
) -> Loss:
    checks.one_of(op, "reduction", reduction, REDUCTIONS)
    smoothing = finite(op, "label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        checks.bad_value(op, "label_smoothing", "in [0, 1]", smoothing)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        checks.bad_type(op, "ignore_index", "an integer", type(ignore_index).__name__)
    if isinstance(return_aux, str):
        checks.bad_type(op, "return_aux", "a sequence of names", "a string", "write a tuple")
    for name in return_aux:
        checks.one_of(op, "return_aux", name, AUX)
    scale, softcap = scores(op, temperature, logit_scale, logit_softcapping)
    weight = finite(op, "z_loss_weight", z_loss_weight)
    return Loss(op, reduction, smoothing, weight, scale, softcap, ignore_index, tuple(return_aux))


def plain_scores(temperature: Any, logit_scale: Any, logit_softcapping: Any) -> bool:
    """The scores are the logits."""
    if logit_softcapping is not None or not small.number(temperature):
        return False
    return small.number(logit_scale) and temperature == logit_scale == 1


def plain(
    temperature: Any,
    logit_scale: Any,
    logit_softcapping: Any,
    z_loss_weight: Any,
    token_weight: Any,
    group: Any,
    vocab_start_index: Any,
    return_aux: Any,
) -> bool:
    """None of what torch's own function lacks is asked for."""
    if token_weight is not None or group is not None or vocab_start_index is not None:
        return False
    if not small.number(z_loss_weight) or z_loss_weight != 0 or return_aux != ():
        return False
    return plain_scores(temperature, logit_scale, logit_softcapping)


def is_soft(op: str, target: Tensor, logits_shape: Sequence[int]) -> bool:
    """Class probabilities rather than indices: as in torch, the shape alone decides."""
    checks.tensor(op, "target", target)
    if tuple(target.shape) != tuple(logits_shape):
        checks.integer(op, "target", target)
        return False
    if not target.is_floating_point():
        checks.bad_type(
            op,
            "target",
            "floating point (probabilities: it has the shape of the logits)",
            checks.short(target.dtype),
        )
    return True


def check_vectors(
    loss: Loss,
    input: Tensor,
    classes: int,
    weight: Tensor | None,
    token_weight: Tensor | None,
    rows_shape: Sequence[int],
) -> None:
    if weight is not None:
        checks.floating(loss.op, "weight", weight)
        checks.shape(loss.op, "weight", weight, [classes], "one per class")
        checks.same_device(loss.op, "weight", weight, "the logits", input)
    if token_weight is not None:
        checks.tensor(loss.op, "token_weight", token_weight)
        checks.shape(loss.op, "token_weight", token_weight, list(rows_shape), "one per target")
        checks.same_device(loss.op, "token_weight", token_weight, "the logits", input)


class Rows(NamedTuple):
    """What the rows of one loss are compared with, [N] each, in the result's dtype."""

    target: Tensor | None  # int64, shape of the result; None: class_weight holds probabilities
    class_weight: Tensor | None  # of the weighted sum, [V] or [N, V]; None: 1
    on_logprob: Tensor | float
    on_weighted_sum: Tensor | float
    on_lse_square: Tensor | float
    total: Tensor | float  # the mean's denominator
    z_total: Tensor | float
    best: Tensor | None = None  # the most probable class where class_weight is a part of it


def compare_with(
    loss: Loss,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    classes: int | Tensor,
    soft: bool,
    dtype: torch.dtype,
    target_weight: Tensor | None = None,
) -> Rows:
    """target: int64 of any shape, or probabilities [N, V]. target_weight: [N], that of each row's
    target where it has been looked up."""
    smoothing = loss.label_smoothing
    weight = None if weight is None else weight.to(dtype)
    per_token: Tensor | float = 1.0
    if token_weight is not None:
        per_token = token_weight.reshape(-1).to(dtype)
        if not soft:  # whatever stands where the target is ignored
            per_token = torch.where(target.reshape(-1) != loss.ignore_index, per_token, 0.0)
    on_lse_square = per_token * loss.z_loss_weight
    mean = loss.reduction == "mean"
    if soft:
        probability = target.to(dtype)
        if smoothing > 0:
            probability = probability * (1 - smoothing) + smoothing / classes
        if weight is not None:
            probability = probability * weight
        rows = float(target.shape[0]) if mean else 1.0
        return Rows(None, probability, 0.0, -per_token, on_lse_square, rows, rows)
    if weight is not None and weight.requires_grad:
        checks.bad_value(
            loss.op, "weight", "a constant", "a tensor with requires_grad", "detach it"
        )
    kept = target.reshape(-1) != loss.ignore_index
    count = total = kept.sum().to(dtype) if mean else 1.0
    on_target: Any = 1.0
    if weight is not None:
        if target_weight is None:
            # clamped: the row op reports an index out of range, with its position
            target_weight = weight[target.reshape(-1).clamp(0, weight.shape[0] - 1)]
        on_target = torch.where(kept, target_weight, 0.0)
        if mean:
            total = on_target.sum()
            if smoothing > 0:  # as in torch: NaN, not what is spread over the classes over 0
                total = total.masked_fill(total == 0, torch.nan)
    return Rows(
        target=target,
        class_weight=weight if smoothing > 0 else None,
        on_logprob=on_target * per_token * (smoothing - 1),
        on_weighted_sum=per_token * (-smoothing / classes),
        on_lse_square=on_lse_square,
        total=total,
        z_total=count,
    )


def compare_shards(
    loss: Loss,
    shard: Shard,
    statistics: Callable[[Tensor | None, Tensor | None, Tensor | None], ParallelStatistics],
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    soft: bool,
    dtype: torch.dtype,
) -> tuple[Rows, Statistics]:
    """`compare_with`, and the statistics, where `weight` and probabilities are a shard's.

    statistics: of (target, class_weight, weight to look up at the target)."""
    if soft:
        # its one use, the share of a class in the smoothing, comes before the statistics
        total = parallel.total_classes(shard, target).to(dtype) if loss.label_smoothing > 0 else 1
        rows = compare_with(loss, target, weight, token_weight, total, soft, dtype)
        assert rows.class_weight is not None
        if "accuracy" in loss.aux:
            rows = rows._replace(best=parallel.argmax(rows.class_weight.detach(), shard))
        return rows, statistics(None, rows.class_weight, None).statistics
    constant = None if weight is None else weight.detach().to(dtype)
    class_weight = constant if loss.label_smoothing > 0 else None
    found, classes, target_weight = statistics(target, class_weight, constant)
    rest = (token_weight, classes.to(dtype), soft, dtype, target_weight)
    return compare_with(loss, target, weight, *rest), found


def losses_of_rows(loss: Loss, rows: Rows, found: Statistics) -> Tensor:
    """[N], without the z-loss."""
    if rows.target is None:
        return rows.on_weighted_sum * found.weighted_sum
    value = rows.on_logprob * found.logprob
    if loss.label_smoothing > 0:
        value = value + rows.on_weighted_sum * found.weighted_sum
    return value


def z_losses(loss: Loss, rows: Rows, found: Statistics) -> Tensor:
    """[] or, without reduction, [N]."""
    value = rows.on_lse_square * found.lse.square()
    return value if loss.reduction == "none" else value.sum() / rows.z_total


def reduce(loss: Loss, rows: Rows, found: Statistics) -> Tensor:
    """[] or, without reduction, [N]."""
    value = losses_of_rows(loss, rows, found)
    if loss.reduction != "none":
        value = value.sum() / rows.total
    return value + z_losses(loss, rows, found) if loss.z_loss_weight != 0 else value


def auxiliary(loss: Loss, rows: Rows, found: Statistics, shape: Sequence[int]) -> dict[str, Tensor]:
    """What `return_aux` names. Of the rows' `shape` but for accuracy and a reduced z_loss."""
    aux: dict[str, Tensor] = {}
    for name in loss.aux:
        if name == "z_loss":
            aux[name] = z_losses(loss, rows, found)
            if loss.reduction == "none":
                aux[name] = aux[name].view(shape)
        elif name == "accuracy":
            aux[name] = _accuracy(loss, rows, found)
        else:
            aux[name] = getattr(found, name).view(shape)
    return aux


def _accuracy(loss: Loss, rows: Rows, found: Statistics) -> Tensor:
    if rows.target is None:
        assert rows.class_weight is not None
        best = rows.class_weight.argmax(-1) if rows.best is None else rows.best
        return (found.argmax == best).to(found.lse.dtype).mean()
    target = rows.target.reshape(-1)
    kept = target != loss.ignore_index
    return ((found.argmax == target) & kept).sum().to(found.lse.dtype) / kept.sum()
