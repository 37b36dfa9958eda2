"""The recurrence of one GRU layer in plain PyTorch: specification, fallback and oracle.

Tokens stand flattened in the order of the input: n = b * T + t with `batch_first`, else t * B + b.
    r = sigmoid(x_r + W_hr h + b_hr)      z = sigmoid(x_z + W_hz h + b_hz)
    a = W_hn h + b_hn                     n = tanh(x_n + r a)          h' = n + z (h - n)
"""

from __future__ import annotations

import torch
from torch import Tensor


def summed_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """[rows, ...]: the sum of the values of each index, in a fixed order."""
    total = values.new_zeros(rows, *values.shape[1:])
    if values.device.type == "cpu":
        return total.index_add_(0, index, values)
    # accumulating index_put_ sorts on a GPU, where index_add_ adds in any order
    return total.index_put_((index,), values, accumulate=True)


def _by_step(flat: Tensor, batch: int, batch_first: bool) -> Tensor:
    """[N, ...] -> view [T, B, ...]."""
    if batch_first:
        return flat.unflatten(0, (batch, -1)).transpose(0, 1)
    return flat.unflatten(0, (-1, batch))


def rounded(x: Tensor) -> Tensor:
    """To the nearest bfloat16, in the same dtype."""
    return x.to(torch.bfloat16).to(x.dtype)


def cell(
    gates_x: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None, round: bool
) -> tuple[Tensor, Tensor]:
    """The next state [B, H] and gates [B, 4H]; `round` takes the product of rounded states."""
    recurrent = torch.nn.functional.linear(rounded(h) if round else h, w_hh, b_hh)
    x_r, x_z, x_n = gates_x.chunk(3, -1)
    h_r, h_z, a = recurrent.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * a)
    return n + z * (h - n), torch.cat((r, z, n, a), -1)


def cell_backward(d: Tensor, h: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of the next state: (dr, dz, dn), (dr, dz, dn * r), and dh through z."""
    r, z, n, a = gates.chunk(4, -1)
    dn = d * (1 - z) * (1 - n * n)
    dz = d * (h - n) * z * (1 - z)
    dr = dn * a * r * (1 - r)
    return torch.cat((dr, dz, dn), -1), torch.cat((dr, dz, dn * r), -1), d * z


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`table` [rows, 3H] holds W_i* x + b_i*, one row a token or, with `index` [N], shared ones.

    Returns output [N, H], h_n [B, H] and gates [N, 4H] = (r, z, n, a), in the dtype of `table`.
    With `round` the recurrent product takes states rounded to bfloat16 (and the caller's w_hh,
    rounded); the states themselves are carried unrounded.
    """
    gates_x = _by_step(table if index is None else table[index], batch, batch_first)
    hidden = w_hh.shape[1]
    tokens = gates_x.shape[0] * batch
    output, gates = table.new_empty(tokens, hidden), table.new_empty(tokens, 4 * hidden)
    out_steps, gate_steps = (_by_step(x, batch, batch_first) for x in (output, gates))
    reset_steps = None if reset is None else _by_step(reset, batch, batch_first)
    h = table.new_zeros(batch, hidden) if h0 is None else h0
    steps = range(gates_x.shape[0])
    for t in reversed(steps) if reverse else steps:
        if reset_steps is not None:
            h = torch.where(reset_steps[t][:, None] != 0, 0.0, h)
        h, saved = cell(gates_x[t], h, w_hh, b_hh, round)
        out_steps[t], gate_steps[t] = h, saved
    return output, h.clone(), gates


def previous_states(
    output: Tensor,
    reset: Tensor | None,
    h0: Tensor | None,
    batch: int,
    batch_first: bool,
    reverse: bool,
) -> Tensor:
    """[N, H]: the state each token started from."""
    previous = torch.empty_like(output)
    steps, source = (_by_step(x, batch, batch_first) for x in (previous, output))
    if reverse:
        steps[:-1], first = source[1:], steps[-1]
    else:
        steps[1:], first = source[:-1], steps[0]
    if h0 is None:
        first.zero_()
    else:
        first.copy_(h0)
    return previous if reset is None else previous.masked_fill_(reset[:, None] != 0, 0.0)


def recompute_gates(
    table: Tensor,
    index: Tensor | None,
    previous: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    round: bool = False,
) -> Tensor:
    """The gates of every token from the saved states, in one product instead of a loop."""
    x_r, x_z, x_n = (table if index is None else table[index]).chunk(3, -1)
    previous = rounded(previous) if round else previous
    h_r, h_z, a = torch.nn.functional.linear(previous, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return torch.cat((r, z, torch.tanh(x_n + r * a), a), -1)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rows` is the number of rows of the table that `index` points into.

    Returns dtable [rows, 3H] = (dr, dz, dn) summed over the tokens of a row, dhidden_gates [N, 3H]
    = (dr, dz, dn * r), dh0 [B, H], and dbias [2, 3H], of b_ih and of b_hh.
    """
    previous = previous_states(output, reset, h0, batch, batch_first, reverse)
    dinput, dhidden = (gates.new_empty(gates.shape[0], 3 * w_hh.shape[1]) for _ in range(2))
    per_token = (doutput, previous, gates, dinput, dhidden)
    steps = [_by_step(x, batch, batch_first) for x in per_token]
    reset_steps = None if reset is None else _by_step(reset, batch, batch_first)
    carry = dh_n
    times = range(steps[0].shape[0])
    for t in times if reverse else reversed(times):
        dout_t, h_t, gates_t, dinput_t, dhidden_t = (x[t] for x in steps)
        to_input, to_hidden, direct = cell_backward(carry + dout_t, h_t, gates_t)
        dinput_t.copy_(to_input)
        dhidden_t.copy_(to_hidden)
        carry = direct + (rounded(to_hidden) if round else to_hidden) @ w_hh
        if reset_steps is not None:
            carry = torch.where(reset_steps[t][:, None] != 0, 0.0, carry)
    dtable = dinput
    if index is not None:
        dtable = summed_rows(dinput, index, rows)
    return dtable, dhidden, carry.clone(), torch.stack((dinput.sum(0), dhidden.sum(0)))
