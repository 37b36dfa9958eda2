"""Attention over a cache of keys in plain PyTorch: the specification of the kernels.

Row b holds keys start_b <= j < n_b. Query i stands on key d_i = n_b - Sq + i and attends to keys j
with d_i - left <= j <= d_i + right (-1 is no limit):
    x = scale * q_i . k_j;  t = softcap * tanh(x / softcap) or x;  s = t - slope * |d_i - j|
    lse_i = log(sum_j exp(s_ij) + exp(sink));  out_i = sum_j exp(s_ij - lse_i) * v_j
A query without keys has out = 0, and lse = sink, or -inf without one.
A row whose length, blocks or cache row do not exist gives NaN and appends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """The arguments of the op behind the caches and lengths."""

    block_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    scale: float
    left: int
    right: int
    softcap: float
    num_splits: int  # a hint for kernels; no result depends on it


def wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """Most keys that a row can hold."""
    return cache.shape[1] * (1 if block_table is None else block_table.shape[1])


def _slots(cache: Tensor, position: Tensor, given: Options) -> tuple[Tensor, Tensor]:
    """Indices into the first two dimensions of a cache, for positions [B, n]; may be outside."""
    if given.block_table is None:
        row = torch.arange(position.shape[0], device=cache.device)
        if given.cache_batch_idx is not None:
            row = given.cache_batch_idx.long()
        return row[:, None].expand_as(position), position
    size, table = cache.shape[1], given.block_table.long()
    column = (position // size).clamp(0, max(0, table.shape[1] - 1))
    if table.shape[1] == 0:
        return torch.full_like(position, -1), position % size
    return table.gather(1, column), position % size


def exists(cache: Tensor, stop: Tensor, given: Options) -> Tensor:
    """[B] booleans: the length is possible and the cache has every slot of the row."""
    good = (stop >= 0) & (stop <= capacity(cache, given.block_table))
    if given.cache_batch_idx is not None:
        row = given.cache_batch_idx
        good = good & (row >= 0) & (row < cache.shape[0])
    if given.block_table is not None:
        table = given.block_table
        block = torch.arange(table.shape[1], device=table.device)
        used = block * cache.shape[1] < stop[:, None]
        inside = (table >= 0) & (table < cache.shape[0])
        good = good & (inside | ~used).all(1)
    return good


def extended(lengths: Tensor, count: int) -> Tensor:
    """Lengths with the new keys; what was out of range stays so."""
    return torch.where(lengths < 0, -1, lengths.long() + count)


def append(
    k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, lengths: Tensor, given: Options
) -> None:
    """Writes k_new and v_new at positions lengths, lengths + 1, ... of their rows."""
    count = k_new.shape[1]
    if k_new.numel() + v_new.numel() == 0 or k_cache.shape[0] * k_cache.shape[1] == 0:
        return
    start = lengths.long()
    good = exists(k_cache, start + count, given) & (start >= 0)
    position = start[:, None] + torch.arange(count, device=lengths.device)
    index = _slots(k_cache, position, given)
    # a row that cannot be written repeats the writes of the first one that can, with no look at
    # the device; where none can, it writes back what is there
    instead = torch.where(
        good, torch.arange(good.shape[0], device=good.device), good.int().argmax()
    )
    some = good.any()
    i, j = (x[instead].clamp(0, n - 1) for x, n in zip(index, k_cache.shape[:2], strict=True))
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        cache[i, j] = torch.where(some, new[instead], cache[i, j])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, begin: int, start: Tensor, stop: Tensor, given: Options
) -> tuple[Tensor, Tensor]:
    """q [B, Sq, H, D] over gathered keys begin, begin + 1, ... [B, K, Hk, ...]; slopes [B|1, H]."""
    batch, rows, heads, size = q.shape
    keys, key_heads = k.shape[1:3]
    grouped = heads // key_heads * rows
    key = begin + torch.arange(keys, device=q.device)
    inside = (key >= start[:, None]) & (key < stop[:, None])
    # what stands in unused slots must not get past a probability of 0
    k, v = (wide(x).masked_fill(~inside[:, :, None, None], 0.0).transpose(1, 2) for x in (k, v))
    place = (stop - rows)[:, None] + torch.arange(rows, device=q.device)
    ahead = (key - place[..., None])[:, None]  # [B, 1, Sq, K]
    keep = inside[:, None, None]
    if given.left >= 0:
        keep = keep & (ahead >= -given.left)
    if given.right >= 0:
        keep = keep & (ahead <= given.right)
    folded = wide(q).transpose(1, 2).reshape(batch, key_heads, grouped, size)
    s = (folded @ k.transpose(-1, -2)).reshape(batch, heads, rows, keys) * given.scale
    if given.softcap > 0:
        s = given.softcap * torch.tanh(s / given.softcap)
    if given.alibi_slopes is not None:
        slopes = given.alibi_slopes.to(s.dtype)
        s = s - slopes.expand(batch, heads)[..., None, None] * ahead.abs()
    s = s.masked_fill(~keep, -torch.inf)
    if given.sink is not None:
        sink = given.sink.to(s.dtype)[:, None, None].expand(batch, heads, rows, 1)
        s = torch.cat([s, sink], -1)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., :keys]
    out = p.reshape(batch, key_heads, grouped, keys) @ v
    return out.reshape(batch, heads, rows, v.shape[-1]).transpose(1, 2), lse


def together(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, given: Options
) -> tuple[Tensor, Tensor]:
    """All rows at once over all slots, without a look at the lengths."""
    batch = q.shape[0]
    stop = lengths.long()
    start = torch.zeros_like(stop)
    if given.cache_leftpad is not None:
        start = given.cache_leftpad.long().clamp(min=0)
    good = exists(k_cache, stop, given)
    position = torch.arange(capacity(k_cache, given.block_table), device=q.device)
    i, j = _slots(k_cache, position.expand(batch, -1), given)
    if k_cache.shape[0] and k_cache.shape[1]:
        i, j = (x.clamp(0, n - 1) for x, n in zip((i, j), k_cache.shape[:2], strict=True))
    out, lse = _attend(q, k_cache[i, j], v_cache[i, j], 0, start, stop, given)
    return (
        out.masked_fill(~good[:, None, None, None], torch.nan),
        lse.masked_fill(~good[:, None, None], torch.nan),
    )


def _row(cache: Tensor, row: int, begin: int, stop: int, given: Options) -> Tensor:
    """Keys [begin, stop) of one row: [1, keys, Hk, D]."""
    if given.block_table is None:
        at = row if given.cache_batch_idx is None else int(given.cache_batch_idx[row])
        return cache[at : at + 1, begin:stop]
    size = cache.shape[1]
    first, last = begin // size, -(-stop // size)
    blocks = cache[given.block_table[row, first:last].long()]
    return blocks.flatten(0, 1)[None, begin - first * size : stop - first * size]


def one_by_one(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, given: Options
) -> tuple[Tensor, Tensor]:
    """Each row over its own keys alone; the arguments were checked."""
    batch, rows, heads, _ = q.shape
    out = wide(q).new_empty(batch, rows, heads, v_cache.shape[3])
    lse = wide(q).new_empty(batch, heads, rows)
    for row, stop in enumerate(lengths.tolist()):
        begin = 0 if given.cache_leftpad is None else int(given.cache_leftpad[row])
        if given.left >= 0:
            begin = max(begin, stop - rows - given.left)
        begin = max(0, min(begin, stop))
        slopes = given.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[row]
        own = Options(**{**vars(given), "alibi_slopes": slopes})
        k, v = (_row(cache, row, begin, stop, given) for cache in (k_cache, v_cache))
        start, end = (torch.tensor([x], device=q.device) for x in (begin, stop))
        found = _attend(q[row : row + 1], k, v, begin, start, end, own)
        out[row : row + 1], lse[row : row + 1] = found
    return out, lse


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, given: Options
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq]; `lengths` counts the appended keys."""
    way = one_by_one if q.device.type == "cpu" else together
    out, lse = way(q, k_cache, v_cache, lengths, given)
    return out.to(q.dtype), lse
