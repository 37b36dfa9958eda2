"""The linear layers of a Transformer, forward and backward, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case

# rows, inputs, outputs; small ones show where the choice between the two products lies
SHAPES = {
    "qkv": (2048, 256, 768),
    "gate-up": (2048, 256, 1408),
    "down": (2048, 704, 256),
    "out": (2048, 256, 256),
    "wide": (2048, 1024, 4096),
    "small": (128, 128, 256),
    "smaller": (64, 64, 128),
    "decode": (1, 256, 768),
}


def make(rows: int, inputs: int, outputs: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        sizes = ((rows, inputs), (outputs, inputs))
        return tuple(torch.randn(size, device=device) for size in sizes)

    return build


CASES = [
    Case(
        op="linear",
        name=f"{name}-{rows}x{inputs}x{outputs}",
        make=make(rows, inputs, outputs),
        ours=fastlm.linear,
        plain=functional.linear,
        compiles=False,
        flops=6.0 * rows * inputs * outputs,
        reach=">= 1.0",
        group="linear",
    )
    for name, (rows, inputs, outputs) in SHAPES.items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
