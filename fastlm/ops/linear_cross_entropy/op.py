"""Cross-entropy of a linear layer's output, without ever holding its logits.

Two ways, chosen by what the caller asks for:

- the weight of each row in the result is known beforehand ("mean", "sum"): one loop computes a
  chunk of logits, its loss and, when gradients are enabled, at once its share of those of input,
  weight and bias (6 N H V operations). The backward hands these out, scaled by the upstream
  gradient; it happens once, so they are scaled in place, and a second backward, or a gradient with
  respect to the auxiliary results, computes everything again from the inputs.
- otherwise ("none", a `token_weight` that needs a gradient, `grad_accum_into`, which must not be
  written to before the backward, a `group`, whose other members have the rest of each row):
  `linear_row_statistics`, whose backward computes the logits again (8 N H V).

Calls of few logits, which fit into what a chunk of the loop takes, are PyTorch's own: see
`row_statistics/small.py`.

Saved: the inputs, two numbers per row, and in the first way the gradients (of float16 in float32,
because float16 has not the range of what is scaled afterwards).

Backends: those of `linear_row_statistics`, which has the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ... import checks, library
from ...second_order import transformed
from ..cross_entropy import loss as losses
from ..cross_entropy.loss import Loss, Rows
from ..cross_entropy.op import cross_entropy
from ..linear_row_statistics import op as linear
from ..linear_row_statistics import parallel, schedule
from ..linear_row_statistics.chunks import (
    Compared,
    Layer,
    Needs,
    RowKernels,
    Span,
    held_dtype,
)
from ..row_statistics import differentiable, small
from ..row_statistics.op import Statistics, Upstream, Wanted, kept_from_the_caller, result_dtype
from ..row_statistics.parallel import ParallelStatistics, Shard, shard_of, unwrapped
from .options import accumulator, chunk_bytes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..cross_entropy.signatures import LinearLossOptions

_OP = "linear_cross_entropy"


def _fake(*args: Any) -> tuple[Tensor, ...]:
    statistics = linear.empty_statistics(args[0], args[3], args[8:12])
    held = held_dtype(args[0])
    return *statistics, *linear.empty_gradients(Layer(*args[:3]), args[17:20], held)


_with_gradients = library.define(
    _OP,
    "forward",
    f"({linear.LAYER_ARGUMENTS}{linear.WANTED_ARGUMENTS}, str caller, Tensor? on_logprob, "
    f"Tensor? on_weighted_sum, Tensor? on_lse_square, {linear.NEEDS_ARGUMENTS}) -> "
    f"({linear.STATISTICS}, {linear.GRADIENTS})",
    _fake,
    check=linear.check_target,
)


def _run(kernels: RowKernels, *args: Any) -> tuple[Tensor, ...]:
    layer, compared = Layer(*args[:3]), Compared(*args[3:8])
    wanted, per_row, needs = Wanted(*args[8:12]), args[14:17], Needs(*args[17:20])
    out = linear.empty_statistics(layer.input, compared.target, wanted)
    chunk = linear.chunk_of(layer, args[12], needs)

    def upstream(span: Span, found: tuple[Tensor, ...]) -> Upstream:
        here = [None if p is None else p[span] for p in per_row]
        return _upstream(None, None, found[1], here)

    found = schedule.forward(kernels, layer, compared, wanted, chunk, out, upstream, needs)
    return *out, *found


linear.register(_OP, _run)


class _KnownRows(torch.autograd.Function):
    """sum over rows of on_logprob * logprob + on_weighted_sum * weighted_sum + on_lse_square *
    lse^2, and the statistics."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        # args: layer 3, compared 5, wanted 4, max_bytes, caller, per_row 3, needs 3, uses_lse
        out = _with_gradients(*args[:20])
        logprob, lse, entropy, sum_sq, weighted_sum, argmax, row_max, log_sum, mass = out[:9]
        on_logprob, on_weighted_sum, on_lse_square = per_row = args[14:17]
        total = lse.new_zeros(())
        if on_logprob is not None:
            total = total + (on_logprob * logprob).sum()
        if on_weighted_sum is not None:
            total = total + (on_weighted_sum * weighted_sum).sum()
        if on_lse_square is not None:
            total = total + (on_lse_square * lse.square()).sum()
        ctx.options, ctx.max_bytes, ctx.needs = args[5:8], args[12], Needs(*args[17:20])
        gradients = [g if need else None for g, need in zip(out[9:], ctx.needs, strict=True)]
        # a compiled graph has no state to hand the gradients out once: it saves and multiplies
        ctx.gradients = None if torch.compiler.is_compiling() else gradients
        saved = gradients if torch.compiler.is_compiling() else (None, None, None)
        ctx.differentiable, ctx.wanted = (args[20], args[8]), Wanted(*args[8:12])
        moments = kept_from_the_caller(ctx.wanted, entropy, sum_sq)
        own = lse.clone() if args[20] else lse
        statistics = (row_max, log_sum, *moments, mass)
        ctx.save_for_backward(*args[:5], own, *per_row, *saved, *statistics)
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        return total, lse, entropy, argmax

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        # under torch.compile a result without a use comes with zeros
        dlse, dentropy = (
            d if use else None for d, use in zip(douts[1:3], ctx.differentiable, strict=True)
        )
        upstream, nothing = (douts[0], dlse, dentropy), (None,) * 18
        if all(d is None for d in upstream):
            return None, None, None, *nothing
        saved = ctx.saved_tensors  # once: a checkpoint hands them out no more
        inputs, rest = saved[:5], saved[5:]
        compared, per_row, wanted = Compared(*inputs[3:], *ctx.options), rest[1:4], ctx.wanted

        def kernels(upstream: Sequence[Tensor | None], *_: Tensor) -> list[Tensor | None]:
            layer = Layer(*inputs[:3])
            return [*_gradients(ctx, layer, compared, rest, upstream), None, None]

        def plain(*inputs: Tensor) -> tuple[Tensor, ...]:
            logprob, lse, entropy, _, weighted_sum = linear.plain(ctx.options, wanted, *inputs)
            terms = zip(per_row, (logprob, weighted_sum, lse.square()), strict=True)
            total = sum((p * v).sum() for p, v in terms if p is not None)
            return lse.new_zeros(()) + total, lse, entropy

        needs = (*ctx.needs, False, False)
        found = differentiable.first_derivative(kernels, plain, upstream, inputs, (), needs)
        return *found[:3], *nothing


def _gradients(
    ctx: Any,
    layer: Layer,
    compared: Compared,
    saved: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
) -> Sequence[Tensor | None]:
    """Of input, weight and bias; saved: lse, factors of the rows, gradients, statistics."""
    (dloss, dlse, dentropy), (lse, *per_row) = upstream, saved[:4]
    assert lse is not None
    if dlse is None and dentropy is None:
        assert dloss is not None
        traced = saved[4:7]
        if any(g is not None for g in traced):
            scaled = [None if g is None else g * dloss for g in traced]
            return [None if g is None else g.to(layer.input.dtype) for g in scaled]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            return linear.released(gradients, dloss, layer.input.dtype)
    per_row = [None if p is None or dloss is None else p * dloss for p in per_row]
    rows = _upstream(dlse, dentropy, lse, per_row)
    return linear.gradients(layer, compared, saved[7:], rows, ctx.needs, ctx.max_bytes)  # type: ignore[arg-type]


def _upstream(
    dlse: Tensor | None,
    dentropy: Tensor | None,
    lse: Tensor,
    per_row: Sequence[Tensor | None],
) -> Upstream:
    on_logprob, on_weighted_sum, on_lse_square = per_row
    if on_lse_square is not None:
        on_lse = 2 * on_lse_square * lse
        dlse = on_lse if dlse is None else dlse + on_lse
    return Upstream(on_logprob, dlse, dentropy, None, on_weighted_sum)


def _known_rows(
    layer: Layer, loss: Loss, rows: Rows, wanted: Wanted, max_bytes: int
) -> tuple[Tensor, Statistics]:
    """The reduced loss, and the statistics that `return_aux` needs."""
    count, dtype = layer.input.shape[0], result_dtype(layer.input)
    device = layer.input.device

    def per_row(weight: Tensor | float, total: Tensor | float, used: bool) -> Tensor | None:
        if not used:
            return None
        value = weight / total if count else 0.0
        return torch.as_tensor(value, dtype=dtype, device=device).expand(count).contiguous()

    factors = (
        per_row(rows.on_logprob, rows.total, rows.target is not None),
        per_row(rows.on_weighted_sum, rows.total, wanted.weighted_sum),
        per_row(rows.on_lse_square, rows.z_total, loss.z_loss_weight != 0),
    )
    enabled = torch.is_grad_enabled()
    needs = Needs(*(enabled and x is not None and x.requires_grad for x in layer))
    compared = (rows.target, rows.class_weight, loss.ignore_index, loss.scale, loss.softcap)
    uses_lse = "lse" in loss.aux or "z_loss" in loss.aux
    total, lse, entropy, argmax = _KnownRows.apply(
        *layer, *compared, *wanted, max_bytes, loss.op, *factors, *needs, uses_lse
    )
    if count == 0 and loss.reduction == "mean":
        total = total + torch.nan
    none = lse.new_empty(0)
    return total, Statistics(none, lse, entropy, none, none, argmax, none)


def _shifted(
    input: Tensor, target: Tensor, token_weight: Tensor | None, shift: int, soft: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions t of the input with positions t + shift of the target."""
    kept = max(0, input.shape[-2] - shift)
    rest = input.shape[-2] - kept
    target = target.narrow(-2 if soft else -1, rest, kept)
    if token_weight is not None:
        token_weight = token_weight.narrow(-1, rest, kept)
    return input.narrow(-2, 0, kept), target, token_weight


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    **rest: Unpack[LinearLossOptions],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_aux: Sequence[str],
    **rest: Unpack[LinearLossOptions],
) -> tuple[Tensor, dict[str, Tensor]]: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss_weight: float = 0.0,
    logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    shift: int = 0,
    group: Any = None,
    vocab_start_index: int | None = None,
    return_aux: Sequence[str] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of a linear layer's output, without ever holding its logits.

    Same as:
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
        cross_entropy(logits.flatten(0, -2), target.flatten(), weight, ...)

    with the products of half-precision inputs accumulated in float32.

    Args:
        input: [..., H], any float dtype.
        linear_weight: [V, H], dtype of `input`. As in torch [V, d1, ..., H] with input [N, H] and
            target [N, d1, ...] is taken too; that form holds its logits.
        target: class indices [...], any integer dtype, each in [0, V) or `ignore_index`; or
            probabilities [..., V].
        linear_bias: [V], dtype of `input`.
        ignore_index: None is -100; must be None with probabilities.
        options: `LinearCrossEntropyOptions` or torch's own class of that name: size of a chunk.
        shift: position t is compared with target[..., t + shift] (and token_weight there): 1 for
            the next token. The last `shift` positions of `input` [..., T, H] have no loss.
        group, vocab_start_index: as in `cross_entropy`; V is the part in `linear_weight` and
            `linear_bias` too, `input` is whole. The backward computes the logits again; its one
            all-reduce is of the gradient of `input`, which comes out whole on every member. A
            DTensor `linear_weight` with Shard(0) is the same.
        Others: see `cross_entropy`.

    Returns:
        As `cross_entropy`, of shape [...] ([..., T - shift]) with "none".

    Raises:
        As `cross_entropy`.
    """
    ignored = -100 if ignore_index is None else ignore_index
    added = (z_loss_weight, token_weight, group, vocab_start_index, return_aux)
    if weight is options is None and type(shift) is int and shift == 0:
        if losses.plain(temperature, logit_scale, logit_softcapping, *added):
            given = (input, linear_weight, linear_bias, target)
            few = small.linear_cross_entropy(given, ignored, reduction, label_smoothing)
            if few is not None:
                return few
    loss = losses.checked(
        _OP,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcapping=logit_softcapping,
        ignore_index=ignored,
        return_aux=return_aux,
    )
    linear_weight, group, vocab_start_index, *others = unwrapped(
        *(_OP, "linear_weight", linear_weight, 0, group, vocab_start_index),
        *(input, target, linear_bias, weight, token_weight),
    )
    input, target, linear_bias, weight, token_weight = others
    checks.tensor(_OP, "linear_weight", linear_weight)
    shard = None
    if group is not None or vocab_start_index is not None:
        shard = shard_of(_OP, group, vocab_start_index, linear_weight.shape[0])
        _check_sharded(linear_weight, target)
    if linear_weight.dim() > 2:
        _refuse_shift(shift, "0 with linear_weight of more than two dimensions")
        logits = _logits(input, linear_weight, linear_bias)
    else:
        layer = linear.checked_layer(_OP, input, linear_weight, linear_bias)
        classes = linear_weight.shape[0]
        soft = losses.is_soft(_OP, target, (*input.shape[:-1], classes))
        checks.same_device(_OP, "target", target, "input", input)
        if soft and ignore_index is not None:
            checks.bad_value(_OP, "ignore_index", "None with probabilities", ignore_index)
        # the gradient of probabilities is as large as the logits
        if not (soft and target.requires_grad):
            return _chunked(layer, target, weight, token_weight, loss, soft, shift, options, shard)
        _refuse_shift(shift, "0 with probabilities that need a gradient")
        logits = torch.nn.functional.linear(*layer)
        if logits.dim() > 2:  # classes second, as cross_entropy has them
            logits, target = logits.movedim(-1, 1), target.movedim(-1, 1)
    return cross_entropy(
        logits, target, weight, ignore_index=loss.ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, z_loss_weight=z_loss_weight,
        logit_softcapping=logit_softcapping, logit_scale=logit_scale, temperature=temperature,
        token_weight=token_weight, return_aux=return_aux,
    )  # fmt: skip


def _check_sharded(linear_weight: Tensor, target: Tensor) -> None:
    """The two calls that hold logits."""
    if linear_weight.dim() != 2:
        checks.bad_value(_OP, "linear_weight", "[V, H] with group", list(linear_weight.shape))
    if isinstance(target, Tensor) and target.requires_grad:
        expected, got = "without gradient with group", "a tensor with requires_grad"
        checks.bad_value(_OP, "target", expected, got, "call cross_entropy with the logits")


def _refuse_shift(shift: int, expected: str) -> None:
    if shift:
        checks.bad_value(_OP, "shift", expected, shift)


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """[N, V, d1, ...] of a weight [V, d1, ..., H]."""
    checks.floating(_OP, "input", input)
    checks.shape(_OP, "input", input, [None, linear_weight.shape[-1]], "[N, H]")
    sizes = linear_weight.shape[:-1]
    if linear_bias is not None:
        checks.shape(_OP, "linear_bias", linear_bias, list(sizes), "as linear_weight")
        linear_bias = linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), linear_bias)
    return logits.view(-1, *sizes)


def _chunked(
    layer: Layer,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    loss: Loss,
    soft: bool,
    shift: int,
    options: Any,
    shard: Shard | None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    input, linear_weight, _ = layer
    classes = linear_weight.shape[0]
    if not soft:
        checks.shape(_OP, "target", target, list(input.shape[:-1]), "one per row of input")
    losses.check_vectors(loss, input, classes, weight, token_weight, input.shape[:-1])
    if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0:
        checks.bad_value(_OP, "shift", "an integer >= 0", shift)
    if shift:
        if input.dim() < 2:
            checks.bad_value(_OP, "input", "[..., T, H] with shift", list(input.shape))
        input, target, token_weight = _shifted(input, target, token_weight, shift, soft)
    shape = list(input.shape[:-1])
    layer = layer._replace(input=input.reshape(-1, input.shape[-1]))
    target = target.reshape(-1, classes) if soft else target.long()
    dtype = result_dtype(input)
    wanted, max_bytes = loss.wanted(soft), chunk_bytes(_OP, options, layer.input, linear_weight)
    compared = (loss.ignore_index, loss.scale, loss.softcap)
    late = token_weight is not None and token_weight.requires_grad
    into = accumulator(_OP, options, layer.input, linear_weight)
    if shard is not None:

        def statistics(
            target: Tensor | None, class_weight: Tensor | None, weight: Tensor | None
        ) -> ParallelStatistics:
            what = Compared(target, class_weight, *compared)
            return parallel.linear_row_statistics(
                layer, what, weight, shard=shard, wanted=wanted, max_bytes=max_bytes, into=into
            )

        rest = (target, weight, token_weight, soft, dtype)
        rows, found = losses.compare_shards(loss, shard, statistics, *rest)
        value = losses.reduce(loss, rows, found)
    else:
        rows = losses.compare_with(loss, target, weight, token_weight, classes, soft, dtype)
        if loss.reduction != "none" and not (late or transformed()) and into is None:
            value, found = _known_rows(layer, loss, rows, wanted, max_bytes)
        else:
            what = Compared(rows.target, rows.class_weight, *compared)
            found = linear.linear_row_statistics(
                layer, what, wanted=wanted, max_bytes=max_bytes, caller=_OP, into=into
            )
            value = losses.reduce(loss, rows, found)
    if loss.reduction == "none":
        value = value.view(shape)
    if not loss.aux:
        return value
    return value, losses.auxiliary(loss, rows, found, shape)
