"""Attention with the call and the meaning of torch.nn.functional, on fastlm's kernels.

Contract: a call goes to `fastlm.attention` where a compiled kernel of fastlm takes it, and else to
PyTorch's own function: where only `reference` or PyTorch's own kernel would run, on a GPU until its
kernels are proven, for calls on the CPU too small to gain, for nested tensors, tensor subclasses
and torch.func, and for every call that PyTorch answers with an error. Inside `use_backend` it goes
to that backend of `fastlm.attention`.
A boolean mask whose rows are runs of keys costs 16 bytes a row there and skips what it forbids. To
find that out on the CPU costs about as much as turning the mask into a bias; it is done where the
mask covers at least four (batch, head) pairs, outside a trace. Else a mask becomes a bias.
Rows that attend to nothing give 0 and pass no gradient, as in PyTorch.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, dispatch
from ..ops.attention.mask import AttnMask, first_runs, is_runs
from ..ops.attention.op import attention

# scores per element of a mask from which on its runs are looked for
_SHARED_BY = 4
# rows looked at first: a mask of another kind is told by them
_SAMPLED = 16
_KERNELS = ("cuda", "triton", "cpu")
# PyTorch's own, also in a program that puts ours in its place
_PYTORCH = F.scaled_dot_product_attention
# log2 of the multiply-adds from which on a call is worth ours, in the order: without and with
# boolean masks, without and with gradient. By 4-byte and 2-byte elements; AMD EPYC (Zen 5,
# AVX-512), 2 cores, 2026-11: a call costs 0.1 ms more than PyTorch's, 0.3 ms with such a mask
_LEAST = {4: (24, 24, 26, 25), 2: (22, 22, 25, 23)}


@dataclass
class Masks:
    """What forbids keys: all of `keep` ([B|1, H|1, Sq|1, Sk|1], True stays) and `alignment`
    ("top_left", "bottom_right" or None: not causal); `bias` of the same shapes is added. With an
    `AttnMask` or a window the call is always ours."""

    keep: list[Tensor] = field(default_factory=list)
    bias: Tensor | None = None
    alignment: str | None = None
    mask: AttnMask | None = None
    window: tuple[int | None, int | None] | None = None


def tracing() -> bool:
    """Values of tensors cannot be read, or would be taken as constants of the trace."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def ordinary(*tensors: Any) -> bool:
    """Plain tensors outside torch.func transforms, which an autograd.Function cannot take."""
    return (
        all(isinstance(x, Tensor) for x in tensors)
        and not torch.overrides.has_torch_function(tensors)
        and not torch._C._are_functorch_transforms_active()
        and not any(x.is_nested or x.device.type not in ("cpu", "cuda") for x in tensors)
        and len({x.device for x in tensors}) == 1
    )


def large_enough(q: Tensor, k: Tensor, v: Tensor, masked: bool) -> bool:
    """Of calls on the CPU: smaller ones are PyTorch's."""
    least = _LEAST.get(q.element_size())
    if least is None or q.device.type != "cpu":
        return True
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[1] == 1 and q.element_size() == 4 and not trained:
        return False  # one query of float32: torch 1.1x faster, the same machine
    work = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] * (q.shape[3] + v.shape[3])
    return work >= 1 << least[2 * masked + trained]


def _tiny(query: Tensor, key: Tensor, value: Tensor, masked: bool) -> bool:
    """Four-dimensional calls that `large_enough` would give to PyTorch, before any other look."""
    if not (type(query) is type(key) is type(value) is Tensor and query.is_cpu):
        return False
    if not query.dim() == key.dim() == value.dim() == 4 or key.shape[2] != value.shape[2]:
        return False
    least = _LEAST.get(query.element_size())
    if least is None or dispatch.forced() is not None:
        return False
    work = query.numel() * key.shape[2] * 2
    return work < 1 << min(least[2 * masked : 2 * masked + 2])


def kernel_takes(q: Tensor, k: Tensor, v: Tensor, masks: Masks, runs: bool, drop: bool) -> bool:
    """Whether a kernel of ours would run this call; q, k, v are [B, S, H, D]."""
    if dispatch.forced() is not None or masks.mask is not None or masks.window is not None:
        return True
    if not large_enough(q, k, v, bool(masks.keep)):
        return False
    rows = q.shape[1]
    square = rows == k.shape[1]
    banded = masks.alignment is not None and (square or masks.alignment == "bottom_right")
    interval = None
    if runs or (masks.alignment is not None and not banded):
        interval = torch.empty(1, 1, rows, dtype=torch.int32, device=q.device)
    bias = masks.bias
    if bias is None and masks.keep and not runs:
        shape = torch.broadcast_shapes(*(keep.shape for keep in masks.keep))
        bias = q.new_empty(()).expand(shape)
    names = ("cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sink")
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "lo": interval, "hi": interval}
    named |= dict.fromkeys(names) | {"bias": bias, "seed": None, "scale": 1.0, "left": -1}
    named |= {"right": 0 if banded else -1, "softcap": 0.0, "dropout_p": 0.5 if drop else 0.0}
    return dispatch.preferred("attention", "forward", named) in _KERNELS


def _runs_of(keep: Tensor, rows: int, keys: int) -> AttnMask | None:
    """The intervals of a dense mask, or None where some row is no run of keys."""
    keep = keep.expand(*keep.shape[:3], keys)
    step = max(1, keep.shape[2] // _SAMPLED)
    for part in (keep[:, :, ::step], keep) if step > 1 else (keep,):
        lo, hi = first_runs(part)
        if not bool(is_runs(part, lo, hi).all()):
            return None
    return AttnMask.intervals(*(x.expand(*x.shape[:2], rows) for x in (lo, hi)))


def _worth_a_look(keep: list[Tensor], q: Tensor, keys: int) -> bool:
    scores = q.shape[0] * q.shape[2] * q.shape[1] * keys
    elements = sum(x.numel() for x in keep)
    return q.device.type == "cpu" and _SHARED_BY * elements <= scores and not tracing()


def as_bias(masks: Masks, dtype: torch.dtype) -> Tensor | None:
    """One additive mask out of `keep` and `bias`."""
    bias = masks.bias
    for keep in masks.keep:
        if bias is None:
            bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
        bias = torch.where(keep, bias, -math.inf)
    return bias


def attend(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, dropout_p: float, scale: float | None
) -> Tensor | None:
    """[B, S, H, D] -> [B, Sq, H, Dv] by a kernel of ours; None where none of them takes it."""
    terms: list[AttnMask] = [] if masks.mask is None else [masks.mask]
    if masks.alignment is not None:
        square = q.shape[1] == k.shape[1]
        terms.append(AttnMask.causal("bottom_right" if square else masks.alignment))
    drop, bias, runs = dropout_p > 0, masks.bias, None
    if masks.keep and _worth_a_look(masks.keep, q, k.shape[1]):
        if kernel_takes(q, k, v, masks, True, drop):
            runs = [_runs_of(keep, q.shape[1], k.shape[1]) for keep in masks.keep]
    if runs is not None and all(runs):
        terms += [term for term in runs if term is not None]
    elif not kernel_takes(q, k, v, masks, False, drop):
        return None
    else:
        bias = as_bias(masks, q.dtype)
    mask = functools.reduce(operator.and_, terms) if terms else None
    window = masks.window
    out = attention(q, k, v, mask=mask, scale=scale, window=window, bias=bias, dropout_p=dropout_p)
    assert isinstance(out, Tensor)
    return out


def _masks(mask: Tensor | None, is_causal: bool, dims: int, full: list[int]) -> Masks | None:
    """None: PyTorch answers, with an error most often. `full` is [B, H, Sq, Sk]."""
    if mask is None:
        return Masks(alignment="top_left" if is_causal else None)
    padded = [1] * (4 - mask.dim()) + list(mask.shape)
    fits = all(n in (1, m) for n, m in zip(padded, full, strict=False))
    if is_causal or not 2 <= mask.dim() <= min(4, dims) or not fits:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    return Masks(keep=[mask]) if mask.dtype == torch.bool else Masks(bias=mask)


def _is_causal_bias(mask: Any) -> bool:
    """Whether it is a torch.nn.attention.bias.CausalBias."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def _bias_of_torch(mask: Any, rows: int, keys: int) -> str | None:
    """The alignment of a causal bias of PyTorch; None: it is something else."""
    if not _is_causal_bias(mask):
        return None
    if mask.variant.name == "UPPER_LEFT":
        return "top_left"
    return "bottom_right" if (mask.seq_len_q, mask.seq_len_kv) == (rows, keys) else None


def _joined(shapes: list[list[int]]) -> list[int] | None:
    """The shape that all broadcast to, or None."""
    joined = []
    for size, *others in zip(*shapes, strict=True):
        # by comparison alone: a set would turn the size of a dynamic dimension into a constant
        for n in others:
            if size == 1:
                size = n
            elif n != 1 and n != size:
                return None
        joined.append(size)
    return joined


def _heads_last(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[list[Tensor], list[int]] | None:
    """[..., H, S, D] as [B, S, H, D], broadcast as PyTorch does, and the shape [..., H] of the
    result; None: PyTorch answers."""
    dims = query.dim()
    if dims < 2 or key.dim() != dims or value.dim() != dims or key.shape[-1] != query.shape[-1]:
        return None
    if key.shape[-2] != value.shape[-2]:
        # PyTorch's CPU kernel reads past the end of value
        got = f"{list(key.shape)} and {list(value.shape)}"
        raise RuntimeError(f"fastlm.sdpa: key and value must be equally long, got {got}")
    tensors = [x[(None,) * (4 - dims)] if dims < 4 else x for x in (query, key, value)]
    heads = [x.shape[-3] for x in tensors]
    shared = heads[1] == heads[2] and (enable_gqa or heads[1] == 1)
    if shared and (heads[1] == 0 or heads[0] % heads[1] or (enable_gqa and dims < 3)):
        return None
    if enable_gqa and not shared:
        return None
    lead = _joined([list(x.shape[: -3 if shared else -2]) for x in tensors])
    if lead is None:
        return None
    wanted = [[*lead, x.shape[-3]] if shared else lead for x in tensors]
    tensors = [x.expand(*w, *x.shape[-2:]) for x, w in zip(tensors, wanted, strict=True)]
    if 0 in (tensors[0].shape[-3], query.shape[-1], value.shape[-1]):
        return None
    four = [x.flatten(0, -4).transpose(1, 2) for x in tensors]
    return four, list(tensors[0].shape[:-2])[max(0, 4 - dims) :]


def _called(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> Tensor | None:  # fmt: skip
    if not ordinary(query, key, value) or query.dim() < 2 or key.dim() < 2:
        return None
    rows, keys = query.shape[-2], key.shape[-2]
    alignment = _bias_of_torch(attn_mask, rows, keys)
    if alignment is not None and not is_causal:
        attn_mask = None
    if attn_mask is not None and not ordinary(query, attn_mask):
        return None
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or not dtypes <= set(checks.FLOATS) or not 0.0 <= dropout_p <= 1.0:
        return None
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return None
    four = _heads_last(query, key, value, enable_gqa)
    if four is None:
        return None
    (q, k, v), lead = four
    masks = _masks(attn_mask, is_causal, query.dim(), [q.shape[0], q.shape[2], rows, keys])
    if masks is None:
        return None
    if alignment is not None:
        masks.alignment = alignment
    out = attend(q, k, v, masks, dropout_p, scale)
    if out is None:
        return None
    return out.transpose(1, 2).reshape(*lead, rows, value.shape[-1])


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, by the kernels of `fastlm.attention`.

    Same as:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p,
            is_causal, scale=scale, enable_gqa=enable_gqa)

    Args:
        query, key, value: [..., H, Sq, D], [..., H, Sk, D], [..., H, Sk, Dv].
        attn_mask: booleans, True where a key is attended to, or floats to add to the scores, that
            broadcast to [..., H, Sq, Sk]; or a causal bias of torch.nn.attention.bias. Floats are
            differentiable.
        dropout_p: applied whenever it is above 0; the mask follows PyTorch's generator, but is not
            the one that PyTorch's function would draw.
        is_causal: query i attends to keys 0 ... i ("top left", whatever the lengths).
        scale: D**-0.5 by default.
        enable_gqa: H of key and value may be a divisor of that of query.

    Returns:
        [..., H, Sq, Dv] in the dtype of query; differentiable once where a kernel of ours ran.

    Raises:
        What PyTorch raises; RuntimeError where key and value differ in length.
    """
    boolean = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
    if not _tiny(query, key, value, boolean):
        out = _called(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    function, mask = _PYTORCH, attn_mask  # type: Any, Any
    if _PYTORCH is not F.scaled_dot_product_attention and _is_causal_bias(mask):
        # such a bias knows PyTorch's function by its place there
        function = mask._dispatch
    return function(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
