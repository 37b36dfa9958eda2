"""Divergence of a linear layer's softmax from a teacher, chunk by chunk, and its autograd.

The torch ops that use it have one form,

    (student, student_weight, student_bias, <teacher's tensors>, keep, row_weight, <options>,
     needs_input, needs_weight, needs_bias) -> (divergence [N], dinput, dweight, dbias)

where the gradients are those of sum(row_weight * divergence). So one op serves both schedules:
where the weight of each row is known beforehand gradients are computed along with the value; where
it comes with the upstream gradient ("none") the op runs again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, library, matmul
from ..cross_entropy.loss import REDUCTIONS, finite
from ..linear_cross_entropy.options import chunk_bytes
from ..linear_row_statistics import op as linear
from ..linear_row_statistics.chunks import (
    LIBRARY,
    Chunk,
    Gradients,
    Layer,
    Matmul,
    Needs,
    Products,
    Span,
    chunk_rows,
    held_dtype,
    spans,
)
from ..row_statistics.op import result_dtype

# rows of a chunk by default, at least: with 64 the products of a wide layer (V=50257, H=1024) made
# the whole 0.96x of plain PyTorch on 2 threads, with 86 1.03x; 2 cores of an EPYC, 2026-11. By the
# number of buffers; more than two are the reference's
_LEAST_ROWS = {2: 96}
# of the weight in one product on a CPU: the library reads a weight of 200 MB in slices of this size
# up to 1.2x as fast as at once, one of 16 MB 1.05x (rows 64, 128; the same machine)
_SLICE_BYTES = 4 << 20

# (logits of a chunk, which are spent, its rows, factor [n] of the gradient or None for none) ->
# divergence [n], gradient [n, V]
Rows = Callable[[Tensor, Span, Tensor | None], tuple[Tensor, Tensor]]


class Prepared(NamedTuple):
    """How the rows of a chunk are compared with the teacher's."""

    rows: Callable[[int], Rows]  # of the rows per chunk
    buffers: int  # of a chunk's size that live at once, the student's logits among them
    matmul: Matmul = LIBRARY


def _chunk(layer: Layer, max_bytes: int, buffers: int) -> int:
    rows, classes = layer.input.shape[0], layer.weight.shape[0]
    itemsize, device = result_dtype(layer.input).itemsize, layer.input.device
    if max_bytes > 0:
        return chunk_rows(rows, buffers * classes, itemsize, max_bytes, device)
    if max_bytes < 0:  # minus the rows
        return chunk_rows(rows, classes, itemsize, -max_bytes * classes * itemsize, device)
    own_choice = chunk_rows(rows, buffers * classes, itemsize, 0, device)
    if device.type != "cpu":
        return own_choice
    # the share of the rows that `chunk_rows` takes is meant for little more than one buffer
    least = 64 if matmul.own_is_faster() else _LEAST_ROWS.get(buffers, 64)
    most = max(least, 2 * own_choice // buffers)
    return chunk_rows(rows, classes, itemsize, most * classes * itemsize, device)


def chunk_of(layer: Layer, rows: int) -> Chunk:
    """What the products take at a time."""
    if layer.input.device.type != "cpu" or matmul.own_is_faster():
        return Chunk(rows)
    row_bytes = max(1, layer.input.shape[1]) * result_dtype(layer.input).itemsize
    return Chunk(rows, classes=max(64, _SLICE_BYTES // row_bytes))


def _on_cpu(value: Tensor) -> bool:
    return value.device.type == "cpu"


def without_masked(value: Tensor, keep: Tensor | None) -> Tensor:
    """Zeros in the rows that `run` computes although they are masked: whatever stands there must
    not reach a product. On a CPU it leaves them out."""
    if keep is None or _on_cpu(value):
        return value
    return value.masked_fill(~keep.view(-1, *(1,) * (value.dim() - 1)), 0)


def run(
    layer: Layer,
    keep: Tensor | None,
    row_weight: Tensor | None,
    needs: Needs,
    max_bytes: int,
    prepared: Prepared,
) -> tuple[Tensor, ...]:
    """The op's results. Rows that `keep` takes out are not computed on a CPU; elsewhere choosing
    rows would wait for the device."""
    rows, chunk = layer.input.shape[0], _chunk(layer, max_bytes, prepared.buffers)
    layer = layer._replace(input=without_masked(layer.input, keep))
    row_weight = None if row_weight is None else without_masked(row_weight, keep)
    products = Products(layer, chunk_of(layer, chunk), prepared.matmul)
    compare = prepared.rows(chunk)
    value = products.new(rows)
    live = keep.nonzero()[:, 0] if keep is not None and _on_cpu(value) else None
    count = rows if live is None else len(live)
    gradients = Gradients(products, needs, dtype=held_dtype(layer.input), rows=count)
    if live is not None:
        value.zero_()
        gradients.clear(slice(None))
    for span in spans(rows, chunk, live):
        logits = products.logits(span)
        factor = None
        if row_weight is not None and any(needs):
            factor = row_weight[span]
        value[span], dlogits = compare(logits, span, factor)
        if factor is not None:
            gradients.add(dlogits, span)
    return without_masked(value, keep), *gradients.results()


def fake(layer: Layer, needs: Any) -> tuple[Tensor, ...]:
    value = layer.input.new_empty(layer.input.shape[0], dtype=result_dtype(layer.input))
    return value, *linear.empty_gradients(layer, needs, held_dtype(layer.input))


def _overload(name: str) -> Any:
    return getattr(torch.ops.fastlm, name).default


class _KnownWeights(torch.autograd.Function):
    """sum(row_weight * divergence); the gradients are there when it is."""

    @staticmethod
    def forward(ctx: Any, name: str, tensors: int, *args: Any) -> Tensor:
        # args: tensors (the last is row_weight), options, needs 3
        value, *found = _overload(name)(*args)
        needs = args[-3:]
        gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
        # a compiled graph has no state to hand the gradients out once: it saves and multiplies
        compiling = torch.compiler.is_compiling()
        ctx.gradients = None if compiling else gradients
        ctx.save_for_backward(*args[:tensors], *(gradients if compiling else (None,) * 3))
        ctx.name, ctx.rest = name, args[tensors:]
        return (args[tensors - 1] * value).sum()

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_weight, _, _, _ = saved = ctx.saved_tensors
        nothing, dtype = (None,) * (len(tensors) - 2 + len(ctx.rest)), tensors[0].dtype
        traced = saved[-3:]
        if any(g is not None for g in traced):
            found = [None if g is None else (g * dloss).to(dtype) for g in traced]
            return None, None, *found, *nothing
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            return None, None, *linear.released(gradients, dloss, dtype), *nothing
        _, *found = _overload(ctx.name)(*tensors, row_weight * dloss, *ctx.rest)
        needs = ctx.rest[-3:]
        found = [g.to(dtype) if need else None for g, need in zip(found, needs, strict=True)]
        return None, None, *found, *nothing


class _EachRow(torch.autograd.Function):
    """The divergence of each row; the backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, name: str, tensors: int, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[: tensors - 1])
        ctx.name, ctx.options = name, args[tensors:-3]
        return _overload(name)(*args)[0]

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:5]
        tensors = ctx.saved_tensors
        _, *found = _overload(ctx.name)(*tensors, dvalue.contiguous(), *ctx.options, *needs)
        dtype = tensors[0].dtype
        found = [g.to(dtype) if need else None for g, need in zip(found, needs, strict=True)]
        return None, None, *found, *(None,) * (len(tensors) - 2 + len(ctx.options) + 3)


def checked_budget(op: str, options: Any, layer: Layer) -> int:
    """The op argument `max_bytes`: memory of a chunk's buffers together; as `chunk_bytes` else."""
    if getattr(options, "grad_accum_into", None) is not None:
        checks.bad_value(op, "options.grad_accum_into", "None", "a tensor", "add the gradient")
    return chunk_bytes(op, options, layer.input, layer.weight)


class Weighting(NamedTuple):
    """How rows become a loss; vectors flattened to [N]."""

    keep: Tensor | None
    token_weight: Tensor | None
    reduction: str


def checked_weighting(
    op: str, student: Tensor, mask: Tensor | None, token_weight: Tensor | None, reduction: str
) -> Weighting:
    checks.one_of(op, "reduction", reduction, REDUCTIONS)
    shape = list(student.shape[:-1])
    for what, value in (("mask", mask), ("token_weight", token_weight)):
        if value is not None:
            checks.tensor(op, what, value)
            checks.shape(op, what, value, shape, "one per row of student")
            checks.same_device(op, what, value, "student", student)
    keep = None if mask is None else (mask != 0).reshape(-1)
    if token_weight is not None:
        token_weight = token_weight.reshape(-1).to(result_dtype(student))
        if keep is not None:  # whatever stands behind the mask
            token_weight = torch.where(keep, token_weight, 0.0)
    return Weighting(keep, token_weight, reduction)


def checked_divergence(
    op: str, divergence: str, beta: float, temperature: float, choices: tuple[str, ...]
) -> tuple[str, float, float]:
    """(divergence, beta, scale of the logits); jsd at the ends of beta is one of the others."""
    checks.one_of(op, "divergence", divergence, choices)
    if not 0 <= finite(op, "beta", beta) <= 1:
        checks.bad_value(op, "beta", "in [0, 1]", beta)
    if finite(op, "temperature", temperature) <= 0:
        checks.bad_value(op, "temperature", "positive", temperature)
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse" if beta == 1 else "forward"
        checks.one_of(op, "divergence (of this beta)", divergence, choices)
    return divergence, float(beta), 1.0 / temperature


def loss(
    name: str,
    layer: Layer,
    others: tuple[Tensor | None, ...],
    weighting: Weighting,
    options: tuple[Any, ...],
    shape: Any,
) -> Tensor:
    """The op `name` reduced; arguments have been checked, rows are flattened."""
    keep, token_weight, reduction = weighting
    rows = layer.input.shape[0]
    count: Tensor | int = 1
    if reduction == "mean":
        count = max(1, rows) if keep is None else keep.sum().clamp(min=1)
    tensors = (*layer, *others, keep)
    if reduction == "none" or (token_weight is not None and token_weight.requires_grad):
        each = _EachRow.apply(name, len(tensors) + 1, *tensors, None, *options, *(False,) * 3)
        if token_weight is not None:
            each = each * token_weight
        return each.view(shape) if reduction == "none" else each.sum() / count
    if token_weight is None:
        token_weight = layer.input.new_ones(rows, dtype=result_dtype(layer.input))
    enabled = torch.is_grad_enabled()
    needs = tuple(enabled and x is not None and x.requires_grad for x in layer)
    row_weight = token_weight / count
    return _KnownWeights.apply(name, len(tensors) + 1, *tensors, row_weight, *options, *needs)
