"""The public functions `embedding_gru` and `token_plan`; `gru` stands in `stack`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks
from . import sequences
from .arguments import check_options, check_state, check_weights, is_single
from .autograd import EMBEDDING, RAGGED, apply
from .op import distinct_tokens


class TokenPlan(NamedTuple):
    """Distinct tokens of a batch, made once by `token_plan` and given to `embedding_gru`.

    unique [U]: distinct tokens, ascending. inverse [N]: rank of each token among them. order [N]:
    positions sorted by token, stable; those of unique[i] stand at offsets[i]:offsets[i + 1].
    """

    unique: Tensor
    inverse: Tensor
    offsets: Tensor
    order: Tensor


def token_plan(ids: Tensor, num_embeddings: int) -> TokenPlan:
    """Which rows of an embedding a batch uses, and where.

    Args:
        ids: [...], any integer dtype, in [0, num_embeddings).
        num_embeddings: rows of the embedding.

    Returns:
        `TokenPlan`, int64 tensors on the device of `ids`, for `ids` flattened.

    Raises:
        TypeError: ids are not integers. IndexError: a token is out of range (CPU).
    """
    checks.integer("token_plan", "ids", ids)
    flat = ids.reshape(-1).long()
    checks.index_range("token_plan", "ids", flat, num_embeddings, None)
    unique, inverse, counts = torch.unique(
        flat, sorted=True, return_inverse=True, return_counts=True
    )
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return TokenPlan(unique, inverse, offsets, inverse.argsort(stable=True))


def embedding_gru(
    tokens: Tensor,
    weight: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    batch_first: bool = True,
    plan: TokenPlan | None = None,
    dedupe: str = "auto",
    padding_idx: int | None = None,
    reset: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    precision: str = "auto",
    save: str = "gates",
) -> tuple[Tensor, Tensor]:
    """A GRU layer over embedded tokens, without building the embedded sequence.

    Same as, for one layer and tokens [B, T]:
        torch.nn.GRU(..., batch_first=True)(torch.nn.functional.embedding(tokens, weight), h0[None])
    but the input projection is computed once for each distinct token.

    Args:
        tokens: [B, T] ([T, B] without `batch_first`), [T] for one sequence, or [total] with
            `cu_seqlens`; any integer dtype, in [0, V).
        weight: [V, D] embedding; float64, float32, float16 or bfloat16, as all weights.
        w_ih, w_hh: [3H, D], [3H, H], gates r, z, n as in torch.nn.GRU.
        b_ih, b_hh: [3H] or None.
        h0: [B, H] ([H] for one sequence, [documents, H] with `cu_seqlens`) or None for zeros.
        plan: `token_plan(tokens, V)`, when a data loader has made it.
        dedupe: "batch": one projection for each distinct token of the batch. "vocab": one for each
            row of `weight`. "off": one for each position. "auto": "batch" on the CPU; on a GPU,
            where counting distinct tokens would be a host synchronisation, "vocab" when
            V <= 1.5 N, else "off".
        padding_idx: row of `weight` that gets no gradient.
        reset: bool or integer, in the shape of `tokens`: nonzero starts that token from a zero
            state.
        segment_ids: in the shape of `tokens`: the state starts afresh where the value changes.
        cu_seqlens: int32 [documents + 1] offsets of documents packed in `tokens` [total]. On the
            CPU they run side by side, longest first; the results of a document are bitwise those
            it gives alone. On a GPU, where reading lengths would be a host synchronisation, they
            run one after the other: give `cu_seqlens` on the CPU, or `lengths` and padding.
        lengths: [B] how many tokens of each sequence count; the output is 0 at the others, and
            nothing is computed for them on the CPU.
        precision: "ieee" computes in float32 (float64 for float64 weights); "auto" is "ieee".
            "bf16" rounds the operands of every product to bfloat16; sums, gates and the state stay
            float32. "bf16x3" and "tf32" allow a GPU such products; the CPU computes them as "ieee".
        save: what the backward keeps per token: "gates" 5 x H values, "hidden" 1 x H and recomputes
            the gates in one product.

    Returns:
        output [B, T, H] (the layout of `tokens`) and h_n [B, H], [documents, H] with `cu_seqlens`;
        both in the dtype of the weights.

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.
        IndexError: a token is out of range (CPU; on a GPU its row is undefined).
    """
    op = "embedding_gru"
    checks.integer(op, "tokens", tokens)
    checks.shape(op, "weight", weight, (None, None))
    hidden = check_weights(op, weight.shape[1], w_ih, w_hh, b_ih, b_hh)
    checks.same_dtype(op, "weight", weight, "w_ih", w_ih)
    checks.one_of(op, "dedupe", dedupe, ("auto", "batch", "vocab", "off"))
    precision = check_options(op, precision, save)
    single = is_single(op, "tokens", tokens.dim(), cu_seqlens, lengths)
    tokens = tokens.long()
    if single:
        tokens, batch_first = tokens.unsqueeze(0), True
        reset, segment_ids = (x if x is None else x.unsqueeze(0) for x in (reset, segment_ids))
        if cu_seqlens is None and h0 is not None:
            h0 = h0.unsqueeze(0)
    begin = sequences.starts(op, tokens.shape, batch_first, reset, segment_ids)
    layout = sequences.layout(op, tokens.shape, batch_first, cu_seqlens, lengths, h0, begin)
    check_state(op, "h0", h0, (layout.batch, hidden), weight)
    cell = (w_ih, w_hh, b_ih, b_hh)
    unique = inverse = None
    if plan is not None:
        checks.shape(op, "plan.inverse", plan.inverse, (tokens.numel(),), "tokens of the batch")
        unique, inverse, dedupe = plan.unique, plan.inverse, "batch"
    if dedupe == "auto":
        few = weight.shape[0] <= 1.5 * tokens.numel()
        dedupe = "batch" if tokens.device.type == "cpu" else "vocab" if few else "off"
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    if layout.where is None:
        tensors = (tokens, weight, *cell, h0, layout.begin, unique, inverse)
        how = (dedupe, padding_idx, batch_first, False)
        output, h_n = apply(EMBEDDING, tensors, how, save, precision)
        if layout.lengths is not None:
            sequence = sequences.Padded(layout.lengths, batch_first)
            h_n, output = sequence.last(output, h0), sequence.masked(output)
    else:
        rows, index = _rows(tokens.reshape(-1), weight, unique, inverse, dedupe, padding_idx)
        where, flat = layout.where.to(weight.device), None if begin is None else begin.reshape(-1)
        placed = (index, where.first, where.lengths, where.offsets)
        output, h_n = apply(
            RAGGED, (rows, *cell, h0, flat, *placed), (where.stride, False), save, precision
        )
        output = output.view(*tokens.shape, hidden)
    if single:
        output = output[0]
        if cu_seqlens is None:
            h_n = h_n[0]
        elif layout.where is None:
            h_n = sequences.final_states(output, cu_seqlens)
    return output, h_n


def _rows(
    tokens: Tensor, weight: Tensor, unique: Tensor | None, inverse: Tensor | None, dedupe: str,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rows of the embedding to project, and which of them each token takes."""
    if dedupe == "batch" and unique is None:
        if torch.compiler.is_compiling():
            # how many tokens are distinct is not known to a compiled graph
            dedupe = "vocab" if weight.shape[0] <= 1.5 * tokens.numel() else "off"
        else:
            checks.index_range("embedding_gru", "tokens", tokens, weight.shape[0], None)
            unique, inverse = distinct_tokens(tokens, weight.shape[0])
    if dedupe == "off":
        return torch.nn.functional.embedding(tokens, weight, padding_idx), None
    if dedupe == "vocab":
        if padding_idx is None:
            return weight, tokens
        unique, inverse = torch.arange(weight.shape[0], device=weight.device), tokens
    assert unique is not None
    return torch.nn.functional.embedding(unique, weight, padding_idx), inverse
