"""Embedding and GRU in one, on tokens distributed as in text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case
from fastlm.bench.tokens import zipf_tokens

VOCAB, HIDDEN, SEQ = 10000, 512, 64


def make(batch: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        tokens = torch.from_numpy(zipf_tokens(batch * SEQ, VOCAB)).view(batch, SEQ)
        bound = HIDDEN**-0.5
        weight = torch.randn(VOCAB, HIDDEN)
        shapes = ((3 * HIDDEN, HIDDEN), (3 * HIDDEN, HIDDEN), (3 * HIDDEN,), (3 * HIDDEN,))
        weights = [torch.empty(*s).uniform_(-bound, bound) for s in shapes]
        return tuple(t.to(device) for t in (tokens, weight, *weights))

    return build


def plain(tokens: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    """What nn.Embedding and nn.GRU(batch_first=True) run, without the cost of the modules."""
    embedded = functional.embedding(tokens, weight)
    h0 = embedded.new_zeros(1, tokens.shape[0], HIDDEN)
    return torch._VF.gru(embedded, h0, weights, True, 1, 0.0, True, False, True)[0]


def ours(tokens: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    return fastlm.embedding_gru(tokens, weight, *weights)[0]


def flops(batch: int) -> float:
    """Forward, dinput, dweight: the recurrence, and the projection of each distinct token."""
    unique = len(set(zipf_tokens(batch * SEQ, VOCAB).tolist()))
    return 3 * 2.0 * HIDDEN * 3 * HIDDEN * (batch * SEQ + unique)


CASES = [
    Case(
        op="embedding_gru",
        name=f"B{batch}-T{SEQ}-H{HIDDEN}-V{VOCAB}",
        make=make(batch),
        ours=ours,
        plain=plain,
        compiles=False,  # torch.compile unrolls the recurrence: minutes of compiling
        flops=flops(batch),
        unit_count=batch * SEQ,
        reach="mean >= 1.8, each >= 1.0",
        group="embedding_gru fwd+bwd",
    )
    for batch in (1, 4, 16, 64)
]


def make_planned(batch: int, distinct: bool) -> Callable[[str], Arguments]:
    """As `make`, with the plan that a data loader would have made; or no token twice."""

    def build(device: str) -> Arguments:
        tokens, *rest = make(batch)(device)
        if distinct:
            tokens = torch.randperm(VOCAB)[: batch * SEQ].view(batch, SEQ).to(device)
        return (fastlm.token_plan(tokens, VOCAB), tokens, *rest)

    return build


def without_plan(dedupe: str) -> Callable[..., Tensor]:
    return lambda plan, tokens, weight, *w: fastlm.embedding_gru(tokens, weight, *w, dedupe=dedupe)[
        0
    ]


CASES += [
    Case(
        op="embedding_gru",
        name=f"{'distinct' if distinct else 'planned'}-B{batch}-T{SEQ}-H{HIDDEN}-V{VOCAB}",
        make=make_planned(batch, distinct),
        ours=lambda plan, tokens, weight, *w: fastlm.embedding_gru(tokens, weight, *w, plan=plan)[
            0
        ],
        plain=lambda plan, *args: plain(*args),
        compiles=False,
        others={"unplanned": without_plan("auto"), "off": without_plan("off")},
        flops=flops(batch) if not distinct else 3 * 4.0 * HIDDEN * 3 * HIDDEN * batch * SEQ,
        unit_count=batch * SEQ,
        reach="unplanned >= 1.0, off >= 1.0",
    )
    for batch, distinct in ((1, False), (32, False), (32, True))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_embedding_gru(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
