"""A training step of the Transformer language model, and a step of its decoding, against the same
model in plain PyTorch with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm.bench.case import Arguments, Case
from fastlm.lm.transformer import PlainTransformerLM, TransformerLM

VOCABULARY = 2048


class Model:
    """The loss as a function of tokens and parameters, in their order."""

    def __init__(self, kind: Any, settings: dict[str, Any]) -> None:
        with torch.device("meta"):
            self.model = kind(VOCABULARY, end=VOCABULARY - 1, **settings)
        self.names = [name for name, _ in self.model.named_parameters()]

    def __call__(self, tokens: Tensor, *parameters: Tensor) -> Tensor:
        values = {f"model.{n}": p for n, p in zip(self.names, parameters, strict=True)}
        return torch.func.functional_call(_Loss(self.model), values, (tokens,))


class _Loss(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[0]


def make(settings: dict[str, Any], batch: int, documents: bool) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        model = TransformerLM(VOCABULARY, end=VOCABULARY - 1, **settings).to(device)
        tokens = torch.randint(VOCABULARY - 1, (batch, settings["context"] + 1), device=device)
        if documents:  # of random lengths, 64 tokens on average
            tokens[torch.rand_like(tokens, dtype=torch.float32) < 1 / 64] = VOCABULARY - 1
        return (tokens, *(p.detach() for p in model.parameters()))

    return build


def flops(settings: dict[str, Any], batch: int) -> float:
    with torch.device("meta"):
        config = TransformerLM(VOCABULARY, **settings).config
    return float(config.flops_per_token() * batch * settings["context"])


SIZES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "H256-L4-B8-T256": ({"hidden_size": 256, "num_layers": 4, "context": 256}, 8, False),
    "H256-L4-B8-T256-documents": ({"hidden_size": 256, "num_layers": 4, "context": 256}, 8, True),
    "H128-L2-B4-T512": ({"hidden_size": 128, "num_layers": 2, "context": 512}, 4, False),
    "H256-L2-B2-T1024-grouped": (
        {"hidden_size": 256, "num_layers": 2, "num_kv_heads": 1, "context": 1024},
        2,
        False,
    ),
}

CASES = [
    Case(
        op="transformer",
        name=name,
        make=make(settings, batch, documents),
        ours=Model(TransformerLM, settings),
        plain=Model(PlainTransformerLM, settings),
        needs=("lm.TransformerLM",),
        compiles=False,
        # documents leave out a part of the scores that these FLOPs count
        flops=0.0 if documents else flops(settings, batch),
        unit_count=batch * settings["context"],
        reach=">= 1.0",
        group="transformer",
    )
    for name, (settings, batch, documents) in SIZES.items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformer(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
