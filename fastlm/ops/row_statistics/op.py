"""Softmax statistics of each row of logits, every one differentiable.

    z = scale * softcap(logits)      softcap(x) = softcap * tanh(x / softcap), 0: none
    log p = z - lse                  p = softmax(z)

    logprob       log p[target]                       lse           log sum exp z
    entropy       -sum p log p                        sum_sq        sum p^2
    weighted_sum  sum class_weight * log p            argmax        of the logits, first of equals

`cross_entropy`, `token_logprobs` and `entropy` are short functions of these. The gradient of any of
them with respect to z has the form

    p * (on_p + on_p_log_p * log p + on_p_squared * p)
      + on_weight * class_weight + on_target * [class is target]

with five numbers per row, so one backward kernel serves all: one read of the logits, one write of
dlogits. Saved: the logits, max and log sum exp(z - max) of each row (two numbers, because lse alone
loses log p to rounding when |z| is large), never probabilities. Further derivatives and forward
mode: `differentiable.py`.

A row whose target is `ignore_index` is not read: statistics 0, argmax -1, gradient 0. A target out
of range raises IndexError on the CPU; elsewhere its log-prob is NaN, and the row's gradient through
it. NaN and infinite logits give what `log_softmax` gives.

Backends: triton and cpu take float32, bfloat16 and float16 (cpu by copies of some rows, see
`half.py`), reference every float dtype; any strides of the logits. Results are float32, for
float64 logits float64. Calls of few logits do not come here: see `small.py`.

Source: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867), by blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, dispatch, extension, library, triton_backend
from ...second_order import tangents, transformed
from . import differentiable, half, reference


def result_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def empty_statistics(
    rows: Any,
    like: Tensor,
    target: bool,
    entropy: bool,
    sum_sq: bool,
    weighted_sum: bool,
    argmax: bool,
) -> tuple[Tensor, ...]:
    """The outputs of the forward op in order; what was not asked for has no elements."""

    def floats(wanted: bool) -> Tensor:
        return like.new_empty(rows if wanted else 0, dtype=result_dtype(like))

    return (
        floats(target),
        floats(True),
        floats(entropy),
        floats(sum_sq),
        floats(weighted_sum),
        like.new_empty(rows if argmax else 0, dtype=torch.int64),
        floats(True),
        floats(True),
        floats(weighted_sum),
    )


def _forward_fake(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    *wanted: Any,
) -> tuple[Tensor, ...]:
    return empty_statistics(logits.shape[0], logits, target is not None, *wanted[:4])


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def check_target(named: dict[str, Any], classes: int) -> None:
    if named["target"] is not None:
        checks.index_range(
            named["caller"], "target", named["target"], classes, named["ignore_index"]
        )


_forward = library.define(
    "row_statistics",
    "forward",
    "(Tensor logits, Tensor? target, Tensor? class_weight, int ignore_index, float scale, "
    "float softcap, bool entropy, bool sum_sq, bool weighted_sum, bool argmax, str caller) -> "
    "(Tensor logprob, Tensor lse, Tensor entropy, Tensor sum_sq, Tensor weighted_sum, "
    "Tensor argmax, Tensor row_max, Tensor log_sum, Tensor weight_mass)",
    _forward_fake,
    check=lambda named: check_target(named, named["logits"].shape[1]),
)
_backward = library.define(
    "row_statistics",
    "backward",
    "(Tensor logits, Tensor? target, Tensor? class_weight, Tensor row_max, Tensor log_sum, "
    "Tensor? on_p, Tensor? on_p_log_p, Tensor? on_p_squared, Tensor? on_weight, "
    "Tensor? on_target, int ignore_index, float scale, float softcap) -> Tensor",
    _backward_fake,
)


def _optional(value: Tensor) -> Tensor | None:
    return value if value.numel() else None


def cpu_forward(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    entropy: bool,
    sum_sq: bool,
    weighted_sum: bool,
    argmax: bool,
    caller: str,
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    options = (ignore_index, scale, softcap)
    if logits.dtype == torch.float16:
        rest = (*options, entropy, sum_sq, weighted_sum, argmax, caller)
        return half.forward(cpu_forward, logits, target, class_weight, *rest)
    wanted = (target is not None, entropy, sum_sq, weighted_sum, argmax)
    out = empty_statistics(rows, logits, *wanted)
    logprob, lse, entropies, squares, weighted, best, row_max, log_sum, mass = out
    # a broadcast view is read as it is: a copy could be larger than memory
    if logits.stride(1) != 1 and 0 not in logits.stride():
        logits = logits.contiguous()
    extension.raw("row_statistics_forward")(
        logits,
        None if target is None else target.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        *options,
        row_max,
        log_sum,
        lse,
        _optional(logprob),
        _optional(entropies),
        _optional(squares),
        _optional(weighted),
        _optional(mass),
        _optional(best),
    )
    return out


def cpu_backward_into(
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    coefficients: tuple[Tensor | None, ...],
    ignore_index: int,
    scale: float,
    softcap: float,
) -> None:
    """Write dlogits, contiguous; it may be `logits`."""
    if logits.dtype == torch.float16:
        rows = (dlogits, logits, target, class_weight, row_max, log_sum)
        options = (coefficients, ignore_index, scale, softcap)
        return half.backward_into(cpu_backward_into, *rows, *options)
    extension.raw("row_statistics_backward")(
        logits if logits.stride(1) == 1 else logits.contiguous(),
        None if target is None else target.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        ignore_index,
        scale,
        softcap,
        row_max,
        log_sum,
        *coefficients,
        dlogits,
    )


def _backward_of(
    backward_into: Callable[..., None],
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    on_p: Tensor | None,
    on_p_log_p: Tensor | None,
    on_p_squared: Tensor | None,
    on_weight: Tensor | None,
    on_target: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    coefficients = (on_p, on_p_log_p, on_p_squared, on_weight, on_target)
    rows = (logits, target, class_weight, row_max, log_sum)
    backward_into(dlogits, *rows, coefficients, ignore_index, scale, softcap)
    return dlogits


def _refuses_float64(logits: Tensor, **_: Any) -> str | None:
    wide = logits.dtype == torch.float64
    return "takes float32, bfloat16 and float16, not float64" if wide else None


def triton_forward(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    entropy: bool,
    sum_sq: bool,
    weighted_sum: bool,
    argmax: bool,
    caller: str,
) -> tuple[Tensor, ...]:
    from . import triton_kernels

    rows = logits.shape[0]
    wanted = (target is not None, entropy, sum_sq, weighted_sum, argmax)
    out = empty_statistics(rows, logits, *wanted)
    logprob, lse, entropies, squares, weighted, best, row_max, log_sum, mass = out
    options = (ignore_index, scale, softcap)
    written = (row_max, log_sum, lse, logprob, entropies, squares, weighted, mass, best)
    triton_kernels.forward(logits, target, class_weight, *options, tuple(map(_optional, written)))
    return out


def triton_backward_into(dlogits: Tensor, *args: Any) -> None:
    """As `cpu_backward_into`."""
    from . import triton_kernels

    triton_kernels.backward_into(dlogits, *args)


def triton_refuses_size(rows: int, classes: int) -> str | None:
    # a column is an int32; a grid has less than 2^31 programs, of 128 columns at least
    if classes >= 2**30 or rows * (1 + classes // 128) >= 2**31:
        return f"takes fewer than 2^30 classes and 2^38 logits, not {[rows, classes]}"
    return None


def _triton_refuses(logits: Tensor, **_: Any) -> str | None:
    return _refuses_float64(logits) or triton_refuses_size(*logits.shape)


dispatch.register(
    "row_statistics",
    "triton",
    triton_forward,
    functools.partial(_backward_of, triton_backward_into),
    devices=triton_backend.devices,
    unavailable=triton_backend.unavailable,
    refuses=_triton_refuses,
    proven=False,
)
dispatch.register(
    "row_statistics",
    "cpu",
    cpu_forward,
    functools.partial(_backward_of, cpu_backward_into),
    devices=("cpu",),
    unavailable=extension.unavailable,
    refuses=_refuses_float64,
)
dispatch.register("row_statistics", "reference", reference.forward, reference.backward)


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the statistics, [N] each; None: not used."""

    logprob: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    sum_sq: Tensor | None = None
    weighted_sum: Tensor | None = None


def coefficients(
    upstream: Upstream, entropy: Tensor, sum_sq: Tensor, weight_mass: Tensor
) -> tuple[Tensor | None, ...]:
    """(on_p, on_p_log_p, on_p_squared, on_weight, on_target) of the chain rule, [N] or None."""
    on_p: list[Tensor] = []
    on_p_log_p = on_p_squared = on_target = None
    if upstream.logprob is not None:  # d logprob = [target] - p
        on_target = upstream.logprob.contiguous()
        on_p.append(-on_target)
    if upstream.lse is not None:  # d lse = p
        on_p.append(upstream.lse)
    if upstream.entropy is not None:  # d entropy = -p (log p + entropy)
        on_p_log_p = -upstream.entropy
        on_p.append(on_p_log_p * entropy)
    if upstream.sum_sq is not None:  # d sum_sq = 2 p (p - sum_sq)
        on_p_squared = 2 * upstream.sum_sq
        on_p.append(-on_p_squared * sum_sq)
    on_weight = upstream.weighted_sum
    if on_weight is not None:  # d weighted_sum = weight - p * sum weight
        on_weight = on_weight.contiguous()
        on_p.append(-on_weight * weight_mass)
    total = torch.stack(on_p).sum(0) if len(on_p) > 1 else on_p[0].contiguous()
    return total, on_p_log_p, on_p_squared, on_weight, on_target


class Wanted(NamedTuple):
    """The statistics that cost something."""

    entropy: bool = False
    sum_sq: bool = False
    weighted_sum: bool = False
    argmax: bool = False


def upstream_of(douts: Sequence[Tensor | None], has_target: bool, wanted: Wanted) -> Upstream:
    """Under torch.compile an output without a use comes with zeros, also if it has no elements."""
    used = (has_target, True, wanted.entropy, wanted.sum_sq, wanted.weighted_sum)
    return Upstream(*(d if use else None for d, use in zip(douts, used, strict=False)))


def kept_from_the_caller(wanted: Wanted, entropy: Tensor, sum_sq: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of what the backward needs and the caller has, who may write to it."""
    return (
        entropy.clone() if wanted.entropy else entropy,
        sum_sq.clone() if wanted.sum_sq else sum_sq,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> tuple[Tensor | None, ...]:
    """What the backward is given."""
    _, _, entropy, sum_sq, _, argmax, row_max, log_sum, mass = output
    ctx.options, ctx.wanted = inputs[3:6], Wanted(*inputs[6:10])
    moments = kept_from_the_caller(ctx.wanted, entropy, sum_sq)
    saved = (*inputs[:3], row_max, log_sum, *moments, mass)
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(argmax, row_max, log_sum, mass)
    ctx.set_materialize_grads(False)
    return saved


def _plain(ctx: Any) -> Callable[..., tuple[Tensor, ...]]:
    rest: Any = (*ctx.options, ctx.wanted)
    return lambda *inputs: differentiable.statistics(*inputs, *rest)


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        out = _forward(*args)
        _save(ctx, args, out)
        return out

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, row_max, log_sum, entropy, sum_sq, mass = ctx.saved_tensors
        upstream = upstream_of(douts[:5], inputs[1] is not None, ctx.wanted)
        if all(value is None for value in upstream):
            return (None,) * 11
        options, needs = ctx.options, ctx.needs_input_grad[:3]

        def kernels(upstream: Sequence[Tensor | None], *saved: Any) -> list[Tensor | None]:
            here, dlogits, dweight = Upstream(*upstream), None, None
            if needs[0]:
                dlogits = _backward(*saved[:5], *coefficients(here, *saved[5:]), *options)
            if needs[2] and here.weighted_sum is not None:
                dweight = differentiable.class_weight_gradient(
                    here.weighted_sum, saved[0], saved[1], *saved[3:5], *options
                )
            return [dlogits, None, dweight]

        saved = (row_max, log_sum, entropy, sum_sq, mass)
        rest = (upstream, inputs, saved, needs)
        return *differentiable.first_derivative(kernels, _plain(ctx), *rest), *(None,) * 8


class _Transformed(_RowStatistics):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # vmap keeps one list of what is saved for either
        ctx.save_for_forward(*_save(ctx, inputs, output))

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        return *tangents(_plain(ctx), ctx.saved_tensors[:3], given[:3]), *(None,) * 4


class Statistics(NamedTuple):
    """Per row [N]; a statistic that was not asked for has no elements."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    sum_sq: Tensor
    weighted_sum: Tensor
    argmax: Tensor
    weight_mass: Tensor


def row_statistics(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    *,
    wanted: Wanted,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float = 0.0,
    caller: str = "row_statistics",
) -> Statistics:
    """Statistics of logits [N, V]; target int64 with N elements in any shape, class_weight in the
    result's dtype, [V] or (differentiable) [N, V]. Arguments have been checked."""
    function = _Transformed if transformed() else _RowStatistics
    options = (ignore_index, scale, softcap)
    out: Any = function.apply(logits, target, class_weight, *options, *wanted, caller)
    return Statistics._make((*out[:6], out[8]))
