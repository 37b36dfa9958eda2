"""GRU layers in PyTorch operations that autograd follows: for second derivatives, and zoneout.

The same mathematics as `reference`, but nothing is written in place and nothing is saved by hand,
so every derivative of any order exists. A step takes some fifteen operations: slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ragged

# for each step: mask of old states to keep [count, H], or the same fraction everywhere
Keep = Sequence[Tensor] | float | None


class Cell(NamedTuple):
    """The weights of one layer in one direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def _operand(x: Tensor, round: bool) -> Tensor:
    """Rounded to bfloat16 where asked; the derivative is that of the unrounded value."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x + (x.to(torch.bfloat16).to(x.dtype) - x).detach() if round else x


def _steps(
    gates_x: Sequence[Tensor], resets: Sequence[Tensor] | None, cell: Cell, h: Tensor,
    reverse: bool, round: bool, keep: Keep,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Outputs of each step and the last states; step t works on the first rows of `h`."""
    w_hh, b_hh = _operand(cell.w_hh, round), _wide(cell.b_hh)
    outputs: list[Tensor] = list(gates_x)
    steps = range(len(gates_x))
    for t in reversed(steps) if reverse else steps:
        count = gates_x[t].shape[0]
        old = h if count == h.shape[0] else h[:count]
        if resets is not None:
            old = torch.where(resets[t][:, None] != 0, 0.0, old)
        x_r, x_z, x_n = gates_x[t].chunk(3, -1)
        h_r, h_z, a = torch.nn.functional.linear(_operand(old, round), w_hh, b_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * a)
        new = n + z * (old - n)
        if keep is not None:
            kept = keep if isinstance(keep, float) else keep[t]
            new = torch.where(kept, old, new) if isinstance(kept, Tensor) else (
                kept * old + (1.0 - kept) * new
            )  # fmt: skip
        outputs[t] = new
        h = new if count == h.shape[0] else torch.cat((new, h[count:]))
    return outputs, h


def _start(h0: Tensor | None, count: int, like: Tensor, hidden: int) -> Tensor:
    wide = _wide(h0)
    return like.new_zeros(count, hidden) if wide is None else wide


def _dense(
    rows: Tensor, cell: Cell, h0: Tensor | None, reset: Tensor | None, batch_first: bool,
    reverse: bool, round: bool, keep: Keep,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rows [T, B, C], or [B, T, C] with `batch_first`, in the dtype of the weights."""
    dim = 1 if batch_first else 0
    gates_x = torch.nn.functional.linear(
        _operand(rows, round), _operand(cell.w_ih, round), _wide(cell.b_ih)
    )
    start = _start(h0, rows.shape[1 - dim], gates_x, cell.w_hh.shape[1])
    resets = None if reset is None else reset.unbind(dim)
    outputs, h_n = _steps(gates_x.unbind(dim), resets, cell, start, reverse, round, keep)
    if not outputs:
        return rows.new_zeros(*rows.shape[:2], start.shape[1]), start.to(rows.dtype)
    return torch.stack(outputs, dim).to(rows.dtype), h_n.to(rows.dtype)


def gru(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    h0: Tensor | None, reset: Tensor | None, batch_first: bool, reverse: bool, precision: str,
    keep: Keep = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cell = Cell(w_ih, w_hh, b_ih, b_hh)
    return _dense(input, cell, h0, reset, batch_first, reverse, precision == "bf16", keep)


def embedding_gru(
    tokens: Tensor, weight: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, h0: Tensor | None, reset: Tensor | None, padding_idx: int | None,
    batch_first: bool, reverse: bool, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = torch.nn.functional.embedding(tokens, weight, padding_idx)
    cell = Cell(w_ih, w_hh, b_ih, b_hh)
    return _dense(rows, cell, h0, reset, batch_first, reverse, precision == "bf16", None)


def ragged_gru(
    input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    h0: Tensor | None, reset: Tensor | None, index: Tensor | None, first: Tensor,
    lengths: Tensor, offsets: Tensor | None, stride: int, reverse: bool, precision: str,
    keep: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`keep`: a mask [N, H] in the order of the tokens, or a fraction."""
    round = precision == "bf16"
    plan = ragged.make_plan(first, lengths, offsets, stride)
    token = ragged.positions(plan).token
    counts = plan.parts()[3].tolist()
    cell = Cell(w_ih, w_hh, b_ih, b_hh)
    table = torch.nn.functional.linear(_operand(input, round), _operand(w_ih, round), _wide(b_ih))
    row = token if index is None else index.index_select(0, token)
    gates_x = table.index_select(0, row).split(counts)
    resets = None if reset is None else reset.reshape(-1).index_select(0, token).split(counts)
    kept: Keep = keep.index_select(0, token).split(counts) if isinstance(keep, Tensor) else keep
    start = _start(h0, first.shape[0], table, w_hh.shape[1]).index_select(0, plan.order)
    outputs, last = _steps(gates_x if counts else (), resets, cell, start, reverse, round, kept)
    tokens = (input if index is None else index).shape[0]
    output = table.new_zeros(tokens, start.shape[1])
    if outputs:
        output = output.index_copy(0, token, torch.cat(outputs))
    h_n = torch.zeros_like(last).index_copy(0, plan.order, last)
    return output.to(input.dtype), h_n.to(input.dtype)
