"""Plans of tokens distributed as in text, made as a data loader makes them, and what they save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

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


VOCAB, SEQ, HIDDEN = 10000, 64, 512


def make_planned(batch: int, distinct: bool) -> Callable[[str], Arguments]:
    """With the plan that a data loader would have made; or no token twice."""

    def build(device: str) -> Arguments:
        count, bound = batch * SEQ, HIDDEN**-0.5
        ids = torch.from_numpy(zipf_tokens(count, VOCAB))
        tokens = (torch.randperm(VOCAB)[:count] if distinct else ids).view(batch, SEQ).to(device)
        square, line = (3 * HIDDEN, HIDDEN), (3 * HIDDEN,)
        weights = [torch.empty(s).uniform_(-bound, bound) for s in (square, square, line, line)]
        rest = (w.to(device) for w in (torch.randn(VOCAB, HIDDEN), *weights))
        return (fastlm.token_plan(tokens, VOCAB), tokens, *rest)

    return build


def both_modules(plan: Any, tokens: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    """What nn.Embedding and nn.GRU(batch_first=True) run, without the cost of the modules."""
    h0 = weight.new_zeros(1, tokens.shape[0], HIDDEN)
    rows = functional.embedding(tokens, weight)
    return torch._VF.gru(rows, h0, weights, True, 1, 0.0, True, False, True)[0]


def planned(plan: fastlm.TokenPlan, tokens: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    return fastlm.embedding_gru(tokens, weight, *weights, plan=plan)[0]


def without_plan(dedupe: str) -> Callable[..., Tensor]:
    return lambda plan, tokens, weight, *w: fastlm.embedding_gru(tokens, weight, *w, dedupe=dedupe)[
        0
    ]


def flops(batch: int, distinct: bool) -> float:
    """Forward, dinput, dweight: the recurrence, and the projection of each distinct token."""
    count = batch * SEQ
    unique = count if distinct else len(set(zipf_tokens(count, VOCAB).tolist()))
    return 3 * 2.0 * HIDDEN * 3 * HIDDEN * (count + unique)


CASES += [
    Case(
        op="embedding_gru",
        name=f"{'distinct' if distinct else 'planned'}-B{batch}-T{SEQ}-H{HIDDEN}-V{VOCAB}",
        make=make_planned(batch, distinct),
        ours=planned,
        plain=both_modules,
        compiles=False,
        others={"unplanned": without_plan("auto"), "off": without_plan("off")},
        flops=flops(batch, distinct),
        unit_count=batch * SEQ,
        reach="unplanned >= 1.0, off >= 1.0",
    )
    for batch, distinct in ((1, False), (32, False), (32, True))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_token_plan(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
