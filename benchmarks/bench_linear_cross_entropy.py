"""Output projection and cross-entropy, without the logits in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case


def make(rows: int, features: int, classes: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        hidden = torch.randn(rows, features, device=device)
        weight = torch.randn(classes, features, device=device) * features**-0.5
        bias = torch.randn(classes, device=device) * features**-0.5
        return hidden, weight, bias, torch.randint(classes, (rows,), device=device)

    return build


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight, bias), target)


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return fastlm.linear_cross_entropy(hidden, weight, target, linear_bias=bias)


def chunked_by_torch(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
    return functional.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, options=options
    )


def peers() -> dict[str, Callable]:
    """Other libraries' versions that are installed and run here."""
    found: dict[str, Callable] = {}
    if hasattr(functional, "linear_cross_entropy"):
        found["torch chunked"] = chunked_by_torch
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction,
        )

        found["liger"] = lambda hidden, weight, bias, target: (
            LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, bias)[0]
        )
    if torch.cuda.is_available() and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda hidden, weight, bias, target: linear_cross_entropy(
            hidden, weight, target, bias=bias
        )
    return found


CASES = [
    Case(
        op="linear_cross_entropy",
        name=f"N{rows}-H{features}-V{classes}",
        make=make(rows, features, classes),
        ours=ours,
        plain=plain,
        others=peers(),
        flops=6.0 * rows * features * classes,  # logits, dhidden, dweight
        reach=reach,
    )
    for rows, features, classes, reach in (
        (2048, 512, 10000, ">= 1.0, memory <= 5%"),
        (2048, 256, 10000, ">= 1.3"),
        (2048, 128, 50257, ">= 1.3"),
        (2048, 1024, 50257, ">= 1.0, memory <= 5%"),
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear_cross_entropy(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
