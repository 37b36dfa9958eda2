"""Small calls of `attention` without an option, by PyTorch's own function.

Our way from Python to a kernel takes longer than PyTorch's of as many scores (benchmarks/LOG.md,
"small calls"); the mathematics is the same, and so are the errors: what is not as it should be goes
the usual way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..row_statistics.small import usual

REASON = "so few scores are PyTorch's sooner"

# multiply-adds up to which PyTorch is faster, without and with a gradient; a pair of batch and head
# counts as so many. float64 has no compiled kernel. AMD EPYC (Zen 5, AVX-512), 2 cores, 2026-11
_PER_PAIR = 1 << 16
_MOST = {
    torch.float32: (3 << 19, 3 << 19),
    torch.bfloat16: (3 << 19, 9 << 16),
    torch.float16: (1 << 20, 9 << 16),
    torch.float64: (1 << 62, 1 << 62),
}


def plain(
    mask: Any, extra: tuple[Any, ...], softcap: Any, dropout_p: Any, return_lse: bool
) -> bool:
    """No mask but "causal", nothing in `extra`, nothing else that PyTorch lacks."""
    if return_lse or not (mask is None or (type(mask) is str and mask == "causal")):
        return False
    if any(value is not None for value in extra):
        return False
    return type(softcap) is type(dropout_p) is float and softcap == dropout_p == 0.0


def takes(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> bool:
    if layout not in ("bshd", "bhsd") or not usual(q, k, v):
        return False
    if not (q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype):
        return False
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return False
    at = 2 if layout == "bshd" else 1
    heads, shared, keys = q.shape[at], k.shape[at], k.shape[3 - at]
    work = 2 * q.numel() * keys + q.shape[0] * heads * _PER_PAIR
    if (
        q.numel() == 0
        or keys == 0
        or shared == 0
        or heads % shared
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    most = _MOST.get(q.dtype)
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return most is not None and work <= most[trained]


def takes_causal(q: Tensor, k: Tensor, v: Tensor, layout: str) -> bool:
    """Causal is "top left" there, which is "bottom right" only for as many queries as keys; and a
    NaN in the future is multiplied by 0 there, where it must not be seen."""
    at = 1 if layout == "bshd" else 2
    if q.shape[at] != k.shape[at]:
        return False
    return math.isfinite(float(k.detach().sum() + v.detach().sum()))


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, layout: str
) -> Tensor:
    """In the layout of q, of what `takes` and, if causal, `takes_causal`."""
    scale = None if scale is None else float(scale)
    if layout == "bhsd":
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=shared
        )
    shared = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2).contiguous()
