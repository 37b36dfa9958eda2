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


# arguments of layers that decide what is computed; transformers' own "sdpa" has them in its mask
_NOT_WRITTEN = ("head_mask", "indices", "block_indices", "sinks")


def _added(
    query: Tensor, keys: int, mask: Tensor | None, position_bias: Tensor | None
) -> Tensor | None:
    """What is added to the scores."""
    if mask is not None and mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if position_bias is None:
        return mask
    position_bias = position_bias[..., :keys].to(query.dtype)
    return position_bias if mask is None else position_bias + mask


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
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The call that attention layers of transformers make.

    Args:
        query, key, value: [B, H, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, Dv].
        attention_mask: [B, 1, Sq, Sk], booleans, True attends, or floats to add; it holds causality
            and window. Without it the call is causal where the module is and Sq > 1, query i on key
            i: what lies behind is the unused rest of a static cache; and the window is applied.
        sliding_window: keys up to sliding_window - 1 before the query.
        s_aux: [H], the logit of a sink.
        position_bias: broadcasts to [B, H, Sq, Sk], added to the scores.
        cu_seq_lens_q, cu_seq_lens_k: starts of the sequences packed into a batch of one.

    Returns:
        ([B, Sq, H, Dv], None)

    Raises:
        NotImplementedError: the layer hands over something else that decides what is computed.
    """
    for name in _NOT_WRITTEN:
        if others.get(name) is not None:
            layer = f"fastlm.compat.hf: {type(module).__name__} passes {name}"
            raise NotImplementedError(f"{layer}, which is not written; attn_implementation='eager'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    rows = query.shape[2]
    causal = is_causal and attention_mask is None and rows > 1
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    if causal and not packed:
        key, value = key[:, :, :rows], value[:, :, :rows]
    window = None
    if sliding_window is not None and attention_mask is None:
        window = (sliding_window - 1, -1 if is_causal else sliding_window - 1)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    plain = not packed and window is None and not softcap and s_aux is None
    if plain and (position_bias is None or not causal):
        if position_bias is not None:
            mask = _added(query, key.shape[2], mask, position_bias)
        out = scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    ends = "bottom_right" if packed or rows == key.shape[2] else "top_left"
    options: dict[str, Any] = {
        "mask": AttnMask.causal(ends) if causal or (packed and is_causal) else None,
        "window": window,
        "softcap": softcap or 0.0,
        "sink": s_aux,
        "scale": scaling,
        "dropout_p": dropout,
        "bias": _added(query, key.shape[2], mask, position_bias),
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if packed:
        options |= {"cu_seqlens_q": cu_seq_lens_q, "cu_seqlens_k": cu_seq_lens_k, "layout": "thd"}
        options |= {"max_seqlen_q": max_length_q, "max_seqlen_k": max_length_k}
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    found = attention(q, k, v, **options)
    assert isinstance(found, Tensor)
    return found.view(query.shape[0], query.shape[2], *found.shape[-2:]), None
