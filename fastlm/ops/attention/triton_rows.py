"""What the backward of attention needs of every row, and of every tile of keys, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_config import Tiles
from .triton_kernels import FAR, LOG2E, VARYING, Call, intervals, locate

AT_ONCE = 4096  # elements of `rows_kernel`
SCANNED = 1024  # rows that `ranges_kernel` looks at at once


@triton.jit(do_not_specialize=["rows", "tiles"])
def rows_kernel(
    delta,  # float32 [B, H, Sq]
    lse2,  # the same; in base 2, infinity where a row attends to nothing: its p is 0 then
    clean,  # [B, Sq, H, Dv] or None: dout with 0 in rows that attend to nothing
    out,  # [B, Sq, H, Dv]
    dout,
    lse,  # float32 [B, H, Sq]
    dlse,  # the same or None
    rows,
    tiles,
    heads,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    ONE_KEY: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    bh = (program // tiles).to(tl.int64)
    row = (program % tiles) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    e = tl.arange(0, PAD_DV)[None, :]
    at = (((bh // heads) * rows + row) * heads + bh % heads)[:, None] * DV + e
    tile = inside[:, None] & (e < DV)
    where = bh * rows + row
    found = tl.load(lse + where, mask=inside, other=0.0)
    something = found != float("-inf")
    upstream = tl.load(dout + at, mask=tile & something[:, None], other=0.0)
    if clean is not None:
        tl.store(clean + at, upstream, mask=tile)
    total = tl.zeros((ROWS,), tl.float32)
    if not ONE_KEY:
        value = tl.load(out + at, mask=tile, other=0.0).to(tl.float32)
        # out is 0 in a row with a sink and no keys, whatever dout is
        each = tl.where(value == 0.0, 0.0, value * upstream.to(tl.float32))
        total = tl.sum(each, 1)
    if dlse is not None:
        total -= tl.load(dlse + where, mask=inside & something, other=0.0)
    tl.store(delta + where, total, mask=inside)
    tl.store(lse2 + where, tl.where(something, found * LOG2E, float("inf")), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def ranges_kernel(
    ranges,  # int32 [B|1 * H|1, slots, 4]: tiles of rows that meet the keys, and that meet all
    mask,
    seed,
    lo_batch,
    lo_head,
    rows,
    keys,
    sequences,
    slots,
    left,
    right,
    mask_heads,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    program = tl.program_id(0)
    slot, which = program % slots, (program // slots).to(tl.int64)
    tile, row0, count, origin, first, stop = locate(
        mask, sequences, slot, rows, keys, seed, True, KEYS, SEARCH
    )
    n0 = tl.maximum(tile * KEYS, first)
    n1 = tl.minimum(tile * KEYS + KEYS, stop)
    at = (which // mask_heads) * lo_batch + (which % mask_heads) * lo_head + row0
    begin, end, inner, outer, full = FAR, 0, FAR, 0, 0
    for since in range(0, count, TILES * ROWS):
        row = since + tl.arange(0, TILES * ROWS)
        span, band = (origin, first, stop), (left, right)
        low, high = intervals(row, count, mask, at, span, band, HAS_LEFT, HAS_RIGHT)
        meets = (tl.maximum(low, n0) < tl.minimum(high, n1)).to(tl.int32)
        # rows behind the last one meet all: their probabilities are 0
        all_ = ((low <= n0) & (high >= n1) | (row >= count)).to(tl.int32)
        number = since // ROWS + tl.arange(0, TILES)
        some = tl.max(tl.reshape(meets, (TILES, ROWS)), 1) != 0
        whole = some & (tl.min(tl.reshape(all_, (TILES, ROWS)), 1) != 0)
        begin = tl.minimum(begin, tl.min(tl.where(some, number, FAR), 0))
        end = tl.maximum(end, tl.max(tl.where(some, number + 1, 0), 0))
        inner = tl.minimum(inner, tl.min(tl.where(whole, number, FAR), 0))
        outer = tl.maximum(outer, tl.max(tl.where(whole, number + 1, 0), 0))
        full += tl.sum(whole.to(tl.int32), 0)
    # those without a mask are used when nothing else lies between them
    together = full == outer - inner
    inner = tl.where(together, inner, end)
    outer = tl.where(together, outer, end)
    ranges += (which * slots + slot) * 4
    tl.store(ranges, begin)
    tl.store(ranges + 1, inner)
    tl.store(ranges + 2, outer)
    tl.store(ranges + 3, end)


def one_key(call: Call, keys: int) -> bool:
    """A row with one key has p = 1 and passes no gradient through it, not even a rounding error."""
    return keys == 1 and call.extra.sink is None and call.mask.starts_q is None


def _may_be_empty(call: Call, keys: int) -> bool:
    """Whether a row may attend to nothing, as far as shapes and options say."""
    late = call.numbers["HAS_RIGHT"] and call.numbers["right"] + keys < call.numbers["rows"]
    masked = call.mask.lo is not None or call.mask.starts_q is not None
    return bool(late or masked or call.extra.bias is not None or keys == 0)


def per_row_values(
    call: Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dout with 0 in rows that attend to nothing, lse in base 2, and delta."""
    batch, rows, heads, size = out.shape
    dout, delta, lse2 = dout.contiguous(), torch.empty_like(lse), torch.empty_like(lse)
    clean = torch.empty_like(dout) if _may_be_empty(call, keys) else None
    at_once = max(16, min(64, AT_ONCE // call.numbers["PAD_DV"]))
    tiles = triton.cdiv(rows, at_once)
    rows_kernel[(tiles * batch * heads,)](
        delta,
        lse2,
        clean,
        out,
        dout,
        lse,
        dlse,
        rows,
        tiles,
        heads,
        DV=size,
        PAD_DV=call.numbers["PAD_DV"],
        ONE_KEY=one_key(call, keys),
        ROWS=at_once,
        num_warps=4,
    )
    return dout if clean is None else clean, lse2, delta


def ranges(call: Call, shape: Tiles) -> tuple[Tensor | None, tuple[int, int]]:
    """For each tile of keys the tiles of rows that meet it, with intervals; and strides of it."""
    lo, numbers = call.mask.lo, call.numbers
    if lo is None:
        return None, (0, 0)
    sequences, keys = numbers["sequences"], numbers["keys"]
    slots = keys // shape.keys + sequences + 1 if sequences else triton.cdiv(keys, shape.keys)
    batch, heads = lo.shape[:2]
    found = torch.empty(batch * heads * slots * 4, dtype=torch.int32, device=lo.device)
    names = ("rows", "keys", "sequences", "left", "right", "HAS_LEFT", "HAS_RIGHT", "SEARCH")
    ranges_kernel[(batch * heads * slots,)](
        found,
        call.mask,
        call.extra.seed,
        call.per.lo_batch,
        call.per.lo_head,
        slots=slots,
        mask_heads=heads,
        ROWS=shape.rows,
        KEYS=shape.keys,
        TILES=max(1, SCANNED // shape.rows),
        num_warps=4,
        **{name: numbers[name] for name in names},
    )
    return found, (heads * slots if batch > 1 else 0, slots if heads > 1 else 0)
