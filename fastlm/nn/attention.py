"""MultiheadAttention: a drop-in for torch.nn.MultiheadAttention on fastlm's kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, dispatch
from ..ops.attention.mask import AttnMask
from ..ops.attention.op import attention
from .functional import Masks, as_bias, attend, ordinary

Window = tuple[int | None, int | None]
# log2 of the multiply-adds below which PyTorch's fused module is faster, without masks and
# gradient, by 4-byte and 2-byte elements: AMD EPYC (Zen 5, AVX-512), 2 cores, 2026-11
_FUSED_BELOW = {4: 24, 2: 28}


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on fastlm's kernels: same constructor, parameters, state_dict,
    errors, results.

    `need_weights=False` is the fast call: no matrix of weights, and no copies between the
    projections and the attention. `need_weights=True`, PyTorch's default, computes the matrix as
    PyTorch does. A query that attends to nothing gives the output bias with the first and NaN with
    the second, both as in PyTorch.

    In `eval()` without gradients and masks a small call is PyTorch's, and an
    nn.TransformerEncoderLayer reads the parameters and runs PyTorch's own kernel, to the same
    result; with `num_kv_heads` or `window` neither happens. torch.jit.script puts PyTorch's module,
    on the same parameters, in the place of this one.

    Args:
        num_kv_heads: heads of key and value, a divisor of num_heads; the parameters are then
            q_proj_weight, k_proj_weight, v_proj_weight, as with kdim and vdim.
        window: (left, right) keys around the query's position, see `fastlm.attention`.
        The rest as in torch.nn.MultiheadAttention.
    """

    # of the class, so that a module whose class was changed in place has them
    num_kv_heads: int | None = None
    window: Window | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: Window | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        if num_kv_heads not in (None, num_heads):
            if num_kv_heads <= 0 or num_heads % num_kv_heads:
                expected = f"a divisor of num_heads = {num_heads}"
                checks.bad_value("nn.MultiheadAttention", "num_kv_heads", expected, num_kv_heads)
            self.num_kv_heads = num_kv_heads
            self._share_heads(num_kv_heads)
        if window is not None:
            self.window = window
        if self.extended:
            # PyTorch's fused encoder layer asks for this before it reads the parameters
            self._qkv_same_embed_dim = False

    @property
    def extended(self) -> bool:
        """Computes something that torch.nn.MultiheadAttention cannot."""
        return self.num_kv_heads is not None or self.window is not None

    def _share_heads(self, heads: int) -> None:
        size, like = heads * self.head_dim, self.out_proj.weight
        self.register_parameter("in_proj_weight", None)
        features = (self.embed_dim, self.kdim, self.vdim)
        for name, rows, columns in zip("qkv", (self.embed_dim, size, size), features, strict=True):
            weight = nn.Parameter(like.new_empty(rows, columns))
            self.register_parameter(f"{name}_proj_weight", weight)
        if self.in_proj_bias is not None:
            self.in_proj_bias = nn.Parameter(like.new_empty(self.embed_dim + 2 * size))
        if self.bias_k is not None:
            self.bias_k = nn.Parameter(like.new_empty(1, 1, size))
            self.bias_v = nn.Parameter(like.new_empty(1, 1, size))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        if self.in_proj_weight is not None:
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: PyTorch's module on the same parameters, which it can compile."""
        if self.extended:
            return self
        plain = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        plain.__dict__ = self.__dict__.copy()
        return plain

    def extra_repr(self) -> str:
        names = ("num_kv_heads", "window")
        return ", ".join(f"{n}={getattr(self, n)}" for n in names if getattr(self, n) is not None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: AttnMask | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention.

        Args:
            mask: an `AttnMask`, beside the masks of PyTorch. With it, cu_seqlens, num_kv_heads or a
                window, is_causal needs no attn_mask and a query without keys gives weights of 0.
            cu_seqlens: int32 [sequences + 1]; query, key and value are packed sequences [T, E] that
                start there, without PyTorch's masks and with need_weights=False.
        """
        extended = self.extended or mask is not None or cu_seqlens is not None
        masks = (key_padding_mask, attn_mask)
        tensors = [x for x in (query, key, value, *masks) if x is not None]
        plain = ordinary(*tensors, self.out_proj.weight)
        ours = plain and not need_weights and self._fits(query, key, value, *masks)
        ours = ours and not (len(tensors) == 3 and self._fused(query, key, value))
        if not extended and not ours:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        if not extended and is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if cu_seqlens is not None:
            if need_weights or any(m is not None for m in masks):
                expected = "False, and masks an AttnMask, with cu_seqlens"
                checks.bad_value("nn.MultiheadAttention", "need_weights", expected, need_weights)
            return self._packed(query, key, value, cu_seqlens, mask, is_causal), None
        if not self._fits(query, key, value, *masks):
            got = ", ".join(str(list(x.shape)) for x in tensors)
            expected = "shaped as in torch.nn.MultiheadAttention"
            checks.bad_value("nn.MultiheadAttention", "inputs and masks", expected, got)
        found = self._masks(query, key, masks, is_causal, extended)
        found.mask, found.window = mask, self.window
        q, k, v = self._project(query, key, value)
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._added_keys(k, v)
        if need_weights or not plain:
            out, weights = self._with_weights(q, k, v, found)
        else:
            out, weights = self._attend(q, k, v, found), None
        out = self._output(out, query.dim() == 3)
        if weights is None or not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if query.dim() == 3 else weights[0]

    def _fits(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:  # fmt: skip
        """False: PyTorch says what is wrong."""
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            return False
        if key.shape[:-1] != value.shape[:-1]:
            return False
        sequence = 1 if self.batch_first and dims == 3 else 0
        batch = query.shape[1 - sequence] if dims == 3 else 1
        if dims == 3 and key.shape[1 - sequence] != batch:
            return False
        features = (query.shape[-1], key.shape[-1], value.shape[-1])
        if features != (self.embed_dim, self.kdim, self.vdim):
            return False
        dtypes = [m.dtype for m in (padding, attn_mask) if m is not None]
        if len(set(dtypes)) > 1 or any(
            d not in (torch.bool, torch.float32, query.dtype) for d in dtypes
        ):
            return False
        rows, keys = query.shape[sequence], key.shape[sequence]
        if padding is not None and padding.shape != ((batch, keys) if dims == 3 else (keys,)):
            return False
        shapes = ((rows, keys), (batch * self.num_heads, rows, keys))
        return attn_mask is None or tuple(attn_mask.shape) in shapes

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether PyTorch's own forward would be one fused, faster call; without masks."""
        if self.training or torch.is_grad_enabled() or dispatch.forced() is not None:
            return False
        if not self.batch_first or query.dim() != 3 or query is not key or key is not value:
            return False
        work = 2 * query.shape[0] * query.shape[1] ** 2 * self.embed_dim
        return query.device.type == "cpu" and work < 1 << _FUSED_BELOW.get(query.element_size(), 0)

    def _masks(
        self, query: Tensor, key: Tensor, masks: tuple[Tensor | None, Tensor | None],
        is_causal: bool, extended: bool,
    ) -> Masks:  # fmt: skip
        padding, attn_mask = masks
        found = Masks()
        # PyTorch takes the hint for the mask only where there is no padding
        if is_causal and (padding is None or attn_mask is None):
            attn_mask, found.alignment = None, "top_left"
        added = (self.bias_k is not None) + self.add_zero_attn
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
        if attn_mask is not None:
            shape = (-1, self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            attn_mask = attn_mask.view(*shape, *attn_mask.shape[-2:])
        for mask in (padding, attn_mask):
            if mask is None:
                continue
            mask = F.pad(mask, (0, added)) if added else mask
            if mask.dtype == torch.bool:
                found.keep.append(~mask)
            else:
                found.bias = mask if found.bias is None else found.bias + mask
        return found

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """[B, S, heads, D]; views of one product where inputs are the same tensor."""
        size = (self.num_kv_heads or self.num_heads) * self.head_dim
        sizes = [self.embed_dim, size, size]
        bias = self.in_proj_bias
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.split(sizes)
            given = zip((query, key, value), weights, biases, strict=True)
            parts = [F.linear(x, w, b) for x, w, b in given]
        elif query is key and key is value:
            parts = list(F.linear(query, self.in_proj_weight, bias).split(sizes, -1))
        else:
            groups = (sizes[:1], sizes[1:]) if key is value else tuple([n] for n in sizes)
            totals = [sum(group) for group in groups]
            weights = self.in_proj_weight.split(totals)
            biases = (None,) * len(groups) if bias is None else bias.split(totals)
            parts = []
            for x, w, b, group in zip((query, key, value), weights, biases, groups, strict=False):
                parts += F.linear(x, w, b).split(group, -1)
        parts = [x.unflatten(-1, (-1, self.head_dim)) for x in parts]
        if query.dim() == 2:
            return [x[None] for x in parts]
        return parts if self.batch_first else [x.transpose(0, 1) for x in parts]

    def _added_keys(self, k: Tensor, v: Tensor) -> list[Tensor]:
        grown = []
        for x, bias in ((k, self.bias_k), (v, self.bias_v)):
            more = [x]
            if bias is not None:
                shape = (1, 1, *x.shape[2:])
                more.append(bias.view(shape).expand(x.shape[0], *shape[1:]))
            if self.add_zero_attn:
                more.append(x.new_zeros(x.shape[0], 1, *x.shape[2:]))
            grown.append(torch.cat(more, 1))
        return grown

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        out = attend(q, k, v, masks, self._dropout_p, None)
        if out is not None:
            return out
        alone = len(masks.keep) == 1 and masks.bias is None
        mask = masks.keep[0] if alone else as_bias(masks, q.dtype)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        is_causal = masks.alignment is not None
        if is_causal and mask is not None:
            causal = AttnMask.causal("top_left").to_dense(q.shape[1], k.shape[1]).to(q.device)
            masks.keep.append(causal[None, None])
            mask, is_causal = as_bias(masks, q.dtype), False
        out = F.scaled_dot_product_attention(
            query, key, value, mask, self._dropout_p, is_causal,
            enable_gqa=self.num_kv_heads is not None,
        )  # fmt: skip
        return out.transpose(1, 2)

    def _with_weights(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """The matrix in plain PyTorch, where PyTorch's module does not know the mask."""
        rows, keys = q.shape[1], k.shape[1]
        terms = [] if masks.mask is None else [masks.mask]
        if masks.window is not None:
            terms.append(AttnMask.window(*masks.window))
        if masks.alignment is not None:
            terms.append(AttnMask.causal(masks.alignment))
        masks.keep += [term.to_dense(rows, keys).to(q.device) for term in terms]
        bias = as_bias(masks, q.dtype)
        groups = self.num_heads // k.shape[2]
        key, value = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
        scores = (q * self.head_dim**-0.5).transpose(1, 2) @ key.transpose(-1, -2)
        scores = scores if bias is None else scores + bias
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        weights = F.dropout(weights, self._dropout_p) if self._dropout_p else weights
        return (weights @ value).transpose(1, 2), weights

    def _output(self, out: Tensor, batched: bool) -> Tensor:
        out = out if self.batch_first or not batched else out.transpose(0, 1)
        out = F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return out if batched else out[0]

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor,
        mask: AttnMask | None, is_causal: bool,
    ) -> Tensor:  # fmt: skip
        if self.bias_k is not None or self.add_zero_attn:
            expected = "False with cu_seqlens"
            checks.bad_value("nn.MultiheadAttention", "add_bias_kv, add_zero_attn", expected, True)
        for what, x, size in (
            ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)
        ):  # fmt: skip
            rows = None if x is query else query.shape[0]
            checks.shape("nn.MultiheadAttention", what, x, (rows, size), "[T, E]")
        q, k, v = (x[0] for x in self._project(query, key, value))
        if is_causal:
            mask = AttnMask.causal() if mask is None else mask & AttnMask.causal()
        out = attention(
            q, k, v, mask=mask, window=self.window, dropout_p=self._dropout_p, layout="thd",
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return F.linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)
