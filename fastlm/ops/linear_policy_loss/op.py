"""`policy_loss` of a linear layer's output, with its gradient taken while the logits are there.

The weight of a token in the result follows from the mask alone, and its loss from its own
log-prob and entropy. So one loop computes a chunk of logits, the statistics of its rows, their
losses and at once their share of the gradients of input, weight and bias: 6 N H V operations
where `policy_loss(linear_token_logprobs(...))`, which computes the logits again, takes 8. With a
frozen head (no gradient of weight and bias) it is 4 against 6. On a CPU rows outside the mask are
left out of every product, and rows whose gradient is zero (clipped, or without advantage) out of
those of the gradient. gspo needs the whole sequence before any token's loss, and `grad_accum_into`
must not be written to before the backward: they are that composition. So is a `group`, whose other
members have the rest of each row, and a budget too small for whole rows, in cost (`slices.py`).

Saved: the inputs, per row max, log-sum and the derivatives of its loss, and the gradients (of
float16 in float32), which the backward hands out once, scaled by the upstream gradient; a second
backward computes them again.

Backends: those of `linear_row_statistics`, which has the loop. Few logits are PyTorch's own, with
autograd's gradient: see `row_statistics/small.py`. A `row_loss` cannot pass through a torch op: it
runs the same loop beneath an autograd.Function alone, in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch, library
from ..cross_entropy.loss import scores
from ..linear_cross_entropy.options import accumulator, chunk_bytes
from ..linear_row_statistics import op as linear
from ..linear_row_statistics import schedule
from ..linear_row_statistics.chunks import Compared, Layer, Needs, RowKernels, held_dtype
from ..policy_loss import op as policy
from ..row_statistics import small
from ..row_statistics.op import Upstream, Wanted, result_dtype
from ..row_statistics.parallel import Shard, shard_of, unwrapped
from ..token_logprobs.op import linear_token_logprobs
from .terms import OP, Options, RowLoss, RowLosses, Terms, checked_options, terms_of


def _fake(*args: Any) -> tuple[Tensor, ...]:
    input, needs, entropy = args[0], args[21:24], args[18] != 0
    rows, dtype = input.shape[0], result_dtype(input)
    differentiated = rows if any(needs) else 0
    sizes = (
        rows,
        rows if entropy else 0,
        rows,
        rows,
        differentiated,
        differentiated if entropy else 0,
    )
    per_row = tuple(input.new_empty(size, dtype=dtype) for size in sizes)
    held = held_dtype(input)
    return *per_row, *linear.empty_gradients(Layer(*args[:3]), needs, held)


_forward = library.define(
    OP,
    "forward",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, int ignore_index, "
    "float scale, float softcap, Tensor row_weight, Tensor? advantages, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? importance, str loss_type, float clip_eps_low, "
    "float clip_eps_high, float? dual_clip, float kl_coef, str kl_estimator, float entropy_coef, "
    f"SymInt max_bytes, str caller, {linear.NEEDS_ARGUMENTS}) -> (Tensor losses, Tensor entropy, "
    f"Tensor row_max, Tensor log_sum, Tensor on_logprob, Tensor on_entropy, {linear.GRADIENTS})",
    _fake,
    check=linear.check_target,
)


def _run(kernels: RowKernels, *args: Any, row_loss: RowLoss | None = None) -> tuple[Tensor, ...]:
    layer, compared = Layer(*args[:3]), Compared(args[3], None, *args[4:7])
    terms, needs = Terms(*args[7:19]), Needs(*args[21:24])
    wanted = Wanted(entropy=row_loss is not None or terms.entropy_coef != 0)
    out = linear.empty_statistics(layer.input, compared.target, wanted)
    rows = RowLosses(terms, layer.input, row_loss, needs)
    chunk = linear.chunk_of(layer, args[19], needs)
    found = schedule.forward(kernels, layer, compared, wanted, chunk, out, rows.upstream, needs)
    return rows.losses, out[2], out[6], out[7], rows.on_logprob, rows.on_entropy, *found


linear.register(OP, _run)


def _with_row_loss(row_loss: RowLoss, *args: Any) -> tuple[Tensor, ...]:
    """What the torch op does, for a callable."""
    named = {
        "input": args[0],
        "linear_weight": args[1],
        "target": args[3],
        "ignore_index": args[4],
        "caller": args[20],
    }
    linear.check_target(named)
    return dispatch.select(OP, "forward", named)(*args, row_loss=row_loss)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row_loss: RowLoss | None, *args: Any) -> Tensor:
        out = _forward(*args) if row_loss is None else _with_row_loss(row_loss, *args)
        losses, *statistics = out[:6]
        ctx.options, ctx.max_bytes, ctx.needs = args[4:7], args[19], Needs(*args[21:24])
        gradients = [g if need else None for g, need in zip(out[6:], ctx.needs, strict=True)]
        # a compiled graph has no state to hand the gradients out once: it saves and multiplies
        ctx.gradients = None if torch.compiler.is_compiling() else gradients
        saved = gradients if torch.compiler.is_compiling() else (None, None, None)
        ctx.uses_entropy = row_loss is not None or args[18] != 0
        ctx.save_for_backward(*args[:4], *saved, *statistics)
        return losses.sum()

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        layer, target = Layer(*saved[:3]), saved[3]
        nothing = (None,) * 21
        traced = saved[4:7]
        if any(g is not None for g in traced):
            scaled = [None if g is None else g * dloss for g in traced]
            dtype = layer.input.dtype
            return None, *(None if g is None else g.to(dtype) for g in scaled), *nothing
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            return None, *linear.released(gradients, dloss, layer.input.dtype), *nothing
        entropy, row_max, log_sum, on_logprob, on_entropy = saved[7:]
        none = entropy.new_empty(0)
        upstream = Upstream(
            logprob=on_logprob * dloss, entropy=on_entropy * dloss if ctx.uses_entropy else None
        )
        statistics = (row_max, log_sum, entropy, none, none)
        compared = Compared(target, None, *ctx.options)
        found = linear.gradients(layer, compared, statistics, upstream, ctx.needs, ctx.max_bytes)
        return None, *found, *nothing


def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    advantages: Tensor | None,
    *,
    linear_bias: Tensor | None = None,
    row_loss: RowLoss | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    loss_type: str = "reinforce",
    clip_eps_low: float = 0.2,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    is_ratio: Tensor | None = None,
    is_mode: str = "truncate",
    is_cap: float | None = None,
    loss_agg_mode: str | None = "token-mean",
    max_length: int | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    group: Any = None,
    vocab_start_index: int | None = None,
    options: Any = None,
) -> Tensor:
    """Policy-gradient loss of a linear layer's output, without ever holding its logits.

    Same as, with the log-probs and the entropy of `linear_token_logprobs`:
        policy_loss(logprobs, advantages, entropy=entropy, old_logprobs=old_logprobs, ...)

    but in 3/4 of the operations (2/3 with a frozen head), because the gradient is taken in the
    forward, while the logits are there. gspo, whose ratio needs the whole sequence, and a call with
    a group are that composition, in two passes.

    Args:
        input: [B, T, H], any float dtype.
        linear_weight: [V, H], dtype of `input`.
        target: [B, T], any integer dtype: the sampled tokens, each in [0, V). `ignore_index` takes
            the token out like `mask`; behind the mask anything may stand.
        advantages: [B] or [B, T]. No gradient.
        linear_bias: [V], dtype of `input`.
        row_loss: in place of the loss types, a function of (logprobs [n], entropy [n], rows [n])
            for some of the B * T tokens, `rows` their numbers in flattened order, that returns the
            loss of each, [n]. It is differentiated by its first two arguments inside; a tensor it
            holds gets no gradient. `advantages`, which it may hold itself, is not used and may be
            None; mask, loss_agg_mode and max_length hold. Eager mode only.
        mask ... max_length: see `policy_loss`; the entropy is computed here.
        ignore_index ... options: see `linear_token_logprobs`. With a group every member gets the
            same loss, and a `row_loss` is called for all B * T tokens at once.

    Returns:
        [], float32, or float64 for float64 `input`.

    Raises:
        As `policy_loss` and `linear_token_logprobs`.
    """
    linear_weight, group, vocab_start_index, *others = unwrapped(
        *(OP, "linear_weight", linear_weight, 0, group, vocab_start_index),
        *(input, target, advantages, linear_bias, old_logprobs, ref_logprobs, mask, is_ratio),
    )
    input, target, advantages, linear_bias, old_logprobs, ref_logprobs, mask, is_ratio = others
    layer = linear.checked_layer(OP, input, linear_weight, linear_bias)
    checks.shape(OP, "input", input, (None, None, None), "[B, T, H]")
    checks.integer(OP, "target", target)
    checks.shape(OP, "target", target, input.shape[:2], "one per row of input")
    checks.same_device(OP, "target", target, "input", input)
    scale, softcap = scores(OP, temperature, logit_scale, logit_softcapping)
    clipping = (clip_eps_low, clip_eps_high, dual_clip)
    extra = (kl_coef, kl_estimator, entropy_coef, is_ratio, is_mode, is_cap)
    given = (old_logprobs, ref_logprobs, mask, loss_type, *clipping, *extra)
    chosen = checked_options(Options(*given, loss_agg_mode, max_length), row_loss)
    target = target.long()
    keep = policy.kept(target, mask, "target", OP) & (target != ignore_index)
    target = torch.where(keep, target, ignore_index)
    call = (layer, target, ignore_index, scale, softcap, options)
    shard = shard_of(OP, group, vocab_start_index, linear_weight.shape[0])
    into = accumulator(OP, options, input, linear_weight)
    if into is not None and row_loss is not None:
        checks.bad_value(OP, "options.grad_accum_into", "None with row_loss", "a tensor")
    if loss_type == "gspo" or into is not None or shard is not None:
        return _composition(*call, advantages, keep, chosen, row_loss, shard)
    return _in_chunks(*call, advantages, keep, chosen, row_loss)


def _in_chunks(
    layer: Layer,
    target: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    options: Any,
    advantages: Tensor | None,
    keep: Tensor,
    chosen: Options,
    row_loss: RowLoss | None,
) -> Tensor:
    rows = layer._replace(input=layer.input.reshape(-1, layer.input.shape[-1]))
    dtype = result_dtype(layer.input)
    terms = terms_of(advantages, keep, chosen, dtype, row_loss is not None)
    plain = scale == 1.0 and softcap == 0 and ignore_index < 0 and options is None
    if plain and row_loss is None and chosen.entropy_coef == 0:
        given = (*rows, target.reshape(-1))
        few = small.linear_token_logprobs(OP, given, ignore_index, 1.0)
        if few is not None:
            return (terms.row_weight * terms.loss(few)).sum()
    enabled = torch.is_grad_enabled()
    needs = Needs(*(enabled and x is not None and x.requires_grad for x in rows))
    max_bytes = chunk_bytes(OP, options, rows.input, rows.weight)
    compared = (target.reshape(-1), ignore_index, scale, softcap)
    return _LinearPolicyLoss.apply(row_loss, *rows, *compared, *terms, max_bytes, OP, *needs)


class _KnownRows(torch.autograd.Function):
    """Sum of the losses of rows whose log-prob and entropy, [N] each, are known."""

    @staticmethod
    def forward(
        ctx: Any, row_loss: RowLoss, terms: Terms, logprobs: Tensor, entropy: Tensor
    ) -> Tensor:
        needs = Needs(any(ctx.needs_input_grad), False, False)
        rows = RowLosses(terms, logprobs, row_loss, needs)
        rows.evaluate(slice(0, len(logprobs)), logprobs, entropy)
        ctx.save_for_backward(rows.on_logprob, rows.on_entropy)
        return rows.losses.sum()

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        on_logprob, on_entropy = ctx.saved_tensors
        return None, None, on_logprob * dloss, on_entropy * dloss


def _composition(
    layer: Layer,
    target: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    options: Any,
    advantages: Tensor | None,
    keep: Tensor,
    chosen: Options,
    row_loss: RowLoss | None,
    shard: Shard | None,
) -> Tensor:
    """Two passes: the log-probs, then the loss; the backward computes the logits again."""
    found = linear_token_logprobs(
        layer.input,
        layer.weight,
        target,
        linear_bias=layer.bias,
        ignore_index=ignore_index,
        logit_scale=scale,
        logit_softcapping=softcap or None,
        return_entropy=chosen.entropy_coef != 0 or row_loss is not None,
        group=shard and shard.group,
        vocab_start_index=shard and shard.start,
        options=options,
    )
    logprobs, entropy = (found, None) if isinstance(found, Tensor) else found[:2]
    if row_loss is not None:
        assert entropy is not None
        terms = terms_of(None, keep, chosen, logprobs.dtype, custom=True)
        return _KnownRows.apply(row_loss, terms, logprobs.flatten(), entropy.flatten())
    checks.tensor(OP, "advantages", advantages)
    assert advantages is not None
    shared = chosen._replace(mask=keep)._asdict()
    return policy.policy_loss(logprobs, advantages, entropy=entropy, **shared)
