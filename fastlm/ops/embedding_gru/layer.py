"""One GRU layer around a recurrence: the input projection before it, the products after it.

The recurrence (`reference` or a kernel with the same arguments) does what is sequential; the large
matrix products here are the library's. Computation is in float32, or float64 for float64 inputs;
`gates` is saved in that dtype, everything else in the dtype of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference


class Recurrence(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    token_plan: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    product: Callable[..., Tensor]  # of a, b and optionally a bias: a @ b + bias


def _wide(x: Any) -> Any:
    """In the dtype of the computation, contiguous."""
    if x is None:
        return None
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _project(
    recurrence: Recurrence, rows: Tensor, w_ih: Tensor, b_ih: Tensor | None
) -> Tensor:  # fmt: skip
    return recurrence.product(rows, _wide(w_ih).t(), _wide(b_ih))


def _plan(
    recurrence: Recurrence, tokens: Tensor, unique: Tensor | None, inverse: Tensor | None,
    num_embeddings: int, dedupe: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(rows of the embedding that the table holds, or None for all; row of each token)."""
    if dedupe == "vocab":
        return None, tokens
    if dedupe == "off":
        return tokens, None
    if unique is not None:
        return unique, inverse
    return recurrence.token_plan(tokens, num_embeddings)


class _Call(NamedTuple):
    """How tokens are laid out."""

    batch: int
    batch_first: bool
    reverse: bool


def _layout(first_two: torch.Size, batch_first: bool, reverse: bool) -> _Call:
    return _Call(first_two[0] if batch_first else first_two[1], batch_first, reverse)


def _run_forward(
    recurrence: Recurrence, table: Tensor, index: Tensor | None, reset: Tensor | None,
    weights: tuple[Tensor, Tensor | None], h0: Tensor | None, call: _Call, dtype: torch.dtype,
    shape: torch.Size, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    w_hh, b_hh = (_wide(x) for x in weights)
    flat_reset = None if reset is None else reset.reshape(-1).contiguous()
    if shape.numel() == 0:
        hidden = w_hh.shape[1]
        start = table.new_zeros(call.batch, hidden) if h0 is None else _wide(h0).clone()
        return (
            table.new_empty(*shape, hidden, dtype=dtype),
            start.to(dtype),
            table.new_empty(0, 4 * hidden),
        )
    output, h_n, gates = recurrence.forward(table, index, flat_reset, w_hh, b_hh, _wide(h0), *call)
    if not save:
        gates = gates.new_empty(0, gates.shape[1])
    return output.to(dtype).view(*shape, -1), h_n.to(dtype), gates


class _Saved(NamedTuple):
    w_hh: Tensor
    b_hh: Tensor | None
    h0: Tensor | None
    reset: Tensor | None
    output: Tensor
    gates: Tensor


def _run_backward(
    recurrence: Recurrence, doutput: Tensor, dh_n: Tensor, index: Tensor | None,
    table: Callable[[], Tensor], rows: int, saved: _Saved, call: _Call, need_w_hh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dtable, dw_hh, dbias [2, 3H], dh0 in the dtype of the computation."""
    w_hh, h0 = _wide(saved.w_hh), _wide(saved.h0)
    output = _wide(saved.output).flatten(0, 1)
    reset = None if saved.reset is None else saved.reset.reshape(-1).contiguous()
    width = w_hh.shape[0]
    if output.shape[0] == 0:
        return (
            output.new_zeros(rows, width),
            torch.zeros_like(w_hh),
            output.new_zeros(2, width),
            _wide(dh_n),
        )
    gates, previous = saved.gates, None
    if gates.shape[0] == 0:
        previous = reference.previous_states(output, reset, h0, *call)
        gates = reference.recompute_gates(table(), index, previous, w_hh, _wide(saved.b_hh))
    dtable, dhidden, dh0, dbias = recurrence.backward(
        _wide(doutput).flatten(0, 1), _wide(dh_n), index, rows, reset, w_hh, h0, output, gates,
        *call,
    )  # fmt: skip
    dw_hh = w_hh.new_empty(0)
    if need_w_hh:
        if previous is None:
            previous = reference.previous_states(output, reset, h0, *call)
        dw_hh = recurrence.product(dhidden.t(), previous)
    return dtable, dw_hh, dbias, dh0


def embedding_forward(
    recurrence: Recurrence, tokens: Tensor, weight: Tensor, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None, reset: Tensor | None,
    unique: Tensor | None, inverse: Tensor | None, dedupe: str, padding_idx: int | None,
    batch_first: bool, reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flat = tokens.reshape(-1).contiguous()
    rows, index = _plan(recurrence, flat, unique, inverse, weight.shape[0], dedupe)
    table = _project(recurrence, _wide(weight if rows is None else weight[rows]), w_ih, b_ih)
    call = _layout(tokens.shape, batch_first, reverse)
    return _run_forward(
        recurrence, table, index, reset, (w_hh, b_hh), h0, call, weight.dtype, tokens.shape, save
    )


def embedding_backward(
    recurrence: Recurrence, doutput: Tensor, dh_n: Tensor, tokens: Tensor, weight: Tensor,
    w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    reset: Tensor | None, unique: Tensor | None, inverse: Tensor | None, output: Tensor,
    gates: Tensor, dedupe: str, padding_idx: int | None, batch_first: bool, reverse: bool,
    need_weight: bool, need_w_ih: bool, need_w_hh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dweight, dw_ih, dw_hh, dbias, dh0; a gradient that is not needed comes back empty."""
    flat = tokens.reshape(-1).contiguous()
    rows, index = _plan(recurrence, flat, unique, inverse, weight.shape[0], dedupe)
    used = _wide(weight if rows is None else weight[rows])
    dtable, dw_hh, dbias, dh0 = _run_backward(
        recurrence, doutput, dh_n, index,
        lambda: _project(recurrence, used, w_ih, b_ih), used.shape[0],
        _Saved(w_hh, b_hh, h0, reset, output, gates),
        _layout(tokens.shape, batch_first, reverse), need_w_hh,
    )  # fmt: skip
    dw_ih, dweight = dtable.new_empty(0), weight.new_empty(0)
    if need_w_ih:
        dw_ih = recurrence.product(dtable.t(), used)
    if need_weight:
        dused = recurrence.product(dtable, _wide(w_ih))
        if rows is None:
            dweight = dused.to(weight.dtype)
        elif dedupe == "off":
            # tokens repeat: a float32 sum, in the order of the tokens
            total = dused.new_zeros(weight.shape).index_add_(0, rows, dused)
            dweight = total.to(weight.dtype)
        else:
            dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            dweight.index_copy_(0, rows, dused.to(weight.dtype))
        if padding_idx is not None:
            dweight[padding_idx] = 0
    dtype = weight.dtype
    return dweight, dw_ih.to(dtype), dw_hh.to(dtype), dbias.to(dtype), dh0.to(dtype)


def gru_forward(
    recurrence: Recurrence, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, h0: Tensor | None, reset: Tensor | None, batch_first: bool,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    table = _project(recurrence, _wide(input).flatten(0, 1), w_ih, b_ih)
    call = _layout(input.shape[:2], batch_first, reverse)
    return _run_forward(
        recurrence, table, None, reset, (w_hh, b_hh), h0, call, input.dtype, input.shape[:2], save
    )


def gru_backward(
    recurrence: Recurrence, doutput: Tensor, dh_n: Tensor, input: Tensor, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    reset: Tensor | None, output: Tensor, gates: Tensor, batch_first: bool, reverse: bool,
    need_input: bool, need_w_ih: bool, need_w_hh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dinput, dw_ih, dw_hh, dbias, dh0; a gradient that is not needed comes back empty."""
    rows = _wide(input).flatten(0, 1)
    dtable, dw_hh, dbias, dh0 = _run_backward(
        recurrence, doutput, dh_n, None,
        lambda: _project(recurrence, rows, w_ih, b_ih), rows.shape[0],
        _Saved(w_hh, b_hh, h0, reset, output, gates),
        _layout(input.shape[:2], batch_first, reverse), need_w_hh,
    )  # fmt: skip
    dw_ih = recurrence.product(dtable.t(), rows) if need_w_ih else rows.new_empty(0)
    dinput = rows.new_empty(0)
    if need_input:
        dinput = recurrence.product(dtable, _wide(w_ih)).view(input.shape)
    dtype = input.dtype
    return dinput.to(dtype), dw_ih.to(dtype), dw_hh.to(dtype), dbias.to(dtype), dh0.to(dtype)
