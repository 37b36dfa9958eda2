"""The embedding under the first GRU layer: its options, and the rows that the layer reads.

Whatever an option does, it does to all positions of a token alike, so the projection of a distinct
token stays one: the gradient of a row is complete before it is scaled, dropped or made sparse.
Every sum is in a fixed order on the CPU: the same bits on any number of threads.

Source: dropout of whole words, Gal & Ghahramani 2016 (arXiv:1512.05287), as in AWD-LSTM, Merity et
al. 2017 (arXiv:1708.02182).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...library import once_differentiable
from . import sequences
from .arguments import Cell
from .autograd import DENSE, EMBEDDING, RAGGED, apply
from .op import distinct_tokens
from .reference import summed_rows
from .sequences import Layout
from .token_plan import TokenPlan, token_plan


class EmbeddingOptions(NamedTuple):
    """As in torch.nn.functional.embedding; `dropout` is 0 outside training."""

    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False
    dropout: float = 0.0

    @property
    def by_row(self) -> bool:
        """Whether a complete row's gradient is not the row's gradient yet."""
        return self.scale_grad_by_freq or self.sparse or self.dropout > 0.0

    def checked(self, op: str, size: int) -> EmbeddingOptions:
        """With `padding_idx` counted from the start."""
        if not 0.0 <= self.dropout <= 1.0:
            checks.bad_value(op, "embedding_dropout", "in [0, 1]", self.dropout)
        if self.padding_idx is None:
            return self
        if not -size <= self.padding_idx < size:
            checks.bad_value(op, "padding_idx", f"in [{-size}, {size})", self.padding_idx)
        return self._replace(padding_idx=self.padding_idx % size)


class How(NamedTuple):
    layout: Layout
    batch_first: bool
    dedupe: str
    save: str
    precision: str


class Source(NamedTuple):
    """What the layers read: row places[i] of `rows` for token i, or row i without."""

    rows: Tensor
    places: Tensor | None  # in the shape of the tokens
    unique: Tensor | None = None
    inverse: Tensor | None = None
    dedupe: str = "vocab"
    padding_idx: int | None = None


def over_embedding(
    op: str, tokens: Tensor, weight: Tensor, cells: Sequence[Cell],
    states: Sequence[Tensor | None], options: EmbeddingOptions, plan: TokenPlan | None, how: How,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """(output, h_n) of the forward direction, and of the other when there is a second cell;
    tokens [B, T] or [T, B], int64."""
    if options.sparse and torch.compiler.is_compiling():
        checks.bad_value(op, "sparse", "False under torch.compile", True)
    if how.dedupe == "auto":
        how = how._replace(dedupe="batch" if plan is not None else _cheapest(tokens, weight))
    if options.max_norm is not None:
        _check_tokens(op, tokens, weight.shape[0])
        used = tokens.contiguous() if plan is None else plan.unique
        with torch.no_grad():
            torch.embedding_renorm_(weight, used, options.max_norm, options.norm_type)
    if len(cells) == 1 and how.layout.where is None and not options.by_row:
        unique, inverse = plan[:2] if plan is not None and how.dedupe == "batch" else (None, None)
        source = Source(weight, tokens, unique, inverse, how.dedupe, options.padding_idx)
    else:
        source = _rows_first(op, tokens, weight, options, plan, how.dedupe)
    ways = zip(cells, states, (False, True), strict=False)
    return [_one_way(source, tokens.shape, *way, how) for way in ways]


def _cheapest(tokens: Tensor, weight: Tensor) -> str:
    # counting distinct tokens elsewhere would be a host synchronisation
    return "batch" if tokens.device.type == "cpu" else _without_counting(tokens, weight)


def _without_counting(tokens: Tensor, weight: Tensor) -> str:
    return "vocab" if weight.shape[0] <= 1.5 * tokens.numel() else "off"


def _check_tokens(op: str, tokens: Tensor, size: int) -> None:
    """Before anything is indexed; in a compiled graph the ops that index check for themselves."""
    if not torch.compiler.is_compiling():
        checks.index_range(op, "tokens", tokens, size, None)


def _one_way(
    source: Source, shape: torch.Size, cell: Cell, h0: Tensor | None, reverse: bool, how: How
) -> tuple[Tensor, Tensor]:
    _, where, begin, offsets, lengths = how.layout
    if lengths is not None:
        return _padded(source, shape, cell, h0, begin, reverse, how)
    if reverse:
        begin = sequences.reverse_starts(begin, how.batch_first, where)
    if where is None:
        output, h_n = _dense(source, shape, cell, h0, begin, reverse, how)
        if offsets is not None:
            h_n = sequences.final_states(output[0], offsets, reverse)
        return output, h_n
    where = where.to(source.rows.device)
    index = None if source.places is None else source.places.reshape(-1)
    flat = None if begin is None else begin.reshape(-1)
    placed = (index, where.first, where.lengths, where.offsets)
    tensors = (source.rows, *cell, h0, flat, *placed)
    output, h_n = apply(RAGGED, tensors, (where.stride, reverse), how.save, how.precision)
    return output.view(*shape, cell[1].shape[1]), h_n


def _dense(
    source: Source, shape: torch.Size, cell: Cell, h0: Tensor | None, begin: Tensor | None,
    reverse: bool, how: How,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, index, unique, inverse, *shared = source
    laid = (how.batch_first, reverse)
    if index is None:
        dense = rows.view(*shape, rows.shape[1])
        return apply(DENSE, (dense, *cell, h0, begin), laid, how.save, how.precision)
    tensors = (index, rows, *cell, h0, begin, unique, inverse)
    return apply(EMBEDDING, tensors, (*shared, *laid), how.save, how.precision)


def _padded(
    source: Source, shape: torch.Size, cell: Cell, h0: Tensor | None, begin: Tensor | None,
    reverse: bool, how: How,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Whole rows, masked; the reverse direction is the forward one on turned sequences."""
    assert how.layout.lengths is not None
    padded = sequences.Padded(how.layout.lengths, how.batch_first)
    if reverse:
        if source.places is None:
            dense = padded.turned(source.rows.view(*shape, source.rows.shape[1]))
            source = source._replace(rows=dense.flatten(0, 1))
        else:
            source = source._replace(places=padded.turned(source.places))
        begin = padded.turned_starts(begin)
    output, _ = _dense(source, shape, cell, h0, begin, False, how)
    h_n, output = padded.last(output, h0), padded.masked(output)
    return (padded.turned(output) if reverse else output), h_n


def _rows_first(
    op: str, tokens: Tensor, weight: Tensor, options: EmbeddingOptions, plan: TokenPlan | None,
    dedupe: str,
) -> Source:  # fmt: skip
    """The rows as a tensor of their own, which both directions and sequences of any length read."""
    size, padding_idx = weight.shape[0], options.padding_idx
    if plan is None and dedupe == "batch" and torch.compiler.is_compiling():
        # the number of distinct tokens is not a size that a graph can have
        dedupe = _without_counting(tokens, weight)
    _check_tokens(op, tokens, size)
    unique = inverse = counts = None
    if plan is None and (dedupe == "batch" or options.sparse):
        if options.scale_grad_by_freq:
            plan = token_plan(tokens, size)
        else:
            unique, inverse = distinct_tokens(tokens.reshape(-1), size)
    if plan is not None:
        unique, inverse = plan[:2]
    if options.scale_grad_by_freq:
        counts = _counts(tokens, size) if plan is None else plan.counts()
    index = {"batch": inverse, "vocab": tokens, "off": None}[dedupe]
    index = None if index is None else index.view(tokens.shape)
    if options.by_row:
        keep = _kept_words(weight, options.dropout) if options.dropout else None
        rows = Rows.apply(
            weight, tokens, keep, counts, unique, inverse, dedupe, padding_idx, options.sparse
        )
        return Source(rows, index)
    if dedupe == "vocab" and padding_idx is None:
        return Source(weight, index)
    every = torch.arange(size, device=weight.device) if dedupe == "vocab" else tokens.reshape(-1)
    chosen = unique if dedupe == "batch" else every
    assert chosen is not None
    return Source(torch.nn.functional.embedding(chosen, weight, padding_idx), index)


def _kept_words(weight: Tensor, dropout: float) -> Tensor:
    """[V]: 0 for a word that is dropped, else what its row is scaled by."""
    keep = torch.empty(weight.shape[0], device=weight.device).bernoulli_(1.0 - dropout)
    return keep if dropout == 1.0 else keep / (1.0 - dropout)


def _counts(tokens: Tensor, size: int) -> Tensor:
    flat = tokens.reshape(-1)
    return flat.new_zeros(size).index_add_(0, flat, torch.ones_like(flat))


class Rows(torch.autograd.Function):
    """The rows of `weight` that the layer reads, dropped where `keep` [V] is 0, else scaled by it.

    [U, D] of `unique` with dedupe="batch", all with "vocab", one for each token with "off".
    `counts` divide the gradient: of `unique` where there is one, of all V rows otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        tokens: Tensor,
        keep: Tensor | None,
        counts: Tensor | None,
        unique: Tensor | None,
        inverse: Tensor | None,
        dedupe: str,
        padding_idx: int | None,
        sparse: bool,
    ) -> Tensor:
        index = {"batch": unique, "vocab": None, "off": tokens.reshape(-1)}[dedupe]
        rows = weight.view_as(weight) if index is None else weight.index_select(0, index)
        if keep is not None:
            factor = keep if index is None else keep[index]
            rows = (rows * factor[:, None]).to(weight.dtype)
        ctx.save_for_backward(tokens, keep, counts, unique, inverse)
        ctx.size, ctx.how = weight.shape[0], (dedupe, padding_idx, sparse)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        tokens, keep, counts, unique, inverse = ctx.saved_tensors
        dedupe, padding_idx, sparse = ctx.how
        values = drows
        if dedupe == "off":
            # in the order of the tokens, at least in float32
            wide = torch.promote_types(drows.dtype, torch.float32)
            count = ctx.size if unique is None else unique.shape[0]
            index = tokens.reshape(-1) if unique is None else inverse
            values = summed_rows(drows.to(wide), index, count)
        elif dedupe == "vocab" and unique is not None:
            values = drows[unique]
        if keep is not None:
            values = values * (keep if unique is None else keep[unique])[:, None]
        if counts is not None:
            # rows that do not occur have no gradient to divide
            values = values / counts.clamp(min=1)[:, None]
        dweight = _place(values.to(drows.dtype), unique, ctx.size, padding_idx, sparse)
        return (dweight, *(None,) * 8)


def _place(
    values: Tensor, unique: Tensor | None, size: int, padding_idx: int | None, sparse: bool
) -> Tensor:
    """The gradient [V, D] whose rows `unique` (all, when None) are `values`."""
    shape = (size, values.shape[1])
    if sparse:
        assert unique is not None
        if padding_idx is not None:
            kept = unique != padding_idx
            unique, values = unique[kept], values[kept]
        return torch.sparse_coo_tensor(
            unique[None], values, shape, check_invariants=False, is_coalesced=True
        )
    dweight = values
    if unique is not None:
        dweight = values.new_zeros(shape).index_copy_(0, unique, values)
    if padding_idx is not None:
        # without `unique` it is still the gradient that arrived
        dweight = dweight.clone() if unique is None else dweight
        dweight[padding_idx] = 0
    return dweight
