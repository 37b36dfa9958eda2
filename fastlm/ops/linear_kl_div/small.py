"""`linear_kl_div` of few logits, by PyTorch's own operations: see `row_statistics/small.py`."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..row_statistics import small
from ..row_statistics.small import wide

Pair = tuple[Tensor, Tensor]


def takes(
    student: Pair, teacher: Pair, divergence: Any, beta: Any, temperature: Any, reduction: Any
) -> bool:
    """Hidden states and weight of each; else, or where an argument is not as it should be, the call
    goes the usual way."""
    if not small.takes_layer(*student, None) or not small.takes_layer(*teacher, None):
        return False
    (input, weight), (states, projection) = student, teacher
    if input.dtype != states.dtype or input.shape[:-1] != states.shape[:-1]:
        return False
    if weight.shape[:1] != projection.shape[:1] or not small.divides(temperature):
        return False
    options = divergence in ("forward", "reverse", "jsd"), reduction in ("mean", "sum", "none")
    return all(options) and type(beta) is float and 0.0 < beta < 1.0


def _log_probs(layer: Pair, scale: float) -> Tensor:
    logits = F.linear(wide(layer[0]), wide(layer[1]))
    return (logits if scale == 1.0 else logits * scale).log_softmax(-1).flatten(0, -2)


def divergence(
    student: Pair, teacher: Pair, divergence: str, beta: float, temperature: float, reduction: str
) -> Tensor:
    log_q = _log_probs(student, 1.0 / temperature)
    with torch.no_grad():
        log_p = _log_probs(teacher, 1.0 / temperature)
    # of (log q, log p): KL(p || q)
    how = {"mean": "batchmean"}.get(reduction, reduction)
    kl = functools.partial(F.kl_div, reduction=how, log_target=True)
    if divergence == "forward":
        value = kl(log_q, log_p)
    elif divergence == "reverse":
        value = kl(log_p, log_q)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        value = beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)
    return value.sum(-1).view(student[0].shape[:-1]) if reduction == "none" else value
