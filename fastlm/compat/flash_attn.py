"""The functions of the package flash_attn (version 2) on `fastlm.attention`.

Signatures and meanings are those of FlashAttention-2: [B, S, H, D], masks aligned at the bottom
right, a negative window side or a softcap <= 0 is no limit, and the lse of a query that attends to
nothing is +inf (its output is 0). Any device, head size and float dtype goes, and softcap together
with dropout. What differs, where FlashAttention-2 computes or promises less:
- the sums are always deterministic; `deterministic` changes nothing;
- `softmax_lse` and `alibi_slopes` pass gradients; with causal and ALiBi together lse has the bias
  that is documented, -slope * distance, not one shifted by a constant per row;
- rows behind the last sequence give 0, and lse +inf, instead of what the memory held;
- with a `block_table` the pages pass gradients, and may be of any size;
- S_dmask [B, H, Sq, Sk] holds probabilities, negative where dropped, and is not padded;
- errors are ValueError and TypeError with the words of `fastlm.attention`.

Source: Dao 2023 (arXiv:2307.08691); the interface of github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import AttnMask, attention, checks
from .flash_attn_kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Out = Tensor | tuple[Tensor, Tensor, Tensor]
Window = tuple[int, int]


def _options(
    dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Window,
    softcap: float, alibi_slopes: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    left, right = (-1 if side < 0 else side for side in window_size)
    return {
        "mask": AttnMask.causal() if causal else None,
        "window": (left, right),
        "scale": softmax_scale,
        "softcap": max(0.0, softcap),
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
    }


def _finish(lse: Tensor) -> Tensor:
    return torch.where(lse == -math.inf, math.inf, lse)


def _seed(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same dropout in several calls."""
    if options["dropout_p"] == 0:
        return options
    return options | {"seed": torch.randint(2**63 - 1, (), device=device)}


def _signed(q: Tensor, k: Tensor, identity: Tensor, options: dict[str, Any]) -> Tensor:
    """Probabilities [..., H, Sk] of each row of q, negative where dropped.

    With the identity for v the output is the matrix of probabilities itself.
    """
    eye = identity.expand(*k.shape[:-1], identity.shape[-1])
    kept = attention(q, k, eye, **options)
    whole = attention(q, k, eye, **(options | {"dropout_p": 0.0}))
    assert isinstance(kept, Tensor) and isinstance(whole, Tensor)
    return torch.where((kept == 0) & (whole > 0), -whole, whole)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], return_attn_probs: bool
) -> Out:
    if not return_attn_probs:
        out = attention(q, k, v, **options)
        assert isinstance(out, Tensor)
        return out
    options = _seed(options, q.device)
    out, lse = attention(q, k, v, return_lse=True, **options)
    probs = q.new_empty(0)
    if options["dropout_p"] > 0:
        identity = torch.eye(k.shape[1], dtype=q.dtype, device=q.device)[:, None]
        with torch.no_grad():
            probs = _signed(q, k, identity, options).transpose(1, 2)
    return out, _finish(lse), probs


def _starts(name: str, starts: Tensor, like: Tensor) -> Tensor:
    checks.tensor("flash_attn", name, starts)
    if starts.dtype != torch.int32:
        remedy = "call .int() once per batch"
        checks.bad_type("flash_attn", name, "int32", checks.short(starts.dtype), remedy)
    if starts.dim() != 1 or starts.shape[0] < 2:
        checks.bad_value("flash_attn", name, "[sequences + 1]", list(starts.shape))
    checks.same_device("flash_attn", name, starts, "q", like)
    return starts.long()


def _right_aligned(starts: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """[B, longest]: the packed row at each place of sequences that end together, and whether
    there is one."""
    place = torch.arange(longest, device=starts.device) - longest
    index = starts[1:, None] + place
    there = index >= starts[:-1, None]
    # the other places repeat the sequence's own first token: no NaN of another one beside a 0
    return torch.maximum(index, starts[:-1, None]).clamp(max=max(0, total - 1)), there


def _unpacked(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Out and lse, packed, and S_dmask, by a dense batch: for what differs between sequences.

    Sequences that end together are aligned at the bottom right, each as it is alone.
    """
    rows, row_there = _right_aligned(starts[0], longest[0], q.shape[0])
    keys, key_there = _right_aligned(starts[1], longest[1], k.shape[0])
    dense = (q[rows], k[keys], v[keys])
    lo = (longest[1] - key_there.sum(-1, keepdim=True)).expand(rows.shape)
    hi = torch.where(row_there, longest[1], 0)
    within = AttnMask.intervals(lo, hi)
    mask = options["mask"]
    options = _seed(options, q.device) | {"mask": within if mask is None else within & mask}
    out, lse = attention(*dense, return_lse=True, **options)
    probs = q.new_empty(0)
    if options["dropout_p"] > 0:
        identity = torch.eye(longest[1], dtype=q.dtype, device=q.device)[:, None]
        with torch.no_grad():
            probs = _signed(dense[0], dense[1], identity, options).transpose(1, 2)
            probs = _to_the_left(probs, row_there, key_there)
    # places without a row go to one behind the last, which is cut off
    index = torch.where(row_there, rows, q.shape[0]).flatten()
    packed = q.new_zeros(q.shape[0] + 1, *out.shape[2:]).index_copy(0, index, out.flatten(0, 1))
    lse = lse.transpose(1, 2).flatten(0, 1)
    packed_lse = lse.new_full((q.shape[0] + 1, lse.shape[1]), -math.inf).index_copy(0, index, lse)
    return packed[:-1], packed_lse[:-1].transpose(0, 1), probs


def _to_the_left(probs: Tensor, row_there: Tensor, key_there: Tensor) -> Tensor:
    """[B, H, rows, keys] of sequences that end together, as sequences that start together."""
    for dim, there in ((2, row_there), (3, key_there)):
        size = there.shape[1]
        shift = size - there.sum(-1, keepdim=True)
        index = (torch.arange(size, device=probs.device) + shift) % max(1, size)
        shape = [index.shape[0], 1, 1, 1]
        shape[dim] = size
        probs = probs.gather(dim, index.view(shape).expand(probs.shape))
    return probs


def _pages(cache: Tensor, table: Tensor, starts: Tensor, total: int) -> Tensor:
    """Tokens [total, Hk, D] of paged sequences, in their order; the rest is token 0."""
    page = cache.shape[1]
    token = torch.arange(total, device=cache.device)
    sequence = torch.searchsorted(starts, token, right=True) - 1
    there = sequence < table.shape[0]
    sequence = sequence.clamp(max=table.shape[0] - 1)
    place = torch.where(there, token - starts[sequence], 0)
    block = table[sequence, (place // page).clamp(max=table.shape[1] - 1)].long()
    if cache.device.type == "cpu":
        checks.index_range("flash_attn", "block_table", block[there], cache.shape[0], None)
    index = torch.where(there, block * page + place % page, 0)
    return cache.flatten(0, 1)[index]


def _paged(
    k: Tensor, v: Tensor, table: Tensor, starts: Tensor, sequences: int, longest: int
) -> tuple[Tensor, Tensor]:
    checks.tensor("flash_attn", "block_table", table)
    checks.shape("flash_attn", "k", k, (None,) * 4, "[blocks, page, H, D] with a block_table")
    checks.shape("flash_attn", "v", v, (*k.shape[:3], None), "as k")
    checks.shape("flash_attn", "block_table", table, (sequences, None))
    if table.dtype != torch.int32:
        checks.bad_type("flash_attn", "block_table", "int32", checks.short(table.dtype))
    # no look at the lengths on a GPU: as many tokens as there can be
    total = int(starts[-1]) if k.device.type == "cpu" else sequences * longest
    if k.device.type == "cpu":
        most = table.shape[1] * k.shape[1]
        length = int(starts.diff().max())
        if length > most:
            checks.bad_value("flash_attn", "sequences of k", f"at most {most} long", length)
    return _pages(k, table, starts, total), _pages(v, table, starts, total)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    longest: tuple[int, int], options: dict[str, Any], return_attn_probs: bool,
) -> Out:  # fmt: skip
    drop = options["dropout_p"] > 0 and return_attn_probs
    slopes = options["alibi_slopes"]
    if drop or (slopes is not None and slopes.dim() == 2 and slopes.shape[0] > 1):
        starts = (
            _starts("cu_seqlens_q", cu_seqlens_q, q),
            _starts("cu_seqlens_k", cu_seqlens_k, q),
        )
        out, lse, probs = _unpacked(q, k, v, starts, longest, options)
    else:
        found = attention(
            q, k, v, layout="thd", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=longest[0], max_seqlen_k=longest[1], return_lse=return_attn_probs,
            **options,
        )  # fmt: skip
        if not return_attn_probs:
            assert isinstance(found, Tensor)
            return found
        (out, lse), probs = found, q.new_empty(0)
    return (out, _finish(lse), probs) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Out:
    """Attention of q [B, Sq, H, D] over k, v [B, Sk, Hk, D], aligned at the bottom right.

    Args:
        window_size: (left, right) keys around the query's position, inclusive; negative: no limit.
        alibi_slopes: [H] or [B, H].
        return_attn_probs: also return lse [B, H, Sq] (natural logarithm, +inf where a query attends
            to nothing) and S_dmask: [B, H, Sq, Sk] with dropout, else empty.

    Returns:
        out [B, Sq, H, Dv], or (out, softmax_lse, S_dmask).

    Raises:
        ValueError: a shape or option does not fit. TypeError: a dtype.
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _dense(q, k, v, options, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Out:  # fmt: skip
    """As `flash_attn_func`, with k and v in one tensor [B, Sk, 2, Hk, D]."""
    checks.shape("flash_attn", "kv", kv, (None, None, 2, None, None))
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    k, v = kv.unbind(2)
    return _dense(q, k, v, options, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Out:  # fmt: skip
    """As `flash_attn_func`, with q, k and v in one tensor [B, S, 3, H, D]."""
    checks.shape("flash_attn", "qkv", qkv, (None, None, 3, None, None))
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = qkv.unbind(2)
    return _dense(q, k, v, options, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Out:
    """As `flash_attn_func`, of packed sequences: q [Tq, H, D], k, v [Tk, Hk, D].

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each sequence starts.
        alibi_slopes: [H] or [sequences, H].
        block_table: int32 [sequences, blocks]; k and v are then pages [blocks, page, Hk, D].

    Returns:
        out [Tq, H, Dv], or (out, softmax_lse [H, Tq], S_dmask).
    """
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        starts = _starts("cu_seqlens_k", cu_seqlens_k, q)
        k, v = _paged(k, v, block_table, starts, starts.shape[0] - 1, max_seqlen_k)
    longest = (max_seqlen_q, max_seqlen_k)
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, options, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Out:  # fmt: skip
    """As `flash_attn_varlen_func`, with k and v in one tensor [Tk, 2, Hk, D]."""
    checks.shape("flash_attn", "kv", kv, (None, 2, None, None))
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    k, v = kv.unbind(1)
    longest = (max_seqlen_q, max_seqlen_k)
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, options, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Out:  # fmt: skip
    """As `flash_attn_varlen_func`, with q, k and v in one tensor [T, 3, H, D]."""
    checks.shape("flash_attn", "qkv", qkv, (None, 3, None, None))
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    q, k, v = qkv.unbind(1)
    longest = (max_seqlen, max_seqlen)
    return _varlen(q, k, v, cu_seqlens, cu_seqlens, longest, options, return_attn_probs)
