"""Cross-entropy of logits: torch's function, with one read of the logits in each direction.

Composed of `row_statistics` (which see for the kernel, the backends and what is saved) and a few
operations on one number per row, so every option is differentiable with all others. Calls of few
logits, and of float64, are PyTorch's own: see `row_statistics/small.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from ... import checks, dispatch
from ..row_statistics import parallel, small
from ..row_statistics.op import result_dtype, row_statistics
from . import loss as losses

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .signatures import LossOptions

_OP = "cross_entropy"


def _rows_shape(input: Tensor, target: Tensor) -> list[int]:
    """Shape of the loss without reduction, torch's: that of `input` without its classes."""
    if input.dim() == 1:
        if tuple(target.shape) not in ((), (1,)):
            checks.shape(_OP, "target", target, [], "input is one row")
        return []
    expected = [input.shape[0], *input.shape[2:]]
    if list(target.shape) != expected:
        remedy = ""
        if target.shape == input.shape[:-1]:
            remedy = "; classes are dimension 1, so flatten: input.flatten(0, -2), target.flatten()"
        checks.shape(_OP, "target", target, expected, f"input is {list(input.shape)}{remedy}")
    return expected


def _by_torch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor | None:
    """The loss of few logits; None: not such a call, or its arguments are not as they should be."""
    if not dispatch.direct(input, target, weight) or input.dim() < 2:
        return None
    if not small.few(input, input.shape[1], input.numel(), small.trained(input)):
        return None
    if target.dtype not in checks.INTEGERS or target.shape != input.shape[:1] + input.shape[2:]:
        return None
    if not small.valid(ignore_index, reduction, label_smoothing):
        return None
    if weight is not None:
        fits = weight.shape == input.shape[1:2] and weight.dtype == result_dtype(input)
        if weight.requires_grad or not fits:
            return None
    small.note(_OP)
    return small.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    **rest: Unpack[LossOptions],
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_aux: Sequence[str],
    **rest: Unpack[LossOptions],
) -> tuple[Tensor, dict[str, Tensor]]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    group: Any = None,
    vocab_start_index: int | None = None,
    return_aux: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of logits and class indices or probabilities, without storing the softmax.

    Same as, without the arguments after `label_smoothing`:
        torch.nn.functional.cross_entropy(
            input.float(), target.long(), weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing)

    Args:
        input: logits, [N, V], [V] or [N, V, d1, ...], any float dtype.
        target: class indices, `input`'s shape without V, any integer dtype, each in [0, V) or
            `ignore_index`; or probabilities in the shape of `input`, float (differentiable).
        weight: [V], of each class; "mean" then divides by the sum of the targets' weights.
        ignore_index: target value of a row without loss, without gradient, and not read.
        reduction: "none", "mean" (over the rows that are not ignored) or "sum".
        label_smoothing: share of the target that is spread evenly over all classes.
        z_loss_weight: adds z_loss_weight * lse**2 to each row (class weights do not apply to it).
        logit_softcapping: cap in logits = cap * tanh(logits / cap), applied first.
        logit_scale, temperature: logits * logit_scale / temperature, applied second.
        token_weight: shape of the index target, multiplies each row's loss (differentiable); it
            does not enter the denominator of "mean".
        group: process group (of torch.distributed) whose members hold the vocabulary in parts:
            V is then the size of this process's part in `input`, `weight` and probabilities, and
            class indices are global. Every member calls with the same rows and gets the same
            result; gradients are of its own part. One all-gather of a few numbers per row.
            A DTensor with Shard on the classes is the same; results are plain tensors.
        vocab_start_index: this part's first class; None: rank * V, for parts of equal size.
        return_aux: names among "lse", "z_loss", "entropy", "argmax", "accuracy".

    Returns:
        float32 (float64 for float64 input): [], or with "none" the shape of the index target. With
        `return_aux` a pair of it and a dict. "lse", "entropy" (differentiable) and "argmax" have
        the shape of the index target and hold 0 (argmax -1) where it is ignored; "z_loss" is
        reduced like the loss; "accuracy" is the share of the kept rows whose argmax is the target.
        As in torch the mean over no rows is NaN.

    Raises:
        ValueError: a shape or value differs from the above. TypeError: a dtype does.
        IndexError: a class index is out of range (CPU; elsewhere the row's loss is NaN).
        RuntimeError: `group` in a PyTorch without torch.distributed.
    """
    added = (z_loss_weight, token_weight, group, vocab_start_index, return_aux)
    if losses.plain(temperature, logit_scale, logit_softcapping, *added):
        few = _by_torch(input, target, weight, ignore_index, reduction, label_smoothing)
        if few is not None:
            return few
    options = losses.checked(
        _OP,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcapping=logit_softcapping,
        ignore_index=ignore_index,
        return_aux=return_aux,
    )
    class_dim = 1 if isinstance(input, Tensor) and input.dim() > 1 else 0
    input, group, vocab_start_index, target, weight, token_weight = parallel.unwrapped(
        _OP, "input", input, class_dim, group, vocab_start_index, target, weight, token_weight
    )
    checks.floating(_OP, "input", input)
    if input.dim() == 0:
        checks.bad_value(_OP, "input", "[N, V], [V] or [N, V, d1, ...]", "no dimension")
    classes = input.shape[class_dim]
    if classes == 0:
        checks.bad_value(_OP, "input", "of at least one class", list(input.shape))
    soft = losses.is_soft(_OP, target, input.shape)
    checks.same_device(_OP, "target", target, "input", input)
    if soft and ignore_index >= 0:
        checks.bad_value(_OP, "ignore_index", "negative with probabilities", ignore_index)
    shape = [s for d, s in enumerate(input.shape) if d != class_dim]
    if not soft:
        shape = _rows_shape(input, target)
    losses.check_vectors(options, input, classes, weight, token_weight, shape)

    logits = input.movedim(class_dim, -1).reshape(-1, classes)
    dtype = result_dtype(input)
    target = target.movedim(class_dim, -1).reshape(-1, classes) if soft else target.long()
    settings: dict[str, Any] = {"wanted": options.wanted(soft), "ignore_index": ignore_index}
    settings |= {"scale": options.scale, "softcap": options.softcap}
    shard = parallel.shard_of(_OP, group, vocab_start_index, classes)
    if shard is None:
        rows = losses.compare_with(options, target, weight, token_weight, classes, soft, dtype)
        found = row_statistics(logits, rows.target, rows.class_weight, caller=_OP, **settings)
    else:

        def statistics(*compared: Tensor | None) -> parallel.ParallelStatistics:
            return parallel.row_statistics(logits, *compared, shard=shard, **settings)

        rest = (target, weight, token_weight, soft, dtype)
        rows, found = losses.compare_shards(options, shard, statistics, *rest)
    value = losses.reduce(options, rows, found)
    if reduction == "none":
        value = value.view(shape)
    if not options.aux:
        return value
    return value, losses.auxiliary(options, rows, found, shape)
