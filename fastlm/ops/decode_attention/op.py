"""Attention of a few new queries over a cache of keys and values, which it may extend in place.

Contract: `reference.py` holds the mathematics. q [B, Sq, H, D]; the caches are [rows, S, Hk, D(v)],
or blocks [blocks, block_size, Hk, D(v)] that an int32 table [B, max_blocks] puts in order. Two
torch ops: `decode_attention` reads the caches, `decode_attention_append` first writes k_new and
v_new into them (its schema says so) and then attends to them too. Nothing is saved for a backward:
an inference op. lse [B, H, Sq] is the natural logarithm, the sink included, -inf in a row that
attends to nothing; float32, or float64 for float64. On the CPU lengths and indices out of range
raise IndexError before anything is written; on a GPU such a row is NaN and appends nothing.

Backends: cpu (C++; float32, bfloat16, float16, head size to 1024; a row gives the same bits alone,
in any batch and on any number of threads), triton (all but float64 and heads above 256; keys in
parts that follow from the capacity of the cache), reference (everything; on a GPU it gathers the
whole cache).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from ... import dispatch, extension, library, triton_backend
from ..attention.arguments import floats, last_contiguous
from . import arguments, reference

if TYPE_CHECKING:
    from typing import Literal

    from typing_extensions import Unpack

    from .signatures import Options as Signature

_SHARED = (
    "Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? alibi_slopes, "
    "Tensor? sink, float scale, SymInt left, SymInt right, float softcap, SymInt num_splits"
)

Result = tuple[Tensor, Tensor]


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> Result:
    batch, rows, heads, _size = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(batch, rows, heads, v_cache.shape[3]),
        q.new_empty(batch, heads, rows, dtype=wide),
    )


_ATTEND = library.define(
    "decode_attention",
    "forward",
    f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, {_SHARED})"
    " -> (Tensor, Tensor)",
    _fake,
)
_APPEND = library.define(
    "decode_attention_append",
    "forward",
    "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new, "
    f"Tensor cache_seqlens, {_SHARED}) -> (Tensor, Tensor)",
    _fake,
)


def _bump(*caches: Tensor) -> None:
    """A write that autograd did not see: a backward that saved the cache must notice."""
    torch.autograd.graph.increment_version([c for c in caches if not c.is_inference()])


def _reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *given: Any) -> Result:
    arguments.check_values(k_cache, 0, lengths, *given[:3])
    return reference.forward(q, k_cache, v_cache, lengths, reference.Options(*given))


def _append(
    k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, lengths: Tensor, *given: Any
) -> tuple[Tensor, reference.Options]:
    """Checks, then writes; the lengths after it, and the options."""
    arguments.check_values(k_cache, k_new.shape[1], lengths, *given[:3])
    options = reference.Options(*given)
    reference.append(k_cache, v_cache, k_new, v_new, lengths, options)
    _bump(k_cache, v_cache)
    return reference.extended(lengths, k_new.shape[1]), options


def _reference_append(q: Tensor, k_cache: Tensor, v_cache: Tensor, *given: Any) -> Result:
    lengths, options = _append(k_cache, v_cache, *given)
    return reference.forward(q, k_cache, v_cache, lengths, options)


_RAW: Any = None if extension.unavailable else extension.raw("decode_attention")


def _cpu_both(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    lengths: Tensor,
    table: Tensor | None,
    row: Tensor | None,
    pad: Tensor | None,
    slopes: Tensor | None,
    sink: Tensor | None,
    *numbers: Any,
) -> Result:
    batch, rows, heads, _ = q.shape
    out = q.new_empty(batch, rows, heads, v_cache.shape[3])
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    given = (
        lengths.contiguous(),
        table if table is None else last_contiguous(table),
        row if row is None else row.contiguous(),
        pad if pad is None else pad.contiguous(),
        floats(slopes),
        floats(sink),
        *numbers[:-1],
    )
    done = _RAW(last_contiguous(q), k_cache, v_cache, k_new, v_new, *given, out, lse)
    if not done:
        count = 0 if k_new is None else k_new.shape[1]
        arguments.check_values(k_cache, count, lengths, table, row, pad)
        raise AssertionError("what the kernel found out of range is in range")
    return out, lse


def _cpu(q: Tensor, k_cache: Tensor, v_cache: Tensor, *given: Any) -> Result:
    return _cpu_both(q, last_contiguous(k_cache), last_contiguous(v_cache), None, None, *given)


def _cpu_append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    lengths: Tensor,
    *given: Any,
) -> Result:
    _bump(k_cache, v_cache)
    if k_cache.stride(-1) == v_cache.stride(-1) == 1:
        new = last_contiguous(k_new), last_contiguous(v_new)
        return _cpu_both(q, k_cache, v_cache, *new, lengths, *given)
    arguments.check_values(k_cache, k_new.shape[1], lengths, *given[:3])
    reference.append(k_cache, v_cache, k_new, v_new, lengths, reference.Options(*given))
    return _cpu(q, k_cache, v_cache, lengths + k_new.shape[1], *given)


def _cpu_refuses(q: Tensor, **_: Any) -> str | None:
    if q.dtype == torch.float64:
        return "q is float64"
    return "a head is larger than 1024" if q.shape[3] > 1024 else None


def _triton(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *given: Any) -> Result:
    from . import triton_kernels

    arguments.check_values(k_cache, 0, lengths, *given[:3])
    return triton_kernels.forward(q, k_cache, v_cache, lengths, reference.Options(*given))


def _triton_append(q: Tensor, k_cache: Tensor, v_cache: Tensor, *given: Any) -> Result:
    from . import triton_kernels

    lengths, options = _append(k_cache, v_cache, *given)
    return triton_kernels.forward(q, k_cache, v_cache, lengths, options)


def _triton_refuses(q: Tensor, v_cache: Tensor, **_: Any) -> str | None:
    if q.dtype == torch.float64:
        return "takes float32, bfloat16 and float16, not float64"
    if max(q.shape[3], v_cache.shape[3]) > 256:
        return f"takes head sizes to 256, not {max(q.shape[3], v_cache.shape[3])}"
    return None


for _op, _kernels in (("decode_attention", _triton), ("decode_attention_append", _triton_append)):
    dispatch.register(
        _op,
        "triton",
        _kernels,
        devices=triton_backend.devices,
        unavailable=triton_backend.unavailable,
        refuses=_triton_refuses,
        proven=False,
    )
for _op, _call in (("decode_attention", _cpu), ("decode_attention_append", _cpu_append)):
    dispatch.register(
        _op,
        "cpu",
        _call,
        devices=("cpu",),
        unavailable=extension.unavailable,
        refuses=_cpu_refuses,
    )
dispatch.register("decode_attention", "reference", _reference)
dispatch.register("decode_attention_append", "reference", _reference_append)


def _direct(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """What the compiled kernel takes without the torch op around it, which takes as long as a row
    of a short cache."""
    if _RAW is None or not dispatch.undisturbed() or _cpu_refuses(q) is not None:
        return False
    return dispatch.direct(q, k_cache, v_cache)


def _four_dims(x: Any) -> Any:
    return x[:, None] if isinstance(x, Tensor) and x.dim() == 3 else x


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    *,
    return_lse: Literal[False] = ...,
    **rest: Unpack[Signature],
) -> Tensor: ...
@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    *,
    return_lse: Literal[True],
    **rest: Unpack[Signature],
) -> Result: ...
@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    *,
    return_lse: bool,
    **rest: Unpack[Signature],
) -> Tensor | Result: ...
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int,
    *,
    block_table: Tensor | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a cache of keys and values; appends to the cache in place.

    Same as, for one row of length n:
        fastlm.attention(q, k_cache[:1, :n], v_cache[:1, :n], mask="causal")

    With k_new and v_new the caches are **written to**: row b takes them at positions
    cache_seqlens[b], cache_seqlens[b] + 1, ..., and the queries attend to them too. cache_seqlens
    itself is not changed. Let n be the length of a row with its new keys; query i stands on key
    n - Sq + i. What stands in unused slots, NaN included, has no effect.

    Args:
        q: [B, Sq, H, D], or [B, H, D] for one query. Any float dtype; sums in float32.
        k_cache, v_cache: [B or more, S, Hk, D] and [..., Dv], H a multiple of Hk; any strides.
            With `block_table` [blocks, block_size, Hk, D] and [..., Dv], any block_size.
        cache_seqlens: int32 [B], valid keys of each row before the append, or an int for all.
        block_table: int32 [B, max_blocks], the blocks of each row in order. Blocks behind the
            length of a row are not looked at.
        k_new, v_new: [B, S_new, Hk, D] and [..., Dv], or without S_new = 1.
        causal: no key after the query's own.
        window: (left, right) keys around the query's, inclusive; -1 or None: no limit.
        softcap: c > 0 makes a score c * tanh(score / c), before ALiBi.
        sink: [H], a logit that takes part in each softmax without a value.
        alibi_slopes: [H] or [B, H]; adds -slope * distance of positions.
        scale: D**-0.5 by default.
        cache_batch_idx: int32 [B], the row of the cache for each row of q; distinct where keys
            are appended. Not with `block_table`.
        cache_leftpad: int32 [B], the first valid key of each row; 0 by default.
        num_splits: in how many parts a kernel may take the keys of a row; never changes a result.
        return_lse: also return the log-sum-exp of the scores, the sink included.

    Returns:
        out, in the shape and dtype of q with head size Dv; with `return_lse` also lse [B, H, Sq]
        ([B, H] for one query), float32 (float64 for float64), natural logarithm. A query that
        attends to nothing gives 0, and the sink or -inf. `merge_attention` joins parts of a cache.

    Raises:
        ValueError: a shape or option differs from the above, or an input requires grad.
        TypeError: a dtype does. IndexError: on the CPU a length, block or row that the cache does
        not have; nothing was written. On a GPU such a row gives NaN.

    Source: Dao et al. 2023, Flash-Decoding; paged caches, Kwon et al. 2023 (arXiv:2309.06180).
    """
    one = isinstance(q, Tensor) and q.dim() == 3
    q, k_new, v_new = _four_dims(q), _four_dims(k_new), _four_dims(v_new)
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k_new": k_new, "v_new": v_new}
    arguments.check_gradient({**tensors, "sink": sink, "alibi_slopes": alibi_slopes})
    plain = block_table is cache_batch_idx is cache_leftpad is alibi_slopes is sink is num_splits
    if not (
        plain
        and num_splits is None
        and softcap == 0
        and arguments.usual(q, k_cache, v_cache, cache_seqlens, k_new, v_new)
    ):
        q, k_new, v_new = arguments.check_floats(tensors)
        indexed = cache_batch_idx is not None
        arguments.check_shapes(q, k_cache, v_cache, block_table is not None, indexed)
        if isinstance(cache_seqlens, int):
            cache_seqlens = q.new_full(q.shape[:1], cache_seqlens, dtype=torch.int32)
        arguments.check_integers(cache_seqlens, block_table, cache_batch_idx, cache_leftpad, q)
        arguments.check_options(q, alibi_slopes, sink, softcap, num_splits)
    left, right = arguments.band(window, causal)
    shared = (
        cache_seqlens,
        block_table,
        cache_batch_idx,
        cache_leftpad,
        alibi_slopes,
        sink,
        q.shape[3] ** -0.5 if scale is None else float(scale),
        left,
        right,
        float(softcap),
        num_splits or 0,
    )
    attend: Any = _ATTEND
    append: Any = _APPEND
    if _direct(q, k_cache, v_cache):
        attend, append = _cpu, _cpu_append
    if k_new is None and v_new is None:
        out, lse = attend(q, k_cache, v_cache, *shared)
    else:
        arguments.check_new(k_new, v_new, q, k_cache, v_cache)
        out, lse = append(q, k_cache, v_cache, k_new, v_new, *shared)
    if one:
        out, lse = out[:, 0], lse[..., 0]
    return (out, lse) if return_lse else out
