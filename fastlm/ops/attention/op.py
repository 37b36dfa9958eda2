"""Softmax attention with every usual mask, forward and backward, without the [Sq, Sk] matrix.

Contract: `reference.py` holds the mathematics. The torch op works on [B, S, H, D]; a packed batch
is B = 1 with cu_seqlens. A mask arrives as a band around the diagonal (left, right; -1 is no
limit) and, where that does not say it, as intervals of keys lo, hi [B|1, H|1, Sq] int32. Saved for
backward: the inputs, out, and lse [B, H, Sq] (natural logarithm, the sink included, -inf in a row
that attends to nothing), float32 or, for float64 inputs, float64. Dropout draws its mask again in
the backward, from the seed. Sums run in a fixed order: deterministic.

Backends: triton (everything but float64, head sizes above 256, and float32 heads above 128 with
bias or dropout; a packed sequence gives the bits that it gives alone; inside `hopper.use` the
Hopper kernels of `gluon_kernels.py` where they take the call), cpu (everything but float64; the
same bits on any number of threads, and for a sequence alone, in a batch or packed), torch (the CPU
flash kernel of PyTorch: full or square causal attention without the other options; its backward
takes no gradient through lse), reference (everything; blocks of query rows, memory O(S)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ... import checks, dispatch, extension, library, triton_backend
from . import arguments, cpu_kernels, hopper, reference
from .mask import AttnMask

if TYPE_CHECKING:
    from typing import Literal

    from typing_extensions import Unpack

    from .signatures import Options as Signature

_SHARED = (
    "Tensor? lo, Tensor? hi, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, "
    "Tensor? sink, Tensor? bias, Tensor? seed, float scale, SymInt left, SymInt right, "
    "float softcap, float dropout_p"
)
_COUNT = 13  # arguments in _SHARED


def _check_starts(what: str, starts: Tensor | None, total: int) -> None:
    if starts is None or starts.device.type != "cpu":
        return
    values = starts.tolist()
    if values[0] != 0 or values[-1] > total or values != sorted(values):
        expected = f"non-decreasing from 0 to at most {total}"
        checks.bad_value("attention", what, expected, values)


def _check_values(named: dict[str, Any]) -> None:
    _check_starts("cu_seqlens_q", named["cu_seqlens_q"], named["q"].shape[1])
    _check_starts("cu_seqlens_k", named["cu_seqlens_k"], named["k"].shape[1])


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _size = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty(batch, heads, rows, dtype=wide)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    given, needs = rest[2 : 2 + _COUNT], rest[-1]
    extra = [
        x.new_empty(x.shape) if need and x is not None else _empty(q)
        for x, need in zip(given[4:7], needs, strict=True)
    ]
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *extra)


_FORWARD = library.define(
    "attention",
    "forward",
    f"(Tensor q, Tensor k, Tensor v, {_SHARED}) -> (Tensor, Tensor)",
    _fake_forward,
    _check_values,
)
_BACKWARD = library.define(
    "attention",
    "backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SHARED}, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return reference.forward(q, k, v, reference.Options(*given))


def _reference_backward(*args: Any) -> tuple[Tensor, ...]:
    dout, dlse, q, k, v, _out, lse, *shared, needs = args
    given = reference.Options(*shared)
    found = reference.backward(dout, dlse, q, k, v, lse, given, tuple(needs))
    optional = (
        (found.alibi_slopes, given.alibi_slopes),
        (found.sink, given.sink),
        (found.bias, given.bias),
    )
    return (
        *(d.to(x.dtype).contiguous() for d, x in ((found.q, q), (found.k, k), (found.v, v))),
        *(_empty(q) if d is None or x is None else d.to(x.dtype) for d, x in optional),
    )


_SHARES_HEADS = torch.__version__ >= "2.13"
_ATEN = "_scaled_dot_product_flash_attention_for_cpu"


def _heads_first(x: Tensor) -> Tensor:
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    options = reference.Options(*given)
    out, lse = getattr(torch.ops.aten, _ATEN)(
        *(_heads_first(x) for x in (q, k, v)), 0.0, options.right == 0, scale=options.scale
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _torch_backward(*args: Any) -> tuple[Tensor, ...]:
    dout, _, q, k, v, out, lse, *given, _needs = args
    options = reference.Options(*given)
    # that kernel reads lse as [B, Sq, H]
    rows_first = lse.transpose(1, 2).contiguous().transpose(1, 2)
    grads = getattr(torch.ops.aten, _ATEN + "_backward")(
        *(_heads_first(x) for x in (dout, q, k, v, out)),
        rows_first,
        0.0,
        options.right == 0,
        scale=options.scale,
    )
    return (*(d.transpose(1, 2).contiguous() for d in grads), *(_empty(q) for _ in range(3)))


def _torch_refuses(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> str | None:
    if named.get("dlse") is not None:
        return "it has no gradient through lse"
    for what in ("lo", "cu_seqlens_q", "alibi_slopes", "sink", "bias"):
        if named[what] is not None:
            return f"it has no {what}"
    if named["softcap"] > 0 or named["dropout_p"] > 0:
        return "it has neither softcap nor dropout"
    square_causal = named["right"] == 0 and q.shape[1] == k.shape[1]
    if named["left"] >= 0 or not (square_causal or named["right"] < 0):
        return "its only mask is causal with as many queries as keys"
    if q.shape[3] != v.shape[3]:
        return "it needs equal head sizes"
    if q.shape[2] != k.shape[2] and not _SHARES_HEADS:
        return "it shares key heads from torch 2.13 on"
    if q.numel() == 0 or k.numel() == 0:
        return "a tensor is empty"
    return None


_OPTIONS = tuple(reference.Options.__dataclass_fields__)


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    from . import triton_forward

    named = dict(zip(_OPTIONS, given, strict=True))
    ours = hopper if hopper.refuses(q, k, v, **named) is None else triton_forward
    return ours.forward(q, k, v, *given)


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from . import triton_backward

    dout, _, q, k, v, _, _, *given, _ = args
    named = dict(zip(_OPTIONS, given, strict=True))
    ours = hopper if hopper.refuses(q, k, v, dout=dout, **named) is None else triton_backward
    return ours.backward(*args)


def _triton_refuses(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> str | None:
    size = max(q.shape[3], v.shape[3])
    if q.dtype == torch.float64:
        return "takes float32, bfloat16 and float16, not float64"
    if size > 256:
        return f"takes head sizes to 256, not {size}"
    if q.dtype == torch.float32 and size > 128:
        if named["bias"] is not None or named["dropout_p"] > 0:
            return "takes float32 heads to 128 with bias or dropout: no tile fits the registers"
    if max(q.shape[1], k.shape[1]) >= 2**28:
        return "takes fewer than 2^28 rows"
    return None


dispatch.register(
    "attention",
    "triton",
    _triton_forward,
    _triton_backward,
    devices=triton_backend.devices,
    unavailable=triton_backend.unavailable,
    refuses=_triton_refuses,
    proven=False,
)
dispatch.register(
    "attention",
    "cpu",
    cpu_kernels.forward,
    cpu_kernels.backward,
    devices=("cpu",),
    unavailable=extension.unavailable,
    refuses=cpu_kernels.refuses,
)
dispatch.register(
    "attention",
    "torch",
    _torch_forward,
    _torch_backward,
    devices=("cpu",),
    unavailable=None if hasattr(torch.ops.aten, _ATEN) else "this torch has no CPU flash kernel",
    refuses=_torch_refuses,
)
dispatch.register("attention", "reference", _reference_forward, _reference_backward)


class _Attention(torch.autograd.Function):
    # lse is an output only where asked for: a compiled graph hands in zeros as the gradient of an
    # unused one, and not every backend takes a gradient of lse
    @staticmethod
    def forward(ctx: Any, return_lse: bool, *args: Any) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, lse = _FORWARD(*args)
        tensors, ctx.options = args[:11], args[11:]
        ctx.save_for_backward(*tensors, out, lse)
        return (out, lse) if return_lse else out

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Any, ...]:
        q, k, v, *given, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        needs = list(ctx.needs_input_grad[8:11])
        dq, dk, dv, *extra = _BACKWARD(dout, dlse, q, k, v, out, lse, *given, *ctx.options, needs)
        optional = [d if need else None for d, need in zip(extra, needs, strict=True)]
        return (None, dq, dk, dv, *(None,) * 4, *optional, *(None,) * 6)


_TO_BSHD: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda x: x,
    "bhsd": lambda x: x.transpose(1, 2),
    "thd": lambda x: x[None],
}
_FROM_BSHD: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda x: x,
    "bhsd": lambda x: x.transpose(1, 2),
    "thd": lambda x: x[0],
}


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **rest: Unpack[Signature]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **rest: Unpack[Signature]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **rest: Unpack[Signature]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: str | AttnMask | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    layout: str = "bshd",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: softmax(scale * q k^T, masked) v, without the matrix of scores.

    Same as, for layout "bhsd", equal head counts and no option:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)

    Positions are aligned at the end ("bottom right"): with Sq queries and Sk keys, query i stands
    on key i + Sk - Sq. A query that attends to nothing gives 0 and passes no gradient.

    Args:
        q, k, v: layout "bshd": [B, Sq, H, D], [B, Sk, Hk, D], [B, Sk, Hk, Dv]; "bhsd": heads before
            length; "thd": packed sequences [Tq, H, D], [Tk, Hk, D], [Tk, Hk, Dv]. H is a multiple
            of Hk: query heads g * H / Hk ... share key head g. Any float dtype; sums in float32.
        mask: None, "causal" or an `AttnMask`.
        scale: D**-0.5 by default.
        window: (left, right) keys around the query's position, inclusive; -1 or None: no limit.
        softcap: c > 0 makes a score c * tanh(score / c), before the additions below.
        alibi_slopes: [H] or [B, H]; adds -slope * distance of positions. Differentiable.
        sink: [H], a logit that takes part in each softmax without a value. Differentiable.
        bias: broadcasts to [B, H, Sq, Sk] (B = 1 when packed), added to the scores; -inf masks.
            Differentiable.
        dropout_p, seed: drops probabilities; the mask is a function of the seed (an int or int64
            []), None draws one from PyTorch's generator.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], with "thd" only. Rows behind the last
            sequence give 0.
        max_seqlen_q, max_seqlen_k: length of the longest sequence, if known; never needed.
        return_lse: also return the log-sum-exp of the scores, the sink included.

    Returns:
        out, in the layout and dtype of q with head size Dv; with `return_lse` also lse, [B, H, Sq]
        or [H, Tq], float32 (float64 for float64), natural logarithm, -inf where a query attends to
        nothing. Both are differentiable, once.

    Raises:
        ValueError: a shape or option differs from the above. TypeError: a dtype does.

    Source: Dao 2023 (arXiv:2307.08691); ALiBi, Press et al. 2022 (arXiv:2108.12409); sinks, Xiao et
    al. 2024 (arXiv:2309.17453).
    """
    q, k, v = (_TO_BSHD[layout](x) for x in arguments.check_tensors(q, k, v, layout))
    arguments.check_shapes(q, k, v, layout)
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    arguments.check_starts(layout, starts, q)
    arguments.check_per_head("alibi_slopes", alibi_slopes, q, batched=True)
    arguments.check_per_head("sink", sink, q, batched=False)
    if not softcap >= 0:
        checks.bad_value("attention", "softcap", ">= 0", softcap)
    limits = arguments.resolve_mask(mask, window, q, k, (cu_seqlens_q, cu_seqlens_k))
    lo, hi = limits.lo, limits.hi
    if lo is not None and hi is not None and lo.shape != hi.shape:
        lo, hi = (x.contiguous() for x in torch.broadcast_tensors(lo, hi))
    found = _Attention.apply(
        return_lse,
        *library.distinct(q, k, v, lo, hi, cu_seqlens_q, cu_seqlens_k),
        alibi_slopes,
        sink,
        None if bias is None else arguments.four_dims(bias, q, k.shape[1]),
        arguments.seed_tensor(seed, dropout_p, q),
        q.shape[3] ** -0.5 if scale is None else float(scale),
        limits.left,
        limits.right,
        float(softcap),
        float(dropout_p),
    )
    if not return_lse:
        return _FROM_BSHD[layout](found)
    out, lse = found
    return _FROM_BSHD[layout](out), lse[0] if layout == "thd" else lse
