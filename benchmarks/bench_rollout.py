"""Sampling whole sequences from the GRU language model, log-probabilities kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm import testing
from fastlm.bench.case import Arguments, Case

BATCH, VOCAB, HIDDEN, LENGTH = 32, 2048, 256, 256


@dataclass
class Model:
    """The same parameters, as plain modules and as ours."""

    embedding: nn.Embedding
    gru: nn.GRU
    head: nn.Linear
    ours: nn.Module


def make(device: str) -> Arguments:
    embedding = nn.Embedding(VOCAB, HIDDEN)
    gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
    ours = fastlm.nn.EmbeddingGRU(VOCAB, HIDDEN, HIDDEN, batch_first=True)
    before = [*embedding.parameters(), *gru.parameters()]
    with torch.no_grad():
        for new, old in zip(ours.parameters(), before, strict=True):
            new.copy_(old)
    head = nn.Linear(HIDDEN, VOCAB)
    model = Model(*(m.to(device).eval() for m in (embedding, gru, head, ours)))
    return (model,)


def plain(model: Model) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(BATCH, 1, dtype=torch.int64, device=model.head.weight.device)
    h, kept, logprobs = None, [], []
    for _ in range(LENGTH):
        output, h = model.gru(model.embedding(tokens), h)
        probs = model.head(output[:, -1]).softmax(-1)
        tokens = torch.multinomial(probs, 1)
        kept.append(tokens)
        logprobs.append(probs.gather(-1, tokens).log())
    return torch.cat(kept, 1), torch.cat(logprobs, 1)


def ours(model: Model) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(BATCH, dtype=torch.int64, device=model.head.weight.device)
    decoder = model.ours.decoder()
    h, kept, logprobs = None, [], []
    for i in range(LENGTH):
        output, h = decoder.step(tokens, h)
        tokens, logprob = fastlm.sample(model.head(output), seed=1, step=i)
        kept.append(tokens)
        logprobs.append(logprob)
    return torch.stack(kept, 1), torch.stack(logprobs, 1)


def check(args: Arguments) -> None:
    """The log-probabilities are those that a forward pass over the sampled tokens gives."""
    (model,) = args
    with torch.no_grad():
        tokens, logprobs = ours(model)
        inputs = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)

        def again(dtype: torch.dtype) -> Tensor:
            modules = [m.to(dtype) for m in (model.embedding, model.gru, model.head)]
            logits = modules[2](modules[1](modules[0](inputs))[0])
            return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].double()

        exact, theirs = again(torch.float64), again(torch.float32)
    floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(exact.abs().max())
    allowed = 2 * testing.error(theirs, exact) + floor
    actual = testing.error(logprobs.double(), exact)
    assert actual <= allowed, f"log-probabilities are off by {actual:.2g}, allowed {allowed:.2g}"
    counts = torch.bincount(tokens.flatten(), minlength=VOCAB)
    assert int((counts > 0).sum()) > VOCAB // 4, "the sampled tokens are not spread out"


CASES = [
    Case(
        op="rollout",
        name=f"B{BATCH}-V{VOCAB}-H{HIDDEN}-{LENGTH}-tokens",
        make=make,
        ours=ours,
        plain=plain,
        needs=("nn.EmbeddingGRU", "sample"),
        backward=False,
        compiles=False,  # 256 unrolled steps
        check=check,
        flops=2.0 * BATCH * LENGTH * HIDDEN * (6 * HIDDEN + VOCAB),
        unit_count=BATCH * LENGTH,
        reach=">= 2.0",
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rollout(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
