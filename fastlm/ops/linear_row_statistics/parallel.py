"""`linear_row_statistics` with the classes of the layer spread over the processes of a group.

Rank r holds rows [start_r, start_r + classes_r) of the weight and of the bias, and the whole
input. The forward is the op on the shard and the exchange of `row_statistics/parallel.py`. The
backward gives each rank the gradients of its own weight and bias; that of the input is a sum over
the ranks, taken by one all-reduce in the input's dtype, and only where it is needed, which must be
the same on all ranks. Weights and logits are never sent.

The argmax is of the scores: logits that differ but become equal by softcap, or by a scale of 0, on
two ranks count as equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import library
from ..row_statistics import parallel
from ..row_statistics.op import Statistics, Wanted, kept_from_the_caller, upstream_of
from ..row_statistics.parallel import ParallelStatistics, Shard
from . import op as linear
from .chunks import Compared, Layer, Needs


def _largest(row_max: Tensor, log_sum: Tensor) -> Tensor:
    """The score at the argmax; the op's maximum passes over NaN, which comes first there."""
    return row_max.masked_fill(log_sum.isnan() & (row_max != torch.inf), torch.nan)


class _ParallelLinearRowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        into: Tensor | None,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        class_weight: Tensor | None,
        target_weight: Tensor | None,
        shard: Shard,
        compared: Compared,
        wanted: Wanted,
        max_bytes: int,
    ) -> tuple[Tensor, ...]:
        layer, target = Layer(input, linear_weight, linear_bias), compared.target
        local = parallel.local_target(shard, target, compared.ignore_index)
        options = (parallel.LOCAL_IGNORE_INDEX, compared.scale, compared.softcap)
        out = torch.ops.fastlm.linear_row_statistics(
            *layer, local.target, class_weight, *options, *wanted, max_bytes, shard.caller
        )
        top = _largest(out[6], out[7]) if wanted.argmax else None
        whole = parallel.combine(
            shard, local, target, compared.ignore_index, out, top, target_weight
        )
        statistics = whole.statistics
        logprob, lse, entropy, sum_sq, weighted_sum, argmax, row_max, log_sum, mass = statistics
        saved = (row_max, log_sum, *kept_from_the_caller(wanted, entropy, sum_sq), mass)
        ctx.save_for_backward(*layer, local.target, local.owned, class_weight, *saved)
        ctx.options, ctx.wanted, ctx.max_bytes, ctx.group = options, wanted, max_bytes, shard.group
        # not saved: another backward may write to it before this one does
        ctx.into = into
        ctx.mark_non_differentiable(argmax, mass, whole.classes, whole.target_weight)
        ctx.set_materialize_grads(False)
        results = (logprob, lse, entropy, sum_sq, weighted_sum, argmax, mass)
        return *results, whole.classes, whole.target_weight

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        *three, target, owned, class_weight, row_max, log_sum, entropy, sum_sq, mass = (
            ctx.saved_tensors
        )
        layer, statistics = Layer(*three), (entropy, sum_sq, mass)
        upstream = upstream_of(douts[:5], target is not None, ctx.wanted)
        if all(value is None for value in upstream):
            return (None,) * 10
        needs = Needs(*ctx.needs_input_grad[1:4])
        factors = parallel.shard_coefficients(upstream, owned, *statistics)
        compared = Compared(target, class_weight, *ctx.options)
        rest = (factors, needs, ctx.max_bytes, ctx.into)
        found = linear.gradients_of(layer, compared, (row_max, log_sum), *rest)
        if found[0] is not None:
            torch.distributed.all_reduce(found[0], group=ctx.group)
        return None, *found, *(None,) * 6


def linear_row_statistics(
    layer: Layer,
    compared: Compared,
    target_weight: Tensor | None,
    *,
    shard: Shard,
    wanted: Wanted,
    max_bytes: int,
    into: Tensor | None = None,
) -> ParallelStatistics:
    """`op.linear_row_statistics` of rows of which the layer's weight and bias, and the class
    weights, are this rank's part; target_weight: see `parallel.row_statistics`."""
    found = _ParallelLinearRowStatistics.apply(
        into, *layer, compared.class_weight, target_weight, shard, compared, wanted, max_bytes
    )
    return ParallelStatistics(Statistics(*found[:7]), *found[7:])
