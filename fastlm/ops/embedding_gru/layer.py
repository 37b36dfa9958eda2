"""One GRU layer around a recurrence: the input projection before it, the products after it.

The recurrence (`reference` or a kernel with the same arguments) does what is sequential; the large
products here are those of `matmul`. Computation is in float32, or float64 for float64 inputs;
`gates` is saved in that dtype, everything else in the dtype of the weights. With precision "bf16"
the operands of every product are rounded to bfloat16; sums, gates and the state are not. "auto" is
that for bfloat16 weights where the recurrence multiplies pairs of them faster, else "ieee".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import matmul
from . import ragged, reference
from .ragged import Plan


class Recurrence(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    token_plan: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    # of a, b and optionally a bias: a @ b + bias; the second where a row of the result must not
    # depend on the rows around it, so that a document has the same bits alone and among others
    product: Callable[..., Tensor] = matmul.plain
    each_row: Callable[..., Tensor] = matmul.plain_each_row
    recompute_gates: Callable[..., Tensor] = reference.recompute_gates
    # whether forward and backward take w_hh in bfloat16
    takes_bfloat16: bool = False
    # whether the two products take operands in bfloat16, and `round`
    multiplies_pairs: Callable[[], bool] = lambda: False
    # whether `forward` takes save=False, to leave the gates out
    may_drop_gates: bool = False


def _wide(x: Any) -> Any:
    """In the dtype of the computation, contiguous."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _operand(x: Any, round: bool) -> Any:
    return reference.rounded(_wide(x)) if round else _wide(x)


def _recurrent(recurrence: Recurrence, w_hh: Tensor, round: bool) -> Tensor:
    if recurrence.takes_bfloat16 and (round or w_hh.dtype == torch.bfloat16):
        return w_hh.to(torch.bfloat16).contiguous()
    return _operand(w_hh, round)


def _factor(recurrence: Recurrence, x: Tensor, round: bool) -> Tensor:
    """An operand of one of the large products, which may round it themselves."""
    if recurrence.multiplies_pairs() and (round or x.dtype == torch.bfloat16):
        return x if x.dtype in (torch.float32, torch.bfloat16) else _wide(x)
    return _operand(x, round)


def _product(
    recurrence: Recurrence, a: Tensor, b: Tensor, bias: Tensor | None, round: bool, *,
    each_row: bool = False,
) -> Tensor:  # fmt: skip
    """a @ b + bias of operands from `_factor`, in the dtype of the computation."""
    product = recurrence.each_row if each_row else recurrence.product
    if round and recurrence.multiplies_pairs():
        return product(a, b, bias, round=True)
    return product(a, b, bias)


def _project(
    recurrence: Recurrence, rows: Tensor, w_ih: Tensor, b_ih: Tensor | None, round: bool
) -> Tensor:
    rows, w_ih = (_factor(recurrence, x, round) for x in (rows, w_ih))
    return _product(recurrence, rows, w_ih.t(), _wide(b_ih), round, each_row=True)


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
    """How tokens are laid out, and how exact the products are."""

    batch: int
    batch_first: bool
    reverse: bool
    round: bool = False
    plan: Plan | None = None  # sequences of different lengths; batch counts them

    def recurrence(self) -> dict[str, Any]:
        """What a recurrence takes beside the layout, named only where it is used."""
        plan = {} if self.plan is None else {"plan": self.plan}
        return {**plan, "round": True} if self.round else plan

    def previous(self, output: Tensor, reset: Tensor | None, h0: Tensor | None) -> Tensor:
        if self.plan is not None:
            return ragged.previous_states(output, reset, h0, self.plan, self.reverse)
        return reference.previous_states(output, reset, h0, *self[:3])


def _rounds(recurrence: Recurrence, precision: str, w_hh: Tensor) -> bool:
    if precision == "auto":
        return w_hh.dtype == torch.bfloat16 and recurrence.multiplies_pairs()
    return precision == "bf16"


def _layout(first_two: torch.Size, batch_first: bool, reverse: bool, round: bool) -> _Call:
    batch = first_two[0] if batch_first else first_two[1]
    return _Call(batch, batch_first, reverse, round)


def _reordered(h: Tensor | None, call: _Call) -> Tensor | None:
    """States of the caller's sequences in the order of the plan."""
    return h if h is None or call.plan is None else h[call.plan.order]


def _restored(h: Tensor, call: _Call) -> Tensor:
    return h if call.plan is None else torch.empty_like(h).index_copy_(0, call.plan.order, h)


def _flat(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.reshape(-1).contiguous()


def _run_forward(
    recurrence: Recurrence, table: Tensor, index: Tensor | None, reset: Tensor | None,
    weights: tuple[Tensor, Tensor | None], h0: Tensor | None, call: _Call, dtype: torch.dtype,
    shape: torch.Size, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    w_hh, b_hh = _recurrent(recurrence, weights[0], call.round), _wide(weights[1])
    hidden = w_hh.shape[1]
    if shape.numel() == 0 or call.batch == 0:
        start = table.new_zeros(call.batch, hidden) if h0 is None else _wide(h0).clone()
        return (
            table.new_zeros(*shape, hidden, dtype=dtype),
            start.to(dtype),
            table.new_empty(shape.numel() if save else 0, 4 * hidden),
        )
    drops = {} if save or not recurrence.may_drop_gates else {"save": False}
    output, h_n, gates = recurrence.forward(
        table, index, _flat(reset), w_hh, b_hh, _reordered(_wide(h0), call), *call[:3],
        **call.recurrence(), **drops,
    )  # fmt: skip
    if not save:
        gates = gates.new_empty(0, gates.shape[1])
    return output.to(dtype).view(*shape, -1), _restored(h_n.to(dtype), call), gates


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
    w_hh, h0 = _recurrent(recurrence, saved.w_hh, call.round), _reordered(_wide(saved.h0), call)
    width, hidden = w_hh.shape
    output, doutput = (_wide(x).reshape(-1, hidden) for x in (saved.output, doutput))
    reset = _flat(saved.reset)
    if output.shape[0] == 0 or call.batch == 0:
        return (
            output.new_zeros(rows, width),
            output.new_zeros(width, hidden),
            output.new_zeros(2, width),
            _wide(dh_n),
        )
    gates, previous = saved.gates, None
    if gates.shape[0] == 0:
        previous = call.previous(output, reset, h0)
        weights = (w_hh, _wide(saved.b_hh), call.round)
        gates = recurrence.recompute_gates(table(), index, previous, *weights)
    dtable, dhidden, dh0, dbias = recurrence.backward(
        doutput, _reordered(_wide(dh_n), call), index, rows, reset, w_hh, h0, output, gates,
        *call[:3], **call.recurrence(),
    )  # fmt: skip
    dw_hh = output.new_empty(0)
    if need_w_hh:
        if previous is None:
            previous = call.previous(output, reset, h0)
        operands = [_factor(recurrence, x, call.round) for x in (dhidden, previous)]
        dw_hh = _product(recurrence, operands[0].t(), operands[1], None, call.round)
    return dtable, dw_hh, dbias, _restored(dh0, call)


def embedding_forward(
    recurrence: Recurrence, tokens: Tensor, weight: Tensor, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None, reset: Tensor | None,
    unique: Tensor | None, inverse: Tensor | None, dedupe: str, padding_idx: int | None,
    batch_first: bool, reverse: bool, save: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flat = tokens.reshape(-1).contiguous()
    rows, index = _plan(recurrence, flat, unique, inverse, weight.shape[0], dedupe)
    call = _layout(tokens.shape, batch_first, reverse, _rounds(recurrence, precision, w_hh))
    table = _project(recurrence, weight if rows is None else weight[rows], w_ih, b_ih, call.round)
    return _run_forward(
        recurrence, table, index, reset, (w_hh, b_hh), h0, call, weight.dtype, tokens.shape, save
    )


def embedding_backward(
    recurrence: Recurrence, doutput: Tensor, dh_n: Tensor, tokens: Tensor, weight: Tensor,
    w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    reset: Tensor | None, unique: Tensor | None, inverse: Tensor | None, output: Tensor,
    gates: Tensor, dedupe: str, padding_idx: int | None, batch_first: bool, reverse: bool,
    need_weight: bool, need_w_ih: bool, need_w_hh: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dweight, dw_ih, dw_hh, dbias, dh0; a gradient that is not needed comes back empty."""
    flat = tokens.reshape(-1).contiguous()
    rows, index = _plan(recurrence, flat, unique, inverse, weight.shape[0], dedupe)
    call = _layout(tokens.shape, batch_first, reverse, _rounds(recurrence, precision, w_hh))
    used = _factor(recurrence, weight if rows is None else weight[rows], call.round)
    dtable, dw_hh, dbias, dh0 = _run_backward(
        recurrence, doutput, dh_n, index,
        lambda: _project(recurrence, used, w_ih, b_ih, call.round), used.shape[0],
        _Saved(w_hh, b_hh, h0, reset, output, gates), call, need_w_hh,
    )  # fmt: skip
    needs = (need_w_ih, need_weight)
    dw_ih, dused = _input_gradients(recurrence, dtable, used, w_ih, call.round, *needs)
    dweight = weight.new_empty(0)
    if need_weight:
        if rows is None:
            dweight = dused.to(weight.dtype)
        elif dedupe == "off":
            # tokens repeat: a float32 sum, in the order of the tokens
            dweight = reference.summed_rows(dused, rows, weight.shape[0]).to(weight.dtype)
        else:
            dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            dweight.index_copy_(0, rows, dused.to(weight.dtype))
        if padding_idx is not None:
            dweight[padding_idx] = 0
    dtype = weight.dtype
    return dweight, dw_ih.to(dtype), dw_hh.to(dtype), dbias.to(dtype), dh0.to(dtype)


def _input_gradients(
    recurrence: Recurrence, dtable: Tensor, rows: Tensor, w_ih: Tensor, round: bool,
    need_w_ih: bool, need_rows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the input weights and of the projected rows, empty where not needed."""
    dtable = _factor(recurrence, dtable, round)
    dw_ih = drows = dtable.new_empty(0)
    if need_w_ih:
        dw_ih = _product(recurrence, dtable.t(), rows, None, round)
    if need_rows:
        w_ih = _factor(recurrence, w_ih, round)
        drows = _product(recurrence, dtable, w_ih, None, round, each_row=True)
    return dw_ih, drows


def gru_forward(
    recurrence: Recurrence, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, h0: Tensor | None, reset: Tensor | None, batch_first: bool,
    reverse: bool, save: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _layout(input.shape[:2], batch_first, reverse, _rounds(recurrence, precision, w_hh))
    table = _project(recurrence, input.flatten(0, 1), w_ih, b_ih, call.round)
    return _run_forward(
        recurrence, table, None, reset, (w_hh, b_hh), h0, call, input.dtype, input.shape[:2], save
    )


def gru_backward(
    recurrence: Recurrence, doutput: Tensor, dh_n: Tensor, input: Tensor, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    reset: Tensor | None, output: Tensor, gates: Tensor, batch_first: bool, reverse: bool,
    need_input: bool, need_w_ih: bool, need_w_hh: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dinput, dw_ih, dw_hh, dbias, dh0; a gradient that is not needed comes back empty."""
    call = _layout(input.shape[:2], batch_first, reverse, _rounds(recurrence, precision, w_hh))
    return _dense_backward(
        recurrence, doutput, dh_n, input, None, w_ih, b_ih,
        _Saved(w_hh, b_hh, h0, reset, output, gates), call, (need_input, need_w_ih, need_w_hh),
    )  # fmt: skip


def _dense_backward(
    recurrence: Recurrence, doutput: Tensor, dh_n: Tensor, input: Tensor, index: Tensor | None,
    w_ih: Tensor, b_ih: Tensor | None, saved: _Saved, call: _Call,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_input, need_w_ih, need_w_hh = needs
    rows = _factor(recurrence, input, call.round).flatten(0, -2)
    dtable, dw_hh, dbias, dh0 = _run_backward(
        recurrence, doutput, dh_n, index,
        lambda: _project(recurrence, rows, w_ih, b_ih, call.round), rows.shape[0], saved,
        call, need_w_hh,
    )  # fmt: skip
    wanted = (need_w_ih, need_input)
    dw_ih, drows = _input_gradients(recurrence, dtable, rows, w_ih, call.round, *wanted)
    dinput = drows.view(input.shape) if need_input else drows
    dtype = input.dtype
    return dinput.to(dtype), dw_ih.to(dtype), dw_hh.to(dtype), dbias.to(dtype), dh0.to(dtype)


def ragged_forward(
    recurrence: Recurrence, input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, h0: Tensor | None, reset: Tensor | None, index: Tensor | None,
    first: Tensor, lengths: Tensor, offsets: Tensor | None, stride: int, reverse: bool,
    save: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan = ragged.make_plan(first, lengths, offsets, stride)
    call = _Call(first.shape[0], True, reverse, _rounds(recurrence, precision, w_hh), plan)
    table = _project(recurrence, input, w_ih, b_ih, call.round)
    tokens = (input if index is None else index).shape[:1]
    return _run_forward(
        recurrence, table, index, reset, (w_hh, b_hh), h0, call, input.dtype, tokens, save
    )


def ragged_backward(
    recurrence: Recurrence, doutput: Tensor, dh_n: Tensor, input: Tensor, w_ih: Tensor,
    w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    reset: Tensor | None, index: Tensor | None, first: Tensor, lengths: Tensor,
    offsets: Tensor | None, output: Tensor, gates: Tensor, stride: int, reverse: bool,
    need_input: bool, need_w_ih: bool, need_w_hh: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = ragged.make_plan(first, lengths, offsets, stride)
    call = _Call(first.shape[0], True, reverse, _rounds(recurrence, precision, w_hh), plan)
    return _dense_backward(
        recurrence, doutput, dh_n, input, index, w_ih, b_ih,
        _Saved(w_hh, b_hh, h0, reset, output, gates), call, (need_input, need_w_ih, need_w_hh),
    )  # fmt: skip
