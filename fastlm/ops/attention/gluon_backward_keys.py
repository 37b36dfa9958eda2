"""dK and dV of attention for Hopper in Gluon: see `gluon_backward.py`."""

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
    rows_of,
    schedule,
)

INTEGERS = (
    "rows", "keys", "heads", "group", "tiles", "section", "sequences", "left", "right", "padded"
)  # fmt: skip


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
def in_turn(j, count, head, end):
    """The tile that comes as number j: those with a mask, [0, head) and [end, count), are first."""
    tail = count - end
    return gl.where(j < head, j, gl.where(j < head + tail, j - head + end, j - tail))


@gluon.jit
def key_produce(descs, smem, bars, where, work, cfg: gl.constexpr):
    """K and V once; then for each query head Q with lse and dO with delta, tile by tile."""
    q_desc, g_desc, k_desc, v_desc, s_desc = descs
    k_smem, v_smem, q_smem, g_smem, lse_smem, delta_smem = smem
    owned, q_full, g_full, empty = bars
    batch, key_head, group, first_row, rows, key, line, step, plane = where
    first, count, head, end = work
    if count > 0:
        mbarrier.expect(owned.index(0), 4 * ROWS * cfg.size * 2)
        for part in gl.static_range(2):
            place = [batch, key_head, key + part * ROWS, 0]
            tma.async_copy_global_to_shared(k_desc, place, owned.index(0), k_smem.index(part))
            tma.async_copy_global_to_shared(v_desc, place, owned.index(0), v_smem.index(part))
    for n in range(0, count * group):
        member = n // count
        row = (first + in_turn(n % count, count, head, end)) * cfg.keys
        stage = n % cfg.stages
        phase = ((n // cfg.stages) & 1) ^ 1
        place = rows_of(batch, key_head * group + member, first_row, rows, row, cfg)
        at = line + member * step + row
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(q_full.index(stage), cfg.keys * (cfg.size * 2 + 4))
        tma.async_copy_global_to_shared(q_desc, place, q_full.index(stage), q_smem.index(stage))
        tma.async_copy_global_to_shared(s_desc, [at], q_full.index(stage), lse_smem.index(stage))
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
    _, q_full, g_full, empty = bars
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
        base, low, high = limits
        p = kept(p, base + (low - row), base + (high - row), cfg.right, cfg.left, cfg)
    dv = hopper.warpgroup_mma(narrow(p, q_smem, cfg), g, dv, is_async=True)
    dp = hopper.warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - gl.expand_dims(delta_smem.index(stage).load(columns), 0))
    if MASKED:
        # as P, also where dP is NaN; to keep the mask of P would take registers
        ds = gl.where(p == 0.0, 0.0, ds)
    dk = hopper.warpgroup_mma(narrow(ds, q_smem, cfg), q, dk, is_async=True)
    dv, dk = hopper.warpgroup_mma_wait(0, deps=[dv, dk])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def key_consume(GROUP: gl.constexpr, smem, bars, work, mask, out, numbers, cfg: gl.constexpr):
    """dK and dV of 64 keys."""
    k_smem, v_smem, _, _, _, _ = smem
    first, count, head, end = work
    place, rows, keys, left, right, group = mask
    dk_out, dv_out, line, step = out
    factor, scale = numbers
    key = place + GROUP * ROWS + gl.arange(0, ROWS, layout=cfg.score_rows)
    # queries that attend to a key: from key + low on, below key + high
    limits = (quad_bound(key, cfg), rows - keys - right, rows - keys + left + 1)
    dk = gl.full([ROWS, cfg.size], 0.0, gl.float32, layout=cfg.out_layout)
    dv = gl.full([ROWS, cfg.size], 0.0, gl.float32, layout=cfg.out_layout)
    k = k_smem.index(GROUP).reshape((ROWS, cfg.size))
    v = v_smem.index(GROUP).reshape((ROWS, cfg.size))
    masked = head + count - end
    if count > 0:
        mbarrier.wait(bars[0].index(0), 0)
        for member in range(0, group):
            base = member * count
            if cfg.left or cfg.right:
                for j in range(0, masked):
                    row = (first + in_turn(j, count, head, end)) * cfg.keys
                    dk, dv = key_step(
                        base + j, row, dk, dv, k, v, limits, smem, bars, factor, True, cfg
                    )
            for j in range(masked, count):
                dk, dv = key_step(base + j, 0, dk, dv, k, v, limits, smem, bars, factor, False, cfg)
    place += GROUP * ROWS
    put(dk * scale, k_smem.index(GROUP), dk_out, line, step, place, keys, cfg)
    put(dv, v_smem.index(GROUP), dv_out, line, step, place, keys, cfg)


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
    bars = (ring(1, 1), ring(1, cfg.stages), ring(1, cfg.stages), ring(2, cfg.stages))
    hopper.fence_async_shared()
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
