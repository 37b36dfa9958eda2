"""The recurrence of a GRU layer in Triton, with the arguments of `reference`.

One launch per step: the end of a launch is what makes a step's states visible to every program of
the next, so a CUDA graph may hold all of them and Triton's interpreter, which runs programs one
after another, runs the same kernels. A program owns a tile of rows and hidden units, takes its
recurrent products over the full depth and applies the gates to them before anything is stored.
The state stays in float32: step t reads what step t - 1 wrote to `output`.

Products have float32's digits whatever the weights are. bfloat16 weights are multiplied on tensor
cores by three bfloat16 parts of the other operand, which hold its 24 bits; float16 weights in three
products of tf32 parts (the weight is one part, the other operand two with 22 bits); float32 weights
in float32. Nothing is added atomically; every sum has an order that sizes alone decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_backend
from ..row_statistics.triton_kernels import on_device, tanh

# rows of a product at least, hidden units of a program
LEAST_ROWS, UNITS = 16, 16
# how products are taken, and terms of their sums that are read at once
PRECISION = {torch.float32: "ieee", torch.bfloat16: "parts", torch.float16: "tf32x3"}
LEAST_DEPTH, DEPTH = 32, {torch.float32: 32, torch.bfloat16: 64, torch.float16: 32}
# positions read at once for one row of the table, and columns of a program
POSITIONS, COLUMNS = 16, 128


@triton.jit
def _tile(hidden, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """Rows and hidden units of this program; one axis of the grid, the others end at 65535."""
    tiles = tl.cdiv(hidden, UNITS)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, (program % tiles) * UNITS + tl.arange(0, UNITS)


@triton.jit
def _wide(pointer, mask, other=0.0):
    return tl.load(pointer, mask=mask, other=other).to(tl.float32)


@triton.jit
def _bias(b_hh, unit, mask):
    """[1, UNITS]"""
    value = tl.zeros_like(unit).to(tl.float32)
    if b_hh is not None:
        value = _wide(b_hh + unit, mask)
    return value[None, :]


@triton.jit
def _product(x, w, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + x @ w for float32 x."""
    if PRECISION == "parts":
        for _ in tl.static_range(3):
            part = x.to(tl.bfloat16)
            x -= part.to(tl.float32)
            if WIDEN:
                total = tl.dot(part.to(tl.float32), w.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(part, w, total)
    else:
        total = tl.dot(x, w.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["step", "before", "rows", "batch", "row_stride", "step_stride"])
def forward_kernel(
    output,  # [N, H], token n = row * row_stride + step * step_stride
    gates,  # float32 [N, 4H] or None
    table,  # [rows, 3H]
    index,  # int64 [N] or None
    reset,  # [N] or None
    w_hh,  # [3H, H]
    b_hh,  # [3H] or None
    previous,  # output, or h0 [batch, H]
    step,
    before,  # step of `previous`
    rows,
    batch,
    hidden,
    row_stride,
    step_stride,
    previous_stride,  # of rows of `previous`, in tokens
    PRECISION: tl.constexpr,  # of products: "ieee", "parts" or "tf32x3"
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 wrongly
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, unit = _tile(hidden, ROWS, UNITS)
    in_batch, in_hidden = row < batch, unit < hidden
    token = row * row_stride + tl.cast(step, tl.int64) * step_stride
    kept = in_batch
    if reset is not None:
        # the state of a row that starts afresh is not read: it may be NaN
        kept = in_batch & (tl.load(reset + token, mask=in_batch, other=1) == 0)
    state = (row * previous_stride + tl.cast(before, tl.int64) * step_stride) * hidden
    state = previous + state[:, None]
    gate = tl.cast(hidden, tl.int64) * hidden  # between the weights of two gates

    r = tl.zeros((ROWS, UNITS), tl.float32)
    z, a = r, r
    for begin in range(0, hidden, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        h = _wide(state + k[None, :], kept[:, None] & (k < hidden)[None, :])
        w = w_hh + unit.to(tl.int64)[None, :] * hidden + k[:, None]
        inside = (k < hidden)[:, None] & in_hidden[None, :]
        r = _product(h, tl.load(w, mask=inside, other=0.0), r, PRECISION, WIDEN)
        z = _product(h, tl.load(w + gate, mask=inside, other=0.0), z, PRECISION, WIDEN)
        a = _product(h, tl.load(w + 2 * gate, mask=inside, other=0.0), a, PRECISION, WIDEN)

    source, valid = token, in_batch
    if index is not None:
        source = tl.load(index + token, mask=in_batch, other=-1)
        valid = (source >= 0) & (source < rows)
    x = table + source[:, None] * (3 * hidden) + unit[None, :]
    read = valid[:, None] & in_hidden[None, :]
    nan = float("nan")  # an index out of range: NaN in that row
    r = tl.sigmoid(_wide(x, read, nan) + (r + _bias(b_hh, unit, in_hidden)))
    z = tl.sigmoid(_wide(x + hidden, read, nan) + (z + _bias(b_hh, hidden + unit, in_hidden)))
    a += _bias(b_hh, 2 * hidden + unit, in_hidden)
    n = tanh(_wide(x + 2 * hidden, read, nan) + r * a)
    h = _wide(state + unit[None, :], kept[:, None] & in_hidden[None, :])
    h = n + z * (h - n)

    written = in_batch[:, None] & in_hidden[None, :]
    tl.store(output + token[:, None] * hidden + unit[None, :], h, mask=written)
    if gates is not None:
        saved = gates + token[:, None] * (4 * hidden) + unit[None, :]
        tl.store(saved, r, mask=written)
        tl.store(saved + hidden, z, mask=written)
        tl.store(saved + 2 * hidden, n, mask=written)
        tl.store(saved + 3 * hidden, a, mask=written)


@triton.jit(do_not_specialize=["step", "before", "after", "batch", "row_stride", "step_stride"])
def backward_kernel(
    carry,  # float32 [batch, H]: dh_n at first, dh0 at last, between steps dh * z
    dhidden,  # float32 [N, 3H] = (dr, dz, dn * r)
    dn,  # float32, rows of dn_stride
    doutput,  # [N, H]
    gates,  # float32 [N, 4H]
    reset,  # [N] or None
    w_hh,  # [3H, H]
    previous,  # as in the forward
    step,
    before,
    after,  # the step that the launch before this one did
    batch,
    hidden,
    dn_stride,
    row_stride,
    step_stride,
    previous_stride,
    PRODUCT: tl.constexpr,  # there is a step after this one
    GATES: tl.constexpr,  # there is this step: without, what remains is dh0
    PRECISION: tl.constexpr,  # of products: "ieee", "parts" or "tf32x3"
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 wrongly
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, unit = _tile(hidden, ROWS, UNITS)
    in_batch, in_hidden = row < batch, unit < hidden
    mine = in_batch[:, None] & in_hidden[None, :]
    held = carry + row[:, None] * hidden + unit[None, :]
    d = tl.load(held, mask=mine, other=0.0)
    if PRODUCT:
        token = row * row_stride + tl.cast(after, tl.int64) * step_stride
        kept = in_batch
        if reset is not None:
            kept = in_batch & (tl.load(reset + token, mask=in_batch, other=1) == 0)
        total = tl.zeros((ROWS, UNITS), tl.float32)
        for begin in range(0, 3 * hidden, DEPTH):
            k = begin + tl.arange(0, DEPTH)
            inside = k < 3 * hidden
            dh = dhidden + token[:, None] * (3 * hidden) + k[None, :]
            dh = tl.load(dh, mask=kept[:, None] & inside[None, :], other=0.0)
            w = w_hh + k.to(tl.int64)[:, None] * hidden + unit[None, :]
            w = tl.load(w, mask=inside[:, None] & in_hidden[None, :], other=0.0)
            total = _product(dh, w, total, PRECISION, WIDEN)
        d = tl.where(kept[:, None], d + total, 0.0)
    if GATES:
        token = row * row_stride + tl.cast(step, tl.int64) * step_stride
        started = in_batch
        if reset is not None:
            started = in_batch & (tl.load(reset + token, mask=in_batch, other=1) == 0)
        state = (row * previous_stride + tl.cast(before, tl.int64) * step_stride) * hidden
        state = previous + state[:, None] + unit[None, :]
        h = _wide(state, started[:, None] & in_hidden[None, :])
        saved = gates + token[:, None] * (4 * hidden) + unit[None, :]
        r, z = tl.load(saved, mask=mine), tl.load(saved + hidden, mask=mine)
        n, a = tl.load(saved + 2 * hidden, mask=mine), tl.load(saved + 3 * hidden, mask=mine)
        d += _wide(doutput + token[:, None] * hidden + unit[None, :], mine)
        through_n = d * (1.0 - z) * (1.0 - n * n)
        written = dhidden + token[:, None] * (3 * hidden) + unit[None, :]
        tl.store(written, through_n * a * r * (1.0 - r), mask=mine)
        tl.store(written + hidden, d * (h - n) * z * (1.0 - z), mask=mine)
        tl.store(written + 2 * hidden, through_n * r, mask=mine)
        tl.store(dn + token[:, None] * dn_stride + unit[None, :], through_n, mask=mine)
        d *= z
    tl.store(held, d, mask=mine)


@triton.jit
def segment_sum_kernel(
    dtable,  # float32 [rows, 3H]
    dhidden,  # float32 [N, 3H]: the first two gates
    dn,  # float32 [N, H]: the third
    order,  # int64 [N], tokens sorted by their row of the table
    offsets,  # int64 [rows + 1], where each row's tokens begin in `order`
    hidden,
    blocks,  # of a row
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per row and block of columns; its tokens in their order, 16 partial sums a column
    that are added at the end."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    in_first = (column < 2 * hidden)[None, :]
    in_third = ((column >= 2 * hidden) & (column < 3 * hidden))[None, :]
    last = tl.load(offsets + row + 1)
    total = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    for begin in range(tl.load(offsets + row), last, POSITIONS):
        position = begin + tl.arange(0, POSITIONS)
        inside = (position < last)[:, None]
        token = tl.load(order + position, mask=position < last, other=0)[:, None]
        first = dhidden + token * (3 * hidden) + column[None, :]
        third = dn + token * hidden + (column - 2 * hidden)[None, :]
        total += tl.load(first, mask=inside & in_first, other=0.0)
        total += tl.load(third, mask=inside & in_third, other=0.0)
    at = dtable + row * (3 * hidden) + column
    tl.store(at, tl.sum(total, 0), mask=column < 3 * hidden)


class _Steps(NamedTuple):
    """The order of the steps, and where their tokens stand."""

    steps: range
    row_stride: int
    step_stride: int

    def each(self, start: Tensor, output: Tensor) -> Iterator[tuple[int, Tensor, int, int]]:
        """In the forward's order: step; tensor, step and row stride of the state before it."""
        yield self.steps[0], start, 0, 1
        for before, step in zip(self.steps, self.steps[1:], strict=False):
            yield step, output, before, self.row_stride


def _steps(tokens: int, batch: int, batch_first: bool, reverse: bool) -> _Steps:
    length = tokens // batch
    steps = range(length - 1, -1, -1) if reverse else range(length)
    return _Steps(steps, length if batch_first else 1, 1 if batch_first else batch)


def _shape_of_a_program(batch: int, hidden: int, dtype: torch.dtype) -> dict[str, object]:
    """Tile and precision; few rows to a program while the batch is small, to fill the device."""
    rows = LEAST_ROWS if batch <= 64 else 2 * LEAST_ROWS
    # tensor cores take tiles of 16 x 8 from a warp
    warps = rows // 8 if dtype == torch.bfloat16 else 4
    return {
        "PRECISION": PRECISION[dtype],
        "WIDEN": triton_backend.interpreted,
        "ROWS": rows,
        "UNITS": UNITS,
        # values that are not aligned are read one at a time, which takes more registers
        "DEPTH": LEAST_DEPTH if hidden % 16 else DEPTH[dtype],
        "num_warps": warps,
        "num_stages": 3,
        # one unit is compiled apart, and the assembler then spills to have more blocks at once
        **({"maxnreg": 128} if hidden == 1 else {}),
    }


def _grid(batch: int, hidden: int, shape: dict[str, object]) -> tuple[int]:
    return (triton.cdiv(batch, shape["ROWS"]) * triton.cdiv(hidden, UNITS),)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; w_hh, b_hh and h0 may have 16 bits, results are float32."""
    tokens, hidden = (table if index is None else index).shape[0], w_hh.shape[1]
    gates = table.new_empty(tokens, 4 * hidden, dtype=torch.float32)
    output = _run_forward(
        gates, table, index, reset, w_hh, b_hh, h0, _steps(tokens, batch, batch_first, reverse)
    )
    ends = output.view(batch, -1, hidden)[:, 0 if reverse else -1]
    if not batch_first:
        ends = output.view(-1, batch, hidden)[0 if reverse else -1]
    return output, ends.clone(memory_format=torch.contiguous_format), gates


def _run_forward(
    gates: Tensor | None, table: Tensor, index: Tensor | None, reset: Tensor | None, w_hh: Tensor,
    b_hh: Tensor | None, h0: Tensor | None, steps: _Steps,
) -> Tensor:  # fmt: skip
    tokens, hidden = (table if index is None else index).shape[0], w_hh.shape[1]
    batch = tokens // len(steps.steps)
    output = table.new_empty(tokens, hidden, dtype=torch.float32)
    start = output.new_zeros(batch, hidden) if h0 is None else h0
    shape = _shape_of_a_program(batch, hidden, w_hh.dtype)
    kernel = forward_kernel[_grid(batch, hidden, shape)]
    with on_device(table):
        for step, previous, before, stride in steps.each(start, output):
            kernel(
                output, gates, table, index, reset, w_hh, b_hh, previous, step, before,
                table.shape[0], batch, hidden, steps.row_stride, steps.step_stride, stride,
                **shape,
            )  # fmt: skip
    return output


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.backward`."""
    tokens, hidden = output.shape
    steps = _steps(tokens, batch, batch_first, reverse)
    dhidden = gates.new_empty(tokens, 3 * hidden)
    if index is None:
        dtable = gates.new_empty(tokens, 3 * hidden)
        dn = dtable[:, 2 * hidden :]
    else:
        dn = gates.new_empty(tokens, hidden)
    dh0 = _run_backward(dhidden, dn, doutput, dh_n, reset, w_hh, h0, output, gates, steps)
    if index is None:
        dtable[:, : 2 * hidden] = dhidden[:, : 2 * hidden]
    else:
        dtable = _segment_sum(dhidden, dn, index, rows)
    of_hidden = dhidden.sum(0)
    of_input = torch.cat((of_hidden[: 2 * hidden], dn.sum(0)))
    return dtable, dhidden, dh0, torch.stack((of_input, of_hidden))


def _run_backward(
    dhidden: Tensor, dn: Tensor, doutput: Tensor, dh_n: Tensor, reset: Tensor | None, w_hh: Tensor,
    h0: Tensor | None, output: Tensor, gates: Tensor, steps: _Steps,
) -> Tensor:  # fmt: skip
    """Write dhidden and dn, return dh0."""
    batch, hidden = dh_n.shape
    carry = dh_n.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    start = carry.new_zeros(batch, hidden) if h0 is None else h0
    shape = _shape_of_a_program(batch, hidden, w_hh.dtype)
    kernel = backward_kernel[_grid(batch, hidden, shape)]
    strides = (dn.stride(0), steps.row_stride, steps.step_stride)
    with on_device(output):
        after = None
        for step, previous, before, stride in reversed(list(steps.each(start, output))):
            kernel(
                carry, dhidden, dn, doutput, gates, reset, w_hh, previous, step, before,
                step if after is None else after, batch, hidden, *strides, stride,
                PRODUCT=after is not None, GATES=True, **shape,
            )  # fmt: skip
            after = step
        kernel(
            carry, dhidden, dn, doutput, gates, reset, w_hh, start, after, 0, after,
            batch, hidden, *strides, 1, PRODUCT=True, GATES=False, **shape,
        )  # fmt: skip
    return carry


def _segment_sum(dhidden: Tensor, dn: Tensor, index: Tensor, rows: int) -> Tensor:
    """dtable [rows, 3H]; a token out of range is in no row."""
    hidden = dn.shape[1]
    dtable = dn.new_empty(rows, 3 * hidden)
    ordered, order = torch.sort(index, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(rows + 1, device=index.device))
    blocks = triton.cdiv(3 * hidden, COLUMNS)
    with on_device(dn):
        segment_sum_kernel[(rows * blocks,)](
            dtable, dhidden, dn, order, offsets, hidden, blocks,
            POSITIONS=POSITIONS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return dtable
