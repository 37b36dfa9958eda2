"""Log-probability of a token, and entropy, from logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.bench.case import Arguments, Case

SHAPES = ((2048, 10000), (512, 50257))


def make(rows: int, classes: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        logits = torch.randn(rows, classes, device=device).mul_(3)
        return logits, torch.randint(classes, (rows,), device=device)

    return build


def plain_logprobs(logits: Tensor, target: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def plain_entropy(logits: Tensor, _: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def plain_both(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, target[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def both(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    result = fastlm.token_logprobs(logits, target, return_entropy=True)
    return result.logprobs, result.entropy


def cases(op: str, what: str, ours: Callable, plain: Callable) -> list[Case]:
    return [
        Case(
            op=op,
            name=f"{what}-N{rows}-V{classes}-{'fwd+bwd' if backward else 'fwd'}",
            make=make(rows, classes),
            ours=ours,
            plain=plain,
            backward=backward,
            traffic=(3.0 if backward else 1.0) * rows * classes * 4,
            reach=">= 2.5",
            group=f"{op}/{what} {'fwd+bwd' if backward else 'fwd'}",
        )
        for rows, classes in SHAPES
        for backward in (False, True)
    ]


def make_linear(rows: int, features: int, classes: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        hidden = torch.randn(rows, features, device=device)
        weight = torch.randn(classes, features, device=device) * features**-0.5
        return hidden, weight, torch.randint(classes, (rows,), device=device)

    return build


def linear_alone(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return fastlm.linear_token_logprobs(hidden, weight, target)


def linear_both(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    result = fastlm.linear_token_logprobs(hidden, weight, target, return_entropy=True)
    return result.logprobs, result.entropy


def plain_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return plain_both(torch.nn.functional.linear(hidden, weight), target)


LINEAR = [
    Case(
        op="linear_token_logprobs",
        name=f"with-entropy-N{rows}-H{features}-V{classes}",
        make=make_linear(rows, features, classes),
        ours=linear_both,
        plain=plain_linear,
        others={"logprobs alone": linear_alone},
        flops=8.0 * rows * features * classes,  # the logits twice, their two gradients
        reach="alone >= 0.95",
    )
    for rows, features, classes in ((2048, 512, 10000), (512, 1024, 50257))
]

CASES = [
    *cases("token_logprobs", "logprob", lambda a, b: fastlm.token_logprobs(a, b), plain_logprobs),
    *cases("token_logprobs", "with-entropy", both, plain_both),
    *cases("entropy", "entropy", lambda logits, _: fastlm.entropy(logits), plain_entropy),
    *LINEAR,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_token_logprobs(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
