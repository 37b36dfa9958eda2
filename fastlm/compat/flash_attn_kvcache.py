"""flash-attn 2's attention over a KV cache, on `fastlm.decode_attention`.

Semantics from flash-attn 2 (github.com/Dao-AILab/flash-attention, flash_attn_interface.py and
csrc/flash_attn): what its documentation leaves open follows its kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import decode_attention

_NAME = "fastlm.compat.flash_attn.flash_attn_with_kvcache"


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, D] with its first 2 * cos.shape[1] features turned; positions [B, S] or [B, 1].

    In float32 and rounded once, as the kernel does.
    """
    half = cos.shape[1]
    c, s = (t[positions].float()[:, :, None] for t in (cos, sin))
    turned = x[..., : 2 * half].float()
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


def _limit(size: int | Tensor, slots: int) -> int:
    """One side of window_size; a window over the whole cache is none."""
    size = int(size)
    return -1 if size < 0 or size >= slots else size


def _check_rotary(cos: Tensor, sin: Tensor | None, k: Tensor | None, size: int, slots: int) -> None:
    if sin is None:
        raise ValueError(f"{_NAME}: rotary_sin must be given with rotary_cos, got None")
    if k is None:
        raise ValueError(f"{_NAME}: k and v must be given with rotary_cos, got None")
    if cos.dim() != 2 or cos.shape != sin.shape:
        got = f"{list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(f"{_NAME}: rotary_cos, rotary_sin must be [S, rotary_dim / 2], got {got}")
    if 2 * cos.shape[1] > size:
        raise ValueError(f"{_NAME}: rotary_dim must be <= {size} (as q), got {2 * cos.shape[1]}")
    if cos.shape[0] < slots:
        raise ValueError(f"{_NAME}: rotary_cos must have >= {slots} rows, got {cos.shape[0]}")


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a KV cache with flash-attn 2's arguments; writes k and v into the caches.

    Same as, without k, rotary embedding and window:
        fastlm.decode_attention(q, k_cache, v_cache, cache_seqlens, causal=causal)

    As in flash-attn 2 there is no backward: the result carries no gradient. Beyond it: any device,
    any float dtype, any head size, any block size, a head size of v of its own, `cache_leftpad`
    beside `block_table`.

    Args:
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, softcap,
            alibi_slopes: as in `fastlm.decode_attention`; cache_seqlens None is a full cache.
        k, v: [B, S_new, Hk, D], written in place at cache_seqlens, k after its rotation.
        rotary_cos, rotary_sin: [slots or more, rotary_dim / 2]. k is turned at cache_seqlens,
            cache_seqlens + 1, ...; so is q with `causal` or a window, else all of q at
            cache_seqlens. Only with k and v.
        softmax_scale: D**-0.5 by default.
        causal: bottom right, no key after the query's own.
        window_size: (left, right), -1 is no limit.
        rotary_interleaved: turns features 0 and 1, 2 and 3, ...; else 0 and rotary_dim / 2, ...
        num_splits: never changes a result here.
        return_softmax_lse: also return the log-sum-exp of the scores.

    Returns:
        out [B, Sq, H, D] in the dtype of q, and if asked for lse [B, H, Sq], float32. A query that
        attends to nothing gives 0, and +inf as in flash-attn 2 (`fastlm` has -inf). With ALiBi the
        lse is of the documented bias; the kernel of flash-attn 2 shifts it by a number per row.

    Raises:
        ValueError, TypeError, IndexError: as `fastlm.decode_attention`.
    """
    slots = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{_NAME}: cache_seqlens must be given with k and v, got None")
        cache_seqlens = slots
    left, right = (_limit(side, slots) for side in window_size)
    if rotary_cos is not None:
        _check_rotary(rotary_cos, rotary_sin, k, q.shape[-1], slots)
        assert k is not None and rotary_sin is not None
        start = cache_seqlens
        if not isinstance(start, Tensor):
            start = torch.full((q.shape[0],), start, dtype=torch.int64, device=q.device)
        first = start.long()[:, None]
        of_k = first + torch.arange(k.shape[1], device=q.device)
        moving = causal or left >= 0 or right >= 0
        of_q = first + torch.arange(q.shape[1], device=q.device) if moving else first
        k = _rotate(k, rotary_cos, rotary_sin, of_k, rotary_interleaved)
        q = _rotate(q, rotary_cos, rotary_sin, of_q, rotary_interleaved)
    out, lse = decode_attention(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table=block_table,
        k_new=k,
        v_new=v,
        causal=causal,
        window=(left, right),
        softcap=max(0.0, softcap),
        alibi_slopes=alibi_slopes,
        scale=softmax_scale,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        num_splits=num_splits or None,
        return_lse=True,
    )
    return (out, lse.masked_fill(lse == -math.inf, math.inf)) if return_softmax_lse else out
