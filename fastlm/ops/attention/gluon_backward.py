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

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .gluon_backward_keys import key_kernel
from .gluon_backward_queries import query_kernel
from .gluon_common import (
    L2_BYTES,
    LOG2E,
    BackwardConfig,
    descriptor,
    layout_of,
    locate,
    value_descriptor,
)
from .reference import Options


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


# -- the launches ---------------------------------------------------------------------------------


def statistics_descriptor(stats: Tensor, block: int) -> TensorDescriptor:
    flat = stats.view(-1)
    return TensorDescriptor(flat, [flat.shape[0]], [1], [block], layout_of([block], stats.dtype))


def configuration(size: int, given: Options) -> BackwardConfig:
    return BackwardConfig(
        size=size,
        keys=64,
        stages=2,
        left=given.left >= 0,
        right=given.right >= 0,
        packed=given.cu_seqlens_q is not None,
    )


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and, for the gradient of the sink, delta [B, H, Sq]; `hopper.refuses` says what
    it takes."""
    given = Options(*args)
    batch, rows, heads, size = q.shape
    keys, key_heads = k.shape[1:3]
    group = heads // key_heads
    cfg = configuration(size, given)
    if cfg.packed or cfg.left or (cfg.right and rows > keys):
        # a row that attends to nothing takes no gradient: 0 * NaN
        dout = dout.masked_fill((lse == -torch.inf).transpose(1, 2)[..., None], 0.0)
    q, k, v, dout = (x if x.data_ptr() % 16 == 0 else x.clone() for x in (q, k, v, dout))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    starts = (given.cu_seqlens_q, given.cu_seqlens_k)
    sequences = 0 if starts[0] is None else starts[0].shape[0] - 1
    padded = -(-(rows + 64 * sequences) // 64) * 64
    stats = q.new_zeros(2, batch, heads, padded, dtype=torch.float32)

    def slots(count: int) -> int:
        return count // cfg.rows + sequences + 1 if cfg.packed else -(-count // cfg.rows)

    prepare_kernel[(slots(rows) * batch * heads,)](
        out, dout, dlse, lse, stats, *starts, rows, keys, heads, slots(rows), sequences, padded,
        cfg, num_warps=4,
    )  # fmt: skip
    ends = value_descriptor if cfg.packed else descriptor
    scales = (given.scale * LOG2E.value, given.scale)
    at_once = max(1, L2_BYTES // (4 * max(rows, keys) * size))
    key_kernel[(slots(keys) * batch * key_heads,)](
        ends(q, cfg.keys), ends(dout, cfg.keys), descriptor(k, 64), descriptor(v, 64),
        statistics_descriptor(stats, cfg.keys), dk, dv, *starts, *scales,
        rows, keys, key_heads, group, slots(keys), min(max(1, at_once // group), batch * key_heads),
        sequences, given.left, given.right, padded, cfg, num_warps=4,
    )  # fmt: skip
    query_kernel[(slots(rows) * batch * heads,)](
        descriptor(q, 64), descriptor(dout, 64), ends(k, cfg.keys), ends(v, cfg.keys),
        stats, dq, *starts, *scales,
        rows, keys, heads, group, slots(rows), min(at_once * group, batch * heads),
        sequences, given.left, given.right, padded, cfg, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, _unpadded(stats[1], rows, starts[0])


def _unpadded(delta: Tensor, rows: int, starts: Tensor | None) -> Tensor:
    if starts is None:
        return delta[..., :rows]
    row = torch.arange(rows, device=delta.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts, row, right=True) - 1
    return delta[..., row + 64 * sequence]
