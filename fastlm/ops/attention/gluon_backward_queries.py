"""dQ of attention for Hopper in Gluon: see `gluon_backward.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_common import (
    ROWS,
    kept,
    locate,
    narrow,
    put,
    quad_bound,
    ring,
    row_limits,
    rows_of,
    schedule,
    tile_range,
)

INTEGERS = (
    "rows", "keys", "heads", "group", "tiles", "section", "sequences", "left", "right", "padded"
)  # fmt: skip
# as `gluon_kernels.PIN`, for the bits of numbers >= 0
PIN = gl.constexpr(
    "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.s32 p, $1, 0; "
    "@p st.shared.b32 [a], $1; mov.b32 $0, $1; }"
)


@gluon.jit
def query_produce(descs, smem, bars, where, work, cfg: gl.constexpr):
    """Q and dO once, then the tiles of K and V."""
    q_desc, g_desc, k_desc, v_desc = descs
    q_smem, g_smem, k_smem, v_smem = smem
    owned, k_full, v_full, empty = bars
    batch, head, key_head, row, first_key, keys = where
    last, count, _, _ = work
    if count > 0:
        mbarrier.expect(owned.index(0), 4 * ROWS * cfg.size * 2)
        for part in gl.static_range(2):
            place = [batch, head, row + part * ROWS, 0]
            tma.async_copy_global_to_shared(q_desc, place, owned.index(0), q_smem.index(part))
            tma.async_copy_global_to_shared(g_desc, place, owned.index(0), g_smem.index(part))
    for j in range(0, count):
        stage = j % cfg.stages
        phase = ((j // cfg.stages) & 1) ^ 1
        place = rows_of(batch, key_head, first_key, keys, (last - 1 - j) * cfg.keys, cfg)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), cfg.keys * cfg.size * 2)
        tma.async_copy_global_to_shared(k_desc, place, k_full.index(stage), k_smem.index(stage))
        mbarrier.expect(v_full.index(stage), cfg.keys * cfg.size * 2)
        tma.async_copy_global_to_shared(v_desc, place, v_full.index(stage), v_smem.index(stage))


@gluon.jit
def query_step(
    j, dq, q, g, last, limits, lse, delta, smem, bars, factor, MASKED: gl.constexpr,
    cfg: gl.constexpr,
):  # fmt: skip
    """Adds what a tile of keys gives to dQ."""
    _, _, k_smem, v_smem = smem
    _, k_full, v_full, empty = bars
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
    seen = gl.reduce_or(gl.cast(p, gl.int32, bitcast=True), 1)
    seen = gl.inline_asm_elementwise(PIN, "=r,r", [seen], dtype=gl.int32, is_pure=False, pack=1)
    dp, seen = hopper.warpgroup_mma_wait(0, deps=[dp, seen])
    ds = p * (dp - gl.expand_dims(delta, 1))
    if MASKED:
        key = (last - 1 - j) * cfg.keys
        low, high = limits
        ds = kept(ds, quad_bound(low - key, cfg), quad_bound(high - key, cfg), cfg.left, True, cfg)
    dq = hopper.warpgroup_mma(narrow(ds, k_smem, cfg), k, dq, is_async=True)
    dq = hopper.warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(empty.index(stage), count=1)
    return dq


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
        mbarrier.wait(bars[0].index(0), 0)
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
    bars = (ring(1, 1), ring(1, cfg.stages), ring(1, cfg.stages), ring(2, cfg.stages))
    hopper.fence_async_shared()
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
