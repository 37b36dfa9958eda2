"""Checks of the arguments of `decode_attention`, and their form in the torch op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import checks, library
from .reference import capacity

_OP = "decode_attention"


def _integers(what: str, value: Any, q: Tensor, shape: tuple[int | None, ...]) -> None:
    checks.tensor(_OP, what, value)
    if value.dtype != torch.int32:
        checks.bad_type(_OP, what, "int32", checks.short(value.dtype), "call .int() once per batch")
    checks.same_device(_OP, what, value, "q", q)
    checks.shape(_OP, what, value, shape)


def _per_head(what: str, value: Any, q: Tensor, batched: bool) -> None:
    checks.floating(_OP, what, value)
    checks.same_device(_OP, what, value, "q", q)
    batch, _, heads, _ = q.shape
    shapes = [(heads,), (batch, heads)] if batched else [(heads,)]
    if tuple(value.shape) not in shapes:
        expected = " or ".join(str(list(s)) for s in shapes)
        checks.bad_value(_OP, what, expected, list(value.shape))


def usual(q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any, *new: Any) -> bool:
    """Whether the checks below find nothing in a call with these tensors alone.

    They take as long as the attention over a short cache, and this a third of it.
    """
    if not (type(q) is type(k_cache) is type(v_cache) is type(cache_seqlens) is Tensor):
        return False
    for x in new:
        if x is not None and (
            type(x) is not Tensor or x.dtype != q.dtype or x.device != q.device or x.dim() != 4
        ):
            return False
    shape, keys, values, dtype, device = q.shape, k_cache.shape, v_cache.shape, q.dtype, q.device
    return (
        len(shape) == len(keys) == len(values) == 4
        and k_cache.dtype == v_cache.dtype == dtype
        and dtype in checks.FLOATS
        and cache_seqlens.dtype == torch.int32
        and k_cache.device == v_cache.device == cache_seqlens.device == device
        and keys[:3] == values[:3]
        and keys[3] == shape[3]
        and shape[2] > 0
        and shape[3] > 0
        and keys[2] > 0
        and values[3] > 0
        and shape[2] % keys[2] == 0
        and keys[0] >= shape[0]
        and cache_seqlens.shape == shape[:1]
        and not library.autocast_on(device.type)
    )


def check_floats(tensors: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q, k_new and v_new; in an autocast region in the dtype of the cache, which cannot change."""
    q, cache = tensors["q"], tensors["k_cache"]
    for what, value in tensors.items():
        if value is not None or what in ("q", "k_cache", "v_cache"):
            checks.floating(_OP, what, value)
            checks.same_device(_OP, what, value, "q", q)
    if library.autocast_on(q.device.type):
        tensors = {w: None if x is None else x.to(cache.dtype) for w, x in tensors.items()}
    for what, value in tensors.items():
        if value is not None:
            checks.same_dtype(_OP, what, value, "q", tensors["q"])
    return tensors["q"], tensors["k_new"], tensors["v_new"]


def check_gradient(tensors: dict[str, Tensor | None]) -> None:
    if not torch.is_grad_enabled():
        return
    for what, value in tensors.items():
        if value is not None and value.requires_grad:
            remedy = "use fastlm.attention for a gradient, or torch.no_grad()"
            checks.bad_value(_OP, what, "without gradient", "one that requires grad", remedy)


def check_shapes(q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: bool, indexed: bool) -> None:
    checks.shape(_OP, "q", q, (None,) * 4, "[B, Sq, H, D] or [B, H, D]")
    batch, _, heads, size = q.shape
    form = "[blocks, block_size, Hk, D]" if paged else "[B, S, Hk, D]"
    checks.shape(_OP, "k_cache", k_cache, (None, None, None, size), form)
    checks.shape(_OP, "v_cache", v_cache, (*k_cache.shape[:3], None), "as k_cache")
    key_heads = k_cache.shape[2]
    for what, count in (
        ("heads of k_cache", key_heads),
        ("head size of v_cache", v_cache.shape[3]),
    ):
        if count == 0:
            checks.bad_value(_OP, what, ">= 1", 0)
    if heads == 0 or heads % key_heads:
        checks.bad_value(_OP, "heads of q", f"a multiple of {key_heads} (as k_cache)", heads)
    if size == 0:
        checks.bad_value(_OP, "head size of q", ">= 1", 0)
    if paged and k_cache.shape[1] == 0:
        checks.bad_value(_OP, "block_size", ">= 1", 0)
    if not paged and not indexed and k_cache.shape[0] < batch:
        expected = f"at least {batch} (as q)"
        checks.bad_value(_OP, "k_cache.shape[0]", expected, k_cache.shape[0])


def check_new(
    k_new: Tensor | None, v_new: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    if k_new is None or v_new is None:
        checks.bad_value(_OP, "k_new and v_new", "given both or neither", "one")
    batch, key_heads = q.shape[0], k_cache.shape[2]
    shape = (batch, None, key_heads, k_cache.shape[3])
    checks.shape(_OP, "k_new", k_new, shape, "[B, S_new, Hk, D]")
    checks.shape(_OP, "v_new", v_new, (batch, k_new.shape[1], key_heads, v_cache.shape[3]))
    for what, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        # an append through such a view would write one slot for several positions
        if any(n > 1 and step == 0 for n, step in zip(cache.shape, cache.stride(), strict=True)):
            checks.bad_value(_OP, what, "without expanded dimensions", list(cache.stride()))


def check_integers(
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    q: Tensor,
) -> None:
    batch = q.shape[0]
    _integers("cache_seqlens", cache_seqlens, q, (batch,))
    if block_table is not None:
        _integers("block_table", block_table, q, (batch, None))
        if cache_batch_idx is not None:
            checks.bad_value(_OP, "cache_batch_idx", "None with a block_table", "a tensor")
    if cache_batch_idx is not None:
        _integers("cache_batch_idx", cache_batch_idx, q, (batch,))
    if cache_leftpad is not None:
        _integers("cache_leftpad", cache_leftpad, q, (batch,))


def check_options(
    q: Tensor,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    softcap: float,
    num_splits: int | None,
) -> None:
    if alibi_slopes is not None:
        _per_head("alibi_slopes", alibi_slopes, q, batched=True)
    if sink is not None:
        _per_head("sink", sink, q, batched=False)
    if not softcap >= 0:
        checks.bad_value(_OP, "softcap", ">= 0", softcap)
    if num_splits is not None and num_splits < 1:
        checks.bad_value(_OP, "num_splits", ">= 1 or None", num_splits)


def side(what: str, value: int | None) -> int:
    """-1 for "no limit"."""
    if value is None or value == -1:
        return -1
    if value < 0:
        checks.bad_value(_OP, what, ">= 0, or -1 or None for no limit", value)
    return int(value)


def band(window: tuple[int | None, int | None] | None, causal: bool) -> tuple[int, int]:
    left = right = -1
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            checks.bad_value(_OP, "window", "(left, right)", window)
        left, right = side("window[0]", window[0]), side("window[1]", window[1])
    return left, 0 if causal else right


def _outside(what: str, value: Tensor, bad: Tensor, allowed: str) -> None:
    position = bad.nonzero()[0].tolist()
    got = f"{int(value[tuple(position)])} at {position}"
    raise IndexError(f"fastlm.{_OP}: {what} must be {allowed}, got {got}")


def check_values(
    cache: Tensor,
    count: int,
    lengths: Tensor,
    table: Tensor | None,
    row: Tensor | None,
    pad: Tensor | None,
) -> None:
    """On the CPU: lengths with `count` new keys within the cache, blocks and rows that exist."""
    if lengths.device.type != "cpu" or lengths.numel() == 0:
        return
    most = capacity(cache, table)
    bad = (lengths < 0) | (lengths.long() + count > most)
    if bool(bad.any()):
        held = f"{most} slots" if table is None else f"{table.shape[1]} blocks of {cache.shape[1]}"
        room = f"in [0, {most - count}] ({held} of a row" + (f", {count} new)" if count else ")")
        _outside("cache_seqlens", lengths, bad, room)
    if table is not None:
        block = torch.arange(table.shape[1], device=table.device)
        used = block * cache.shape[1] < (lengths.long() + count)[:, None]
        bad = used & ((table < 0) | (table >= cache.shape[0]))
        if bool(bad.any()):
            _outside("block_table", table, bad, f"in [0, {cache.shape[0]}) where it is used")
    if row is not None:
        checks.index_range(_OP, "cache_batch_idx", row, cache.shape[0], None)
    if pad is not None and bool((pad < 0).any()):
        _outside("cache_leftpad", pad, pad < 0, ">= 0")
