"""Cross-entropy on logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case


def make(rows: int, classes: int, dtype: torch.dtype) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        logits = torch.randn(rows, classes, device=device).mul_(3).to(dtype)
        return logits, torch.randint(classes, (rows,), device=device)

    return build


def traffic(rows: int, classes: int, itemsize: int) -> float:
    """Read the logits in each pass, write their gradient in the second."""
    return 3.0 * rows * classes * itemsize


CASES = [
    Case(
        op="cross_entropy",
        name=f"N{rows}-V{classes}-{str(dtype).removeprefix('torch.')}",
        make=make(rows, classes, dtype),
        ours=lambda logits, target: fastlm.cross_entropy(logits, target),
        plain=functional.cross_entropy,
        traffic=traffic(rows, classes, dtype.itemsize),
        group="cross_entropy",
    )
    for rows, classes, dtype in (
        (2048, 10000, torch.float32),
        (512, 50257, torch.float32),
        (2048, 10000, torch.bfloat16),
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cross_entropy(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
