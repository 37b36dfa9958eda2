"""`row_statistics` of a linear layer's output, without ever holding its logits.

    logits = input @ linear_weight.T + linear_bias     [N, V], at least float32 whatever the inputs
                                                       are; only a chunk of rows exists at a time

Saved: the inputs, and max and log sum exp(z - max) of each row. The backward computes the logits
again, so any function of the statistics can follow (8 N H V operations in all; the op
`linear_cross_entropy` does with 6 where the function is known beforehand).

Memory beyond inputs and gradients: one chunk of logits, and for half-precision inputs also one of
the input and a slice of the weight in float32; a budget (`max_bytes`) covers these. Beside it, for
half-precision inputs, the float32 sum of the weight's gradient, or, where the budget is so small
that the logits come in tiles (`slices.py`), that of the input's.

Backends: all run the loop of `chunks.py`. cpu and triton take float32, bfloat16 and float16 (the
logits are float32) and run the compiled or Triton's row kernels; reference runs those of plain
PyTorch, any float dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch, extension, library, triton_backend
from ...second_order import tangents, transformed
from ..row_statistics import differentiable
from ..row_statistics import op as rows_op
from ..row_statistics import reference as rows_reference
from ..row_statistics.op import (
    Statistics,
    Upstream,
    Wanted,
    coefficients,
    result_dtype,
    upstream_of,
)
from . import schedule
from .chunks import FASTEST, NO_NEEDS, Compared, Layer, Needs, RowKernels, chunk_of

LAYER_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? target, "
    "Tensor? class_weight, int ignore_index, float scale, float softcap, "
)
WANTED_ARGUMENTS = "bool entropy, bool sum_sq, bool weighted_sum, bool argmax, SymInt max_bytes"
NEEDS_ARGUMENTS = "bool needs_input, bool needs_weight, bool needs_bias"
STATISTICS = (
    "Tensor logprob, Tensor lse, Tensor entropy, Tensor sum_sq, Tensor weighted_sum, "
    "Tensor argmax, Tensor row_max, Tensor log_sum, Tensor weight_mass"
)
GRADIENTS = "Tensor dinput, Tensor dlinear_weight, Tensor dlinear_bias"


def empty_statistics(input: Tensor, target: Tensor | None, wanted: Any) -> tuple[Tensor, ...]:
    return rows_op.empty_statistics(input.shape[0], input, target is not None, *wanted)


def empty_gradients(
    layer: Layer, needs: Any, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    shapes = (layer.input.shape, layer.weight.shape, layer.weight.shape[:1])
    return tuple(
        layer.input.new_empty(shape if need else 0, dtype=dtype)
        for shape, need in zip(shapes, needs, strict=True)
    )


def check_target(named: dict[str, Any]) -> None:
    rows_op.check_target(named, named["linear_weight"].shape[0])


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    return empty_statistics(args[0], args[3], args[8:12])


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return empty_gradients(Layer(*args[:3]), args[15:18])


_forward = library.define(
    "linear_row_statistics",
    "forward",
    f"({LAYER_ARGUMENTS}{WANTED_ARGUMENTS}, str caller) -> ({STATISTICS})",
    _forward_fake,
    check=check_target,
)
_backward = library.define(
    "linear_row_statistics",
    "backward",
    f"({LAYER_ARGUMENTS}Tensor row_max, Tensor log_sum, Tensor? on_p, Tensor? on_p_log_p, "
    "Tensor? on_p_squared, Tensor? on_weight, Tensor? on_target, "
    f"{NEEDS_ARGUMENTS}, SymInt max_bytes) -> ({GRADIENTS})",
    _backward_fake,
)

# the one op here that writes to an argument; eager mode only
_accumulate = library.define(
    "accumulate_linear_row_statistics",
    "forward",
    f"({LAYER_ARGUMENTS}Tensor row_max, Tensor log_sum, Tensor? on_p, Tensor? on_p_log_p, "
    "Tensor? on_p_squared, Tensor? on_weight, Tensor? on_target, "
    f"{NEEDS_ARGUMENTS}, SymInt max_bytes, Tensor(a!) into) -> ({GRADIENTS})",
    lambda *args: empty_gradients(Layer(*args[:3]), (args[15], False, args[17])),
)


def _run_forward(kernels: RowKernels, *args: Any) -> tuple[Tensor, ...]:
    layer, compared = Layer(*args[:3]), Compared(*args[3:8])
    wanted = Wanted(*args[8:12])
    out = empty_statistics(layer.input, compared.target, wanted)
    schedule.forward(kernels, layer, compared, wanted, chunk_of(layer, args[12]), out)
    return out


def _run_backward(kernels: RowKernels, *args: Any) -> tuple[Tensor, ...]:
    layer, compared = Layer(*args[:3]), Compared(*args[3:8])
    row_max, log_sum, factors, needs = args[8], args[9], args[10:15], Needs(*args[15:18])
    into = args[19] if len(args) > 19 else None
    chunk = chunk_of(layer, args[18], needs if into is None else NO_NEEDS)
    rest = (row_max, log_sum, factors, chunk, needs, into)
    return schedule.backward(kernels, layer, compared, *rest)


def _in_place_backward(
    backward_into: Callable[..., None],
    logits: Tensor,
    compared: Compared,
    row_max: Tensor,
    log_sum: Tensor,
    factors: Any,
) -> Tensor:
    target, class_weight, ignore_index, scale, softcap = compared
    rows = (logits, target, class_weight, row_max, log_sum)
    backward_into(logits, *rows, factors, ignore_index, scale, softcap)
    return logits


def _plain_backward(
    logits: Tensor, compared: Compared, row_max: Tensor, log_sum: Tensor, factors: Any
) -> Tensor:
    target, class_weight, *options = compared
    arguments = (logits, target, class_weight, row_max, log_sum, *factors, *options)
    return rows_reference.backward(*arguments)


def _kernels_refuse(input: Tensor, **_: Any) -> str | None:
    if input.dtype == torch.float64:
        return "takes float32, bfloat16 and float16, not float64"
    return None


def _triton_refuses(input: Tensor, linear_weight: Tensor, **_: Any) -> str | None:
    too_large = rows_op.triton_refuses_size(input.shape[0], linear_weight.shape[0])
    return _kernels_refuse(input) or too_large


_TRITON = RowKernels(
    rows_op.triton_forward, functools.partial(_in_place_backward, rows_op.triton_backward_into)
)
_COMPILED = RowKernels(
    rows_op.cpu_forward,
    functools.partial(_in_place_backward, rows_op.cpu_backward_into),
    FASTEST,
)
_PLAIN = RowKernels(rows_reference.forward, _plain_backward)


def register(
    op: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]] | None = None,
) -> None:
    """Register the chunk loops of one op, which take the row kernels as first argument."""
    dispatch.register(
        op,
        "triton",
        functools.partial(forward, _TRITON),
        backward and functools.partial(backward, _TRITON),
        devices=triton_backend.devices,
        unavailable=triton_backend.unavailable,
        refuses=_triton_refuses,
        proven=False,
    )
    dispatch.register(
        op,
        "cpu",
        functools.partial(forward, _COMPILED),
        backward and functools.partial(backward, _COMPILED),
        devices=("cpu",),
        unavailable=extension.unavailable,
        refuses=_kernels_refuse,
    )
    dispatch.register(
        op,
        "reference",
        functools.partial(forward, _PLAIN),
        backward and functools.partial(backward, _PLAIN),
    )


register("linear_row_statistics", _run_forward, _run_backward)
register("accumulate_linear_row_statistics", _run_backward)


def gradients(
    layer: Layer,
    compared: Compared,
    saved: tuple[Tensor, ...],
    upstream: Upstream,
    needs: Needs,
    max_bytes: int,
    into: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias; saved: row_max, log_sum, entropy, sum_sq and
    weight_mass of the forward. That of the weight is added to `into`, if given, and None."""
    factors = coefficients(upstream, *saved[2:])
    return gradients_of(layer, compared, saved[:2], factors, needs, max_bytes, into)


def gradients_of(
    layer: Layer,
    compared: Compared,
    row_sums: tuple[Tensor, ...],
    factors: Sequence[Tensor | None],
    needs: Needs,
    max_bytes: int,
    into: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`gradients` for the coefficients of each row; row_sums: row_max and log_sum."""
    rest = (*row_sums, *factors, *needs, max_bytes)
    if into is None or not needs.weight:
        found = _backward(*layer, *compared, *rest)
    else:
        found, needs = _accumulate(*layer, *compared, *rest, into), needs._replace(weight=False)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def scaled(gradients: Sequence[Tensor | None], dloss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, which are ours alone, times dloss."""
    functorch = torch._C._functorch
    # a batch of upstream gradients, which cannot be looked at
    if functorch.is_legacy_batchedtensor(dloss) or functorch.is_functorch_wrapped_tensor(dloss):
        return tuple(None if g is None else g * dloss for g in gradients)
    if not checks.readable(dloss) or float(dloss) != 1.0:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(dloss)
    return tuple(gradients)


def released(
    gradients: Sequence[Tensor | None], dloss: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """As `scaled`, from the dtype they were held in to that of the layer."""
    return tuple(None if g is None else g.to(dtype) for g in scaled(gradients, dloss))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
    """What the backward is given."""
    into, *args = inputs
    _, _, entropy, sum_sq, _, argmax, row_max, log_sum, mass = output
    ctx.options, ctx.wanted, ctx.max_bytes = args[5:8], Wanted(*args[8:12]), args[12]
    moments = rows_op.kept_from_the_caller(ctx.wanted, entropy, sum_sq)
    saved = (*args[:5], row_max, log_sum, *moments, mass)
    ctx.save_for_backward(*saved)
    # not saved: another backward may write to it before this one does
    ctx.into = into
    ctx.mark_non_differentiable(argmax, row_max, log_sum, mass)
    ctx.set_materialize_grads(False)
    return saved


def plain(options: Any, wanted: Wanted, *inputs: Any) -> tuple[Tensor, ...]:
    """`differentiable.statistics` of the layer's logits; inputs: those that have a gradient, and
    what they are compared with."""
    input, *rest = inputs
    dtype = result_dtype(input)
    layer: Any = (x if x is None else x.to(dtype) for x in (input, *rest[:2]))
    with torch.autocast(input.device.type, enabled=False):
        logits = torch.nn.functional.linear(*layer)
    compared: Any = (*rest[2:], *options, wanted)
    return differentiable.statistics(logits, *compared)


class _LinearRowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        out = _forward(*args[1:])
        _save(ctx, args, out)
        return out

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: a checkpoint hands them out no more
        inputs, saved = tensors[:5], tensors[5:]
        upstream = upstream_of(douts[:5], inputs[3] is not None, ctx.wanted)
        if all(value is None for value in upstream):
            return (None,) * 15
        needs = Needs(*ctx.needs_input_grad[1:4])
        options, wanted, max_bytes, into = ctx.options, ctx.wanted, ctx.max_bytes, ctx.into

        def kernels(upstream: Sequence[Tensor | None], *tensors: Any) -> list[Tensor | None]:
            layer, compared = Layer(*tensors[:3]), Compared(*tensors[3:5], *options)
            here = Upstream(*upstream)
            found = gradients(layer, compared, tensors[5:], here, needs, max_bytes, into)
            return [*found, None, None]

        # what is added to `into` is not among the gradients
        found_here = needs if into is None else needs._replace(weight=False)
        rest = (upstream, inputs, saved, (*found_here, False, False))
        found = differentiable.first_derivative(
            kernels, functools.partial(plain, options, wanted), *rest
        )
        return None, *found, *(None,) * 9


class _Transformed(_LinearRowStatistics):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _forward(*args[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # vmap keeps one list of what is saved for either
        ctx.save_for_forward(*_save(ctx, inputs, output))

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        here = functools.partial(plain, ctx.options, ctx.wanted)
        return *tangents(here, ctx.saved_tensors[:5], given[1:6]), *(None,) * 4


def linear_row_statistics(
    layer: Layer,
    compared: Compared,
    *,
    wanted: Wanted,
    max_bytes: int,
    caller: str,
    into: Tensor | None = None,
) -> Statistics:
    """Statistics of the layer's logits; max_bytes: see `chunk_of`. Arguments have been checked.
    class_weight is a constant. The gradient of the weight is added to `into`, if given."""
    function = _Transformed if transformed() else _LinearRowStatistics
    out: Any = function.apply(into, *layer, *compared, *wanted, max_bytes, caller)
    return Statistics._make((*out[:6], out[8]))


def checked_layer(
    op: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    names: tuple[str, str, str] = ("input", "linear_weight", "linear_bias"),
) -> Layer:
    """input [..., H], as it is; under autocast all three in its dtype, as for `F.linear`. `names`
    are the caller's, for the messages."""
    of_input, of_weight, of_bias = names
    checks.floating(op, of_input, input)
    checks.floating(op, of_weight, linear_weight)
    if input.dim() == 0:
        checks.bad_value(op, of_input, "[..., H]", "no dimension")
    checks.shape(op, of_weight, linear_weight, [None, input.shape[-1]], "[V, H]")
    if linear_weight.shape[0] == 0:
        checks.bad_value(op, of_weight, "of at least one class", list(linear_weight.shape))
    checks.same_device(op, of_weight, linear_weight, of_input, input)
    device = input.device.type
    if library.autocast_on(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    checks.same_dtype(op, of_weight, linear_weight, of_input, input)
    if linear_bias is not None:
        checks.floating(op, of_bias, linear_bias)
        checks.shape(op, of_bias, linear_bias, [linear_weight.shape[0]], "[V]")
        checks.same_dtype(op, of_bias, linear_bias, of_input, input)
        checks.same_device(op, of_bias, linear_bias, of_input, input)
    return Layer(input, linear_weight, linear_bias)
