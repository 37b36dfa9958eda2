"""Matrix products of a training step: what ours and PyTorch's reach here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastlm import matmul
from fastlm.bench.case import Arguments, Case

# rows, depth, columns; a chunk of logits, of its two gradients, the projection of a GRU's input
SHAPES = {
    "logits": (256, 512, 10000),
    "dinput": (256, 10000, 512),
    "dweight": (10000, 256, 512),
    "projection": (2048, 512, 1536),
    "few-rows": (32, 256, 2048),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Callable[[str], Arguments]:
    rows, depth, columns = SHAPES[name]

    def build(device: str) -> Arguments:
        a = torch.randn(rows, depth, device=device).to(dtype)
        b = torch.randn(depth, columns, device=device).to(dtype)
        # as they stand in memory: weights [columns, depth], gradients [depth, rows]
        if name in ("logits", "projection", "few-rows"):
            b = b.t().contiguous().t()
        if name == "dweight":
            a = a.t().contiguous().t()
        return a, b

    return build


def plain(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


# of bfloat16 operands ours comes out in float32, PyTorch's in bfloat16
CASES = [
    Case(
        op="matmul",
        name=f"{name}-{rows}x{depth}x{columns}{suffix}",
        make=make(name, dtype),
        ours=matmul.fastest,
        plain=plain,
        needs=("matmul.fastest",),
        backward=False,
        compiles=False,
        flops=2.0 * rows * depth * columns,
        reach=">= 1.0",
        group="matmul",
    )
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bf16"))
    for name, (rows, depth, columns) in SHAPES.items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matmul(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
