"""The loop of `chunks.py` for a budget that holds less than a sensible chunk of whole rows.

Tiles of logits, some rows by some classes, in two passes: first the statistics, merged over the
slices of classes; then, with the statistics of the whole row known, the gradient of each tile from
its logits computed again (8 N H V operations, where whole rows take 6). A slice of the weight's
gradient is finished in one go, so for half-precision inputs the sums held in float32 are those of
the input's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..row_statistics.op import Wanted, coefficients, result_dtype
from .chunks import (
    Chunk,
    Compared,
    Layer,
    Matmul,
    Needs,
    RowKernels,
    Span,
    UpstreamOfRows,
    clear_statistics,
    few,
    held_dtype,
    spans,
)

# products of less run at a fraction of the rate
_LEAST_SIDE = 64
_NO_INDEX = -1


class _Tiles:
    """Buffers for the logits of some rows and some classes, near square within the budget."""

    def __init__(
        self,
        layer: Layer,
        compared: Compared,
        budget: int,
        live: Tensor | None,
        needs: Needs,
        matmul: Matmul,
    ) -> None:
        self.layer, self.live, self.into = layer, live, matmul.into
        self.dtype = result_dtype(layer.input)
        self.classes, self.features = layer.weight.shape
        self.widens = layer.input.dtype != self.dtype
        self.widens &= not matmul.takes_mixed(layer.input)
        self.rounds_logits = matmul.rounds and layer.input.dtype != self.dtype and not self.widens
        count = len(layer.input) if live is None else len(live)
        # copies: of the logits; per row and per class of as many numbers as there are features
        soft = compared.class_weight is not None and compared.class_weight.dim() == 2
        tiles = 2 if soft else 1
        per_row = self.widens + (0 if live is None else 2)
        per_class = self.widens * (1 + needs.weight)
        room = max(0, budget // self.dtype.itemsize)
        fixed = self.features * (per_row + per_class)
        side = int((math.sqrt(fixed * fixed + 4 * tiles * room) - fixed) / (2 * tiles))
        self.rows = max(1, min(count, max(_LEAST_SIDE, side)))
        rest = room - self.features * per_row * self.rows
        most = max(_LEAST_SIDE, rest // (tiles * self.rows + self.features * per_class))
        self.step = -(-self.classes // -(-self.classes // most))
        self.buffer = self.new(self.rows * self.step)
        if self.widens:
            self.weight_buffer = self.new(self.step, self.features)
            self.input_buffer = self.new(self.rows, self.features)

    def new(self, *shape: int) -> Tensor:
        return self.layer.input.new_empty(shape, dtype=self.dtype)

    def spans(self) -> Iterator[Span]:
        return spans(len(self.layer.input), self.rows, self.live)

    def parts(self) -> Iterator[slice]:
        for begin in range(0, self.classes, self.step):
            yield slice(begin, min(begin + self.step, self.classes))

    def weight(self, part: slice) -> Tensor:
        weight = self.layer.weight[part]
        return self.weight_buffer[: len(weight)].copy_(weight) if self.widens else weight

    def input(self, span: Span) -> Tensor:
        rows = self.layer.input[span]
        return self.input_buffer[: len(rows)].copy_(rows) if self.widens else rows

    def logits(self, rows: Tensor, weight: Tensor, part: slice) -> Tensor:
        out = self.buffer[: len(rows) * len(weight)].view(len(rows), len(weight))
        bias = self.layer.bias
        return self.into(out, rows, weight.t(), None if bias is None else bias[part].to(self.dtype))


def _within(compared: Compared, part: slice) -> tuple[Compared, Tensor | None]:
    """What the rows' logits of some classes are compared with; which targets are among them."""
    target, weight = compared.target, compared.class_weight
    if weight is not None:
        weight = weight[..., part]
    inside = None
    if target is not None:
        inside = (target >= part.start) & (target < part.stop)
        inside &= target != compared.ignore_index
        # a row whose target is elsewhere is compared with any class, and its result dropped
        local = torch.where(inside, target - part.start, 0)
        target = torch.where(target == compared.ignore_index, _NO_INDEX, local)
    return compared._replace(target=target, class_weight=weight, ignore_index=_NO_INDEX), inside


class _Merged:
    """Statistics of the rows over the classes seen so far."""

    def __init__(self, part: slice, found: tuple[Tensor, ...], inside: Tensor | None) -> None:
        logprob, _, self.entropy, self.sum_sq, self.weighted_sum, best, *scale, self.mass = found
        self.row_max, self.log_sum = scale
        # a target that no slice holds stays NaN
        self.logprob = logprob if inside is None else torch.where(inside, logprob, math.nan)
        self.inside, self.best = inside, best + part.start
        self.top = best

    def add(self, other: _Merged) -> None:
        top = torch.maximum(self.row_max, other.row_max)
        # classes of -inf alone are measured from 0: -inf - -inf would be NaN
        base = torch.where(top == -math.inf, 0.0, top)
        shares = [(v.row_max - base) + v.log_sum for v in (self, other)]
        log_sum = (shares[0].exp() + shares[1].exp()).log()
        # log of each side's probability; one without any has no say
        logs = [s - log_sum for s in shares]
        none = [v.row_max == -math.inf for v in (self, other)]
        probability = [d.exp().masked_fill(n, 0.0) for d, n in zip(logs, none, strict=True)]

        def moved(name: str, factor: bool = False) -> list[Tensor]:
            """Log-probs of both sides as those of all the classes."""
            return [
                (getattr(v, name) + (d * v.mass if factor else d)).masked_fill(n, -math.inf)
                for v, d, n in zip((self, other), logs, none, strict=True)
            ]

        def mean(values: list[Tensor], power: int) -> Tensor:
            parts = [
                torch.where(p == 0, 0.0, p**power * v)
                for p, v in zip(probability, values, strict=True)
            ]
            return parts[0] + parts[1]

        if other.inside is not None:
            before, here = moved("logprob")
            if self.inside is not None:
                before = torch.where(self.inside, before, math.nan)
                self.inside = self.inside | other.inside
            self.logprob = torch.where(other.inside, here, before)
        if self.entropy.numel():
            sides = zip((self, other), logs, strict=True)
            self.entropy = mean([v.entropy - d for v, d in sides], 1)
        if self.sum_sq.numel():
            self.sum_sq = mean([self.sum_sq, other.sum_sq], 2)
        if self.weighted_sum.numel():
            before, here = moved("weighted_sum", factor=True)
            self.weighted_sum, self.mass = before + here, self.mass + other.mass
        if self.best.numel():
            # NaN is the largest, as for argmax
            above = (other.top > self.top) | (other.top.isnan() & ~self.top.isnan())
            self.best = torch.where(above, other.best, self.best)
            self.top = torch.where(above, other.top, self.top)
        self.row_max, self.log_sum = top, log_sum

    def statistics(self, kept: Tensor | None) -> tuple[Tensor, ...]:
        """In the order of the op, of all rows; an ignored one has zeros, and -1 for argmax."""
        lse = self.row_max + self.log_sum
        rows = [self.logprob, lse, self.entropy, self.sum_sq, self.weighted_sum]
        for index in (0, 2, 3, 4):
            if rows[index].numel():  # a row of -inf alone
                rows[index] = torch.where(lse == -math.inf, math.nan, rows[index])
        floats = [*rows, self.row_max, self.log_sum, self.mass]
        best = self.best
        if kept is not None:
            floats = [torch.where(kept, v, 0.0) if v.numel() else v for v in floats]
            best = torch.where(kept, best, -1) if best.numel() else best
        return *floats[:5], best, *floats[5:]


def _statistics(
    kernels: RowKernels, tiles: _Tiles, compared: Compared, wanted: Wanted, span: Span
) -> tuple[Tensor, ...]:
    here = compared.rows(span)
    merged: _Merged | None = None
    for part in tiles.parts():
        logits = tiles.logits(tiles.input(span), tiles.weight(part), part)
        local, inside = _within(here, part)
        if local.target is not None:  # the rows are compared even if ignored: zeros come last
            local = local._replace(target=local.target.clamp(min=0))
        found = _Merged(part, kernels.forward(logits, *local, *wanted, ""), inside)
        if wanted.argmax:
            sign = -1 if compared.scale < 0 else 1
            found.top = logits.gather(1, found.top[:, None])[:, 0] * sign
        if merged is None:
            merged = found
        else:
            merged.add(found)
    assert merged is not None
    kept = None if here.target is None else here.target != here.ignore_index
    return merged.statistics(kept)


def forward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    wanted: Wanted,
    chunk: Chunk,
    out: tuple[Tensor, ...],
    upstream: UpstreamOfRows | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    live = few(len(layer.input), compared.live())
    if live is not None:
        clear_statistics(out)
    tiles = _Tiles(layer, compared, chunk.tile_bytes, live, Needs(), kernels.matmul)
    for span in tiles.spans():
        for whole, part in zip(
            out, _statistics(kernels, tiles, compared, wanted, span), strict=True
        ):
            if part.numel():
                whole[span] = part
    del tiles
    everything = slice(0, len(layer.input)) if live is None else live
    factors: tuple[Tensor | None, ...] = ()
    if upstream is not None:
        found = tuple(v[everything] if v.numel() else v for v in out)
        douts = upstream(everything, found)
        if any(needs):
            factors = coefficients(douts, found[2], found[3], found[8])
            if live is not None:
                factors = tuple(_spread(f, live, len(layer.input)) for f in factors)
    if not factors:
        needs = Needs()
    rest = (factors, chunk, needs, None, held_dtype(layer.input))
    return backward(kernels, layer, compared, out[6], out[7], *rest)


def _spread(value: Tensor | None, live: Tensor, rows: int) -> Tensor | None:
    return None if value is None else value.new_zeros(rows).index_copy_(0, live, value)


def backward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    row_max: Tensor,
    log_sum: Tensor,
    factors: tuple[Tensor | None, ...],
    chunk: Chunk,
    needs: Needs,
    into: Tensor | None = None,
    result: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """result: dtype of the results, the layer's by default."""
    result = layer.input.dtype if result is None else result
    none = layer.input.new_empty(0, dtype=result)
    if not any(needs):
        return none.clone(), none.clone(), none.clone()
    live = few(len(layer.input), compared.live(factors))
    tiles = _Tiles(layer, compared, chunk.tile_bytes, live, needs, kernels.matmul)
    dtype = tiles.dtype
    dinput = layer.input.new_zeros(layer.input.shape, dtype=dtype) if needs.input else None
    dweight = None
    if needs.weight and into is None:
        dweight = layer.weight.new_zeros(layer.weight.shape, dtype=result)
    dbias = layer.input.new_zeros(tiles.classes, dtype=dtype) if needs.bias else None
    for part in tiles.parts():
        weight = tiles.weight(part)
        target = dweight if into is None else into
        total = None if target is None or not needs.weight else target[part]
        if total is not None and total.dtype != dtype:
            total = tiles.new(*total.shape).zero_()
        for span in tiles.spans():
            rows = tiles.input(span)
            local, inside = _within(compared.rows(span), part)
            factor = [None if f is None else f[span] for f in factors]
            if factor[4] is not None and inside is not None:
                factor[4] = factor[4].where(inside, 0.0)
            logits = tiles.logits(rows, weight, part)
            scale = (row_max[span], log_sum[span])
            dlogits = kernels.backward(logits, local, *scale, tuple(factor))
            if dbias is not None:
                dbias[part] += dlogits.sum(0)
            if tiles.rounds_logits:
                dlogits = dlogits.to(layer.input.dtype)
            if total is not None:
                tiles.into(total, dlogits.t(), rows, accumulate=True)
            if dinput is None:
                continue
            if isinstance(span, slice):
                tiles.into(dinput[span], dlogits, weight, accumulate=True)
            else:
                here = tiles.new(len(rows), tiles.features)
                dinput.index_add_(0, span, tiles.into(here, dlogits, weight))
                del here
        if dweight is not None and total is not None and total.dtype != dweight.dtype:
            dweight[part] = total.to(dweight.dtype)
    found = (dinput, dweight, dbias)
    dinput, dweight, dbias = (none.clone() if g is None else g.to(result) for g in found)
    return dinput, dweight, dbias
