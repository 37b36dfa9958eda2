"""Attention over a cache in Triton: a program per row of the batch, key head and part of the keys,
then one program per query and head that joins the parts.

The queries of all heads that share a key head are the rows of one tile, so that keys are read once.
How keys are parted follows from the capacity of the cache alone: a captured graph stays right when
lengths grow, and a row has the same bits in any batch. Parts that a row does not reach are left at
once, and are not read when the parts are joined.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.triton_kernels import LOG2E, Extra, by, load, precision, score
from ..row_statistics.triton_kernels import on_device
from .reference import Options, capacity, exists

FAR = tl.constexpr(1 << 30)
LEAST_PART, MOST_PARTS = 256, 64  # keys of a part at least, parts of a row


@triton.jit(do_not_specialize=["part_keys", "left", "right"])
def part_kernel(
    found,  # float32 [B, H, Sq, parts, Dv]: sums of p * v, where part_lse is not -inf
    part_lse,  # float32 [B, H, Sq, parts], in base 2
    q,
    k,
    v,
    lengths,  # int32 [B], as pad, cache_row and good; pad and cache_row may be None
    pad,
    cache_row,
    good,  # whether the cache has the row: nothing is read where it has not
    table,  # int32 [B, columns] or None
    extra,  # of attention, of which there are slopes alone: float32 [B|1, H] or None
    q_by,
    k_by,
    v_by,
    slope_batch,
    table_by,  # from one row of the table, and one column, to the next
    block_size,
    queries,
    heads,
    group,
    parts,
    part_keys,
    scale,
    softcap,
    left,
    right,
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
):
    program = tl.program_id(0)
    part, rest = program % parts, program // parts
    tiles = tl.cdiv(group * queries, ROWS)
    tile, rest = rest % tiles, rest // tiles
    key_heads = heads // group
    key_head, b = (rest % key_heads).to(tl.int64), (rest // key_heads).to(tl.int64)
    member = tile * ROWS + tl.arange(0, ROWS)
    inside = member < group * queries
    query, h = member // group, key_head * group + member % group
    where = ((b * heads + h) * queries + query) * parts + part

    stop = tl.load(lengths + b)
    stop = tl.where(tl.load(good + b) != 0, stop, 0)
    start = 0
    if pad is not None:
        start = tl.maximum(tl.load(pad + b), 0)
    diagonal = query + (stop - queries)
    low = tl.zeros_like(query) + start
    high = tl.zeros_like(query) + stop
    if HAS_LEFT:
        low = tl.maximum(low, diagonal - left)
    if HAS_RIGHT:
        high = tl.minimum(high, diagonal + right + 1)
    begin = tl.maximum(tl.min(tl.where(inside, low, FAR), 0), part * part_keys)
    end = tl.minimum(tl.max(tl.where(inside, high, 0), 0), (part + 1) * part_keys)

    d, e, n = tl.arange(0, PAD_D)[None, :], tl.arange(0, PAD_DV)[None, :], tl.arange(0, KEYS)
    at = q + b * q_by.batch + query.to(tl.int64)[:, None] * q_by.row + h[:, None] * q_by.head + d
    rows_here = load(at, member, 0, group * queries, D, PAD_D, True)
    slope, bias = extra.slopes, extra.bias
    if extra.slopes is not None:
        slope = tl.load(extra.slopes + b * slope_batch + h, mask=inside, other=0.0)[:, None]
    row = b
    if cache_row is not None:
        row = tl.load(cache_row + b).to(tl.int64)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PAD_DV), tl.float32)
    for since in tl.range(begin // KEYS * KEYS, end, KEYS):
        key = since + n
        slot, entry = key.to(tl.int64), row
        if table is not None:
            used = (key >= begin) & (key < end)
            column = (key // block_size).to(tl.int64) * table_by[1]
            entry = tl.load(table + b * table_by[0] + column, mask=used, other=0).to(tl.int64)
            slot = slot % block_size
        k_at = k + (entry * k_by.batch + slot * k_by.row + key_head * k_by.head)[:, None] + d
        v_at = v + (entry * v_by.batch + slot * v_by.row + key_head * v_by.head)[:, None] + e
        # slots between the rows' keys may hold anything
        keys_here = load(k_at, key, begin, end, D, PAD_D, True)
        values = load(v_at, key, begin, end, DV, PAD_DV, True)
        s, _ = score(
            tl.dot(rows_here, tl.trans(keys_here), input_precision=PRECISION),
            (query[:, None], key[None, :], low[:, None], high[:, None], diagonal[:, None]),
            inside[:, None],
            (slope, bias, 0, 0),
            scale,
            softcap,
            CAPPED,
            True,
        )
        # of a tile, the keys of this part
        s = tl.where(((key >= begin) & (key < end))[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        rescale = tl.exp2(top - base)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    nothing = total == 0.0
    tl.store(part_lse + where, tl.where(nothing, float("-inf"), top + tl.log2(total)), mask=inside)
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(
        found + where[:, None] * DV + e, acc, mask=(inside & (nothing == 0))[:, None] & (e < DV)
    )


@triton.jit
def join_kernel(
    out,  # [B, Sq, H, Dv]
    lse,  # float32 [B, H, Sq]
    found,
    part_lse,
    good,
    sink,  # float32 [H] or None
    queries,
    heads,
    parts,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    PARTS: tl.constexpr,
):
    where = tl.program_id(0).to(tl.int64)
    query, h, b = where % queries, where // queries % heads, where // (queries * heads)
    n, e = tl.arange(0, PARTS), tl.arange(0, PAD_DV)[None, :]
    each = tl.load(part_lse + where * parts + n, mask=n < parts, other=float("-inf"))
    top = tl.max(each, 0)
    extra = top
    if sink is not None:
        extra = tl.load(sink + h) * LOG2E
        top = tl.maximum(top, extra)
    base = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(each - base)
    total = tl.sum(share, 0)
    if sink is not None:
        total += tl.exp2(extra - base)
    at = found + (where * parts + n)[:, None] * DV + e
    value = tl.load(at, mask=(each != float("-inf"))[:, None] & (e < DV), other=0.0)
    value = tl.sum(value * share[:, None], 0) / tl.where(total == 0, 1.0, total)
    sum_ = tl.where(total == 0, float("-inf"), (base + tl.log2(total)) / LOG2E)
    exists_ = tl.load(good + b) != 0
    tl.store(lse + where, tl.where(exists_, sum_, float("nan")))
    column = tl.arange(0, PAD_DV)
    at = out + ((b * queries + query) * heads + h) * DV + column
    value = tl.where(exists_, value, float("nan"))
    tl.store(at, value.to(out.dtype.element_ty), mask=column < DV)


def parts_of(keys: int, num_splits: int) -> tuple[int, int]:
    """How many parts the keys of a row are taken in, and their length."""
    length = triton.cdiv(max(1, keys), num_splits) if num_splits else LEAST_PART
    length = max(length, triton.cdiv(keys, MOST_PARTS), 1)
    return triton.cdiv(max(1, keys), length), length


def _tile(rows: int, size: int, itemsize: int) -> tuple[int, int]:
    """Rows and keys of a tile: what spills no register, whatever the strides of the cache."""
    if itemsize == 4:
        most, keys = 16, 32 if size <= 64 else 16
    else:
        most, keys = (64, 64) if size <= 64 else (32, 32) if size <= 128 else (16, 16)
    return max(16, min(most, triton.next_power_of_2(rows))), keys


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, given: Options
) -> tuple[Tensor, Tensor]:
    """`lengths` counts the appended keys."""
    batch, queries, heads, size = q.shape
    key_heads, size_v = v_cache.shape[2:]
    out = q.new_empty(batch, queries, heads, size_v)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k_cache, v_cache = (_last_contiguous(x) for x in (q, k_cache, v_cache))
    table, slopes = given.block_table, _floats(given.alibi_slopes)
    good = exists(k_cache, lengths, given).int()
    parts, part_keys = parts_of(capacity(k_cache, table), given.num_splits)
    group = heads // key_heads
    pads = [max(16, triton.next_power_of_2(n)) for n in (size, size_v)]
    rows, keys = _tile(group * queries, max(pads), q.element_size())
    found = q.new_empty(batch, heads, queries, parts, size_v, dtype=torch.float32)
    part_lse = torch.empty(batch, heads, queries, parts, dtype=torch.float32, device=q.device)
    columns: dict[str, Any] = {"DV": size_v, "PAD_DV": pads[1]}
    with on_device(q):
        part_kernel[(batch * key_heads * triton.cdiv(group * queries, rows) * parts,)](
            found,
            part_lse,
            q,
            k_cache,
            v_cache,
            lengths.int().contiguous(),
            None if given.cache_leftpad is None else given.cache_leftpad.contiguous(),
            None if given.cache_batch_idx is None else given.cache_batch_idx.contiguous(),
            good,
            table,
            Extra(slopes, None, None, None),
            by(q),
            by(k_cache),
            by(v_cache),
            heads if slopes is not None and slopes.dim() == 2 else 0,
            (0, 0) if table is None else table.stride(),
            k_cache.shape[1],
            queries,
            heads,
            group,
            parts,
            part_keys,
            given.scale,
            given.softcap,
            min(given.left, 1 << 29),
            min(given.right, 1 << 29),
            D=size,
            PAD_D=pads[0],
            HAS_LEFT=given.left >= 0,
            HAS_RIGHT=given.right >= 0,
            CAPPED=given.softcap > 0,
            PRECISION=precision(q),
            ROWS=rows,
            KEYS=keys,
            num_warps=4,
            num_stages=2,
            **columns,
        )
        join_kernel[(batch * heads * queries,)](
            out,
            lse,
            found,
            part_lse,
            good,
            _floats(given.sink),
            queries,
            heads,
            parts,
            PARTS=triton.next_power_of_2(parts),
            num_warps=4,
            **columns,
        )
    return out, lse
