"""Distillation from a teacher's output layer, without the logits of either in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case

Layer = tuple[Tensor, Tensor]  # hidden states and the weight


def make(rows: int, features: int, classes: int) -> Callable[[str], Arguments]:
    """student, its weight, and both of the teacher as one argument, which gets no gradient."""

    def layer(device: str) -> Layer:
        hidden = torch.randn(rows, features, device=device)
        return hidden, torch.randn(classes, features, device=device) * features**-0.5

    return lambda device: (*layer(device), layer(device))


def plain(student: Tensor, weight: Tensor, teacher: Layer, divergence: str) -> Tensor:
    with torch.no_grad():
        log_p = functional.linear(*(x.to(student.dtype) for x in teacher)).log_softmax(-1)
    log_q = functional.linear(student, weight).log_softmax(-1)
    kl_div = functools.partial(functional.kl_div, reduction="batchmean", log_target=True)
    if divergence == "forward":
        return kl_div(log_q, log_p)
    if divergence == "reverse":
        return kl_div(log_p, log_q)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl_div(log_m, log_p) + kl_div(log_m, log_q))


def ours(student: Tensor, weight: Tensor, teacher: Layer, divergence: str) -> Tensor:
    return fastlm.linear_kl_div(student, weight, *teacher, divergence=divergence)


CASES = [
    Case(
        op="linear_kl_div",
        name=f"{divergence}-N{rows}-H{features}-V{classes}",
        make=make(rows, features, classes),
        ours=functools.partial(ours, divergence=divergence),
        plain=functools.partial(plain, divergence=divergence),
        flops=8.0 * rows * features * classes,  # both logits, dstudent, dweight
        reach=">= 1.0, memory <= 7%",
        group="linear_kl_div",
    )
    for rows, features, classes in ((1024, 256, 16000), (512, 1024, 50257))
    for divergence in ("forward", "reverse", "jsd")
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear_kl_div(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
