"""fastlm as an attention implementation of the package transformers, which is imported only here.

After `fastlm.compat.hf.register()`, a model loaded with attn_implementation="fastlm" calls
`attention_forward` with the masks of its "sdpa" implementation.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .. import AttnMask, attention
from ..nn.functional import scaled_dot_product_attention


def register(name: str = "fastlm") -> None:
    """Make `name` an attention implementation of transformers (from 4.53 on)."""
    transformers = importlib.import_module("transformers")
    masks = importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(name, attention_forward)
    transformers.AttentionMaskInterface.register(name, masks.sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The call that attention layers of transformers make.

    Args:
        query, key, value: [B, H, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, Dv].
        attention_mask: [B, 1, Sq, Sk], booleans, True attends, or floats to add; it holds causality
            and window. Without it the call is causal where the module is and Sq > 1, aligned at the
            last key, and the window is applied.
        sliding_window: keys up to sliding_window - 1 before the query.
        s_aux: [H], the logit of a sink.
        cu_seq_lens_q, cu_seq_lens_k: starts of the sequences packed into a batch of one.

    Returns:
        ([B, Sq, H, Dv], None)
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    window = None
    if sliding_window is not None and attention_mask is None:
        window = (sliding_window - 1, -1 if is_causal else sliding_window - 1)
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    added = packed or window is not None or bool(softcap) or s_aux is not None
    same = query.shape[2] == key.shape[2]
    if not added and (not causal or same):
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = query.new_zeros(bias.shape).masked_fill(~bias, -torch.inf)
    options: dict[str, Any] = {
        "mask": AttnMask.causal() if causal or (packed and is_causal) else None,
        "window": window,
        "softcap": softcap or 0.0,
        "sink": s_aux,
        "scale": scaling,
        "dropout_p": dropout,
        "bias": bias,
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if packed:
        options |= {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k, "layout": "thd"}
        options |= {"max_seqlen_q": max_length_q, "max_seqlen_k": max_length_k}
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    found = attention(q, k, v, **options)
    assert isinstance(found, Tensor)
    return found.view(query.shape[0], query.shape[2], *found.shape[-2:]), None
