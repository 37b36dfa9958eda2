"""flash_attn_with_kvcache: the options of flash-attn 2 in all combinations, by its error rule.

Out must be within 3 times (5 with ALiBi) the error of plain PyTorch in the same dtype with the
scale moved to k, both against float32, plus 1e-5.
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastlm.compat.flash_attn_kvcache import flash_attn_with_kvcache

BATCH, HEADS = 2, 6


def turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Each pair of features as a complex number times exp(i * angle); x [B, S, H, D]."""
    half = cos.shape[1]
    out = x.float().clone()
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        pair = torch.complex(x[..., a].float(), x[..., b].float())
        angle = torch.complex(cos[:, j].float(), sin[:, j].float())[positions][..., None]
        pair = pair * angle
        out[..., a], out[..., b] = pair.real, pair.imag
    return out.to(x.dtype)


def plain(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor, softcap: float, upcast: bool
) -> tuple[Tensor, Tensor]:
    """q [B, Sq, H, D], k and v [B, K, Hk, D], keep and bias [B, H, Sq, K]."""
    dtype = q.dtype
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    groups, scale = HEADS // k.shape[2], q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    a, b = (q * scale, k) if upcast else (q, k * scale)
    s = torch.einsum("bqhd,bkhd->bhqk", a, b)
    if softcap:
        s = torch.tanh(s / softcap) * softcap
    s = (s + bias).masked_fill(~keep, -math.inf)
    alive = keep.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~alive, 0.0), -1).masked_fill(~alive, 0.0).to(v.dtype)
    lse = s.float().logsumexp(-1).masked_fill(~alive[..., 0], math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", p, v).to(dtype), lse


@dataclass(frozen=True)
class Options:
    key_heads: int
    new: int  # 0: nothing is appended
    causal: bool
    local: bool
    alibi: bool
    rotary_dim: int
    interleaved: bool
    block_size: int
    leftpad: bool
    indexed: bool
    rows: int
    slots: int
    size: int
    softcap: float = 0.0
    dtype: torch.dtype = torch.float16


class Setup:
    """Random inputs for the options, and what should come out of them."""

    def __init__(self, given: Options) -> None:
        self.given, slots, hk = given, given.slots, given.key_heads

        def random(*shape: int) -> Tensor:
            return torch.randn(shape).to(given.dtype)

        self.q = random(BATCH, given.rows, HEADS, given.size)
        self.new = [random(BATCH, given.new, hk, given.size) for _ in "kv"]
        moving = given.rotary_dim > 0 and (given.causal or given.local)
        room = max(given.new, given.rows if moving else 0) if given.new else 0
        low = 0 if given.new else 1
        self.lengths = torch.randint(low, slots - room + 1, (BATCH,), dtype=torch.int32)
        self.pad = torch.zeros(BATCH, dtype=torch.int32)
        if given.leftpad:
            self.pad = (torch.rand(BATCH) * self.lengths).int()
        self.window = torch.randint(0, slots, (2,)) if given.local else (-1, -1)
        self.slopes = torch.rand(BATCH, HEADS) * 0.3 if given.alibi else None
        self.table = self.index = None
        if given.block_size:
            blocks = -(-slots // given.block_size)
            self.table = torch.randperm(3 * BATCH * blocks)[: BATCH * blocks].view(BATCH, -1).int()
            self.caches = [
                random(3 * BATCH * blocks, given.block_size, hk, given.size) for _ in "kv"
            ]
        else:
            rows = 2 * BATCH if given.indexed else BATCH
            if given.indexed:
                self.index = torch.randperm(rows)[:BATCH].int()
            self.caches = [random(rows, slots, hk, given.size) for _ in "kv"]
        self.cos = self.sin = None
        if given.rotary_dim:
            angle = torch.rand(self.capacity(), given.rotary_dim // 2) * 2 * math.pi
            self.cos, self.sin = angle.cos().to(given.dtype), angle.sin().to(given.dtype)

    def capacity(self) -> int:
        return self.given.slots if self.table is None else self.dense(self.caches[0]).shape[1]

    def dense(self, cache: Tensor) -> Tensor:
        """The cache in order of positions: [B, capacity, Hk, D]."""
        if self.table is not None:
            return cache[self.table.long()].flatten(1, 2)
        return cache if self.index is None else cache[self.index.long()]

    def run(self, caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        given = self.given
        return flash_attn_with_kvcache(
            self.q,
            *caches,
            *(self.new if given.new else (None, None)),
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            cache_seqlens=self.lengths,
            cache_batch_idx=self.index,
            cache_leftpad=self.pad if given.leftpad else None,
            block_table=self.table,
            causal=given.causal,
            window_size=self.window,
            softcap=given.softcap,
            rotary_interleaved=given.interleaved,
            alibi_slopes=self.slopes,
            return_softmax_lse=True,
        )

    def want(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """k and v of the caches afterwards, out and lse in float32, out in the dtype."""
        given, q = self.given, self.q
        k, v = (self.dense(cache).clone() for cache in self.caches)
        k_new, v_new = self.new
        if self.cos is not None and self.sin is not None:
            first = self.lengths.long()[:, None]
            of_q = first + torch.arange(given.rows) * (given.causal or given.local)
            q = turn(q, self.cos, self.sin, of_q, given.interleaved)
            of_k = first + torch.arange(given.new)
            k_new = turn(k_new, self.cos, self.sin, of_k, given.interleaved)
        for row, n in enumerate(self.lengths.tolist()):
            k[row, n : n + given.new], v[row, n : n + given.new] = k_new[row], v_new[row]
        left, right = (int(side) for side in self.window)
        right = 0 if given.causal else right
        key = torch.arange(k.shape[1])
        total = (self.lengths + given.new)[:, None, None]
        place = total - given.rows + torch.arange(given.rows)[:, None]
        keep = (key < total) & (key >= self.pad[:, None, None])
        if left >= 0:
            keep = keep & (key >= place - left)
        if right >= 0:
            keep = keep & (key <= place + right)
        bias = torch.zeros(())
        if self.slopes is not None:
            bias = -self.slopes[..., None, None] * (key - place).abs()[:, None]
        outs = [plain(q, k, v, keep[:, None], bias, given.softcap, up) for up in (True, False)]
        return k, v, *outs[0], outs[1][0]


def check(given: Options) -> None:
    case = Setup(given)
    before = [cache.clone() for cache in case.caches]
    k, v, want, want_lse, half = case.want()
    out, lse = case.run(case.caches)
    mult = 5 if given.alibi else 3
    allowed = mult * float((half - want).float().abs().max()) + 1e-5
    assert float((out - want).float().abs().max()) <= allowed, given
    assert lse.shape == want_lse.shape and lse.dtype == torch.float32
    torch.testing.assert_close(lse, want_lse, msg=str(given))
    assert torch.equal(case.dense(case.caches[1]), v), given
    got = case.dense(case.caches[0])
    if given.rotary_dim:  # a rounding of the rotation apart
        torch.testing.assert_close(got, k, msg=str(given))
    else:
        assert torch.equal(got, k), given
    if not given.new:
        assert all(torch.equal(a, b) for a, b in zip(case.caches, before, strict=True))


SIZES = [(1, 128, 32), (1, 59, 59), (3, 96, 64), (16, 70, 80), (40, 129, 32), (5, 33, 128)]


@pytest.mark.parametrize("key_heads", [6, 1, 3], ids=["mha", "mqa", "gqa"])
@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_every_combination(key_heads, appends, causal, local, alibi):
    sizes = itertools.cycle(SIZES)
    for fraction, interleaved, block_size, leftpad, indexed, equal in itertools.product(
        (0.0, 0.5, 1.0), (False, True), (0, 16), (False, True), (False, True), (True, False)
    ):
        if (indexed or leftpad) and block_size:
            continue
        if not appends and (fraction or interleaved or not equal):
            continue
        if interleaved and not fraction:
            continue
        rows, slots, size = next(sizes)
        new = (rows if equal else max(1, rows // 2)) if appends else 0
        rotary_dim = int(fraction * size) // 16 * 16
        cache = (block_size, leftpad, indexed)
        masks = (causal, local, alibi)
        check(Options(key_heads, new, *masks, rotary_dim, interleaved, *cache, rows, slots, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_dtypes_and_softcap(dtype, softcap):
    for rows, slots, size in SIZES:
        shape = (rows, slots, size, softcap, dtype)
        check(Options(3, rows, True, False, False, 0, True, 7, False, False, *shape))


def test_signature_is_that_of_flash_attn():
    names = (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes "
        "num_splits return_softmax_lse"
    )
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert list(parameters) == names.split()
    defaults = [p.default for p in parameters.values()][3:]
    no = None
    want = [no, no, no, no, no, no, no, no, no, False, (-1, -1), 0.0, True, no, 0, False]
    assert defaults == want


def test_lengths_int_and_none_and_no_gradient():
    q, cache = torch.randn(2, 3, 6, 16, requires_grad=True), torch.randn(2, 2, 20, 3, 16)
    full = flash_attn_with_kvcache(q, *cache)
    assert not full.requires_grad
    lengths = torch.full((2,), 20, dtype=torch.int32)
    assert torch.equal(full, flash_attn_with_kvcache(q, *cache, cache_seqlens=20))
    assert torch.equal(full, flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths))
    scaled = flash_attn_with_kvcache(q, *cache, softmax_scale=0.25, num_splits=3)
    assert torch.equal(full, scaled)


def test_rows_without_keys():
    """More queries than keys: 0 and +inf, as flash-attn has it."""
    q, cache = torch.randn(1, 5, 2, 8), torch.randn(2, 1, 9, 2, 8)
    out, lse = flash_attn_with_kvcache(
        q, *cache, cache_seqlens=2, causal=True, return_softmax_lse=True
    )
    assert bool((out[:, :3] == 0).all()) and bool((lse[..., :3] == math.inf).all())
    assert bool(lse[..., 3:].isfinite().all())


def test_a_window_over_the_whole_cache_turns_q_at_one_position():
    """The kernel drops such a window before it asks whether attention is local."""
    q, cache = torch.randn(2, 3, 6, 16), torch.randn(2, 2, 20, 3, 16)
    new, angle = torch.randn(2, 3, 3, 16), torch.rand(20, 8)
    given = {"k": new, "v": new, "rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    given["cache_seqlens"] = 4
    want = flash_attn_with_kvcache(q, *cache.clone(), **given)
    assert torch.equal(
        flash_attn_with_kvcache(q, *cache.clone(), window_size=(20, 99), **given), want
    )
    assert not torch.equal(
        flash_attn_with_kvcache(q, *cache.clone(), window_size=(19, 99), **given), want
    )


def test_rejects():
    q, cache, new = torch.randn(1, 2, 6, 16), torch.randn(2, 1, 20, 3, 16), torch.randn(1, 2, 3, 16)
    cos = torch.ones(20, 8)
    rejected = [
        ({"k": new, "v": new}, "cache_seqlens must be given"),
        ({"rotary_cos": cos, "rotary_sin": cos, "cache_seqlens": 3}, "k and v must be given"),
        ({"rotary_cos": cos, "k": new, "v": new, "cache_seqlens": 3}, "rotary_sin must be given"),
        (
            {"rotary_cos": cos[:9], "rotary_sin": cos[:9], "k": new, "v": new, "cache_seqlens": 3},
            "rotary_cos must have >= 20 rows, got 9",
        ),
        ({"k": new, "cache_seqlens": 3}, "k_new and v_new must be given both or neither"),
    ]
    for given, message in rejected:
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(q, *cache, **given)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(IndexError, match=r"1 blocks of 20 of a row, 2 new\), got 19"):
        flash_attn_with_kvcache(q, *cache, k=new, v=new, cache_seqlens=19, block_table=table)
