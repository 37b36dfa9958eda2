"""fastlm.compat.flash_attn: the functions of FlashAttention-2, against their definition."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from test_attention import band, plain, qkv
from torch import Tensor

import fastlm
from fastlm import testing
from fastlm.compat import flash_attn
from fastlm.dispatch import ready

BACKENDS = ready("attention")
HALVES = (torch.float16, torch.bfloat16)
every_half = pytest.mark.parametrize("dtype", HALVES)


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def expected(*args: Tensor, keep: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Out and lse as FlashAttention-2 has them: 0 and +inf where there is nothing to attend to."""
    if keep is None:
        return plain(*args, **options)
    alive = keep.any(-1)
    out, lse = plain(*args, keep=keep | ~alive[..., None], **options)
    return out.where(alive[:, None, None], 0.0), lse.where(alive, math.inf)


@every_half
@pytest.mark.parametrize("sizes", [(9, 13), (13, 9), (1, 5), (150, 140)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, 2), (4, -1), (-3, 1)])
def test_flash_attn_func(dtype, sizes, causal, window, poisoned):
    """Its own test's grid in small: shapes, GQA, causal with windows, ALiBi, softcap, scale."""
    left, right = (max(w, -1) for w in window)
    keep = band(*sizes, left, 0 if causal and (right < 0 or right > 0) else right)
    args = [*qkv(dtype, (2, *sizes, 4, 2), (8, 8)), torch.rand(2, 4).to(dtype)]

    def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        extra = {"window_size": window, "softcap": 3.0, "alibi_slopes": slopes}
        return flash_attn.flash_attn_func(q, k, v, 0.0, 0.5, causal, **extra)

    def theirs(*args: Tensor) -> Tensor:
        return expected(*args, keep=keep, softcap=3.0, scale=0.5)[0]

    testing.check(ours, theirs, args)


@pytest.mark.parametrize("backend", BACKENDS)
@every_half
@pytest.mark.parametrize("causal", [False, True])
def test_packed_arguments(backend, dtype, causal, poisoned):
    """One tensor for q, k, v or for k, v; their gradients in one tensor too."""
    keep = band(33, 33, right=0) if causal else None
    qkv_packed, kv = torch.randn(2, 33, 3, 4, 16), torch.randn(2, 33, 2, 2, 16)
    q = torch.randn(2, 33, 4, 16)
    with fastlm.use_backend(backend):
        testing.check(
            lambda x: flash_attn.flash_attn_qkvpacked_func(x, causal=causal),
            lambda x: expected(*x.unbind(2), keep=keep)[0],
            [qkv_packed.to(dtype)],
        )
        testing.check(
            lambda q, kv: flash_attn.flash_attn_kvpacked_func(q, kv, causal=causal),
            lambda q, kv: expected(q, *kv.unbind(2), keep=keep)[0],
            [q.to(dtype), kv.to(dtype)],
        )


LENGTHS_Q, LENGTHS_K = (3, 0, 9, 40, 1), (5, 4, 7, 40, 0)


def each(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, **options: Any):
    """Every sequence alone, and zeros behind the last one."""
    causal, window = options.pop("causal", False), options.pop("window", (-1, -1))
    q_parts, k_parts, v_parts = (
        x[: sum(n)].split(n) for x, n in ((q, LENGTHS_Q), (k, LENGTHS_K), (v, LENGTHS_K))
    )
    outs, lses = [], []
    for i, part in enumerate(zip(q_parts, k_parts, v_parts, strict=True)):
        keep = band(len(part[0]), len(part[1]), window[0], 0 if causal else window[1])
        if not len(part[1]):
            outs.append(part[0].new_zeros(len(part[0]), q.shape[1], v.shape[2]))
            lses.append(part[0].new_full((q.shape[1], len(part[0])), math.inf))
            continue
        own = slopes[i : i + 1] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = expected(*(x[None] for x in part), own, keep=keep, **options)
        outs.append(out[0])
        lses.append(lse[0])
    behind = len(q) - sum(LENGTHS_Q)
    outs.append(q.new_zeros(behind, q.shape[1], v.shape[2]))
    lses.append(q.new_full((q.shape[1], behind), math.inf))
    return torch.cat(outs), torch.cat(lses, -1)


def varlen_args(dtype: torch.dtype) -> list[Tensor]:
    rows, keys = sum(LENGTHS_Q) + 4, sum(LENGTHS_K) + 2
    shapes = [(rows, 4, 8), (keys, 2, 8), (keys, 2, 8)]
    return [torch.randn(s).to(dtype) for s in shapes]


PACKED = (starts(*LENGTHS_Q), starts(*LENGTHS_K), 40, 40)


@every_half
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("slopes", [None, (4,), (5, 4)])
def test_flash_attn_varlen_func(dtype, causal, slopes, poisoned):
    """Slopes may differ from sequence to sequence; empty ones; rows behind the last."""
    args = varlen_args(dtype)
    if slopes is not None:
        args.append(torch.rand(slopes).to(dtype))

    def ours(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, ...]:
        out, lse, probs = flash_attn.flash_attn_varlen_func(
            q, k, v, *PACKED, softmax_scale=0.4, causal=causal, window_size=(6, -1),
            alibi_slopes=slopes, return_attn_probs=True,
        )  # fmt: skip
        assert probs.shape == (0,) and probs.dtype == dtype and lse.shape == (4, len(q))
        return out, lse.where(lse < math.inf, 7.0)

    def theirs(*args: Tensor) -> tuple[Tensor, ...]:
        out, lse = each(*args, causal=causal, window=(6, -1), scale=0.4)
        return out, lse.where(lse < math.inf, 7.0)

    testing.check(ours, theirs, args)
    out = flash_attn.flash_attn_varlen_func(*args[:3], *PACKED)
    assert isinstance(out, Tensor)


@every_half
def test_varlen_packed_arguments(dtype):
    lengths = starts(3, 0, 17)
    qkv_packed, kv = torch.randn(20, 3, 2, 8).to(dtype), torch.randn(20, 2, 1, 8).to(dtype)
    got = flash_attn.flash_attn_varlen_qkvpacked_func(qkv_packed, lengths, 17, causal=True)
    q, k, v = qkv_packed.unbind(1)
    given = (lengths, lengths, 17, 17)
    assert torch.equal(got, flash_attn.flash_attn_varlen_func(q, k, v, *given, causal=True))
    got = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *given, softcap=2.0)
    k, v = kv.unbind(1)
    assert torch.equal(got, flash_attn.flash_attn_varlen_func(q, k, v, *given, softcap=2.0))


@pytest.mark.parametrize("page", [1, 3, 16])
def test_paged_keys(page, poisoned):
    """Pages in any order; gradients reach them; a page out of range is an IndexError."""
    args = varlen_args(torch.float32)
    blocks = [-(-n // page) for n in LENGTHS_K]
    pages = torch.randperm(sum(blocks) + 2)
    table = torch.full((len(blocks), max(blocks) + 1), 10**6, dtype=torch.int32)
    caches = [torch.randn(len(pages), page, 2, 8) for _ in range(2)]
    used = iter(pages.tolist())
    index = []
    for row, (count, length) in enumerate(zip(blocks, LENGTHS_K, strict=True)):
        for column in range(count):
            block = next(used)
            table[row, column] = block
            index += [block * page + i for i in range(min(page, length - column * page))]

    def paged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_varlen_func(q, k, v, *PACKED, causal=True, block_table=table)

    def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [x.flatten(0, 1)[torch.tensor(index)] for x in (k, v)]
        return flash_attn.flash_attn_varlen_func(q, *parts, *PACKED, causal=True)

    testing.check(paged, flat, [args[0], *caches])
    table[0, 0] = len(pages)
    with pytest.raises(IndexError, match=rf"block_table must be in \[0, {len(pages)}\)"):
        paged(args[0], *caches)
    with pytest.raises(ValueError, match="sequences of k must be at most"):
        flash_attn.flash_attn_varlen_func(
            args[0], *caches, *PACKED, block_table=torch.zeros(5, 2, dtype=torch.int32)
        )


def test_lse_is_plus_infinity_where_nothing_is_attended_to():
    q, k, v = qkv(torch.bfloat16, (2, 6, 2, 4, 2))
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert lse.shape == (2, 4, 6) and lse.dtype == torch.float32
    assert bool((lse[..., :4] == math.inf).all()) and bool(lse[..., 4:].isfinite().all())
    assert bool((out[:, :4] == 0).all())
    out, lse, _ = flash_attn.flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert bool((lse == math.inf).all()) and bool((out == 0).all())


@pytest.mark.parametrize("packed", [False, True])
def test_probabilities_encode_the_dropout(packed):
    """|S_dmask| are the probabilities, its sign the mask that out was made with."""
    if packed:
        q, k, v = (x.double() for x in varlen_args(torch.float32))
        out, _, probs = flash_attn.flash_attn_varlen_func(
            q, k, v, *PACKED, dropout_p=0.3, causal=True, return_attn_probs=True
        )
        assert probs.shape == (5, 4, 40, 40)
        dropped = probs.clamp(min=0.0) / 0.7
        for i, (a, b) in enumerate(zip(PACKED[0].tolist(), PACKED[0].tolist()[1:], strict=False)):
            c, d = PACKED[1].tolist()[i : i + 2]
            values = v[c:d].repeat_interleave(2, 1).transpose(0, 1)
            want = (dropped[i, :, : b - a, : d - c] @ values).transpose(0, 1)
            torch.testing.assert_close(out[a:b], want)
            assert not probs[i, :, b - a :].any() and not probs[i, :, :, d - c :].any()
        return
    q, k, v = qkv(shape=(2, 40, 50, 4, 2))
    out, lse, probs = flash_attn.flash_attn_func(
        q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True
    )
    keep = band(40, 50, right=0)
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
    p = (s - lse[..., None]).exp().where(keep, 0.0)
    torch.testing.assert_close(probs.abs(), p)
    assert 0.25 < float((probs < 0).sum() / (2 * 4 * keep.sum())) < 0.35
    kept = probs.clamp(min=0.0) / 0.7
    want = torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, want)


def test_signatures_are_those_of_flash_attn():
    """Names, order and defaults, as version 2.8 has them."""
    tail = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 "
    tail += "alibi_slopes=None deterministic=False return_attn_probs=False"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    want = {
        "flash_attn_func": f"q k v {tail}",
        "flash_attn_kvpacked_func": f"q kv {tail}",
        "flash_attn_qkvpacked_func": f"qkv {tail}",
        "flash_attn_varlen_func": f"q k v {lengths} {tail} block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q kv {lengths} {tail}",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {tail}",
    }
    for name, signature in want.items():
        found = inspect.signature(getattr(flash_attn, name)).parameters.values()
        text = " ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found
        )
        assert text == signature, name


def test_softcap_below_zero_is_off_and_deterministic_changes_nothing():
    q, k, v = qkv(torch.bfloat16, (1, 9, 9, 2, 2))
    want = flash_attn.flash_attn_func(q, k, v)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, softcap=-1.0, deterministic=True), want)


Q, N = torch.zeros(2, 5, 4, 8), starts(2, 3)
AS_INT32 = r"cu_seqlens_q must be int32, got int64; call .int\(\) once per batch"
TWO = (Q[0], Q[0], Q[0], N.long(), N, 5, 5)
PAGES = r"k must be \[\*, \*, \*, \*\] \(\[blocks, page, H, D\] with a block_table\)"


@pytest.mark.parametrize(
    "name, args, options, error, message",
    [
        ("qkvpacked", (Q,), {}, ValueError, r"qkv must be \[\*, \*, 3, \*, \*\]"),
        ("kvpacked", (Q, Q), {}, ValueError, r"kv must be \[\*, \*, 2, \*, \*\]"),
        ("varlen", TWO, {}, TypeError, AS_INT32),
        ("varlen", TWO, {"alibi_slopes": torch.rand(2, 4)}, TypeError, AS_INT32),
        ("varlen", (*TWO[:3], N, N, 5, 5), {"block_table": N[None]}, ValueError, PAGES),
    ],
)
def test_rejects(name, args, options, error, message):
    with pytest.raises(error, match=message):
        getattr(flash_attn, f"flash_attn_{name}_func")(*args, **options)


def test_compiles_as_one_graph():
    q, k, v = (x.requires_grad_() for x in qkv(torch.float32, (2, 9, 9, 4, 2)))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(4, 0))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
