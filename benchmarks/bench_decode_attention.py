"""One new query per sequence over a cache: 32 heads on 8 of keys, head size 128."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case

HEADS, KEY_HEADS, SIZE = 32, 8, 128


def make(batch: int, slots: int, dtype: torch.dtype) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        q = torch.randn(batch, 1, HEADS, SIZE, device=device).to(dtype)
        k, v = (
            torch.randn(batch, slots, KEY_HEADS, SIZE, device=device).to(dtype) for _ in range(2)
        )
        return q, k, v, torch.full((batch,), slots, dtype=torch.int32, device=device)

    return build


def ours(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return fastlm.decode_attention(q, k, v, lengths)


def shared(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """PyTorch's kernel with its own sharing of key heads; every length is that of the cache."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The heads of a key head as queries of one head, by hand."""
    rows = q.view(-1, KEY_HEADS, HEADS // KEY_HEADS, SIZE)
    out = functional.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.view(-1, 1, HEADS, SIZE)


SIZES = [
    *((batch, slots, reach) for batch in (1, 8) for slots, reach in ((16, ""), (256, ""))),
    *((batch, 8192, ">= 2x SDPA with enable_gqa") for batch in (1, 8)),
]

CASES = [
    Case(
        op="decode_attention",
        name=f"B{batch}-S{slots}-{str(dtype).removeprefix('torch.')}",
        make=make(batch, slots, dtype),
        ours=ours,
        plain=shared,
        others={"packed": packed},
        backward=False,
        compiles=False,
        traffic=2.0 * batch * slots * KEY_HEADS * SIZE * dtype.itemsize,
        reach=reach,
    )
    for dtype in (torch.float32, torch.bfloat16)
    for batch, slots, reach in SIZES
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode_attention(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
