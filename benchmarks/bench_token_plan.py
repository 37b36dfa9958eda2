"""Plans of tokens distributed as in text, made as a data loader makes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.bench.case import Arguments, Case
from fastlm.bench.tokens import zipf_tokens


def make(count: int, vocab: int) -> Callable[[str], Arguments]:
    return lambda device: (zipf_tokens(count, vocab), vocab)


def plain(ids: np.ndarray, vocab: int) -> list[Tensor]:
    flat = torch.from_numpy(ids)
    unique, inverse, counts = torch.unique(flat, return_inverse=True, return_counts=True)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return [unique, inverse, offsets, flat.argsort(stable=True)]


def in_numpy(ids: np.ndarray, vocab: int) -> list[np.ndarray]:
    unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return [unique, inverse, np.cumsum(counts), ids.argsort(kind="stable")]


def check(args: Arguments) -> None:
    for got, want in zip(fastlm.token_plan(*args), plain(*args), strict=True):
        assert torch.equal(got, want)


CASES = [
    Case(
        op="token_plan",
        name=f"N{count}-V{vocab}",
        make=make(count, vocab),
        ours=lambda ids, vocab: list(fastlm.token_plan(ids, vocab)),
        plain=plain,
        others={"numpy": in_numpy},
        backward=False,
        compiles=False,
        check=check,
        traffic=count * 4 * 8,  # read ids; write inverse and order, count once
        unit_count=count,
        reach=">= 2",
    )
    for count, vocab in ((2048, 10000), (65536, 50257), (2048, 256000))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_token_plan(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
