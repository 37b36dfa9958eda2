"""Sequences of different lengths side by side, with nothing computed for padding.

A batch is described by where its tokens stand: token t of sequence s is number
`first[s] + t * stride` (or `first[s] + offsets[t]`) of N tokens. That covers documents one after
the other, padded batches in both layouts, and a PackedSequence. Longest first, step t works on the
first counts[t] sequences; sequences that are done cost nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference


class Plan(NamedTuple):
    """`packed` holds rows [S], lengths [S], offsets [T], counts [T] in int64, as the kernel takes
    them; sequence number i of the plan is order[i] of the caller."""

    order: Tensor
    packed: Tensor
    covered: int

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = self.order.shape[0]
        steps = self.packed.shape[0] // 2 - count
        rows, lengths, offsets, counts = self.packed.split((count, count, steps, steps))
        return rows, lengths, offsets, counts


def make_plan(first: Tensor, lengths: Tensor, offsets: Tensor | None, stride: int) -> Plan:
    """Work of the host, O(sequences + steps): on a GPU it waits for the lengths."""
    ordered, order = lengths.sort(descending=True, stable=True)
    count = lengths.shape[0]
    steps = int(ordered[0]) if count else 0
    done = torch.bincount(lengths, minlength=steps + 1).cumsum(0)[:steps]
    if offsets is None:
        offsets = torch.arange(steps, device=first.device) * stride
    packed = torch.cat((first[order], ordered, offsets[:steps], count - done))
    return Plan(order, packed, int(ordered.sum()) if count else 0)


class Positions(NamedTuple):
    """The covered tokens step by step: number, step and sequence (of the plan) of each."""

    token: Tensor
    step: Tensor
    row: Tensor


def positions(plan: Plan) -> Positions:
    rows, _, offsets, counts = plan.parts()
    step = torch.repeat_interleave(torch.arange(counts.shape[0], device=rows.device), counts)
    begin = counts.cumsum(0) - counts
    row = torch.arange(step.shape[0], device=rows.device) - begin[step]
    return Positions(rows[row] + offsets[step], step, row)


def previous_states(
    output: Tensor, reset: Tensor | None, h0: Tensor | None, plan: Plan, reverse: bool
) -> Tensor:
    """As `reference.previous_states`; zeros where no sequence stands."""
    rows, lengths, offsets, _ = plan.parts()
    token, step, row = positions(plan)
    starts = step + 1 == lengths[row] if reverse else step == 0
    other = torch.where(starts, step, step + 1 if reverse else step - 1)
    before = output.index_select(0, rows[row] + offsets[other])
    begin = torch.zeros((), dtype=output.dtype, device=output.device) if h0 is None else h0[row]
    before = torch.where(starts[:, None], begin, before)
    previous = output.new_zeros(output.shape).index_copy_(0, token, before)
    return previous if reset is None else previous.masked_fill_(reset[:, None] != 0, 0.0)


def forward(
    table: Tensor, index: Tensor | None, reset: Tensor | None, w_hh: Tensor, b_hh: Tensor | None,
    h0: Tensor | None, plan: Plan, reverse: bool, round: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `reference.forward`, for the sequences of the plan."""
    tokens, hidden = (table if index is None else index).shape[0], w_hh.shape[1]
    output, gates = table.new_zeros(tokens, hidden), table.new_zeros(tokens, 4 * hidden)
    rows, _, offsets, counts = plan.parts()
    h = table.new_zeros(rows.shape[0], hidden) if h0 is None else h0.clone()
    steps = list(enumerate(counts.tolist()))
    for t, count in reversed(steps) if reverse else steps:
        token = rows[:count] + offsets[t]
        gates_x = table[token if index is None else index[token]]
        state = h[:count]
        if reset is not None:
            state = torch.where(reset[token, None] != 0, 0.0, state)
        out, saved = reference.cell(gates_x, state, w_hh, b_hh, round)
        h[:count], output[token], gates[token] = out, out, saved
    return output, h, gates


def backward(
    doutput: Tensor, dh_n: Tensor, index: Tensor | None, rows: int, reset: Tensor | None,
    w_hh: Tensor, h0: Tensor | None, output: Tensor, gates: Tensor, plan: Plan, reverse: bool,
    round: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `reference.backward`, for the sequences of the plan."""
    previous = previous_states(output, reset, h0, plan, reverse)
    dinput, dhidden = (gates.new_zeros(gates.shape[0], 3 * w_hh.shape[1]) for _ in range(2))
    first, _, offsets, counts = plan.parts()
    carry = dh_n.clone()
    steps = list(enumerate(counts.tolist()))
    for t, count in steps if reverse else reversed(steps):
        token = first[:count] + offsets[t]
        d = carry[:count] + doutput[token]
        to_input, to_hidden, direct = reference.cell_backward(d, previous[token], gates[token])
        dinput[token], dhidden[token] = to_input, to_hidden
        d = direct + (reference.rounded(to_hidden) if round else to_hidden) @ w_hh
        if reset is not None:
            d = torch.where(reset[token, None] != 0, 0.0, d)
        carry[:count] = d
    dtable = dinput
    if index is not None:
        dtable = reference.summed_rows(dinput, index, rows)
    return dtable, dhidden, carry, torch.stack((dinput.sum(0), dhidden.sum(0)))
