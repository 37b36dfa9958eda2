"""The GRU language model against the same model in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlm import testing
from fastlm.lm.errors import UsageError
from fastlm.lm.model import GRULM, PlainGRULM, parameter_count

SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 16},
    {"hidden_size": 20, "embedding_dim": 12, "num_layers": 2},
    {"hidden_size": 16, "tied": True},
]


def pair(**settings: Any) -> tuple[GRULM, PlainGRULM]:
    ours, plain = GRULM(33, **settings), PlainGRULM(33, **settings)
    plain.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 7)])
def test_loss_state_and_gradients_match_plain(
    settings: dict[str, Any], batch: int, length: int
) -> None:
    ours, plain = pair(**settings)
    layers, width = settings.get("num_layers", 1), settings["hidden_size"]
    tokens, targets = torch.randint(33, (2, batch, length))
    h0 = torch.randn(layers, batch, width)

    def call(model: Any) -> Any:
        def run(state: torch.Tensor, *parameters: torch.Tensor) -> Any:
            names = [name for name, _ in model.named_parameters()]
            values = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(
                model, values, (tokens, targets, state), tie_weights=True
            )

        return run

    class Loss(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            return self.model.loss(*args)

    parameters = [p.detach() for p in plain.parameters()]
    testing.check(call(Loss(ours)), call(Loss(plain)), [h0, *parameters])


@pytest.mark.parametrize("settings", SHAPES)
def test_stepping_is_the_forward(settings: dict[str, Any]) -> None:
    ours, plain = pair(**settings)
    tokens = torch.randint(33, (2, 5))
    for model in (ours, plain):
        logits, h_n = model(tokens)
        for step in (model.step, model.decoder()):
            h = torch.zeros_like(h_n)
            for t in range(5):
                with torch.no_grad():
                    one, h = step(tokens[:, t], h)
                torch.testing.assert_close(one, logits[:, t].detach())
            torch.testing.assert_close(h, h_n.detach())


def test_decoder_has_the_parameters_of_now() -> None:
    model = GRULM(33, 16)
    token, h = torch.tensor([3]), torch.zeros(1, 1, 16)
    with torch.no_grad():
        before = model.decoder()(token, h)[0]
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = model.decoder()(token, h)[0]
    assert not torch.equal(before, after)


def test_tied_head_is_the_embedding() -> None:
    model: Any = GRULM(33, 16, tied=True)
    assert model.head.weight is model.body.embedding.weight
    assert parameter_count(model) == 33 * 16 + 33 + 3 * (2 * 16 * 16 + 2 * 16)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"tied": True, "embedding_dim": 8}, "equal to hidden_size"),
    ],
)
def test_rejects(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        GRULM(33, **settings)


def test_token_out_of_range_names_value_and_position() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    tokens[1, 2] = 33
    with pytest.raises(IndexError, match="33"):
        GRULM(33, 16).loss(tokens, torch.zeros_like(tokens))
    with pytest.raises(IndexError, match="33"):
        GRULM(33, 16).loss(torch.zeros_like(tokens), tokens)


def test_flops_are_those_of_the_matrix_products() -> None:
    plain = PlainGRULM(33, 20, embedding_dim=12, num_layers=2)
    matrices = {name: p for name, p in plain.named_parameters() if p.dim() == 2}
    products = sum(p.numel() for name, p in matrices.items() if "embedding" not in name)
    assert plain.config.flops_per_token() == 6 * products


def test_start_from_counts_predicts_the_frequencies() -> None:
    model: Any = PlainGRULM(4, 8)
    model.start_from_counts(torch.tensor([0, 1, 3, 12]))
    share = model.head.bias.softmax(0)
    torch.testing.assert_close(share, torch.tensor([1.0, 2.0, 4.0, 13.0]) / 20)
