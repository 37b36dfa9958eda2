"""Attention in Triton, backward: probabilities again from the scores and lse, nothing atomic.

Three launches. `rows_kernel` takes delta, the sum of dout * out less dlse, of every row. In
`dkdv_kernel` a program owns a tile of keys and goes through the rows of every query head that
shares them; scores stand transposed there, keys first. In `dq_kernel` a program owns a tile of rows
as in the forward. Every sum has one owner and an order that sizes alone decide; the scores are
computed twice, 7 products where 5 would do with atomic additions.

Intervals have no formula for the rows that meet a key: `ranges_kernel` finds their ends for each
tile of keys. A bias has a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_statistics.triton_kernels import on_device
from .reference import Options
from .triton_bias import dbias
from .triton_kernels import (
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
from .triton_rows import one_key, per_row_values, ranges


@triton.jit
def row_tiles(
    count,
    n0,
    n1,
    shift,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tiles of rows [begin, end) that meet a key of [n0, n1) in a band, and those that meet all."""
    begin, end = n0 * 0, n0 * 0 + count
    inner, outer = begin, end
    if HAS_RIGHT:
        begin = tl.maximum(begin, n0 - right - shift)
        inner = tl.maximum(inner, n1 - 1 - right - shift)
    if HAS_LEFT:
        end = tl.maximum(tl.minimum(end, n1 + left - shift), 0)
        outer = tl.maximum(tl.minimum(outer, n0 + left - shift + 1), 0)
    begin, end = begin // ROWS, tl.cdiv(end, ROWS)
    # the last tile may reach behind the last row
    outer = tl.where(outer == count, tl.cdiv(outer, ROWS), outer // ROWS)
    inner = tl.minimum(tl.maximum(tl.cdiv(inner, ROWS), begin), end)
    return begin, inner, tl.maximum(tl.minimum(outer, end), inner), end


@triton.jit(do_not_specialize=VARYING)
def dkdv_kernel(
    dk,  # [B, Sk, Hk, D]
    dv,  # [B, Sk, Hk, Dv]
    q,
    k,
    v,
    dout,  # [B, Sq, H, Dv], 0 in rows that attend to nothing
    lse2,  # float32 [B, H, Sq], as delta
    delta,
    ranges,  # of `ranges_kernel`, with intervals
    mask,
    extra,
    q_by,
    k_by,
    v_by,
    per,
    range_by,  # from one batch entry, and one head, of `ranges` to the next
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
    ONE_KEY: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    # earlier keys meet more rows: the longest first
    slot, bh = schedule(slots, batch_heads, width)
    tile, row0, count, origin, first, stop = locate(
        mask, sequences, slot, rows, keys, extra.seed, True, KEYS, SEARCH
    )
    if tile * KEYS >= stop:
        return
    key_heads = heads // group
    b, key_head = (bh // key_heads).to(tl.int64), (bh % key_heads).to(tl.int64)
    key = tile * KEYS + tl.arange(0, KEYS)
    shift = stop - count
    d, e = tl.arange(0, PAD_D)[None, :], tl.arange(0, PAD_DV)[None, :]
    key_place = (origin + key).to(tl.int64)[:, None]
    at = k + b * k_by.batch + key_head * k_by.head + key_place * k_by.row + d
    keys_here = load(at, key, first, stop, D, PAD_D, True)
    at = v + b * v_by.batch + key_head * v_by.head + key_place * v_by.row + e
    values = load(at, key, first, stop, DV, PAD_DV, True)
    n0, n1 = tl.maximum(tile * KEYS, first), tl.minimum(tile * KEYS + KEYS, stop)
    acc_k = tl.zeros((KEYS, PAD_D), tl.float32)
    acc_v = tl.zeros((KEYS, PAD_DV), tl.float32)
    for member in tl.range(0, group, disable_licm=True):
        h = key_head * group + member
        # 0, which no compiler knows: hoisted out of the loop, what follows from it spills
        zero = member // group
        m = tl.arange(0, ROWS) + zero
        begin, inner, outer, end = row_tiles(
            count + zero, n0, n1, shift, left, right, HAS_LEFT, HAS_RIGHT, ROWS
        )
        if mask.lo is not None:
            found = ranges + (b * range_by[0] + h * range_by[1] + slot) * 4
            begin, inner = tl.load(found), tl.load(found + 1)
            outer, end = tl.load(found + 2), tl.load(found + 3)
        lo_at = b * per.lo_batch + h * per.lo_head + row0
        slope, bias = extra.slopes, extra.bias
        if extra.slopes is not None:
            slope = tl.load(extra.slopes + b * per.slope_batch + h)
        if extra.bias is not None:
            bias = bias_of(extra, per, b, h, row0, origin)
        place = (row0 + m).to(tl.int64)
        q_at = q + b * q_by.batch + h * q_by.head + place[:, None] * q_by.row + d
        g_at = dout + ((b * rows + place) * heads + h)[:, None] * DV + e
        first_row = (b * heads + h) * rows + row0
        # tiles of rows before, within and behind those that meet all of these keys
        for part in tl.static_range(3):
            if part == 1 or (HAS_RIGHT if part == 0 else HAS_LEFT) or mask.lo is not None:
                since = begin if part == 0 else (inner if part == 1 else outer)
                until = inner if part == 0 else (outer if part == 1 else end)
                for index in tl.range(since, until, num_stages=STAGES, disable_licm=True):
                    step = tl.full((), 0, tl.int64) + index * ROWS
                    row = index * ROWS + m
                    inside = row < count
                    query = load(q_at + step * q_by.row, row, 0, count, D, PAD_D, True)
                    upstream = load(g_at + step * heads * DV, row, 0, count, DV, PAD_DV, True)
                    total = tl.load(lse2 + first_row + row, mask=inside, other=float("inf"))
                    mean = tl.load(delta + first_row + row, mask=inside, other=0.0)
                    low, high = row, row
                    if part != 1:
                        low, high = intervals(
                            row, count, mask, lo_at, (origin, first, stop), (left, right),
                            HAS_LEFT, HAS_RIGHT,
                        )  # fmt: skip
                    s, squashed = score(
                        tl.dot(keys_here, tl.trans(query), input_precision=PRECISION),
                        (
                            row[None, :],
                            key[:, None],
                            low[None, :],
                            high[None, :],
                            row[None, :] + shift,
                        ),
                        inside[None, :] & ((key >= first) & (key < stop))[:, None],
                        (slope, bias, per.bias_row, per.bias_key),
                        scale,
                        softcap,
                        CAPPED,
                        part != 1,
                    )
                    p = tl.exp2(s - total[None, :])
                    ds = tl.zeros((KEYS, ROWS), tl.float32)
                    if not ONE_KEY:
                        ds = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
                    dropped = p
                    if extra.seed is not None:
                        counter = (first_row + row).to(tl.int64)
                        stays = kept(extra.seed, counter, origin + tile * KEYS, limit, KEYS)
                        stays = tl.trans(stays)
                        dropped = tl.where(stays, p * keep_scale, 0.0)
                        ds = tl.where(stays, ds * keep_scale, 0.0)
                    acc_v = tl.dot(
                        dropped.to(upstream.dtype), upstream, acc_v, input_precision=PRECISION
                    )
                    ds = p * (ds - mean[None, :])
                    if CAPPED:
                        ds = ds * (1.0 - squashed * squashed)
                    acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision=PRECISION)
    inside = ((key >= first) & (key < stop))[:, None]
    # anew from one number on: kept through the loop, the places of the keys spill
    first_place = (b * keys + origin + tile * KEYS) * key_heads + key_head
    n = tl.arange(0, KEYS)[:, None] * key_heads
    dk += first_place * D
    dv += first_place * DV
    tl.store(dk + n * D + d, (acc_k * scale).to(dk.dtype.element_ty), mask=inside & (d < D))
    tl.store(dv + n * DV + e, acc_v.to(dv.dtype.element_ty), mask=inside & (e < DV))


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    dq,  # [B, Sq, H, D]
    dslope,  # float32 [B, H, Sq] or None: the part of each row
    q,
    k,
    v,
    dout,  # as in `dkdv_kernel`
    lse2,
    delta,
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
    ONE_KEY: tl.constexpr,
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
    inside, shift = row < count, stop - count
    lo_at = b * per.lo_batch + h * per.lo_head + row0
    span, band = (origin, first, stop), (left, right)
    low, high = intervals(row, count, mask, lo_at, span, band, HAS_LEFT, HAS_RIGHT)
    begin, inner, outer, end = key_tiles(row, count, low, high, KEYS)
    d, e = tl.arange(0, PAD_D)[None, :], tl.arange(0, PAD_DV)[None, :]
    place = (row0 + row).to(tl.int64)
    at = q + b * q_by.batch + h * q_by.head + place[:, None] * q_by.row + d
    query = load(at, row, 0, count, D, PAD_D, True)
    out_place = ((b * rows + place) * heads + h)[:, None]
    upstream = load(dout + out_place * DV + e, row, 0, count, DV, PAD_DV, True)
    counter = (b * heads + h) * rows + place
    total = tl.load(lse2 + counter, mask=inside, other=float("inf"))
    mean = tl.load(delta + counter, mask=inside, other=0.0)
    key_place = (origin + n).to(tl.int64)[:, None]
    k_at = k + b * k_by.batch + (h // group) * k_by.head + key_place * k_by.row + d
    v_at = v + b * v_by.batch + (h // group) * v_by.head + key_place * v_by.row + e
    slope, bias = extra.slopes, extra.bias
    if extra.slopes is not None:
        slope = tl.load(extra.slopes + b * per.slope_batch + h)
    if extra.bias is not None:
        bias = bias_of(extra, per, b, h, row0, origin)

    acc = tl.zeros((ROWS, PAD_D), tl.float32)
    on_slope = tl.zeros((ROWS,), tl.float32)
    for part in tl.static_range(3):
        if part != 0 or HAS_LEFT or mask.lo is not None or extra.seed is not None:
            since = begin if part == 0 else (inner if part == 1 else outer)
            until = inner if part == 0 else (outer if part == 1 else end)
            for index in tl.range(since, until, num_stages=STAGES):
                step = tl.full((), 0, tl.int64) + index * KEYS
                key = index * KEYS + n
                keys_here = load(k_at + step * k_by.row, key, first, stop, D, PAD_D, part != 1)
                values = load(v_at + step * v_by.row, key, first, stop, DV, PAD_DV, part != 1)
                s, squashed = score(
                    tl.dot(query, tl.trans(keys_here), input_precision=PRECISION),
                    (row[:, None], key[None, :], low[:, None], high[:, None], row[:, None] + shift),
                    inside[:, None] & ((key >= first) & (key < stop))[None, :],
                    (slope, bias, per.bias_row, per.bias_key),
                    scale,
                    softcap,
                    CAPPED,
                    part != 1,
                )
                p = tl.exp2(s - total[:, None])
                ds = tl.zeros((ROWS, KEYS), tl.float32)
                if not ONE_KEY:
                    ds = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
                if extra.seed is not None:
                    stays = kept(extra.seed, counter, origin + index * KEYS, limit, KEYS)
                    ds = tl.where(stays, ds * keep_scale, 0.0)
                ds = p * (ds - mean[:, None])
                if dslope is not None:
                    distance = tl.abs(row[:, None] + shift - key[None, :]).to(tl.float32)
                    on_slope -= tl.sum(ds * distance, 1)
                if CAPPED:
                    ds = ds * (1.0 - squashed * squashed)
                acc = tl.dot(ds.to(keys_here.dtype), keys_here, acc, input_precision=PRECISION)
    tl.store(
        dq + out_place * D + d,
        (acc * scale).to(dq.dtype.element_ty),
        mask=inside[:, None] & (d < D),
    )
    if dslope is not None:
        tl.store(dslope + counter, on_slope, mask=inside)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, and the gradients of slopes, sink and bias, without elements if not asked for."""
    given, needs = Options(*rest[:-1]), rest[-1]
    batch, rows, heads, _ = q.shape
    keys, key_heads = k.shape[1:3]
    sizes = [x.shape[3] for x in (q, k, v)]
    wanted = zip(needs, (given.alibi_slopes, given.sink, given.bias), strict=True)
    extra = [x.new_zeros(x.shape) if n and x is not None else q.new_empty(0) for n, x in wanted]
    if q.numel() == 0:
        return *(x.new_zeros(x.shape) for x in (q, k, v)), *extra
    q, k, v, out, dout = (aligned(x) for x in (q, k, v, out, dout.contiguous()))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    call = prepare(q, k, v, given)
    per_row = q.new_empty(batch, heads, rows, dtype=torch.float32) if extra[0].numel() else None
    reads = [
        x.shape[1] * (q.shape[3] + v.shape[3]) * q.element_size() * x.shape[2] // key_heads
        for x in (q, k)
    ]
    with on_device(q):
        dout, lse2, delta = per_row_values(call, dout, dlse, out, lse, keys)
        call.numbers["ONE_KEY"] = one_key(call, keys)
        saved = (q, k, v, dout, lse2, delta)
        strides = (by(q), by(k), by(v), call.per)
        shape = call.entry.dkdv
        if k.numel():
            found, range_by = ranges(call, shape)
            launch(
                call,
                dkdv_kernel,
                shape,
                (keys, shape.keys),
                (batch * key_heads, reads[0]),
                (dk, dv, *saved, found, call.mask, call.extra, *strides, range_by),
            )
        shape = call.entry.dq
        launch(
            call,
            dq_kernel,
            shape,
            (rows, shape.rows),
            (batch * heads, reads[1]),
            (dq, per_row, *saved, call.mask, call.extra, *strides),
        )
        if extra[2].numel():
            extra[2] = dbias(call, saved, given)
    if per_row is not None and given.alibi_slopes is not None:
        each = per_row.sum(-1)
        extra[0] = (each if given.alibi_slopes.dim() == 2 else each.sum(0)).to(extra[0].dtype)
    if extra[1].numel() and given.sink is not None:
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        share = torch.exp(given.sink.float()[:, None] - finite)
        extra[1] = -(share * delta).sum((0, 2)).to(extra[1].dtype)
    grads = (first_columns(x, n) for x, n in zip((dq, dk, dv), sizes, strict=True))
    return *grads, *extra
