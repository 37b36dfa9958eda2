"""Causal attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case


def make(batch: int, seq: int, heads: int, size: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        return tuple(torch.randn(batch, seq, heads, size, device=device) for _ in range(3))

    return build


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores in full, as one would write it."""
    seq = q.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


CASES = [
    Case(
        op="attention",
        name=f"causal-B{batch}-S{seq}-H{heads}-D{size}",
        make=make(batch, seq, heads, size),
        ours=lambda q, k, v: fastlm.attention(q, k, v, mask="causal"),
        plain=plain,
        others={"sdpa": fused},
        # scores and output; backward five products; half of each is masked
        flops=7.0 * batch * heads * seq * seq * size,
    )
    for batch, seq, heads, size in ((4, 256, 8, 64),)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
