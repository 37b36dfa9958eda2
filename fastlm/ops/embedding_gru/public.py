"""The public function `embedding_gru`; `gru` stands in `stack`, `token_plan` in its own file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks
from . import sequences
from .arguments import Cell, check_options, check_state, check_weights, is_single
from .by_torch import Form, embedded, of_few_steps
from .embedding import EmbeddingOptions, How, over_embedding
from .stack import gru
from .token_plan import TokenPlan


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
        plan: `token_plan(tokens, V)` of these very tokens, when a data loader has made it.
        dedupe: "batch": one projection for each distinct token of the batch. "vocab": one for each
            row of `weight`. "off": one for each position. "auto": "batch" on the CPU; on a GPU,
            where counting distinct tokens would be a host synchronisation, "vocab" when
            V <= 1.5 N, else "off"; with a plan "batch". Without other options it also lets a call
            of few tokens, or one that PyTorch's GRU takes, be embedding and then `gru`.
        padding_idx: row of `weight` that gets no gradient.
        max_norm, norm_type, scale_grad_by_freq: as in torch.nn.functional.embedding: rows in use
            are renormalised in place first; a row's gradient is divided by its occurrences, those
            behind `lengths` counted too.
        sparse: the gradient of `weight` is a COO tensor of the rows in use, each once and ascending
            (coalesced), for example for torch.optim.SparseAdam. Not under torch.compile.
        embedding_dropout: probability, when `training`, that a token is zero wherever it occurs
            (AWD-LSTM's), with p the probability: `weight` counts as
                weight * torch.empty(V, 1).bernoulli_(1 - p) / (1 - p)
        reset: bool or integer, in the shape of `tokens`: nonzero starts that token from a zero
            state.
        segment_ids: in the shape of `tokens`: the state starts afresh where the value changes.
        cu_seqlens: int32 [documents + 1] offsets of documents packed in `tokens` [total]. On the
            CPU they run side by side, longest first; the results of a document are bitwise those
            it gives alone. On a GPU, where reading lengths would be a host synchronisation, they
            run one after the other: give `cu_seqlens` on the CPU, or `lengths` and padding.
        lengths: [B] how many tokens of each sequence count; the output is 0 at the others, and
            nothing is computed for them on the CPU.
        precision: "ieee" computes in float32 (float64 for float64 weights); "bf16"
            rounds the operands of every product to bfloat16; sums, gates and the state stay
            float32. "auto" is "bf16" for bfloat16 weights on a CPU that multiplies pairs of them
            (AVX512_BF16), else "ieee". "bf16x3" and "tf32" allow a GPU such products; the CPU
            computes them as "ieee".
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
    by_row = max_norm is not None or scale_grad_by_freq or sparse
    by_row = by_row or (training and embedding_dropout != 0.0)
    layout = (plan, reset, segment_ids, cu_seqlens, lengths)
    if dedupe == "auto" and not by_row and all(x is None for x in layout):
        if save == "gates" and precision in ("auto", "ieee"):
            cell = (w_ih, w_hh, b_ih, b_hh)
            found = _in_two(tokens, weight, cell, h0, batch_first, padding_idx)
            if found is not None:
                return found
    options = EmbeddingOptions(
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
        embedding_dropout if training else 0.0,
    )  # fmt: skip
    output, h_n = embedding_layer(
        op, tokens, weight, [(w_ih, w_hh, b_ih, b_hh)], [h0], options, batch_first=batch_first,
        plan=plan, dedupe=dedupe, reset=reset, segment_ids=segment_ids, cu_seqlens=cu_seqlens,
        lengths=lengths, precision=precision, save=save,
    )  # fmt: skip
    return output, h_n[0]


def _in_two(
    tokens: Tensor, weight: Tensor, cell: Cell, h0: Tensor | None, batch_first: bool,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Embedding and then `gru`, where that is faster."""
    weights = [w for w in cell if w is not None]
    form = Form(1, len(weights) == 4, False, batch_first)
    hx = None if h0 is None else h0[None]
    rows = embedded(tokens, weight, hx, weights, form, padding_idx)
    if rows is None:
        return None
    found = of_few_steps(rows, hx, weights, form, fits=True)
    output, h_n = found or gru(rows, hx, weights, **form._asdict())
    assert isinstance(output, Tensor)  # as the input is
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
    lengths: Tensor | None,
    precision: str,
    save: str,
) -> tuple[Tensor, list[Tensor]]:
    """`embedding_gru` in one direction, or with a second cell in both, over one embedding."""
    checks.integer(op, "tokens", tokens)
    checks.shape(op, "weight", weight, (None, None))
    for cell in cells:
        hidden = check_weights(op, weight.shape[1], *cell)
        checks.same_dtype(op, "weight", weight, "w_ih", cell[0])
    checks.one_of(op, "dedupe", dedupe, ("auto", "batch", "vocab", "off"))
    precision = check_options(op, precision, save)
    options = options.checked(op, weight.shape[0])
    single = is_single(op, "tokens", tokens.dim(), cu_seqlens, lengths)
    tokens = tokens.long()
    if single:
        tokens, batch_first = tokens.unsqueeze(0), True
        reset, segment_ids = (x if x is None else x.unsqueeze(0) for x in (reset, segment_ids))
        if cu_seqlens is None:
            states = [x if x is None else x.unsqueeze(0) for x in states]
    begin = sequences.starts(op, tokens.shape, batch_first, reset, segment_ids)
    layout = sequences.layout(op, tokens.shape, batch_first, cu_seqlens, lengths, states[0], begin)
    for state in states:
        check_state(op, "h0", state, (layout.batch, hidden), weight)
    if plan is not None:
        plan = _checked_plan(op, plan, tokens)
    how = How(layout, batch_first, dedupe, save, precision)
    results = over_embedding(op, tokens, weight, cells, states, options, plan, how)
    outputs, h_n = [output for output, _ in results], [state for _, state in results]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    if single:
        output = output[0]
        if cu_seqlens is None:
            h_n = [state[0] for state in h_n]
    return output, h_n


def _checked_plan(op: str, plan: TokenPlan, tokens: Tensor) -> TokenPlan:
    checks.shape(op, "plan.inverse", plan.inverse, (tokens.numel(),), "tokens of the batch")
    for name, value in (("plan.unique", plan.unique), ("plan.inverse", plan.inverse)):
        checks.same_dtype(op, name, value, "token_plan makes it", tokens)
        checks.same_device(op, name, value, "tokens", tokens)
    return plan._replace(inverse=plan.inverse.contiguous())
