"""The gradient of attention's bias in Triton: a program owns a tile of it.

Where the bias is broadcast, the program goes through all that its tile was added to: batch entries,
heads, and the tiles of rows or keys. Rows and keys count over the whole packing, because the bias
does, and the interval of each row is given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_kernels
from .mask import coordinates, row_bounds
from .reference import Options
from .triton_config import REGISTERS
from .triton_kernels import FAR, VARYING, Call, by, kept, load, score


def _tile(size: int, itemsize: int, capability: int) -> tuple[int, int, int]:
    """Rows, keys and warps, for the larger head size: none of them spills a register."""
    if itemsize == 4 or size > 128:
        return 16, 16, 8 if itemsize == 2 and capability < 90 else 4
    return 32, 32, 8


@triton.jit(do_not_specialize=VARYING)
def bias_kernel(
    dbias,  # contiguous, of the bias' shape
    q,
    k,
    v,
    dout,  # as in `dkdv_kernel`
    lse2,
    delta,
    lows,  # int32 [B|1, H|1, Sq]
    highs,
    diagonals,  # int32 [Sq]
    extra,
    q_by,
    k_by,
    v_by,
    per,
    of_lows,  # their strides
    bias_heads,
    rows,
    keys,
    batch,
    heads,
    group,
    scale,
    softcap,
    limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_KEY: tl.constexpr,
    ALL: tl.constexpr,  # whether it is broadcast, by dimension
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    across = 1 if ALL[3] else tl.cdiv(keys, KEYS)
    down = 1 if ALL[2] else tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    tile_key, tile_row = program % across, (program // across) % down
    bias_head = (program // (across * down)) % bias_heads
    bias_batch = program // (across * down * bias_heads)
    m, n = tl.arange(0, ROWS), tl.arange(0, KEYS)
    d, e = tl.arange(0, PAD_D)[None, :], tl.arange(0, PAD_DV)[None, :]
    acc = tl.zeros((ROWS, KEYS), tl.float32)
    # heads of all batch entries that the tile is added to
    entries = (batch if ALL[0] else 1) * (heads if ALL[1] else 1)
    for entry in tl.range(0, entries, disable_licm=True):
        each = heads if ALL[1] else 1
        b = (entry // each + bias_batch).to(tl.int64)
        h = (entry % each + bias_head).to(tl.int64)
        # both at once: a None that is assigned alone cannot stand in a tuple
        slope, bias = extra.slopes, extra.bias + b * per.bias_batch + h * per.bias_head
        if extra.slopes is not None:
            slope = tl.load(extra.slopes + b * per.slope_batch + h)
        q_at = q + b * q_by.batch + h * q_by.head + d
        k_at = k + b * k_by.batch + (h // group) * k_by.head + d
        v_at = v + b * v_by.batch + (h // group) * v_by.head + e
        since = 0 if ALL[2] else tile_row
        for row_tile in tl.range(
            since, tl.cdiv(rows, ROWS) if ALL[2] else tile_row + 1, disable_licm=True
        ):
            row = row_tile * ROWS + m
            inside = row < rows
            place = row.to(tl.int64)
            query = load(q_at + place[:, None] * q_by.row, row, 0, rows, D, PAD_D, True)
            at = dout + ((b * rows + place) * heads + h)[:, None] * DV + e
            upstream = load(at, row, 0, rows, DV, PAD_DV, True)
            counter = (b * heads + h) * rows + place
            total = tl.load(lse2 + counter, mask=inside, other=float("inf"))
            mean = tl.load(delta + counter, mask=inside, other=0.0)
            at = b * of_lows[0] + h * of_lows[1] + row
            low = tl.load(lows + at, mask=inside, other=FAR)
            high = tl.load(highs + at, mask=inside, other=0)
            diagonal = tl.load(diagonals + row, mask=inside, other=0)
            begin, end = tl.min(low, 0) // KEYS, tl.cdiv(tl.max(high, 0), KEYS)
            if not ALL[3]:
                begin, end = tl.maximum(begin, tile_key), tl.minimum(end, tile_key + 1)
            for key_tile in tl.range(begin, end, disable_licm=True):
                key = key_tile * KEYS + n
                key_place = key.to(tl.int64)[:, None]
                keys_here = load(k_at + key_place * k_by.row, key, 0, keys, D, PAD_D, True)
                values = load(v_at + key_place * v_by.row, key, 0, keys, DV, PAD_DV, True)
                kept_here = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
                s, _ = score(
                    tl.dot(query, tl.trans(keys_here), input_precision=PRECISION),
                    (row[:, None], key[None, :], low[:, None], high[:, None], diagonal[:, None]),
                    kept_here,
                    (slope, bias, per.bias_row, per.bias_key),
                    scale,
                    softcap,
                    CAPPED,
                    True,
                )
                p = tl.exp2(s - total[:, None])
                ds = tl.zeros((ROWS, KEYS), tl.float32)
                if not ONE_KEY:
                    ds = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
                if extra.seed is not None:
                    stays = kept(extra.seed, counter, key_tile * KEYS, limit, KEYS)
                    ds = tl.where(stays, ds * keep_scale, 0.0)
                # what another sequence holds is not added, NaN included
                acc += tl.where(kept_here, p * (ds - mean[:, None]), 0.0)
    row, key = tile_row * ROWS + m, tile_key * KEYS + n
    at = dbias + (bias_batch.to(tl.int64) * bias_heads + bias_head) * (
        (1 if ALL[2] else rows) * (1 if ALL[3] else keys)
    )
    kind = dbias.dtype.element_ty
    if ALL[2] and ALL[3]:
        tl.store(at, tl.sum(tl.sum(acc, 1), 0).to(kind))
    elif ALL[2]:
        tl.store(at + key, tl.sum(acc, 0).to(kind), mask=key < keys)
    elif ALL[3]:
        tl.store(at + row, tl.sum(acc, 1).to(kind), mask=row < rows)
    else:
        at += row.to(tl.int64)[:, None] * keys + key[None, :]
        tl.store(at, acc.to(kind), mask=(row < rows)[:, None] & (key < keys)[None, :])


def dbias(call: Call, saved: tuple[Tensor, ...], given: Options) -> Tensor:
    """`saved`: q, k, v, dout, lse2 and delta."""
    q, k, v = saved[:3]
    bias, numbers = given.bias, call.numbers
    assert bias is not None
    rows, keys = numbers["rows"], numbers["keys"]
    found = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    at = coordinates(rows, keys, call.mask.starts_q, call.mask.starts_k, q.device)
    bounds = row_bounds(at, given.left, given.right, given.lo, given.hi)
    low, high = (x.int().contiguous() for x in bounds)
    size = max(q.shape[3], v.shape[3])
    tile_rows, tile_keys, warps = _tile(size, q.element_size(), triton_kernels.capability(q))
    tiles = triton.cdiv(bias.shape[2], tile_rows), triton.cdiv(bias.shape[3], tile_keys)
    left_out = ("HAS_LEFT", "HAS_RIGHT", "SEARCH", "sequences", "left", "right")
    bias_kernel[(bias.shape[0] * bias.shape[1] * tiles[0] * tiles[1],)](
        found,
        *saved,
        low,
        high,
        at.diagonal.int(),
        call.extra,
        by(q),
        by(k),
        by(v),
        call.per,
        tuple(s if n > 1 else 0 for s, n in zip(low.stride()[:2], low.shape, strict=False)),
        bias.shape[1],
        batch=q.shape[0],
        ALL=tuple(n == 1 for n in bias.shape),
        ROWS=tile_rows,
        KEYS=tile_keys,
        num_warps=warps,
        num_stages=2,
        maxnreg=REGISTERS,
        **{name: value for name, value in numbers.items() if name not in left_out},
    )
    return found
