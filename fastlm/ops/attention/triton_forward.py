"""Attention in Triton, forward: one program per tile of query rows and head."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_statistics.triton_kernels import on_device
from .reference import Options
from .triton_kernels import (
    LOG2E,
    VARYING,
    aligned,
    bias_of,
    by,
    first_columns,
    intervals,
    kept,
    key_tiles,
    launch,
    load,
    locate,
    prepare,
    schedule,
    score,
)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    out,  # [B, Sq, H, Dv]
    lse,  # float32 [B, H, Sq]
    q,
    k,
    v,
    mask,
    extra,
    q_by,
    k_by,
    v_by,
    per,
    rows,
    keys,
    sequences,
    slots,
    width,
    batch_heads,
    heads,
    group,
    scale,
    softcap,
    left,
    right,
    limit,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    slot, bh = schedule(slots, batch_heads, width)
    # later rows attend to more keys: the longest first
    tile, row0, count, origin, first, stop = locate(
        mask, sequences, slots - 1 - slot, rows, keys, extra.seed, False, ROWS, SEARCH
    )
    if tile * ROWS >= count:
        return
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    row, n = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    shift = stop - count
    low, high = intervals(
        row,
        count,
        mask,
        b * per.lo_batch + h * per.lo_head + row0,
        (origin, first, stop),
        (left, right),
        HAS_LEFT,
        HAS_RIGHT,
    )
    begin, inner, outer, end = key_tiles(row, count, low, high, KEYS)
    d, e = tl.arange(0, PAD_D)[None, :], tl.arange(0, PAD_DV)[None, :]
    place = (row0 + row).to(tl.int64)
    at = q + b * q_by.batch + h * q_by.head + place[:, None] * q_by.row + d
    query = load(at, row, 0, count, D, PAD_D, True)
    # the origin apart: 32 bits that are not known, added to each key, take a register pair each
    key_place, before = n.to(tl.int64)[:, None], origin.to(tl.int64)
    k_at = k + b * k_by.batch + (h // group) * k_by.head + before * k_by.row
    v_at = v + b * v_by.batch + (h // group) * v_by.head + before * v_by.row
    k_at, v_at = k_at + key_place * k_by.row + d, v_at + key_place * v_by.row + e
    slope, bias = extra.slopes, extra.bias
    if extra.slopes is not None:
        slope = tl.load(extra.slopes + b * per.slope_batch + h)
    if extra.bias is not None:
        bias = bias_of(extra, per, b, h, row0, origin)
    counter = (b * heads + h) * rows + place

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PAD_DV), tl.float32)
    # tiles before, within and behind the keys that every row attends to
    for part in tl.static_range(3):
        if part != 0 or HAS_LEFT or mask.lo is not None or extra.seed is not None:
            since = begin if part == 0 else (inner if part == 1 else outer)
            until = inner if part == 0 else (outer if part == 1 else end)
            for index in tl.range(since, until, num_stages=STAGES):
                step = tl.full((), 0, tl.int64) + index * KEYS
                key = index * KEYS + n
                keys_here = load(k_at + step * k_by.row, key, first, stop, D, PAD_D, part != 1)
                s, _ = score(
                    tl.dot(query, tl.trans(keys_here), input_precision=PRECISION),
                    (row[:, None], key[None, :], low[:, None], high[:, None], row[:, None] + shift),
                    (row < count)[:, None] & (key < stop)[None, :],
                    (slope, bias, per.bias_row, per.bias_key),
                    scale,
                    softcap,
                    CAPPED,
                    part != 1,
                )
                new_top = tl.maximum(top, tl.max(s, 1))
                base = new_top
                if part != 1 or bias is not None:
                    # a row of -inf alone is measured from 0: -inf - -inf would be NaN
                    base = tl.where(new_top == float("-inf"), 0.0, new_top)
                p = tl.exp2(s - base[:, None])
                rescale = tl.exp2(top - base)
                total = total * rescale + tl.sum(p, 1)
                if extra.seed is not None:
                    stays = kept(extra.seed, counter, origin + index * KEYS, limit, KEYS)
                    p = tl.where(stays, p, 0.0)
                values = load(v_at + step * v_by.row, key, first, stop, DV, PAD_DV, part != 1)
                acc = acc * rescale[:, None]
                acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
                top = new_top

    if extra.sink is not None:
        sink = tl.load(extra.sink + h) * LOG2E
        base = tl.maximum(top, sink)
        total = total * tl.exp2(top - base) + tl.exp2(sink - base)
        acc = acc * tl.exp2(top - base)[:, None]
        top = base
    if extra.seed is not None:
        acc = acc * keep_scale
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    found = tl.where(nothing, float("-inf"), (top + tl.log2(total)) / LOG2E)
    inside = row < count
    tl.store(lse + (b * heads + h) * rows + place, found, mask=inside)
    at = out + ((b * rows + place) * heads + h)[:, None] * DV + e
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (e < DV))


def forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    if lse.numel() * v.shape[3] == 0:
        return q.new_empty(batch, rows, heads, v.shape[3]), lse
    size_v = v.shape[3]
    q, k, v = (aligned(x) for x in (q, k, v))
    out = q.new_empty(batch, rows, heads, v.shape[3])
    call = prepare(q, k, v, Options(*given))
    shape = call.entry.forward
    reads = k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
    args = (out, lse, q, k, v, call.mask, call.extra, by(q), by(k), by(v), call.per)
    with on_device(q):
        launch(call, forward_kernel, shape, (rows, shape.rows), (batch * heads, reads), args)
    return first_columns(out, size_v), lse
