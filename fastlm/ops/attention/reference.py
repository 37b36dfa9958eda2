"""Attention in plain PyTorch, by blocks of query rows: the specification of the kernels.

For query row i and key j of one head, with d = the key that row i is aligned with:
    x = scale * q_i . k_j;  t = softcap * tanh(x / softcap) or x
    s = t - slope * |d - j| + bias_ij, for low_i <= j < high_i
    lse_i = log(sum_j exp(s_ij) + exp(sink));  p_ij = exp(s_ij - lse_i)
    out_i = sum_j keep_ij / (1 - dropout_p) * p_ij * v_j
Backward, with dp_ij = keep_ij / (1 - dropout_p) * dout_i . v_j:
    delta_i = sum_j p_ij * dp_ij - dlse_i           (the sum is also dout_i . out_i)
    ds_ij = p_ij * (dp_ij - delta_i);  dsink = -sum_i exp(sink - lse_i) * delta_i
A row without keys and sink has lse = -inf and out = 0, and no gradient passes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...philox import philox
from .mask import Coordinates, coordinates, row_bounds

# rows of one block: at most this many, and so many that the scores stay below this many elements
_MOST_ROWS = 128
_LEAST_ROWS = 16
_SCORES = 1 << 23


@dataclass(frozen=True)
class Options:
    """The arguments of the op behind q, k and v."""

    lo: Tensor | None
    hi: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float


@dataclass(frozen=True)
class Block:
    rows: slice
    keys: slice
    outside: Tensor | None  # [B|1, H|1, rows, keys], True where the mask forbids; None: nowhere
    distance: Tensor | None  # [rows, keys] of |diagonal - key|, with ALiBi


def wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _pieces(rows: int, batch_heads: int, keys: int, cu_seqlens_q: Tensor | None) -> list[slice]:
    step = max(_LEAST_ROWS, min(_MOST_ROWS, _SCORES // max(1, batch_heads * keys)))
    edges = [0, rows]
    # a block within one sequence keeps NaN from reaching the next one, as 0 * NaN
    if cu_seqlens_q is not None and cu_seqlens_q.device.type == "cpu":
        edges = sorted({0, rows, *cu_seqlens_q.tolist()})
    return [
        slice(begin, min(begin + step, stop))
        for start, stop in zip(edges, edges[1:], strict=False)
        for begin in range(start, stop, step)
    ]


def _blocks(q: Tensor, k: Tensor, given: Options) -> Iterator[Block]:
    """The blocks that have a key; on the CPU cut to the keys that some row attends to."""
    batch, rows, heads, _ = q.shape
    keys = k.shape[1]
    at: Coordinates = coordinates(rows, keys, given.cu_seqlens_q, given.cu_seqlens_k, q.device)
    low, high = row_bounds(at, given.left, given.right, given.lo, given.hi)
    for piece in _pieces(rows, batch * heads, keys, given.cu_seqlens_q):
        lows, highs = low[..., piece], high[..., piece]
        if lows.numel() == 0:
            continue
        begin, end, inner_low, inner_high = 0, keys, 1, 0
        if q.device.type == "cpu":
            begin, end = int(lows.min()), int(highs.max())
            inner_low, inner_high = int(lows.max()), int(highs.min())
        if end <= begin:
            continue
        key = torch.arange(begin, end, device=q.device)
        outside = None
        if inner_low > begin or inner_high < end:
            outside = (key < lows[..., None]) | (key >= highs[..., None])
        distance = None
        if given.alibi_slopes is not None:
            distance = (at.diagonal[piece, None] - key).abs()
        yield Block(piece, slice(begin, end), outside, distance)


def _fold(x: Tensor, rows: slice, groups: int) -> Tensor:
    """[B, S, H, D] -> [B, H / groups, groups * rows, D]: the query heads of a key head as rows."""
    part = wide(x[:, rows]).transpose(1, 2)
    return _refold(part, groups)


def _unfold(x: Tensor, heads: int) -> Tensor:
    """[B, Hk, groups * rows, n] -> [B, H, rows, n]."""
    batch, key_heads, count, size = x.shape
    return x.reshape(batch, heads, key_heads * count // heads, size)


def _refold(x: Tensor, groups: int) -> Tensor:
    """[B, H, rows, n] -> [B, H / groups, groups * rows, n]."""
    batch, heads, count, size = x.shape
    return x.reshape(batch, heads // groups, groups * count, size)


def _slice_bias(bias: Tensor, block: Block) -> Tensor:
    rows = block.rows if bias.shape[2] > 1 else slice(None)
    return bias[:, :, rows, block.keys if bias.shape[3] > 1 else slice(None)]


def _slopes(given: Options, dtype: torch.dtype) -> Tensor:
    assert given.alibi_slopes is not None
    slopes = given.alibi_slopes.to(dtype)
    return (slopes if slopes.dim() == 2 else slopes[None])[..., None, None]


def _scores(
    folded: Tensor, key: Tensor, block: Block, given: Options, heads: int
) -> tuple[Tensor, Tensor | None]:
    """s [B, H, rows, keys] with -inf outside, and tanh(x / softcap) with a softcap."""
    s = _unfold(folded @ key.transpose(-1, -2), heads) * given.scale
    tanh = None
    if given.softcap > 0:
        tanh = torch.tanh(s / given.softcap)
        s = given.softcap * tanh
    if block.distance is not None:
        s = s - _slopes(given, s.dtype) * block.distance
    if given.bias is not None:
        s = s + wide(_slice_bias(given.bias, block))
    if block.outside is not None:
        s = s.masked_fill(block.outside, -torch.inf)
    return s, tanh


def _dropout(block: Block, given: Options, shape: torch.Size, rows: int) -> Tensor | None:
    """keep / (1 - dropout_p) of one block [B, H, rows, keys].

    Element (b, h, i, j) takes word j % 4 of the draw with counter ((b * H + h) * Sq + i, j // 4)
    and stays when word / 2^32 >= dropout_p.
    """
    if given.dropout_p == 0 or given.seed is None:
        return None
    device = given.seed.device
    head = torch.arange(shape[0] * shape[1], device=device).view(shape[0], shape[1], 1, 1)
    row = torch.arange(block.rows.start, block.rows.stop, device=device).view(-1, 1)
    quads = torch.arange(block.keys.start // 4, (block.keys.stop + 3) // 4, device=device)
    words = torch.stack(philox(given.seed, head * rows + row, quads), dim=-1).flatten(-2)
    start = block.keys.start % 4
    words = words[..., start : start + shape[3]]
    keep = words.double() * 2.0**-32 >= given.dropout_p
    scale = 0.0 if given.dropout_p == 1 else 1 / (1 - given.dropout_p)
    return keep * scale


def forward(q: Tensor, k: Tensor, v: Tensor, given: Options) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq]; q [B, Sq, H, D], k and v [B, Sk, Hk, ...]."""
    batch, rows, heads, _ = q.shape
    groups = heads // k.shape[2]
    key, value = wide(k).transpose(1, 2), wide(v).transpose(1, 2)
    out = q.new_zeros(batch, rows, heads, v.shape[3])
    lse = key.new_full((batch, heads, rows), -torch.inf)
    sink = None if given.sink is None else wide(given.sink).to(lse.dtype)[:, None, None]
    if sink is not None:
        lse = sink[..., 0].expand(batch, heads, rows).clone()
    for block in _blocks(q, k, given):
        part = key[:, :, block.keys]
        s, _ = _scores(_fold(q, block.rows, groups), part, block, given, heads)
        top = s.amax(-1, keepdim=True)
        if sink is not None:
            top = torch.maximum(top, sink)
        top = top.masked_fill(top == -torch.inf, 0.0)
        p = torch.exp(s - top)
        total = p.sum(-1, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink - top)
        lse[:, :, block.rows] = (top + total.log())[..., 0]
        p = p / total.masked_fill(total == 0, 1.0)
        keep = _dropout(block, given, p.shape, rows)
        if keep is not None:
            p = p * keep.to(p.dtype)
        result = _unfold(_refold(p, groups) @ value[:, :, block.keys], heads)
        out[:, block.rows] = result.transpose(1, 2).to(out.dtype)
    return out, lse


def _sum_to(value: Tensor, target: Tensor) -> Tensor:
    """Sums the dimensions in which the part of a broadcast bias has size 1."""
    dims = [d for d in range(value.dim()) if target.shape[d] == 1 and value.shape[d] != 1]
    return value.sum(dims, keepdim=True) if dims else value


@dataclass(frozen=True)
class Gradients:
    """float32 or wider, rounded by `finish`; what is not asked for stays None."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None
    sink: Tensor | None
    bias: Tensor | None


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    given: Options,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """`needs`: whether the gradients of alibi_slopes, sink and bias are wanted.

    A block holds whole rows, so delta comes from p and dp: unlike dout . out it has no rounding of
    out in it, and a row with one key has a gradient of exactly 0.
    """
    rows, heads = q.shape[1:3]
    groups = heads // k.shape[2]
    key, value = wide(k).transpose(1, 2), wide(v).transpose(1, 2)
    dq = torch.zeros_like(wide(q), memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (key, value))
    slopes, sink, bias = (
        torch.zeros_like(x, dtype=key.dtype) if need and x is not None else None
        for need, x in zip(needs, (given.alibi_slopes, given.sink, given.bias), strict=True)
    )
    # a row that attends to nothing takes no gradient, whatever arrives there
    nothing = lse == -torch.inf
    dout = dout.masked_fill(nothing.transpose(1, 2)[..., None], 0.0)
    delta = torch.zeros_like(lse) if dlse is None else -dlse.masked_fill(nothing, 0.0)
    delta = delta[..., None]
    finite_lse = lse.masked_fill(nothing, 0.0)[..., None]
    absorbed = None  # what the sink takes of each row's probability
    if given.sink is not None:
        absorbed = torch.exp(given.sink.to(lse.dtype)[:, None, None] - finite_lse)
    for block in _blocks(q, k, given):
        folded_q, folded_dout = (_fold(x, block.rows, groups) for x in (q, dout))
        part = key[:, :, block.keys]
        s, tanh = _scores(folded_q, part, block, given, heads)
        p = torch.exp(s - finite_lse[:, :, block.rows])
        # lse is rounded: far from 0 its last bit is seen in the sum
        total = p.sum(-1, keepdim=True)
        if absorbed is not None:
            total = total + absorbed[:, :, block.rows]
        total = total.masked_fill(total == 0, 1.0)
        p = p / total
        if absorbed is not None:
            absorbed[:, :, block.rows] /= total
        dp = _unfold(folded_dout @ value[:, :, block.keys].transpose(-1, -2), heads)
        keep = _dropout(block, given, p.shape, rows)
        dropped = p
        if keep is not None:
            keep = keep.to(p.dtype)
            dp, dropped = dp * keep, p * keep
        ds = p * dp
        if block.outside is not None:  # 0 * NaN of a key that is not attended to
            ds = ds.masked_fill(block.outside, 0.0)
        delta[:, :, block.rows] += ds.sum(-1, keepdim=True)
        ds = ds - p * delta[:, :, block.rows]
        if bias is not None:
            target = _slice_bias(bias, block)
            target += _sum_to(ds, target)
        if slopes is not None and block.distance is not None:
            each = (ds * block.distance).sum((-2, -1))
            slopes -= each if slopes.dim() == 2 else each.sum(0)
        dx = ds if tanh is None else ds * (1 - tanh.square())
        folded = _refold(dx * given.scale, groups)
        dq[:, block.rows] = _unfold(folded @ part, heads).transpose(1, 2)
        dk[:, :, block.keys] += folded.transpose(-1, -2) @ folded_q
        dv[:, :, block.keys] += _refold(dropped, groups).transpose(-1, -2) @ folded_dout
    if sink is not None and absorbed is not None:
        sink -= (absorbed * delta).sum((0, 2, 3))
    return Gradients(dq, dk.transpose(1, 2), dv.transpose(1, 2), slopes, sink, bias)
