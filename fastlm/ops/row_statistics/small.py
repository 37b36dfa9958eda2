"""Calls of few logits, by PyTorch's own operations.

The way from Python to a kernel and back takes longer than PyTorch needs for some thousand logits
(benchmarks/LOG.md, "small calls"). Here are the functions of few logits in those operations, for
plain tensors on a CPU and the options that most calls have; whatever is not here, a backend that is
asked for, a trace and a transform of torch.func included, goes the usual way.

Contract: that of the ops. Results are float32 or wider, and what stands in an ignored row reaches
neither a result nor a gradient. None is returned where the usual way has an error to report.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dispatch, extension
from ...checks import INTEGERS

_WIDE = (torch.float32, torch.float64)
_DTYPES = (*_WIDE, torch.bfloat16, torch.float16)

# (classes, log2 of the logits up to which PyTorch is faster with so many classes: without and with
# a gradient); a kernel's rows of few classes are all overhead, PyTorch's of 5 to 15 are scalar.
# AMD EPYC (Zen 5, AVX-512), 2 cores, 2026-11
_ANY = 1 << 62
_LOGPROBS = ((4, 22, 22), (15, 15, 15), (32, 22, 21), (128, 20, 20), (512, 19, 19), (_ANY, 18, 19))
_ENTROPY = ((4, 20, 20), (15, 13, 13), (64, 17, 15), (_ANY, 14, 13))
# the wider copies of 16 bits cost as much again from here on
_MOST_NARROW, _MOST_NARROW_ROWS = 1 << 18, 5 << 17  # the second: of rows of at most 128 classes
# multiply-adds of a linear layer up to which ours gains less on its product than the way to it
# takes, in float32 and by pairs of bfloat16; the product of fewer rows is PyTorch's anyway, in
# float32, and then to hold their logits is cheaper than to compute them again
_MOST_WORK, _MOST_PAIRS = 1 << 24, 1 << 22
_FEW_ROWS, _MOST_HELD = 8, 1 << 21


def number(value: Any) -> bool:
    return type(value) is float or type(value) is int


def valid(ignore_index: Any, reduction: Any, label_smoothing: Any) -> bool:
    """Options of a loss as they should be, and no class is ignored."""
    if type(ignore_index) is not int or ignore_index >= 0:
        return False
    if type(reduction) is not str or reduction not in ("none", "mean", "sum"):
        return False
    return number(label_smoothing) and 0 <= label_smoothing <= 1


def divides(temperature: Any) -> bool:
    return number(temperature) and 0 < temperature < math.inf


def few(x: Tensor, classes: int, logits: int, trained: bool, entropy: bool = False) -> bool:
    """Whether PyTorch is faster with so many logits of rows of x. In float64 it always is: no
    kernel is compiled for that."""
    if logits == 0 or x.dtype not in _DTYPES:
        return False
    if x.dtype == torch.float64:
        return True
    limits = _ENTROPY if entropy else _LOGPROBS
    most = next(row for row in limits if classes <= row[0])[1 + trained]
    if x.dtype != torch.float32 and logits > (
        _MOST_NARROW_ROWS if classes <= 128 else _MOST_NARROW
    ):
        return False
    return logits <= 1 << most


def trained(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def note(op: str) -> None:
    dispatch.note(op, "torch", {"cpu": "so few logits are PyTorch's sooner"})


def wide(x: Tensor) -> Tensor:
    return x if x.dtype in _WIDE else x.float()


def without_ignored(rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """rows [N, ...] with zeros in the ignored ones, so that nothing of them is in a gradient;
    target [N] with at least one element (with classes second [N, V, ...] and [N, ...])."""
    if int(target.min()) >= 0:  # ignore_index is below 0
        return rows
    return rows.masked_fill((target == ignore_index).unsqueeze(1), 0.0)


def _loss(
    rows: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor | None:
    try:
        return F.cross_entropy(
            rows, target, weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    except IndexError:
        return None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor | None:
    """Of logits [N, V, ...], integer target [N, ...] with at least one element, ignore_index below
    0, weight [V] in the result's dtype."""
    rows, target = wide(logits), target.long()
    if trained(rows):
        rows = without_ignored(rows, target, ignore_index)
    return _loss(rows, target, weight, ignore_index, reduction, label_smoothing)


def token_logprobs(
    logits: Tensor, target: Tensor, ignore_index: int, scale: float
) -> Tensor | None:
    """[...], of logits [..., V] and integer target [...] with at least one element."""
    rows, target = wide(logits), target.long()
    if scale != 1.0:
        rows = rows * scale
    if target.dim() == 1:
        return _picked(rows, target, ignore_index, trained(rows))
    rows, flat = rows.reshape(-1, logits.shape[-1]), target.reshape(-1)
    value = _picked(rows, flat, ignore_index, trained(rows))
    return None if value is None else value.view(target.shape)


def _picked(rows: Tensor, target: Tensor, ignore_index: int, guard: bool) -> Tensor | None:
    if guard:
        rows = without_ignored(rows, target, ignore_index)
    loss = _loss(rows, target, None, ignore_index, "none", 0.0)
    # not a minus sign: it would leave -0.0 in an ignored row
    return None if loss is None else torch.rsub(loss, 0.0)


def entropy(logits: Tensor, scale: float) -> Tensor:
    """[...], of logits [..., V]."""
    rows = wide(logits)
    log_p = (rows if scale == 1.0 else rows * scale).log_softmax(-1)
    p = log_p.exp()
    value = (p * log_p).sum(-1)
    # a class of probability 0, which log p = -inf or below this has, counts 0 log 0 = 0; it is
    # rare, and to look is cheaper than to mask
    if bool(value.detach().isnan().any()):
        value = (p * log_p.clamp(min=-1e4)).sum(-1)
    return value.neg()


def takes_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None = None
) -> bool:
    """Whether the logits of these few rows are PyTorch's; else, or where an argument is not as it
    should be, the call goes the usual way."""
    # under autocast the products of the backward would be cast again
    if not dispatch.direct(input, weight, bias, target) or torch.is_autocast_enabled("cpu"):
        return False
    dtype = input.dtype
    if dtype not in _DTYPES or weight.dtype != dtype or weight.dim() != 2 or input.dim() == 0:
        return False
    if bias is not None and (bias.dtype != dtype or bias.shape != weight.shape[:1]):
        return False
    classes, features = weight.shape
    if input.shape[-1] != features or features == 0 or classes == 0:
        return False
    rows = input.numel() // features
    if rows < _FEW_ROWS and dtype == torch.float32:
        if not 0 < rows * classes <= _MOST_HELD:
            return False
    elif rows * classes * features > (_MOST_WORK if dtype in _WIDE else _MOST_PAIRS):
        return False
    elif not few(input, classes, rows * classes, trained(input, weight, bias)):
        return False
    return target is None or (target.dtype in INTEGERS and target.shape == input.shape[:-1])


def _layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] in the result's dtype, and target [N] as int64, of what `takes_layer`; nothing
    of an ignored row is in a gradient."""
    rows, target = wide(input), target.long()
    if input.dim() != 2:
        rows, target = rows.reshape(-1, input.shape[-1]), target.reshape(-1)
    if trained(input, weight, bias):
        rows = without_ignored(rows, target, ignore_index)
    return F.linear(rows, wide(weight), None if bias is None else wide(bias)), target


def linear_cross_entropy(
    given: tuple[Tensor, Tensor, Tensor | None, Tensor],
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor | None:
    """given: input [..., H], weight [V, H] and bias of the layer, target [...]."""
    if not valid(ignore_index, reduction, label_smoothing) or not takes_layer(*given):
        return None
    note("linear_cross_entropy")
    logits, target = _layer(*given, ignore_index)
    value = _loss(logits, target, None, ignore_index, reduction, label_smoothing)
    return value if value is None or reduction != "none" else value.view(given[3].shape)


def linear_token_logprobs(
    op: str,
    given: tuple[Tensor, Tensor, Tensor | None, Tensor],
    ignore_index: int,
    scale: float,
) -> Tensor | None:
    """given: as for `linear_cross_entropy`."""
    if not takes_layer(*given):
        return None
    from . import logprobs as kernel

    if given[0].dtype == torch.float32 and extension.unavailable is None:
        # the product and the kernel that `generate` agrees with to the bit
        if not dispatch.undisturbed():
            return None
        input, weight, bias, target = given
        if trained(input, weight, bias):
            flat = target.reshape(-1)
            rows = without_ignored(input.reshape(-1, input.shape[-1]), flat, ignore_index)
            input = rows.view(input.shape)
        logits = kernel.layer(input, weight, bias)
        return kernel.logprobs(op, logits, target, ignore_index, scale)
    note(op)
    logits, target = _layer(*given, ignore_index)
    value = _picked(logits if scale == 1.0 else logits * scale, target, ignore_index, False)
    return None if value is None else value.view(given[3].shape)
