"""Row statistics of logits whose classes are spread over the processes of a group.

Rank r holds the classes [start_r, start_r + classes_r) of every row; targets are global. The op
`row_statistics` runs on the shard; then one all-gather exchanges a few numbers per row, and every
rank computes from them, in float64 and in rank order, the statistics of the whole row:

    share_r  = exp((max_r - max) + (log_sum_r - log_sum))      the probability of shard r
    logprob  = logprob_r + log share_r, of the shard with the target
    entropy  = sum share_r * (entropy_r - log share_r)         sum_sq = sum share_r^2 * sum_sq_r
    weighted_sum = sum weighted_sum_r + weight_mass_r * log share_r

One all-gather and not all-reduces of the maximum and then of the sums: it waits for the network
once, the order of the sums is fixed, all ranks get the same bits, and integers pass unharmed. For
N rows and W ranks it receives 4 to 40 bytes times N W.

The backward with the row's own max and log_sum is that of the op and needs no communication.

All ranks must call with the same rows, targets and options, and their shards must cover the
vocabulary once, in any order: on a CPU anything else raises ValueError, on every rank alike;
elsewhere, and under torch.compile, where looking would wait for the device, all float results are
NaN. So is, there, a row whose target no rank holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, library
from .differentiable import class_weight_gradient
from .op import (
    Statistics,
    Upstream,
    Wanted,
    coefficients,
    kept_from_the_caller,
    result_dtype,
    upstream_of,
)

# the caller's own ignore_index may be a valid position within a shard
LOCAL_IGNORE_INDEX = -100


class Shard(NamedTuple):
    """This process's part of the vocabulary."""

    group: Any  # torch.distributed.ProcessGroup
    start: int
    classes: int
    caller: str


def shard_of(caller: str, group: Any, vocab_start_index: int | None, classes: int) -> Shard | None:
    """The checked arguments of one call; None without a group."""
    if group is None:
        if vocab_start_index is not None:
            got, remedy = vocab_start_index, "pass the process group"
            checks.bad_value(caller, "vocab_start_index", "None without group", got, remedy)
        return None
    if not torch.distributed.is_available():
        raise RuntimeError(
            f"fastlm.{caller}: group needs torch.distributed, which this build of PyTorch lacks"
        )
    if not isinstance(group, torch.distributed.ProcessGroup):
        remedy = "its members alone may call"
        checks.bad_type(caller, "group", "a ProcessGroup", type(group).__name__, remedy)
    start = vocab_start_index
    if start is None:
        start = group.rank() * classes
    elif isinstance(start, bool) or not isinstance(start, int) or start < 0:
        checks.bad_value(caller, "vocab_start_index", "an integer >= 0 or None", repr(start))
    return Shard(group, start, classes, caller)


def unwrapped(
    caller: str,
    what: str,
    sharded: Any,
    dim: int,
    group: Any,
    vocab_start_index: int | None,
    *others: Any,
) -> tuple[Any, ...]:
    """(sharded, group, vocab_start_index, *others); if `sharded` is a DTensor, local tensors with
    the group and the start that it stands for."""
    # by name: most programs never import torch.distributed.tensor
    if type(sharded).__name__ != "DTensor":
        return sharded, group, vocab_start_index, *others
    mesh, placements = sharded.device_mesh, sharded.placements
    dim %= sharded.dim()
    if len(placements) != 1 or not placements[0].is_shard(dim):
        expected = f"a DTensor with Shard({dim}) on a mesh of one dimension"
        remedy = "call .to_local() and pass group, or .full_tensor()"
        checks.bad_value(caller, what, expected, placements, remedy)
    if group is not None or vocab_start_index is not None:
        got = f"{what} as DTensor with one"
        checks.bad_value(caller, "group and vocab_start_index", "None with a DTensor", got)
    classes, ranks = sharded.shape[dim], mesh.size()
    most = -(-classes // ranks)
    if most * (ranks - 1) >= classes:
        got = f"{classes} for {ranks} processes"
        checks.bad_value(caller, f"{what}.shape[{dim}]", "a class for each process at least", got)
    local = (value.to_local() if type(value).__name__ == "DTensor" else value for value in others)
    return sharded.to_local(), mesh.get_group(), mesh.get_local_rank() * most, *local


def _all_gather(shard: Shard, fields: list[Tensor]) -> list[Tensor]:
    """Each field [n] of every rank as [W, n], by one collective; bits are carried, not numbers."""
    packed = torch.cat([field.contiguous().view(torch.int32) for field in fields])
    world = shard.group.size()
    gathered = packed.new_empty(world, packed.numel())
    torch.distributed.all_gather(list(gathered.unbind()), packed, group=shard.group)
    sizes = [field.numel() * field.dtype.itemsize // 4 for field in fields]
    parts = gathered.split(sizes, 1)
    # a clone, because a view in a wider dtype needs aligned memory
    return [
        part.flatten().clone().view(field.dtype).view(world, field.numel())
        for part, field in zip(parts, fields, strict=True)
    ]


class Layout(NamedTuple):
    start: Tensor  # [W] int64
    classes: Tensor  # [W] int64
    valid: Tensor  # [] bool: the shards cover the vocabulary once


def _layout(shard: Shard, spans: Tensor) -> Layout:
    """Of the ranks' (start, classes) [W, 2]."""
    start, classes = spans.unbind(1)
    order = start.argsort()
    ends = classes[order].cumsum(0)
    valid = (start[order] == ends - classes[order]).all()
    if valid.device.type == "cpu" and not torch.compiler.is_compiling() and not valid:
        held = ", ".join(f"[{a}, {a + n})" for a, n in spans.tolist())
        remedy = "pass vocab_start_index where shards differ in size"
        expected = "shards that cover the vocabulary once"
        checks.bad_value(shard.caller, "group", expected, held, remedy)
    return Layout(start, classes, valid)


def total_classes(shard: Shard, like: Tensor) -> Tensor:
    """Size of the vocabulary, [] int64."""
    total = torch.tensor(shard.classes, device=like.device)
    torch.distributed.all_reduce(total, group=shard.group)
    return total


def _first_of_largest(top: Tensor, index: Tensor, start: Tensor) -> Tensor:
    """Global index [N] of the largest `top` [W, N], as argmax: the first, NaN above all."""
    candidate = (top == top.amax(0)) | top.isnan()
    return torch.where(candidate, index + start[:, None], torch.iinfo(torch.int64).max).amin(0)


def argmax(values: Tensor, shard: Shard) -> Tensor:
    """Global index [N] of the largest of the ranks' values [N, classes]."""
    top, index = values.max(-1)
    here = torch.tensor([shard.start], device=values.device)
    tops, indices, starts = _all_gather(shard, [top, index, here])
    return _first_of_largest(tops, indices, starts[:, 0])


class Local(NamedTuple):
    """Targets as one shard sees them."""

    target: Tensor | None  # [N]; 0 where another rank has it, LOCAL_IGNORE_INDEX
    kept: Tensor | None  # [N]; None: all
    owned: Tensor | None  # [N]


def local_target(shard: Shard, target: Tensor | None, ignore_index: int) -> Local:
    if target is None:
        return Local(None, None, None)
    target = target.reshape(-1)
    kept = target != ignore_index
    index = target - shard.start
    owned = kept & (index >= 0) & (index < shard.classes)
    return Local(torch.where(owned, index, 0).where(kept, LOCAL_IGNORE_INDEX), kept, owned)


class _Parts(NamedTuple):
    """What the ranks exchange, [W, N] float64; without elements if not wanted."""

    row_max: Tensor
    log_sum: Tensor
    logprob: Tensor
    entropy: Tensor
    sum_sq: Tensor
    weighted_sum: Tensor
    weight_mass: Tensor
    top: Tensor
    target_weight: Tensor


def _at_target(layout: Layout, target: Tensor, values: Tensor) -> Tensor:
    """[N] of values [W, N]: that of the rank with the target; NaN where there is none."""
    offset = target.reshape(1, -1) - layout.start[:, None]
    owned = (offset >= 0) & (offset < layout.classes[:, None])
    value = torch.where(owned, values, 0).sum(0)
    return torch.where(owned.any(0), value, torch.nan)


def _merged(layout: Layout, parts: _Parts, target: Tensor | None) -> list[Tensor]:
    """logprob, lse, entropy, sum_sq, weighted_sum, max, log_sum and weight_mass of the row."""
    row_max = parts.row_max.amax(0)
    # a row of -inf alone is measured from 0: -inf - -inf would be NaN
    shift = parts.row_max - row_max.where(row_max != -torch.inf, 0)
    log_sum = (shift + parts.log_sum).exp().sum(0).log()
    log_sum = torch.where(layout.valid, log_sum, torch.nan)
    # of a shard of -inf alone -inf and 0, if the row is such a row NaN
    log_share = shift + (parts.log_sum - log_sum)
    share = log_share.exp()
    empty = parts.row_max == -torch.inf
    none = row_max.new_empty(0)

    def total(value: Tensor, of_empty: Tensor) -> Tensor:
        return torch.where(empty, of_empty, value).sum(0)

    logprob = entropy = sum_sq = weighted_sum = weight_mass = none
    if target is not None:
        picked = torch.where(empty, log_share, parts.logprob + log_share)
        logprob = _at_target(layout, target, picked)
    if parts.entropy.numel():
        entropy = total(share * (parts.entropy - log_share), share)
    if parts.sum_sq.numel():
        sum_sq = total(share.square() * parts.sum_sq, share)
    if parts.weighted_sum.numel():
        by_share = parts.weight_mass * log_share
        weighted_sum = total(parts.weighted_sum + by_share, by_share)
        weight_mass = parts.weight_mass.sum(0)
    lse = row_max + log_sum
    return [logprob, lse, entropy, sum_sq, weighted_sum, row_max, log_sum, weight_mass]


class Whole(NamedTuple):
    """What the ranks know together."""

    statistics: tuple[Tensor, ...]  # in the order of the op's outputs
    classes: Tensor  # [] int64
    target_weight: Tensor  # [N], or no elements


def combine(
    shard: Shard,
    local: Local,
    target: Tensor | None,
    ignore_index: int,
    out: tuple[Tensor, ...],
    top: Tensor | None,
    weight: Tensor | None,
) -> Whole:
    """The statistics of whole rows from each rank's outputs `out` of the op.

    top: what the local argmax is the largest of [N], where that is wanted. weight: [classes] of
    the shard, to be looked up at the target.
    """
    logprob, _, *moments, best, row_max, log_sum, mass = out
    none = row_max.new_empty(0)
    if weight is not None and local.target is not None:
        weight = weight[local.target.clamp(min=0)]
    extras = (none if extra is None else extra for extra in (top, weight))
    span = torch.tensor([shard.start, shard.classes], device=row_max.device)
    floats = [row_max, log_sum, logprob, *moments, mass, *extras]
    spans, bests, *received = _all_gather(shard, [span, best, *floats])
    layout = _layout(shard, spans)
    classes = layout.classes.sum()
    if target is not None and target.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.index_range(shard.caller, "target", target, int(classes), ignore_index)

    parts = _Parts(*(part.double() for part in received))
    found = [value.to(row_max.dtype) for value in _merged(layout, parts, target)]
    target_weight = none
    if target is not None and parts.target_weight.numel():
        target_weight = _at_target(layout, target, parts.target_weight).to(row_max.dtype)
    if best.numel():
        best = _first_of_largest(parts.top, bests, layout.start)
    if local.kept is not None:
        ignored = ~local.kept
        found = [x.masked_fill(ignored, 0) if x.numel() else x for x in found]
        best = best.masked_fill(ignored, -1) if best.numel() else best
        if target_weight.numel():
            target_weight = target_weight.masked_fill(ignored, 0)
    return Whole((*found[:5], best, *found[5:]), classes, target_weight)


def shard_coefficients(
    upstream: Upstream,
    owned: Tensor | None,
    entropy: Tensor,
    sum_sq: Tensor,
    weight_mass: Tensor,
) -> tuple[Tensor | None, ...]:
    """The op's coefficients; only the rank with the target adds what is on it."""
    *others, on_target = coefficients(upstream, entropy, sum_sq, weight_mass)
    if on_target is not None and owned is not None:
        on_target = torch.where(owned, on_target, 0)
    return *others, on_target


class _ParallelRowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor | None,
        class_weight: Tensor | None,
        target_weight: Tensor | None,
        shard: Shard,
        ignore_index: int,
        scale: float,
        softcap: float,
        wanted: Wanted,
    ) -> tuple[Tensor, ...]:
        local = local_target(shard, target, ignore_index)
        options = (LOCAL_IGNORE_INDEX, scale, softcap)
        out = torch.ops.fastlm.row_statistics(
            logits, local.target, class_weight, *options, *wanted, shard.caller
        )
        top = None
        if wanted.argmax:
            top = logits.gather(1, out[5].clamp(min=0)[:, None])[:, 0].to(result_dtype(logits))
            top = -top if scale < 0 else top
        whole = combine(shard, local, target, ignore_index, out, top, target_weight)
        statistics = whole.statistics
        logprob, lse, entropy, sum_sq, weighted_sum, argmax, row_max, log_sum, mass = statistics
        moments = kept_from_the_caller(wanted, entropy, sum_sq)
        saved = (row_max, log_sum, *moments, mass)
        ctx.save_for_backward(logits, local.target, local.owned, class_weight, *saved)
        ctx.options, ctx.wanted = options, wanted
        ctx.mark_non_differentiable(argmax, mass, whole.classes, whole.target_weight)
        ctx.set_materialize_grads(False)
        results = (logprob, lse, entropy, sum_sq, weighted_sum, argmax, mass)
        return *results, whole.classes, whole.target_weight

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, owned, class_weight, row_max, log_sum, *statistics = ctx.saved_tensors
        upstream = upstream_of(douts[:5], target is not None, ctx.wanted)
        if all(value is None for value in upstream):
            return (None,) * 9
        dlogits = dweight = None
        if ctx.needs_input_grad[0]:
            factors = shard_coefficients(upstream, owned, *statistics)
            saved = (logits, target, class_weight, row_max, log_sum)
            dlogits = torch.ops.fastlm.row_statistics_backward(*saved, *factors, *ctx.options)
        if ctx.needs_input_grad[2] and upstream.weighted_sum is not None:
            dweight = class_weight_gradient(
                upstream.weighted_sum, logits, target, row_max, log_sum, *ctx.options
            )
        return dlogits, None, dweight, *(None,) * 6


class ParallelStatistics(NamedTuple):
    """Of whole rows, the same on every rank."""

    statistics: Statistics
    classes: Tensor  # size of the vocabulary, [] int64
    target_weight: Tensor  # [N], or no elements


def row_statistics(
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    target_weight: Tensor | None,
    *,
    shard: Shard,
    wanted: Wanted,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> ParallelStatistics:
    """`op.row_statistics` of rows of which `logits` and `class_weight` are this rank's part.

    target_weight: [classes], looked up at each row's target on the rank that holds it."""
    found = _ParallelRowStatistics.apply(
        logits, target, class_weight, target_weight, shard, ignore_index, scale, softcap, wanted
    )
    return ParallelStatistics(Statistics(*found[:7]), *found[7:])
