"""fastlm.merge_attention: parts over disjoint keys make attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import testing

NEG = -math.inf


def split(
    q: Tensor, k: Tensor, v: Tensor, edges: list[int], stacked: bool, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over keys edges[i] <= j < edges[i + 1], merged; the sink in the first part."""
    outs, lses = [], []
    for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        part = fastlm.attention(
            q, k[:, begin:end], v[:, begin:end], sink=None if i else sink, return_lse=True
        )
        outs.append(part[0])
        lses.append(part[1])
    if stacked:
        return fastlm.merge_attention(torch.stack(outs), torch.stack(lses))
    return fastlm.merge_attention(outs, tuple(lses))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("edges", [[0, 13], [0, 5, 13], [0, 1, 1, 6, 13], [0, 0, 13]])
@pytest.mark.parametrize("dtype", testing.FLOATS)
def test_split_keys_merged_are_all_keys(dtype, edges, stacked, poisoned):
    """Out and lse, and every gradient through both."""
    args = [torch.randn(2, 9, 4, 8), torch.randn(2, 13, 2, 8), torch.randn(2, 13, 2, 5)]
    args = [x.to(dtype) for x in (*args, torch.randn(4))]

    def ours(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return split(q, k, v, edges, stacked, sink)

    def theirs(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 8**-0.5
        s = torch.cat([s, sink[:, None, None].expand(2, 4, 9, 1)], -1)
        p = s.softmax(-1)[..., :-1]
        return torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(2, 2)), s.logsumexp(-1)

    if dtype != torch.bfloat16:
        return testing.check(ours, theirs, args)

    # parts round to bfloat16 before they meet, as any split into parts does
    def plainly(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if tensors[0].dtype == torch.float64:
            return theirs(*tensors)
        return rounded(*tensors, edges=edges)

    testing.check(ours, plainly, args)


def rounded(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, *, edges: list[int]
) -> tuple[Tensor, Tensor]:
    """The definition part by part, each rounded to the dtype of q."""
    outs, lses = [], []
    for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        key, value = (x[:, begin:end].repeat_interleave(2, 2) for x in (k, v))
        s = torch.einsum("bqhd,bkhd->bhqk", q, key) * 8**-0.5
        if i == 0:
            s = torch.cat([s, sink[:, None, None].expand(2, 4, 9, 1)], -1)
        if s.shape[-1] == 0:
            continue
        p = s.softmax(-1)[..., : end - begin]
        outs.append(torch.einsum("bhqk,bkhd->bqhd", p, value))
        lses.append(s.logsumexp(-1))
    lse = torch.stack(lses).logsumexp(0)
    shares = [(x - lse).exp().transpose(-1, -2)[..., None] for x in lses]
    return sum(o * share for o, share in zip(outs, shares, strict=True)), lse


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2, 4, 2, 3).to(dtype), torch.randn(3, 2, 2, 4, dtype=torch.float64)


def test_first_and_second_derivatives():
    outs, lses = parts()
    lses[1, :, :, 1:3] = NEG
    lses[0, 0, 0, 1] = NEG
    lses[:, 1, 1, 2] = NEG  # nothing in any part
    finite = lses != NEG

    def call(outs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = fastlm.merge_attention(outs, values.where(finite, NEG))
        return out, lse.masked_fill(lse == NEG, 0.0)

    values = lses.masked_fill(~finite, 0.0).requires_grad_()
    outs.requires_grad_()
    assert torch.autograd.gradcheck(call, (outs, values))
    assert torch.autograd.gradgradcheck(call, (outs, values))


def test_is_the_docstring():
    outs, lses = parts(torch.float64)
    got, got_lse = fastlm.merge_attention(list(outs), list(lses))
    lse = torch.logsumexp(torch.stack(list(lses)), 0)
    out = sum(
        o * (x - lse).exp().transpose(-1, -2)[..., None] for o, x in zip(outs, lses, strict=True)
    )
    torch.testing.assert_close(got, out)
    torch.testing.assert_close(got_lse, lse)


def test_packed():
    outs, lses = parts()
    out, lse = fastlm.merge_attention(outs, lses)
    packed, packed_lse = fastlm.merge_attention(outs[:, 0], lses[:, 0])
    assert torch.equal(packed, out[0]) and torch.equal(packed_lse, lse[0])


@pytest.mark.parametrize("dtype", testing.FLOATS)
def test_a_part_without_keys_counts_nothing(dtype, poisoned):
    """NaN in its out included; its gradients are zero, and so are those of rows without any."""
    outs, lses = parts(dtype)
    lses = lses.to(torch.float64 if dtype == torch.float64 else torch.float32)
    want = fastlm.merge_attention(outs[:2], lses[:2])
    lses[2] = NEG
    outs[2] = math.nan
    leaves = [x.requires_grad_() for x in (outs, lses)]
    got = fastlm.merge_attention(*leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    upstream = [torch.randn_like(x) for x in got]
    douts, dlses = torch.autograd.grad(got, leaves, upstream)
    assert bool((douts[2] == 0).all() & (dlses[2] == 0).all())
    assert bool(douts.isfinite().all() & dlses.isfinite().all())
    out, lse = fastlm.merge_attention(outs[2:], lses[2:])
    assert bool((out == 0).all() & (lse == NEG).all())
    # whatever gradient arrives there
    upstream = [torch.full_like(x, math.nan) for x in (out, lse)]
    douts, dlses = torch.autograd.grad((out, lse), leaves, upstream)
    assert bool((douts == 0).all() & (dlses == 0).all())


def test_far_apart_and_large():
    """No overflow, and the larger part wins to the last bit."""
    outs = torch.randn(2, 1, 1, 1, 4)
    for lses in ([3e38, 0.0], [800.0, -800.0]):
        out, lse = fastlm.merge_attention(outs, torch.tensor(lses).view(2, 1, 1, 1))
        assert torch.equal(out, outs[0]) and float(lse) == torch.tensor(lses[0])


def test_dtypes_and_compile():
    outs, lses = torch.randn(2, 2, 4, 2, 3).bfloat16(), torch.randn(2, 2, 2, 4)
    out, lse = fastlm.merge_attention(outs, lses)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    compiled = torch.compile(fastlm.merge_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(list(outs), list(lses)), (out, lse))


def test_decoding_a_cache_in_two():
    """Half of the keys in each of two caches, as two processes would hold them."""
    q, cache = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 20, 2, 8)
    halves = [
        fastlm.decode_attention(q, *cache[:, :, :12], 12, causal=False, return_lse=True),
        fastlm.decode_attention(q, *cache[:, :, 12:], 8, return_lse=True),
    ]
    got = fastlm.merge_attention(*zip(*halves, strict=True))
    torch.testing.assert_close(got, fastlm.decode_attention(q, *cache, 20, return_lse=True))


REJECTED = {
    "none": (([], []), ValueError, "outs must be at least one tensor, got none"),
    "list": ((3, []), TypeError, "outs must be a tensor or a list of tensors, got int"),
    "dims": (
        (torch.ones(1, 2, 3), torch.ones(1, 2)),
        ValueError,
        r"outs must be \[B, S, H, D\] or \[T, H, D\] each, got \[2, 3\]",
    ),
    "lse": (
        (torch.ones(2, 2, 4, 3, 5), torch.ones(2, 2, 4, 3)),
        ValueError,
        r"lses must be \[2, 2, 3, 4\]",
    ),
    "count": (
        (torch.ones(2, 4, 3, 5), torch.ones(3, 3, 4)),
        ValueError,
        r"lses must be \[2, 3, 4\]",
    ),
    "mixed": (
        ([torch.ones(4, 3, 5), torch.ones(4, 3, 5).double()], torch.ones(2, 3, 4)),
        TypeError,
        r"outs\[1\] must be float32 \(as outs\[0\]\), got float64",
    ),
    "shapes": (
        ([torch.ones(4, 3, 5), torch.ones(4, 3, 6)], torch.ones(2, 3, 4)),
        ValueError,
        r"outs\[1\] must be \[4, 3, 5\]",
    ),
    "integer": (
        (torch.ones(2, 4, 3, 5).int(), torch.ones(2, 3, 4)),
        TypeError,
        "outs must be float",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects(case):
    args, error, message = REJECTED[case]
    with pytest.raises(error, match=rf"fastlm\.merge_attention: {message}"):
        fastlm.merge_attention(*args)
