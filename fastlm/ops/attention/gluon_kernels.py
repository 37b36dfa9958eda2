"""Attention forward for Hopper (sm_90a) in Gluon, Triton's language with explicit synchronisation.

A block owns `64 * groups` query rows of one head. One warp, the producer, moves tiles into shared
memory with TMA; `groups` warpgroups of 64 rows each consume them, from the last key to the first:
    S_j = Q K_j^T and O += P_(j-1) V_(j-1) are issued together; the softmax of S_j runs under the
    second product; so the tensor cores wait for the exponentials of one tile only.
Every stage of K and V has a barrier "full" (bytes arrived) and one "empty" (all groups have read).

Source: Shah et al. 2024 (arXiv:2407.08608), sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_common import (
    L2_BYTES,
    LN2,
    LOG2E,
    ROWS,
    Config,
    descriptor,
    interval_range,
    locate,
    packed,
    put,
    quad_bound,
    quad_columns,
    ring,
    row_limits,
    rows_last,
    rows_of,
    schedule,
    steps_of,
    tile_range,
    unpacked,
    value_descriptor,
)
from .reference import Options

# a never-taken store that needs every row sum, hence every exponential: without it ptxas moves the
# wait for O above the softmax, and nothing overlaps. Sums are >= 0, and NaN compares false
PIN = gl.constexpr(
    "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.lt.f32 p, $1, 0f00000000; "
    "@p st.shared.f32 [a], $1; mov.b32 $0, $1; }"
)

INTEGERS = (
    "rows", "keys", "heads", "group", "tiles", "section", "sequences",
    "left", "right", "low_batch", "low_head", "high_batch", "high_head",
)  # fmt: skip

# -- the two roles --------------------------------------------------------------------------------


@gluon.jit
def produce(descs, smem, bars, where, work, cfg: gl.constexpr):
    """Loads Q once, then the tiles of K and V in the order in which they are consumed."""
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    batch, head, key_head, row, first_key, keys = where
    last, count, _, _ = work
    if count > 0:
        mbarrier.expect(q_full.index(0), cfg.rows * cfg.size * 2)
        groups: gl.constexpr = cfg.groups
        for group in gl.static_range(groups):
            target = q_smem.index(group)
            tma.async_copy_global_to_shared(
                q_desc, [batch, head, row + group * ROWS, 0], q_full.index(0), target
            )
    for j in range(0, count + 1):
        # K is ahead by one: its room is free first, and it is needed first
        if j < count:
            stage = j % cfg.stages
            place = [batch, key_head, first_key + (last - 1 - j) * cfg.keys, 0]
            target = k_smem.index(stage)
            mbarrier.wait(k_empty.index(stage), ((j // cfg.stages) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), cfg.keys * cfg.size * 2)
            tma.async_copy_global_to_shared(k_desc, place, k_full.index(stage), target)
        if j > 0:
            stage = (j - 1) % cfg.stages
            place = rows_of(batch, key_head, first_key, keys, (last - j) * cfg.keys, cfg)
            target = v_smem.index(stage)
            mbarrier.wait(v_empty.index(stage), (((j - 1) // cfg.stages) & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), cfg.keys * cfg.size * 2)
            tma.async_copy_global_to_shared(v_desc, place, v_full.index(stage), target)


@gluon.jit
def scores(q, k_smem, stage, zero, cfg: gl.constexpr):
    k = k_smem.index(stage).reshape((cfg.keys, cfg.size))
    return hopper.warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def values(p, v_smem, stage, acc, cfg: gl.constexpr):
    v = v_smem.index(stage).reshape((cfg.keys, cfg.size))
    return hopper.warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def logits(s, key, limits, numbers, MASKED: gl.constexpr, cfg: gl.constexpr):
    """Softcap, and -inf outside the limits of a row; `key` is the first one of the tile."""
    low, high = limits
    _, inner, cap = numbers
    if cfg.softcap:
        # c tanh(x) = c - 2c / (e^2x + 1), in base 2
        s = cap - (cap + cap) / (gl.exp2(s * inner) + 1.0)
    if MASKED:
        quads = gl.convert_layout(
            s.reshape((ROWS, cfg.keys // 8, 4, 2)), cfg.quad_layout, assert_trivial=True
        )
        place = quad_columns(cfg)
        keep = place < quad_bound(high - key, cfg)
        if cfg.left or cfg.intervals:
            keep = keep & (place >= quad_bound(low - key, cfg))
        quads = gl.where(keep, quads, float("-inf"))
        s = gl.convert_layout(
            quads.reshape((ROWS, cfg.keys)), cfg.score_layout, assert_trivial=True
        )
    return s


@gluon.jit
def softmax(s, top, total, factor):
    """p = 2^(s - top) unnormalised, with the new top and total; `shrink` is for earlier sums."""
    best = gl.maximum(top, gl.max(s, 1) * factor)
    # a row without a key so far: no -inf - -inf
    base = gl.where(best == float("-inf"), 0.0, best)
    shrink = gl.exp2(top - base)
    p = gl.exp2(s * factor - gl.expand_dims(base, 1))
    return p, shrink, best, total * shrink + gl.sum(p, 1)


@gluon.jit
def step(
    j, acc, p, top, total, q, limits, smem, bars, last, numbers,
    MASKED: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """Scores of tile j with the product of tile j - 1; `p` goes in for j - 1 and out for j."""
    _, k_smem, v_smem = smem
    _, k_full, k_empty, v_full, v_empty = bars
    stage = j % cfg.stages
    before = (j - 1) % cfg.stages
    zero = gl.full([ROWS, cfg.keys], 0.0, gl.float32, layout=cfg.score_layout)
    operand = unpacked(p, smem[0].dtype, cfg)
    mbarrier.wait(k_full.index(stage), (j // cfg.stages) & 1)
    s = scores(q, k_smem, stage, zero, cfg)
    mbarrier.wait(v_full.index(before), ((j - 1) // cfg.stages) & 1)
    acc = values(operand, v_smem, before, acc, cfg)
    s = hopper.warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = logits(s, (last - 1 - j) * cfg.keys, limits, numbers, MASKED, cfg)
    p, shrink, top, total = softmax(s, top, total, numbers[0])
    total = gl.inline_asm_elementwise(PIN, "=r,r", [total], dtype=gl.float32, is_pure=False, pack=1)
    acc, total = hopper.warpgroup_mma_wait(0, deps=[acc, total])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, cfg.out_rows), 1)
    return acc, packed(p, smem[0].dtype, cfg), top, total


@gluon.jit
def consume(
    GROUP: gl.constexpr, smem, bars, where, work, mask, numbers, result, cfg: gl.constexpr
):  # fmt: skip
    """64 query rows."""
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    batch, head, key_head, row, first_key, keys = where
    last, count, head_tiles, open_tiles = work
    place, rows, left, right, lows, highs = mask
    first = place + GROUP * ROWS
    place = first + gl.arange(0, ROWS, layout=cfg.score_rows)
    valid = place < rows
    limits = row_limits(place, rows, keys, left, right, cfg)
    if cfg.intervals:
        low = gl.maximum(limits[0], gl.load(lows + place, mask=valid, other=0) - first_key)
        high = gl.minimum(limits[1], gl.load(highs + place, mask=valid, other=0) - first_key)
        limits = (low, high)
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=cfg.score_rows)
    total = gl.full([ROWS], 0.0, gl.float32, layout=cfg.score_rows)
    acc = gl.full([ROWS, cfg.size], 0.0, gl.float32, layout=cfg.out_layout)
    if count > 0:
        q = q_smem.index(GROUP).reshape((ROWS, cfg.size))
        zero = gl.full([ROWS, cfg.keys], 0.0, gl.float32, layout=cfg.score_layout)
        mbarrier.wait(q_full.index(0), 0)
        mbarrier.wait(k_full.index(0), 0)
        s = hopper.warpgroup_mma_wait(0, deps=[scores(q, k_smem, 0, zero, cfg)])
        mbarrier.arrive(k_empty.index(0), count=1)
        s = logits(s, (last - 1) * cfg.keys, limits, numbers, True, cfg)
        p, _, top, total = softmax(s, top, total, numbers[0])
        p = packed(p, smem[0].dtype, cfg)
        if cfg.right or cfg.intervals:
            for j in range(1, head_tiles):
                acc, p, top, total = step(
                    j, acc, p, top, total, q, limits, smem, bars, last, numbers, True, cfg
                )
        for j in range(gl.maximum(head_tiles, 1), open_tiles):
            acc, p, top, total = step(
                j, acc, p, top, total, q, limits, smem, bars, last, numbers, False, cfg
            )
        if cfg.left or cfg.intervals:
            for j in range(gl.maximum(open_tiles, 1), count):
                acc, p, top, total = step(
                    j, acc, p, top, total, q, limits, smem, bars, last, numbers, True, cfg
                )
        stage = (count - 1) % cfg.stages
        mbarrier.wait(v_full.index(stage), ((count - 1) // cfg.stages) & 1)
        acc = hopper.warpgroup_mma_wait(
            0, deps=[values(unpacked(p, smem[0].dtype, cfg), v_smem, stage, acc, cfg)]
        )
    finish(GROUP, acc, top, total, smem, place, first, rows, result, cfg)


@gluon.jit
def finish(
    GROUP: gl.constexpr, acc, top, total, smem, place, first, rows, result, cfg: gl.constexpr
):
    """Divides, and stores through the memory of Q in rows of 16 bytes a thread."""
    sink, out, lse = result
    scale = gl.full([ROWS], 1.0, gl.float32, layout=cfg.score_rows)
    if cfg.sink:
        best = gl.maximum(top, sink)
        base = gl.where(best == float("-inf"), 0.0, best)
        scale = gl.exp2(top - base)
        total = total * scale + gl.exp2(sink - base)
        top = best
    base = gl.where(top == float("-inf"), 0.0, top)
    gl.store(
        lse[0] + gl.cast(place, gl.int64) * lse[1], (base + gl.log2(total)) * LN2, mask=place < rows
    )
    # a row without a key: 0 / 1
    scale = scale / gl.where(total == 0.0, 1.0, total)
    acc = acc * gl.expand_dims(gl.convert_layout(scale, cfg.out_rows), 1)
    put(acc, smem[0].index(GROUP), out[0], out[1], out[2], first, rows, cfg)


@gluon.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q_desc, k_desc, v_desc, out, lse, starts_q, starts_k, lows, highs, sinks,
    factor, inner, cap, rows, keys, heads, group, tiles, section, sequences,
    left, right, low_batch, low_head, high_batch, high_head, cfg: gl.constexpr,
):  # fmt: skip
    """out [B, Sq, H, D] and lse [B, H, Sq]; lows and highs [B|1, H|1, Sq] of keys, or unused."""
    tile, index = schedule(gl.program_id(0), tiles, gl.num_programs(0) // tiles, section)
    batch = index // heads
    head = index % heads
    first_row = 0
    first_key = 0
    all_rows = rows
    place = tile * cfg.rows
    if cfg.packed:
        first_row, first_key, rows, keys, place = locate(
            tile, starts_q, starts_k, rows, keys, sequences, cfg
        )
    if cfg.intervals:
        lows += (
            gl.cast(batch, gl.int64) * low_batch + gl.cast(head, gl.int64) * low_head + first_row
        )
        highs += (
            gl.cast(batch, gl.int64) * high_batch + gl.cast(head, gl.int64) * high_head + first_row
        )
    smem = (
        gl.allocate_shared_memory(q_desc.dtype, [cfg.groups, 1, 1, ROWS, cfg.size], q_desc.layout),
        gl.allocate_shared_memory(
            k_desc.dtype, [cfg.stages, 1, 1, cfg.keys, cfg.size], k_desc.layout
        ),
        gl.allocate_shared_memory(v_desc.dtype, [cfg.stages] + v_desc.block_shape, v_desc.layout),
    )
    bars = (
        ring(1, 1),
        ring(1, cfg.stages),
        ring(cfg.groups, cfg.stages),
        ring(1, cfg.stages),
        ring(cfg.groups, cfg.stages),
    )
    hopper.fence_async_shared()
    end = gl.minimum(place + cfg.rows, rows) - 1
    if cfg.intervals:
        lane = place + gl.arange(0, cfg.lanes, layout=gl.BlockedLayout([1], [32], [4], [0]))
        low_min, low_max, high_min, high_max = interval_range(
            lane, lane <= end, lows, highs, first_key, rows, keys, left, right, cfg
        )
    else:
        low_min, high_min = row_limits(place, rows, keys, left, right, cfg)
        low_max, high_max = row_limits(end, rows, keys, left, right, cfg)
    # a slot behind the last row of its sequence has nothing to do
    high_max = gl.where(place < rows, high_max, 0)
    low_min = gl.where(place < rows, low_min, 0)
    last, count, head_tiles, open_tiles = tile_range(low_min, low_max, high_min, high_max, cfg)
    sink = 0.0
    if cfg.sink:
        sink = gl.cast(gl.load(sinks + head), gl.float32) * LOG2E
    where = (batch, head, head // group, first_row + place, first_key, keys)
    work = (last, count, head_tiles, open_tiles)
    mask = (place, rows, left, right, lows, highs)
    line = gl.cast(batch, gl.int64) * all_rows + first_row
    out = (out, (line * heads + head) * cfg.size, heads * cfg.size)
    lse = (lse + (gl.cast(batch, gl.int64) * heads + head) * all_rows + first_row, 1)
    numbers = (factor, inner, cap)
    result = (sink, out, lse)
    descs = (q_desc, k_desc, v_desc)
    if cfg.groups == 2:
        gl.warp_specialize(
            [
                (consume, (0, smem, bars, where, work, mask, numbers, result, cfg)),
                (consume, (1, smem, bars, where, work, mask, numbers, result, cfg)),
                (produce, (descs, smem, bars, where, work, cfg)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, smem, bars, where, work, mask, numbers, result, cfg)),
                (consume, (1, smem, bars, where, work, mask, numbers, result, cfg)),
                (consume, (2, smem, bars, where, work, mask, numbers, result, cfg)),
                (produce, (descs, smem, bars, where, work, cfg)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


# -- the launch -----------------------------------------------------------------------------------


def configuration(size: int, given: Options) -> Config:
    """Three warpgroups where 160 registers a thread are enough."""
    is_packed = given.cu_seqlens_q is not None
    masks_both_sides = given.left >= 0 or given.lo is not None
    is_large = given.softcap > 0 or (is_packed and masks_both_sides)
    groups = 3 if size == 64 and not is_large else 2
    return Config(
        size=size,
        keys=128,
        stages=2,
        groups=groups,
        left=given.left >= 0,
        right=given.right >= 0,
        intervals=given.lo is not None,
        packed=is_packed,
        softcap=given.softcap > 0,
        sink=given.sink is not None,
    )


def forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The torch op's forward; `hopper.refuses` says what it takes."""
    given = Options(*args)
    batch, rows, heads, size = q.shape
    keys, key_heads = k.shape[1:3]
    cfg = configuration(size, given)
    q, k, v = (x if x.data_ptr() % 16 == 0 else x.clone() for x in (q, k, v))
    out = q.new_empty(batch, rows, heads, size)
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    sequences = 0 if given.cu_seqlens_q is None else given.cu_seqlens_q.shape[0] - 1
    tiles = rows // cfg.rows + sequences + 1 if cfg.packed else -(-rows // cfg.rows)
    group = heads // key_heads
    at_once = max(1, L2_BYTES // (4 * keys * size)) * group
    lows, highs = (None if x is None else rows_last(x) for x in (given.lo, given.hi))
    steps = (0, 0, 0, 0) if lows is None or highs is None else (*steps_of(lows), *steps_of(highs))
    scale = given.scale * LOG2E.value
    inner = 2 * scale / given.softcap if cfg.softcap else 0.0
    forward_kernel[(tiles * batch * heads,)](
        descriptor(q, 64),
        descriptor(k, cfg.keys),
        (value_descriptor if cfg.packed else descriptor)(v, cfg.keys),
        out,
        lse,
        given.cu_seqlens_q,
        given.cu_seqlens_k,
        lows,
        highs,
        given.sink,
        1.0 if cfg.softcap else scale,
        inner,
        given.softcap * LOG2E.value,
        *(rows, keys, heads, group, tiles, min(at_once, batch * heads), sequences),
        *(given.left, given.right, *steps),
        cfg,
        num_warps=4,
    )
    return out, lse
