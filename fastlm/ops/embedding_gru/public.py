"""The public functions `gru` and `embedding_gru`: arguments, layers, directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks
from .embedding import Cell, Direction, EmbeddingOptions, over_embedding
from .op import GRULayer
from .token_plan import TokenPlan

PRECISIONS = ("auto", "ieee")


def _weight_checks(
    op: str, features: int, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> int:
    checks.floating(op, "w_ih", w_ih)
    hidden = w_hh.shape[-1]
    checks.shape(op, "w_hh", w_hh, (3 * hidden, hidden), "three gates r, z, n")
    checks.shape(op, "w_ih", w_ih, (3 * hidden, features), "three gates, input size")
    for name, value in (("w_hh", w_hh), ("b_ih", b_ih), ("b_hh", b_hh)):
        if value is not None:
            checks.same_dtype(op, name, value, "w_ih", w_ih)
            checks.same_device(op, name, value, "w_ih", w_ih)
            if name != "w_hh":
                checks.shape(op, name, value, (3 * hidden,))
    return hidden


def _starts(
    op: str,
    shape: torch.Size,
    batch_first: bool,
    reset: Tensor | None,
    segment_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """uint8 mask of tokens that start from a zero state, in the layout of the input."""
    if cu_seqlens is not None:
        return _document_starts(op, cu_seqlens, shape[1])
    if segment_ids is not None:
        checks.shape(op, "segment_ids", segment_ids, tuple(shape))
        dim = 1 if batch_first else 0
        length = shape[dim]
        changes = torch.zeros(shape, dtype=torch.bool, device=segment_ids.device)
        if length > 1:
            now, before = (segment_ids.narrow(dim, start, length - 1) for start in (1, 0))
            changes.narrow(dim, 1, length - 1).copy_(now != before)
        reset = changes if reset is None else changes | reset.bool()
    if reset is None:
        return None
    checks.shape(op, "reset", reset, tuple(shape))
    return reset.ne(0).to(torch.uint8)


def _reverse_starts(starts: Tensor | None, batch_first: bool) -> Tensor | None:
    """Where the other direction starts afresh: at the last token of each document."""
    if starts is None:
        return None
    dim = 1 if batch_first else 0
    shifted = torch.zeros_like(starts)
    length = starts.shape[dim]
    if length > 1:
        shifted.narrow(dim, 0, length - 1).copy_(starts.narrow(dim, 1, length - 1))
    return shifted


def _document_starts(op: str, cu_seqlens: Tensor, total: int) -> Tensor:
    """[1, total] mask for packed documents; offsets [0, ..., total], empty documents allowed."""
    checks.integer(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        checks.bad_value(op, "cu_seqlens", "[documents + 1]", list(cu_seqlens.shape))
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or any(a > b for a, b in zip(ends, ends[1:])):  # noqa: B905
            expected = f"ascending from 0 to {total}, the number of tokens"
            checks.bad_value(op, "cu_seqlens", expected, ends)
    mask = torch.zeros(total + 1, dtype=torch.uint8, device=cu_seqlens.device)
    mask[cu_seqlens.long()] = 1
    return mask[:total].unsqueeze(0)


def _cells(
    op: str, flat_weights: Sequence[Tensor], count: int, bias: bool
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """(w_ih, w_hh, b_ih, b_hh) of every layer and direction."""
    size = 4 if bias else 2
    if len(flat_weights) != count * size:
        checks.bad_value(op, "flat_weights", f"{count * size} tensors", len(flat_weights))
    groups = (flat_weights[i * size : (i + 1) * size] for i in range(count))
    return [(g[0], g[1], g[2] if bias else None, g[3] if bias else None) for g in groups]


def _final_states(output: Tensor, cu_seqlens: Tensor, reverse: bool = False) -> Tensor:
    """[documents, H]: the state after the last token processed, zeros for an empty document."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if output.shape[0] == 0:
        return output.new_zeros(ends.shape[0], output.shape[1])
    last = starts.clamp(max=output.shape[0] - 1) if reverse else (ends - 1).clamp(min=0)
    return torch.where((ends > starts)[:, None], output[last], 0.0)


def _check_options(op: str, precision: str, save: str) -> None:
    checks.one_of(op, "precision", precision, PRECISIONS)
    checks.one_of(op, "save", save, ("gates", "hidden"))


def _check_state(op: str, name: str, h: Tensor | None, shape: tuple[int, ...], w: Tensor) -> None:
    if h is not None:
        checks.shape(op, name, h, shape)
        checks.same_dtype(op, name, h, "the weights", w)


def _check_dims(
    op: str, name: str, dims: int, cu_seqlens: Tensor | None, given: Sequence[Tensor | None]
) -> bool:
    """Whether there is no batch dimension; `dims` counts batch and steps."""
    if dims not in (1, 2):
        checks.bad_value(op, name, "batched or one sequence", f"{dims} leading dimensions")
    if cu_seqlens is not None and (dims == 2 or any(x is not None for x in given)):
        expected = "packed [total], without initial state and reset"
        checks.bad_value(op, f"{name} with cu_seqlens", expected, "something else")
    return dims == 1


def _batched(dim: int, *values: Tensor | None) -> list[Tensor | None]:
    return [None if value is None else value.unsqueeze(dim) for value in values]


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
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    embedding_dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
        h0: [B, H] ([H] for one sequence) or None for zeros.
        plan: `token_plan(tokens, V)` of these very tokens, when a data loader has made it.
        dedupe: "batch": one projection for each distinct token of the batch. "vocab": one for each
            row of `weight`. "off": one for each position. "auto": "batch" on the CPU; on a GPU,
            where counting distinct tokens would be a host synchronisation, "vocab" when
            V <= 1.5 N, else "off"; with a plan "batch".
        padding_idx: row of `weight` that gets no gradient.
        max_norm, norm_type, scale_grad_by_freq: as in torch.nn.functional.embedding: rows in use
            are renormalised in place first; a row's gradient is divided by its occurrences.
        sparse: the gradient of `weight` is a COO tensor of the rows in use, each once and ascending
            (coalesced), for example for torch.optim.SparseAdam. Not under torch.compile.
        embedding_dropout: probability, when `training`, that a token is zero wherever it occurs
            (AWD-LSTM's), with p the probability: `weight` counts as
                weight * torch.empty(V, 1).bernoulli_(1 - p) / (1 - p)
        reset: bool or integer, in the shape of `tokens`: nonzero starts that token from a zero
            state.
        segment_ids: in the shape of `tokens`: the state starts afresh where the value changes.
        cu_seqlens: [documents + 1] offsets of documents packed in `tokens` [total].
        precision: "ieee" computes in float32 (float64 for float64 weights); "auto" is "ieee".
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
    options = EmbeddingOptions(
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
        embedding_dropout if training else 0.0,
    )  # fmt: skip
    output, h_n = embedding_layer(
        op, tokens, weight, [(w_ih, w_hh, b_ih, b_hh)], [h0], options, batch_first=batch_first,
        plan=plan, dedupe=dedupe, reset=reset, segment_ids=segment_ids, cu_seqlens=cu_seqlens,
        precision=precision, save=save,
    )  # fmt: skip
    return output, h_n[0]


def embedding_layer(
    op: str,
    tokens: Tensor,
    weight: Tensor,
    cells: Sequence[Cell],
    states: Sequence[Tensor | None],
    options: EmbeddingOptions,
    *,
    batch_first: bool,
    plan: TokenPlan | None,
    dedupe: str,
    reset: Tensor | None,
    segment_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    precision: str = "auto",
    save: str = "gates",
) -> tuple[Tensor, list[Tensor]]:
    """`embedding_gru` in one direction, or with a second cell in both, over one embedding."""
    checks.integer(op, "tokens", tokens)
    checks.shape(op, "weight", weight, (None, None))
    for cell in cells:
        hidden = _weight_checks(op, weight.shape[1], *cell)
        checks.same_dtype(op, "weight", weight, "w_ih", cell[0])
    checks.one_of(op, "dedupe", dedupe, ("auto", "batch", "vocab", "off"))
    _check_options(op, precision, save)
    single = _check_dims(op, "tokens", tokens.dim(), cu_seqlens, (*states, reset))
    tokens = tokens.long()
    if single:
        tokens, batch_first = tokens.unsqueeze(0), True
        reset, segment_ids, *states = _batched(0, reset, segment_ids, *states)
    for state in states:
        _check_state(op, "h0", state, (tokens.shape[0 if batch_first else 1], hidden), weight)
    starts = _starts(op, tokens.shape, batch_first, reset, segment_ids, cu_seqlens)
    directions = [
        Direction(cell, state, reverse, _reverse_starts(starts, batch_first) if reverse else starts)
        for cell, state, reverse in zip(cells, states, (False, True), strict=False)
    ]
    if plan is not None:
        checks.shape(op, "plan.inverse", plan.inverse, (tokens.numel(),), "tokens of the batch")
        for name, value in (("plan.unique", plan.unique), ("plan.inverse", plan.inverse)):
            checks.same_dtype(op, name, value, "token_plan makes it", tokens)
            checks.same_device(op, name, value, "tokens", tokens)
        plan = plan._replace(inverse=plan.inverse.contiguous())
    results = over_embedding(
        op, tokens, weight, directions, options.checked(op, weight.shape[0]), plan, dedupe,
        batch_first, save,
    )  # fmt: skip
    outputs = [output for output, _ in results]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    h_n = [state for _, state in results]
    if single:
        output, h_n = output[0], [state[0] for state in h_n]
    if cu_seqlens is not None:
        h_n = [
            _final_states(one[0], cu_seqlens, way.reverse)
            for one, way in zip(outputs, directions, strict=True)
        ]
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    flat_weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    segment_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    precision: str = "auto",
    save: str = "gates",
) -> tuple[Tensor, Tensor]:
    """A GRU over dense input, with the weights of torch.nn.GRU.

    Same as, for gru = torch.nn.GRU(C, H):
        gru(input, hx)        with flat_weights = gru._flat_weights

    Args:
        input: [T, B, C], [B, T, C] with `batch_first`, [T, C] for one sequence, or [total, C] with
            `cu_seqlens`; float64, float32, float16 or bfloat16.
        hx: [num_layers * directions, B, H] (without B for one sequence) or None for zeros.
        flat_weights: for each layer, for each direction: w_ih [3H, C], w_hh [3H, H], and with
            `bias` b_ih, b_hh [3H].
        dropout: probability, between layers, when `training`.
        reset, segment_ids, cu_seqlens, precision, save: as in `embedding_gru`; shapes without C.
            The reverse direction starts afresh at the last token of each document.

    Returns:
        output [T, B, directions * H] in the layout of `input`, and h_n in the shape of `hx`;
        with `cu_seqlens` h_n is [num_layers * directions, documents, H].

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.
    """
    op = "gru"
    checks.floating(op, "input", input)
    _check_options(op, precision, save)
    cells = _cells(op, flat_weights, num_layers * (2 if bidirectional else 1), bias)
    single = _check_dims(op, "input", input.dim() - 1, cu_seqlens, (hx, reset))
    if single:
        input, batch_first = input.unsqueeze(0), True
        reset, segment_ids = _batched(0, reset, segment_ids)
        (hx,) = _batched(1, hx)
    hidden, batch = cells[0][1].shape[-1], input.shape[0 if batch_first else 1]
    checks.same_dtype(op, "input", input, "the weights", cells[0][0])
    _check_state(op, "hx", hx, (len(cells), batch, hidden), input)
    starts = _starts(op, input.shape[:2], batch_first, reset, segment_ids, cu_seqlens)
    directions = [(False, starts)]
    if bidirectional:
        directions.append((True, _reverse_starts(starts, batch_first)))
    states: list[Tensor] = []
    for number in range(num_layers):
        outputs = []
        for reverse, begin in directions:
            cell, state = cells[len(states)], None if hx is None else hx[len(states)]
            _weight_checks(op, input.shape[2], *cell)
            output, h_n = GRULayer.apply(input, *cell, state, begin, batch_first, reverse, save)
            if cu_seqlens is not None:
                h_n = _final_states(output[0], cu_seqlens, reverse)
            outputs.append(output)
            states.append(h_n)
        input = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if dropout and training and number + 1 < num_layers:
            input = torch.nn.functional.dropout(input, dropout)
    h_n = torch.stack(states)
    if single:
        return input[0], (h_n if cu_seqlens is not None else h_n[:, 0])
    return input, h_n
