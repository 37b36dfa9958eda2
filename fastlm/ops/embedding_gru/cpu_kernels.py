"""The compiled recurrence, with the arguments of `reference`; see csrc/embedding_gru."""

from __future__ import annotations

import torch
from torch import Tensor

from ...extension import raw
from .ragged import Plan

# whose gates are computed again in one call, which packs the weights and holds three states each
_TOKENS_AT_ONCE = 4096


def forward(
    table: Tensor,
    index: Tensor | None,
    reset: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor | None,
    batch: int,
    batch_first: bool,
    reverse: bool,
    round: bool = False,
    plan: Plan | None = None,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """With `save` False there are no gates, [0, 4H]."""
    tokens, hidden = (table if index is None else index).shape[0], w_hh.shape[1]
    # the kernel writes the tokens of the plan only
    full = plan is None or plan.covered == tokens
    output = (table.new_empty if full else table.new_zeros)(tokens, hidden)
    gates = table.new_empty(tokens if save else 0, 4 * hidden)
    h_n = table.new_empty(batch, hidden)
    raw("gru_forward")(
        table, index, reset, w_hh, b_hh, h0, batch_first, reverse, output, h_n,
        gates if save else None, None if plan is None else plan.packed, round,
    )  # fmt: skip
    return output, h_n, gates


def recompute_gates(
    table: Tensor,
    index: Tensor | None,
    previous: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    round: bool = False,
) -> Tensor:
    """As `reference.recompute_gates`, the forward's bits: every token is a sequence of one step."""
    tokens, hidden = previous.shape
    gates = table.new_empty(tokens, 4 * hidden)
    unused = table.new_empty(2, min(tokens, _TOKENS_AT_ONCE), hidden)
    for begin in range(0, tokens, _TOKENS_AT_ONCE):
        part = slice(begin, min(begin + _TOKENS_AT_ONCE, tokens))
        output, h_n = unused[:, : part.stop - begin]
        where = (table[part], None) if index is None else (table, index[part])
        raw("gru_forward")(
            *where, None, w_hh, b_hh, previous[part], True, False, output, h_n, gates[part],
            None, round,
        )  # fmt: skip
    return gates


def backward(
    doutput: Tensor,
    dh_n: Tensor,
    index: Tensor | None,
    rows: int,
    reset: Tensor | None,
    w_hh: Tensor,
    h0: Tensor | None,
    output: Tensor,
    gates: Tensor,
    batch: int,
    batch_first: bool,
    reverse: bool,
    round: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = gates.shape[0], 3 * w_hh.shape[1]
    full = plan is None or plan.covered == tokens
    dhidden = (gates.new_empty if full else gates.new_zeros)(tokens, width)
    # shared rows are summed by the kernel, token by token in a fixed order
    dtable = (gates.new_empty if full and index is None else gates.new_zeros)(rows, width)
    dh0, dbias = torch.empty_like(dh_n), gates.new_empty(2, width)
    raw("gru_backward")(
        doutput, dh_n, index, reset, w_hh, h0, output, gates, batch_first, reverse,
        dhidden, dtable, dh0, dbias, None if plan is None else plan.packed, round,
    )  # fmt: skip
    return dtable, dhidden, dh0, dbias


def token_plan(tokens: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """Distinct tokens in ascending order, and each token's rank among them."""
    unique = tokens.new_empty(min(tokens.numel(), num_embeddings))
    inverse = torch.empty_like(tokens)
    count = raw("token_plan")(tokens, num_embeddings, unique, inverse, None, None)
    return unique[:count], inverse


def whole_plan(tokens: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a `TokenPlan`."""
    most = min(tokens.numel(), num_embeddings)
    unique, offsets = tokens.new_empty(most), tokens.new_empty(most + 1)
    inverse, order = torch.empty_like(tokens), torch.empty_like(tokens)
    count = raw("token_plan")(tokens, num_embeddings, unique, inverse, offsets, order)
    return unique[:count], inverse, offsets[: count + 1], order
