"""Attention backward for Hopper (sm_90a) in Gluon: two kernels, deterministic, without atomics.

`key_kernel`: a block owns 128 keys of one key head and reads the queries of all its query heads:
    S^T = K Q^T, dP^T = V dO^T; dV += P^T dO, dK += dS^T Q
transposed, so that P and dS are in registers what the next products take. `query_kernel`: a block
owns 128 queries and reads keys: dQ += dS K. Both compute P again, 7 products instead of 5.
`prepare_kernel` writes lse in base 2 and delta = dout . out - dlse.

What a tile has outside its sequence reads as 0: with dO = 0 and delta = 0 it adds nothing, so that
only the edges of a band need a mask.

Source: Dao 2023 (arXiv:2307.08691), algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gluon_common import (
    BILLION,
    LOG2E,
    ROWS,
    Layouts,
    descriptor,
    layout_of,
    locate,
    quad_bound,
    quad_columns,
    row_limits,
    schedule,
    tile_range,
    value_descriptor,
)
from .reference import Options

INTEGERS = ("rows", "keys", "heads", "group", "tiles", "section", "sequences", "left", "right")
INTEGERS += ("padded",)
L2_BYTES = 32 << 20


@dataclass(frozen=True)
class BackwardConfig(Layouts):
    """`keys`: columns of a tile of scores, whether they are keys or, transposed, queries."""

    size: int
    keys: int
    stages: int
    left: bool
    right: bool
    packed: bool
    groups: int = 2
    intervals: bool = False


@gluon.jit
def prepare_kernel(
    out, dout, dlse, lse, stats, starts_q, starts_k,
    rows, keys, heads, tiles, sequences, padded, cfg: gl.constexpr,
):  # fmt: skip
    """stats [2, B, H, padded]: lse in base 2 and delta; a sequence starts 64 s further behind.
    A row that attends to nothing has +inf there, and so P = 0."""
    slot = gl.program_id(0) % tiles
    index = gl.program_id(0) // tiles
    all_rows = rows
    first = 0
    shift = 0
    place = slot * cfg.rows
    if cfg.packed:
        first, _, rows, _, place = locate(slot, starts_q, starts_k, rows, keys, sequences, cfg)
        shift = (slot * cfg.rows - place - first // cfg.rows * cfg.rows) // cfg.rows * 64
    place += gl.arange(0, 128, layout=gl.SliceLayout(1, cfg.store_layout))
    valid = place < rows
    line = gl.cast(index // heads, gl.int64) * all_rows + first
    column = gl.arange(0, cfg.size, layout=gl.SliceLayout(0, cfg.store_layout))
    at = (line * heads + index % heads) * cfg.size
    at = gl.expand_dims(at + gl.cast(place, gl.int64) * heads * cfg.size, 1)
    at = at + gl.expand_dims(column, 0)
    mask = gl.expand_dims(valid, 1)
    a = gl.cast(gl.load(out + at, mask=mask, other=0.0), gl.float32)
    b = gl.cast(gl.load(dout + at, mask=mask, other=0.0), gl.float32)
    delta = gl.sum(a * b, 1)
    row = gl.cast(index, gl.int64) * all_rows + first + place
    if dlse is not None:
        delta -= gl.load(dlse + row, mask=valid, other=0.0)
    value = gl.load(lse + row, mask=valid, other=0.0)
    is_empty = value == float("-inf")
    base2 = gl.where(is_empty, float("inf"), value * LOG2E)
    target = gl.cast(index, gl.int64) * padded + first + shift + place
    plane = gl.cast(gl.num_programs(0) // tiles, gl.int64) * padded
    gl.store(stats + target, base2, mask=valid)
    gl.store(stats + plane + target, gl.where(is_empty, 0.0, delta), mask=valid)


@gluon.jit
def rows_of(batch, head, first, count, row, cfg: gl.constexpr):
    """Where a tile begins in a descriptor that ends with the sequence: see `value_descriptor`."""
    if cfg.packed:
        place = [BILLION, first + count, head, BILLION - count + row, 0]
    else:
        place = [batch, head, row, 0]
    return place


@gluon.jit
def barriers(cfg: gl.constexpr):
    """owned, a_full, a_empty, b_full, b_empty."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    owned = gl.allocate_shared_memory(gl.int64, [1], layout)
    a_full = gl.allocate_shared_memory(gl.int64, [cfg.stages, 1], layout)
    a_empty = gl.allocate_shared_memory(gl.int64, [cfg.stages, 1], layout)
    b_full = gl.allocate_shared_memory(gl.int64, [cfg.stages, 1], layout)
    b_empty = gl.allocate_shared_memory(gl.int64, [cfg.stages, 1], layout)
    mbarrier.init(owned, count=1)
    stages: gl.constexpr = cfg.stages
    for stage in gl.static_range(stages):
        mbarrier.init(a_full.index(stage), count=1)
        mbarrier.init(a_empty.index(stage), count=2)
        mbarrier.init(b_full.index(stage), count=1)
        mbarrier.init(b_empty.index(stage), count=2)
    hopper.fence_async_shared()
    return owned, a_full, a_empty, b_full, b_empty


# -- dK and dV ------------------------------------------------------------------------------------


@gluon.jit
def query_range(place, rows, keys, left, right, cfg: gl.constexpr):
    """First tile of queries that attend to the keys from `place` on, how many tiles there are;
    and, counted from the first one, where the tiles begin that need no mask, and where they end."""
    size: gl.constexpr = cfg.keys
    shift = keys - rows
    first = place * 0
    stop = gl.where(place < keys, rows, 0)
    open_first = first
    open_stop = stop
    if cfg.right:
        first = gl.maximum(place - shift - right, 0)
        open_first = gl.maximum(place + (cfg.rows - 1) - shift - right, 0)
    if cfg.left:
        stop = gl.minimum(gl.maximum(place + cfg.rows - shift + left, 0), stop)
        open_stop = gl.minimum(gl.maximum(place - shift + left + 1, 0), stop)
    first = first // size
    last = (stop + (size - 1)) // size
    count = gl.maximum(last - first, 0)
    head = gl.minimum(gl.maximum((open_first + (size - 1)) // size, first), last) - first
    end = count
    if cfg.left:
        end = gl.minimum(gl.maximum(open_stop // size, first), last) - first
    return first, count, head, gl.maximum(head, end)


@gluon.jit
def key_produce(descs, smem, bars, where, work, cfg: gl.constexpr):
    """K and V once; then for each query head Q with lse and dO with delta, tile by tile."""
    q_desc, g_desc, k_desc, v_desc, s_desc = descs
    k_smem, v_smem, q_smem, g_smem, lse_smem, delta_smem = smem
    owned, q_full, q_empty, g_full, g_empty = bars
    batch, key_head, group, first_row, rows, key, line, step, plane = where
    first, count, _, _ = work
    if count > 0:
        mbarrier.expect(owned, 4 * ROWS * cfg.size * 2)
        for part in gl.static_range(2):
            place = [batch, key_head, key + part * ROWS, 0]
            tma.async_copy_global_to_shared(k_desc, place, owned, k_smem.index(part))
            tma.async_copy_global_to_shared(v_desc, place, owned, v_smem.index(part))
    for n in range(0, count * group):
        head = key_head * group + n // count
        row = (first + n % count) * cfg.keys
        stage = n % cfg.stages
        phase = ((n // cfg.stages) & 1) ^ 1
        place = rows_of(batch, head, first_row, rows, row, cfg)
        at = line + (n // count) * step + row
        mbarrier.wait(q_empty.index(stage), phase)
        mbarrier.expect(q_full.index(stage), cfg.keys * (cfg.size * 2 + 4))
        tma.async_copy_global_to_shared(q_desc, place, q_full.index(stage), q_smem.index(stage))
        tma.async_copy_global_to_shared(s_desc, [at], q_full.index(stage), lse_smem.index(stage))
        mbarrier.wait(g_empty.index(stage), phase)
        mbarrier.expect(g_full.index(stage), cfg.keys * (cfg.size * 2 + 4))
        tma.async_copy_global_to_shared(g_desc, place, g_full.index(stage), g_smem.index(stage))
        tma.async_copy_global_to_shared(
            s_desc, [at + plane], g_full.index(stage), delta_smem.index(stage)
        )


@gluon.jit
def key_step(
    n, row, dk, dv, k, v, limits, smem, bars, factor, MASKED: gl.constexpr, cfg: gl.constexpr
):
    """Adds what the tile of queries from `row` on gives to dK and dV."""
    _, _, q_smem, g_smem, lse_smem, delta_smem = smem
    _, q_full, q_empty, g_full, g_empty = bars
    stage = n % cfg.stages
    phase = (n // cfg.stages) & 1
    columns: gl.constexpr = gl.SliceLayout(0, cfg.score_layout)
    zero = gl.full([ROWS, cfg.keys], 0.0, gl.float32, layout=cfg.score_layout)
    q = q_smem.index(stage).reshape((cfg.keys, cfg.size))
    g = g_smem.index(stage).reshape((cfg.keys, cfg.size))
    mbarrier.wait(q_full.index(stage), phase)
    s = hopper.warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(g_full.index(stage), phase)
    dp = hopper.warpgroup_mma(v, g.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = hopper.warpgroup_mma_wait(1, deps=[s])
    lse = gl.expand_dims(lse_smem.index(stage).load(columns), 0)
    p = gl.exp2(s * factor - lse)
    if MASKED:
        p = kept(p, limits, row, cfg)
    dv = hopper.warpgroup_mma(narrow(p, q_smem, cfg), g, dv, is_async=True)
    dp = hopper.warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - gl.expand_dims(delta_smem.index(stage).load(columns), 0))
    if MASKED:
        ds = kept(ds, limits, row, cfg)
    dk = hopper.warpgroup_mma(narrow(ds, q_smem, cfg), q, dk, is_async=True)
    dv, dk = hopper.warpgroup_mma_wait(0, deps=[dv, dk])
    mbarrier.arrive(q_empty.index(stage), count=1)
    mbarrier.arrive(g_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def narrow(x, like, cfg: gl.constexpr):
    return gl.convert_layout(gl.cast(x, like.dtype), cfg.operand_layout)


@gluon.jit
def kept(x, limits, first, cfg: gl.constexpr):
    """0 outside the columns [low, high) of a row; `first` is the first column of the tile."""
    low, high = limits
    quads = x.reshape((ROWS, cfg.keys // 8, 4, 2))
    quads = gl.convert_layout(quads, cfg.quad_layout, assert_trivial=True)
    place = quad_columns(cfg)
    keep = (place >= quad_bound(low - first, cfg)) & (place < quad_bound(high - first, cfg))
    quads = gl.where(keep, quads, 0.0).reshape((ROWS, cfg.keys))
    return gl.convert_layout(quads, cfg.score_layout, assert_trivial=True)


@gluon.jit
def key_consume(GROUP: gl.constexpr, smem, bars, work, mask, out, numbers, cfg: gl.constexpr):
    """dK and dV of 64 keys."""
    k_smem, v_smem, _, _, _, _ = smem
    first, count, head, end = work
    place, rows, keys, left, right, group = mask
    dk_out, dv_out, line, step = out
    factor, scale = numbers
    key = place + GROUP * ROWS + gl.arange(0, ROWS, layout=cfg.score_rows)
    limits = (key * 0, key * 0 + rows)
    if cfg.right:
        limits = (key - (keys - rows) - right, limits[1])
    if cfg.left:
        limits = (limits[0], key - (keys - rows) + left + 1)
    dk = gl.full([ROWS, cfg.size], 0.0, gl.float32, layout=cfg.out_layout)
    dv = gl.full([ROWS, cfg.size], 0.0, gl.float32, layout=cfg.out_layout)
    k = k_smem.index(GROUP).reshape((ROWS, cfg.size))
    v = v_smem.index(GROUP).reshape((ROWS, cfg.size))
    if count > 0:
        mbarrier.wait(bars[0], 0)
        for member in range(0, group):
            base = member * count
            if cfg.right:
                for j in range(0, head):
                    row = (first + j) * cfg.keys
                    dk, dv = key_step(
                        base + j, row, dk, dv, k, v, limits, smem, bars, factor, True, cfg
                    )
            for j in range(head, end):
                dk, dv = key_step(base + j, 0, dk, dv, k, v, limits, smem, bars, factor, False, cfg)
            if cfg.left:
                for j in range(end, count):
                    row = (first + j) * cfg.keys
                    dk, dv = key_step(
                        base + j, row, dk, dv, k, v, limits, smem, bars, factor, True, cfg
                    )
    place += GROUP * ROWS
    put(dk * scale, k_smem.index(GROUP), dk_out, line, step, place, keys, cfg)
    put(dv, v_smem.index(GROUP), dv_out, line, step, place, keys, cfg)


@gluon.jit
def put(x, memory, out, line, step, place, count, cfg: gl.constexpr):
    """Rows from `place` on, those below `count`, through shared memory."""
    buffer = memory.reshape((ROWS, cfg.size))
    buffer.store(gl.cast(x, buffer.dtype))
    lines = buffer.load(cfg.store_layout)
    at = place + gl.arange(0, ROWS, layout=gl.SliceLayout(1, cfg.store_layout))
    column = gl.arange(0, cfg.size, layout=gl.SliceLayout(0, cfg.store_layout))
    target = out + gl.expand_dims(line + gl.cast(at, gl.int64) * step, 1)
    gl.store(target + gl.expand_dims(column, 0), lines, mask=gl.expand_dims(at < count, 1))


@gluon.jit(do_not_specialize=INTEGERS)
def key_kernel(
    q_desc, g_desc, k_desc, v_desc, s_desc, dk, dv, starts_q, starts_k, factor, scale,
    rows, keys, heads, group, tiles, section, sequences, left, right, padded,
    cfg: gl.constexpr,
):  # fmt: skip
    """dk and dv [B, Sk, Hk, D]; `heads` are those of k."""
    total = gl.num_programs(0) // tiles
    tile, index = schedule(gl.program_id(0), tiles, total, section)
    # the first keys have most queries
    tile = tiles - 1 - tile
    batch = index // heads
    key_head = index % heads
    all_keys = keys
    first_row = 0
    first_key = 0
    shift = 0
    place = tile * cfg.rows
    if cfg.packed:
        first_key, first_row, keys, rows, place = locate(
            tile, starts_k, starts_q, keys, rows, sequences, cfg
        )
        shift = (tile * cfg.rows - place - first_key // cfg.rows * cfg.rows) // cfg.rows * 64
    work = query_range(place, rows, keys, left, right, cfg)
    smem = (
        gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_shape, k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [2] + v_desc.block_shape, v_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [cfg.stages] + q_desc.block_shape, q_desc.layout),
        gl.allocate_shared_memory(g_desc.dtype, [cfg.stages] + g_desc.block_shape, g_desc.layout),
        gl.allocate_shared_memory(gl.float32, [cfg.stages, cfg.keys], s_desc.layout),
        gl.allocate_shared_memory(gl.float32, [cfg.stages, cfg.keys], s_desc.layout),
    )
    bars = barriers(cfg)
    line = (batch * heads + key_head) * group * padded + first_row + shift
    plane = total * group * padded
    where = (
        batch, key_head, group, first_row, rows, first_key + place, line, padded, plane
    )  # fmt: skip
    mask = (place, rows, keys, left, right, group)
    base = (gl.cast(batch, gl.int64) * all_keys + first_key) * heads + key_head
    out = (dk, dv, base * cfg.size, heads * cfg.size)
    numbers = (factor, scale)
    descs = (q_desc, g_desc, k_desc, v_desc, s_desc)
    gl.warp_specialize(
        [
            (key_consume, (0, smem, bars, work, mask, out, numbers, cfg)),
            (key_consume, (1, smem, bars, work, mask, out, numbers, cfg)),
            (key_produce, (descs, smem, bars, where, work, cfg)),
        ],
        [4, 1],
        [240, 24],
    )


# -- dQ -------------------------------------------------------------------------------------------


@gluon.jit
def query_produce(descs, smem, bars, where, work, cfg: gl.constexpr):
    """Q and dO once, then the tiles of K and V."""
    q_desc, g_desc, k_desc, v_desc = descs
    q_smem, g_smem, k_smem, v_smem = smem
    owned, k_full, k_empty, v_full, v_empty = bars
    batch, head, key_head, row, first_key, keys = where
    last, count, _, _ = work
    if count > 0:
        mbarrier.expect(owned, 4 * ROWS * cfg.size * 2)
        for part in gl.static_range(2):
            place = [batch, head, row + part * ROWS, 0]
            tma.async_copy_global_to_shared(q_desc, place, owned, q_smem.index(part))
            tma.async_copy_global_to_shared(g_desc, place, owned, g_smem.index(part))
    for j in range(0, count):
        stage = j % cfg.stages
        phase = ((j // cfg.stages) & 1) ^ 1
        place = rows_of(batch, key_head, first_key, keys, (last - 1 - j) * cfg.keys, cfg)
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), cfg.keys * cfg.size * 2)
        tma.async_copy_global_to_shared(k_desc, place, k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), cfg.keys * cfg.size * 2)
        tma.async_copy_global_to_shared(v_desc, place, v_full.index(stage), v_smem.index(stage))


@gluon.jit
def query_step(
    j, dq, q, g, last, limits, lse, delta, smem, bars, factor, MASKED: gl.constexpr,
    cfg: gl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to dQ."""
    _, _, k_smem, v_smem = smem
    _, k_full, k_empty, v_full, v_empty = bars
    stage = j % cfg.stages
    phase = (j // cfg.stages) & 1
    zero = gl.full([ROWS, cfg.keys], 0.0, gl.float32, layout=cfg.score_layout)
    k = k_smem.index(stage).reshape((cfg.keys, cfg.size))
    v = v_smem.index(stage).reshape((cfg.keys, cfg.size))
    mbarrier.wait(k_full.index(stage), phase)
    s = hopper.warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    dp = hopper.warpgroup_mma(g, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = hopper.warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * factor - gl.expand_dims(lse, 1))
    dp = hopper.warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(stage), count=1)
    ds = p * (dp - gl.expand_dims(delta, 1))
    if MASKED:
        ds = kept(ds, limits, (last - 1 - j) * cfg.keys, cfg)
    dq = hopper.warpgroup_mma(narrow(ds, q_smem_of(smem), cfg), k, dq, is_async=True)
    dq = hopper.warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(k_empty.index(stage), count=1)
    return dq


@gluon.jit
def q_smem_of(smem):
    return smem[0]


@gluon.jit
def query_consume(
    GROUP: gl.constexpr, smem, bars, work, mask, stats, out, numbers, cfg: gl.constexpr
):
    """dQ of 64 queries."""
    q_smem, g_smem, _, _ = smem
    last, count, head, end = work
    place, rows, keys, left, right = mask
    dq_out, line, step = out
    factor, scale = numbers
    row = place + GROUP * ROWS + gl.arange(0, ROWS, layout=cfg.score_rows)
    limits = row_limits(row, rows, keys, left, right, cfg)
    lse = gl.load(stats[0] + row, mask=row < rows, other=float("inf"))
    delta = gl.load(stats[0] + stats[1] + row, mask=row < rows, other=0.0)
    dq = gl.full([ROWS, cfg.size], 0.0, gl.float32, layout=cfg.out_layout)
    q = q_smem.index(GROUP).reshape((ROWS, cfg.size))
    g = g_smem.index(GROUP).reshape((ROWS, cfg.size))
    if count > 0:
        mbarrier.wait(bars[0], 0)
        for j in range(0, head):
            dq = query_step(j, dq, q, g, last, limits, lse, delta, smem, bars, factor, True, cfg)
        for j in range(head, end):
            dq = query_step(j, dq, q, g, last, limits, lse, delta, smem, bars, factor, False, cfg)
        if cfg.left:
            for j in range(end, count):
                dq = query_step(
                    j, dq, q, g, last, limits, lse, delta, smem, bars, factor, True, cfg
                )
    place += GROUP * ROWS
    put(dq * scale, q_smem.index(GROUP), dq_out, line, step, place, rows, cfg)


@gluon.jit(do_not_specialize=INTEGERS)
def query_kernel(
    q_desc, g_desc, k_desc, v_desc, stats, dq, starts_q, starts_k, factor, scale,
    rows, keys, heads, group, tiles, section, sequences, left, right, padded,
    cfg: gl.constexpr,
):  # fmt: skip
    """dq [B, Sq, H, D]."""
    total = gl.num_programs(0) // tiles
    tile, index = schedule(gl.program_id(0), tiles, total, section)
    batch = index // heads
    head = index % heads
    all_rows = rows
    first_row = 0
    first_key = 0
    shift = 0
    place = tile * cfg.rows
    if cfg.packed:
        first_row, first_key, rows, keys, place = locate(
            tile, starts_q, starts_k, rows, keys, sequences, cfg
        )
        shift = (tile * cfg.rows - place - first_row // cfg.rows * cfg.rows) // cfg.rows * 64
    low_min, high_min = row_limits(place, rows, keys, left, right, cfg)
    end = gl.minimum(place + cfg.rows, rows) - 1
    low_max, high_max = row_limits(end, rows, keys, left, right, cfg)
    high_max = gl.where(place < rows, high_max, 0)
    low_min = gl.where(place < rows, low_min, 0)
    work = tile_range(low_min, low_max, high_min, high_max, cfg)
    smem = (
        gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_shape, q_desc.layout),
        gl.allocate_shared_memory(g_desc.dtype, [2] + g_desc.block_shape, g_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [cfg.stages] + k_desc.block_shape, k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [cfg.stages] + v_desc.block_shape, v_desc.layout),
    )
    bars = barriers(cfg)
    where = (batch, head, head // group, first_row + place, first_key, keys)
    mask = (place, rows, keys, left, right)
    stats = stats + gl.cast(index, gl.int64) * padded + first_row + shift
    stats = (stats, gl.cast(total, gl.int64) * padded)
    base = (gl.cast(batch, gl.int64) * all_rows + first_row) * heads + head
    out = (dq, base * cfg.size, heads * cfg.size)
    numbers = (factor, scale)
    descs = (q_desc, g_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (query_consume, (0, smem, bars, work, mask, stats, out, numbers, cfg)),
            (query_consume, (1, smem, bars, work, mask, stats, out, numbers, cfg)),
            (query_produce, (descs, smem, bars, where, work, cfg)),
        ],
        [4, 1],
        [240, 24],
    )


# -- the launches ---------------------------------------------------------------------------------


def statistics_descriptor(stats: Tensor, block: int) -> TensorDescriptor:
    flat = stats.view(-1)
    return TensorDescriptor(flat, [flat.shape[0]], [1], [block], layout_of([block], stats.dtype))


def configuration(size: int, given: Options, keys: int) -> BackwardConfig:
    return BackwardConfig(
        size=size,
        keys=keys,
        stages=2,
        left=given.left >= 0,
        right=given.right >= 0,
        packed=given.cu_seqlens_q is not None,
    )


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, and delta as [B, H, Sq] for what else needs it."""
    given = Options(*args)
    batch, rows, heads, size = q.shape
    keys, key_heads = k.shape[1:3]
    group = heads // key_heads
    q, k, v, dout = (x if x.data_ptr() % 16 == 0 else x.clone() for x in (q, k, v, dout))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    by_key, by_query = configuration(size, given, 64), configuration(size, given, 64)
    sequences = 0 if given.cu_seqlens_q is None else given.cu_seqlens_q.shape[0] - 1
    padded = -(-(rows + 64 * sequences) // 64) * 64
    stats = q.new_zeros(2, batch, heads, padded, dtype=torch.float32)

    def slots(count: int) -> int:
        return count // 128 + sequences + 1 if by_key.packed else -(-count // 128)

    starts = (given.cu_seqlens_q, given.cu_seqlens_k)
    prepare_kernel[(slots(rows) * batch * heads,)](
        out, dout, dlse, lse, stats, *starts, rows, keys, heads, slots(rows), sequences, padded,
        by_key, num_warps=4,
    )  # fmt: skip
    ends = value_descriptor if by_key.packed else descriptor
    at_once = max(1, L2_BYTES // (4 * max(rows, keys) * size))
    factor = given.scale * LOG2E.value
    key_kernel[(slots(keys) * batch * key_heads,)](
        ends(q, by_key.keys), ends(dout, by_key.keys), descriptor(k, 64), descriptor(v, 64),
        statistics_descriptor(stats, by_key.keys), dk, dv, *starts, factor, given.scale,
        rows, keys, key_heads, group, slots(keys), min(max(1, at_once // group), batch * key_heads),
        sequences, given.left, given.right, padded, by_key, num_warps=4,
    )  # fmt: skip
    query_kernel[(slots(rows) * batch * heads,)](
        descriptor(q, 64), descriptor(dout, 64), ends(k, by_query.keys), ends(v, by_query.keys),
        stats, dq, *starts, factor, given.scale,
        rows, keys, heads, group, slots(rows), min(at_once * group, batch * heads),
        sequences, given.left, given.right, padded, by_query, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, stats[1]
