"""Attention: full, causal, windows and documents against PyTorch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Call, Case

Dense = Callable[[int], Tensor]


def make(
    batch: int, seq: int, heads: int, size: int, dtype: torch.dtype
) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        shape = (batch, seq, heads, size)
        return tuple(torch.randn(shape, device=device).to(dtype) for _ in range(3))

    return build


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores in full, as one would write it; causal."""
    seq = q.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def sdpa(causal: bool = False, mask: Dense | None = None) -> Call:
    """PyTorch's; a dense mask is made once, as a training loop would."""
    made: dict[int, Tensor] = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seq = q.shape[1]
        if mask is not None and seq not in made:
            made[seq] = mask(seq).to(q.device)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=made.get(seq), is_causal=causal
        )
        return out.transpose(1, 2)

    return call


def window(seq: int) -> Tensor:
    place = torch.arange(seq)
    behind = place[:, None] - place
    return (behind >= 0) & (behind <= WINDOW)


def documents(seq: int) -> Tensor:
    place = torch.arange(seq)
    return (place[:, None] >= place) & (place[:, None] // DOCUMENT == place // DOCUMENT)


def by_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ids = torch.arange(q.shape[1], device=q.device) // DOCUMENT
    mask = fastlm.AttnMask.causal() & fastlm.AttnMask.documents(ids)
    return fastlm.attention(q, k, v, mask=mask)


def ours(**options: Any) -> Call:
    return lambda q, k, v: fastlm.attention(q, k, v, **options)


WINDOW, DOCUMENT = 256, 512
# pairs of a query and a key of one head
PAIRS: dict[str, Callable[[int], float]] = {
    "full": lambda s: s * s,
    "causal": lambda s: s * (s + 1) / 2,
    "window": lambda s: s * (WINDOW + 1) - WINDOW * (WINDOW + 1) / 2,
    "documents": lambda s: s * (DOCUMENT + 1) / 2,
}
SIDES: dict[str, tuple[Call, Call]] = {
    "full": (ours(), sdpa()),
    "causal": (ours(mask="causal"), sdpa(causal=True)),
    "window": (ours(mask="causal", window=(WINDOW, 0)), sdpa(mask=window)),
    "documents": (by_documents, sdpa(mask=documents)),
}
FLOAT, HALF = torch.float32, torch.bfloat16


def case(kind: str, seq: int, size: int, dtype: torch.dtype, reach: str) -> Case:
    short = {FLOAT: "float32", HALF: "bfloat16"}[dtype]
    run, plain = SIDES[kind]
    return Case(
        op="attention",
        name=f"{kind}-S{seq}-H8-D{size}-{short}",
        make=make(1, seq, 8, size, dtype),
        ours=run,
        plain=plain,
        compiles=False,  # it would call the same kernel
        # two products, and five in the backward
        flops=14.0 * 8 * PAIRS[kind](seq) * size if dtype == FLOAT else 0.0,
        reach=reach,
    )


CASES = [
    Case(
        op="attention",
        name="causal-B4-S256-H8-D64",
        make=make(4, 256, 8, 64, FLOAT),
        ours=ours(mask="causal"),
        plain=written_out,
        others={"sdpa": sdpa(causal=True)},
        flops=14.0 * 4 * 8 * PAIRS["causal"](256) * 64,
    ),
    case("window", 4096, 64, FLOAT, ">= 8x plain"),
    case("documents", 4096, 64, FLOAT, ">= 7x plain"),
    case("causal", 4096, 64, HALF, ">= 4x plain"),
    *(
        case(kind, seq, size, FLOAT, ">= 1x plain")
        for kind in ("causal", "full")
        for seq in (64, 256, 1024, 4096)
        for size in (32, 64, 128)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
