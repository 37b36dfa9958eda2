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
from .op import EmbeddingGRULayer, GRULayer
from .token_plan import TokenPlan, token_plan

Cell = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w_ih, w_hh, b_ih, b_hh


class EmbeddingOptions(NamedTuple):
    """As in torch.nn.functional.embedding; `dropout` is 0 outside training."""

    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False
    dropout: float = 0.0

    def checked(self, op: str, size: int) -> EmbeddingOptions:
        """With `padding_idx` counted from the start."""
        if not 0.0 <= self.dropout <= 1.0:
            checks.bad_value(op, "embedding_dropout", "in [0, 1]", self.dropout)
        if self.padding_idx is None:
            return self
        if not -size <= self.padding_idx < size:
            checks.bad_value(op, "padding_idx", f"in [{-size}, {size})", self.padding_idx)
        return self._replace(padding_idx=self.padding_idx % size)


class Direction(NamedTuple):
    cell: Cell
    h0: Tensor | None
    reverse: bool
    starts: Tensor | None


def over_embedding(
    op: str,
    tokens: Tensor,
    weight: Tensor,
    directions: Sequence[Direction],
    options: EmbeddingOptions,
    plan: TokenPlan | None,
    dedupe: str,
    batch_first: bool,
    save: str,
) -> list[tuple[Tensor, Tensor]]:
    """(output, h_n) of each direction; tokens [B, T] or [T, B], int64."""
    if options.sparse and torch.compiler.is_compiling():
        checks.bad_value(op, "sparse", "False under torch.compile", True)
    if dedupe == "auto":
        dedupe = "batch" if plan is not None else _cheapest(tokens, weight.shape[0])
    if options.max_norm is not None:
        _check_tokens(op, tokens, weight.shape[0])
        used = tokens.contiguous() if plan is None else plan.unique
        with torch.no_grad():
            torch.embedding_renorm_(weight, used, options.max_norm, options.norm_type)
    by_row = options.scale_grad_by_freq or options.sparse or options.dropout
    if len(directions) == 1 and not by_row:
        (way,) = directions
        unique, inverse = plan[:2] if plan is not None and dedupe == "batch" else (None, None)
        return [
            EmbeddingGRULayer.apply(
                tokens, weight, *way.cell, way.h0, way.starts, unique, inverse,
                dedupe, options.padding_idx, batch_first, way.reverse, save,
            )
        ]  # fmt: skip
    return _over_rows(op, tokens, weight, directions, options, plan, dedupe, batch_first, save)


def _cheapest(tokens: Tensor, size: int) -> str:
    if tokens.device.type == "cpu":
        return "batch"
    # counting distinct tokens there would be a host synchronisation
    return "vocab" if size <= 1.5 * tokens.numel() else "off"


def _check_tokens(op: str, tokens: Tensor, size: int) -> None:
    """Before anything is indexed; in a compiled graph the ops that index check for themselves."""
    if not torch.compiler.is_compiling():
        checks.index_range(op, "tokens", tokens, size, None)


def _over_rows(
    op: str,
    tokens: Tensor,
    weight: Tensor,
    directions: Sequence[Direction],
    options: EmbeddingOptions,
    plan: TokenPlan | None,
    dedupe: str,
    batch_first: bool,
    save: str,
) -> list[tuple[Tensor, Tensor]]:
    """The rows first, as a tensor of their own, which both directions read."""
    size = weight.shape[0]
    if plan is None and dedupe == "batch" and torch.compiler.is_compiling():
        # the number of distinct tokens is not a size that a graph can have
        dedupe = "vocab" if size <= 1.5 * tokens.numel() else "off"
    _check_tokens(op, tokens, size)
    if plan is None and (dedupe == "batch" or options.sparse):
        plan = token_plan(tokens, size)
    keep = None
    if options.dropout:
        keep = torch.empty(size, device=weight.device).bernoulli_(1.0 - options.dropout)
        keep = keep if options.dropout == 1.0 else keep / (1.0 - options.dropout)
    counts = None
    if options.scale_grad_by_freq:
        counts = _counts(tokens, size) if plan is None else plan.counts()
    unique, inverse = (None, None) if plan is None else plan[:2]
    rows = Rows.apply(
        weight, tokens, keep, counts, unique, inverse, dedupe, options.padding_idx, options.sparse
    )
    results = []
    for cell, h0, reverse, starts in directions:
        if dedupe == "off":
            dense = rows.view(*tokens.shape, weight.shape[1])
            results.append(GRULayer.apply(dense, *cell, h0, starts, batch_first, reverse, save))
        else:
            index = tokens if dedupe == "vocab" or inverse is None else inverse.view(tokens.shape)
            results.append(
                EmbeddingGRULayer.apply(
                    index, rows, *cell, h0, starts, None, None, "vocab", None, batch_first,
                    reverse, save,
                )
            )  # fmt: skip
    return results


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
            values = torch.zeros(count, drows.shape[1], dtype=wide, device=drows.device)
            values.index_add_(0, index, drows.to(wide))
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
