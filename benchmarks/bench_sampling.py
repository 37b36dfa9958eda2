"""Drawing a token from logits, with its log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.bench.case import Arguments, Case


def make(rows: int, classes: int) -> Callable[[str], Arguments]:
    return lambda device: (torch.randn(rows, classes, device=device).mul_(3),)


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits with -inf outside the k largest, then outside the smallest set of mass top_p."""
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p
        ordered = ordered.masked_fill(outside, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return logits


def plain(options: dict[str, Any]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    temperature = options.get("temperature", 1.0)

    def sample(logits: Tensor) -> tuple[Tensor, Tensor]:
        kept = filtered(logits / temperature, options.get("top_k"), options.get("top_p"))
        probs = kept.softmax(-1)
        tokens = torch.multinomial(probs, 1)
        return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()

    return sample


def check(options: dict[str, Any]) -> Callable[[Arguments], None]:
    """The tokens are possible ones, and the log-probabilities are those of what `sample` kept.

    Whether log-probabilities are of the kept or of all tokens is the contract of `fastlm.sample`;
    its own tests hold that. Here both forms are known and one must fit everywhere.
    """

    def run(args: Arguments) -> None:
        (logits,) = args
        exact = logits.double() / options.get("temperature", 1.0)
        kept = filtered(exact, options.get("top_k"), options.get("top_p"))
        tokens, logprobs = fastlm.sample(logits, seed=3, **options)
        chosen = tokens[:, None]
        assert kept.gather(-1, chosen).isfinite().all(), "a token outside the kept ones"
        errors = [
            (scores.log_softmax(-1).gather(-1, chosen)[:, 0] - logprobs.double()).abs().max()
            for scores in (kept, exact)
        ]
        floor = 64 * torch.finfo(torch.float32).eps * logits.abs().max()
        assert min(errors) <= floor, f"log-probabilities are off by {float(min(errors)):.2g}"

    return run


CASES = [
    Case(
        op="sample",
        name=f"B32-V{classes}-{name}",
        make=make(32, classes),
        ours=lambda logits, options=options: fastlm.sample(logits, seed=1, **options),
        plain=plain(options),
        backward=False,
        check=check(options),
        traffic=32.0 * classes * 4,
        unit_count=32,
    )
    for classes, name, options in (
        (2048, "temperature", {"temperature": 0.8}),
        (50257, "temperature", {"temperature": 0.8}),
        (50257, "top-k", {"top_k": 50}),
        (50257, "top-p", {"top_p": 0.9}),
        (50257, "top-k-top-p", {"top_k": 50, "top_p": 0.9}),
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sampling(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
