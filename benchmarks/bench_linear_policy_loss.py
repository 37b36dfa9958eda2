"""Output projection and policy loss in one pass, against our own two passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.bench.case import Arguments, Case

LOSS = {"loss_type": "grpo", "clip_eps_low": 0.2, "clip_eps_high": 0.28}


def make(batch: int, length: int, features: int, classes: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        hidden = torch.randn(batch, length, features, device=device)
        weight = torch.randn(classes, features, device=device) * features**-0.5
        target = torch.randint(classes, (batch, length), device=device)
        # an integer: every float argument of a case gets a gradient
        rewarded = torch.randint(2, (batch, length), device=device)
        return hidden, weight, target, rewarded

    return build


def plain(hidden: Tensor, weight: Tensor, target: Tensor, rewarded: Tensor) -> Tensor:
    advantages = 2 * rewarded.to(hidden.dtype) - 1
    logprobs = fastlm.linear_token_logprobs(hidden, weight, target)
    assert isinstance(logprobs, Tensor)
    return fastlm.policy_loss(logprobs, advantages, **LOSS)  # type: ignore[arg-type]


def ours(hidden: Tensor, weight: Tensor, target: Tensor, rewarded: Tensor) -> Tensor:
    advantages = 2 * rewarded.to(hidden.dtype) - 1
    call = (hidden, weight, target, advantages)
    return fastlm.linear_policy_loss(*call, **LOSS)  # type: ignore[arg-type]


CASES = [
    Case(
        op="linear_policy_loss",
        name=f"B{batch}-T{length}-H{features}-V{classes}-two-passes",
        make=make(batch, length, features, classes),
        ours=ours,
        plain=plain,
        flops=6.0 * batch * length * features * classes,  # logits, dhidden, dweight
        reach=">= 1.25",
    )
    for batch, length, features, classes in ((8, 128, 256, 10000),)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear_policy_loss(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
