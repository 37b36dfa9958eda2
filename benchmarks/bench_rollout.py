"""Sampling whole sequences from the GRU language model, log-probabilities kept; and a step of
policy gradient on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm import testing
from fastlm.bench.case import Arguments, Case

VOCAB, HIDDEN, LENGTH = 2048, 256, 256


class Model(NamedTuple):
    """The same parameters, as plain modules and as ours."""

    batch: int
    embedding: nn.Embedding
    gru: nn.GRU
    head: nn.Linear
    ours: fastlm.nn.EmbeddingGRU

    def decoder(self) -> fastlm.nn.GRUDecoder:
        return fastlm.nn.GRUDecoder(self.ours, self.head)

    def start(self) -> Tensor:
        return torch.zeros(self.batch, 1, dtype=torch.int64, device=self.head.weight.device)


def make_model(batch: int, device: str) -> Arguments:
    embedding = nn.Embedding(VOCAB, HIDDEN)
    gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
    ours = fastlm.nn.EmbeddingGRU(VOCAB, HIDDEN, HIDDEN, batch_first=True)
    before = [*embedding.parameters(), *gru.parameters()]
    with torch.no_grad():
        for new, old in zip(ours.parameters(), before, strict=True):
            new.copy_(old)
    head = nn.Linear(HIDDEN, VOCAB)
    return (Model(batch, *(m.to(device).eval() for m in (embedding, gru, head, ours))),)


@torch.no_grad()
def plain(model: Model) -> tuple[Tensor, Tensor]:
    tokens = model.start()
    h, kept, logprobs = None, [], []
    for _ in range(LENGTH):
        output, h = model.gru(model.embedding(tokens), h)
        probs = model.head(output[:, -1]).softmax(-1)
        tokens = torch.multinomial(probs, 1)
        kept.append(tokens)
        logprobs.append(probs.gather(-1, tokens).log())
    return torch.cat(kept, 1), torch.cat(logprobs, 1)


def ours(model: Model) -> tuple[Tensor, Tensor]:
    made = fastlm.generate(model, model.start(), LENGTH, seed=1, return_logprobs=True)
    return made.tokens, made.logprobs


def stepping(model: Model) -> tuple[Tensor, Tensor]:
    """Our decoder and `sample`, from Python."""
    tokens, decoder = model.start()[:, 0], model.decoder()
    h, kept, logprobs = None, [], []
    for i in range(LENGTH):
        logits, h = decoder(tokens, h)
        tokens, logprob = fastlm.sample(logits, seed=1, step=i)
        kept.append(tokens)
        logprobs.append(logprob)
    return torch.stack(kept, 1), torch.stack(logprobs, 1)


def reinforce(logprobs: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, ...]:
    """Gradients for an arbitrary advantage of each token."""
    advantages = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device)
    return torch.autograd.grad((advantages.view_as(logprobs) * logprobs).sum(), list(parameters))


def inputs_of(tokens: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)


def plain_logprobs(model: Model, tokens: Tensor) -> Tensor:
    logits = model.head(model.gru(model.embedding(inputs_of(tokens)))[0])
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@torch.enable_grad()
def plain_policy_step(model: Model) -> tuple[Tensor, ...]:
    tokens, _ = plain(model)
    modules = (model.embedding, model.gru, model.head)
    return reinforce(plain_logprobs(model, tokens), (p for m in modules for p in m.parameters()))


@torch.enable_grad()
def policy_step(model: Model) -> tuple[Tensor, ...]:
    made = fastlm.generate(model, model.start(), LENGTH, seed=1, save_for_backward=True)
    modules = (model.ours, model.head)
    return reinforce(made.logprobs, (p for m in modules for p in m.parameters()))


@torch.enable_grad()
def forward_policy_step(model: Model) -> tuple[Tensor, ...]:
    """Our rollout, then our ordinary training forward instead of what the rollout stored."""
    tokens, _ = ours(model)
    output, _ = model.ours(inputs_of(tokens))
    weight, bias = model.head.weight, model.head.bias
    logprobs = fastlm.linear_token_logprobs(output, weight, tokens, linear_bias=bias)
    modules = (model.ours, model.head)
    return reinforce(logprobs, (p for m in modules for p in m.parameters()))


def check(args: Arguments) -> None:
    """The log-probabilities are those that a forward pass over the sampled tokens gives."""
    (model,) = args
    with torch.no_grad():
        tokens, logprobs = ours(model)

        def again(dtype: torch.dtype) -> Tensor:
            for module in (model.embedding, model.gru, model.head):
                module.to(dtype)
            return plain_logprobs(model, tokens).double()

        exact, theirs = again(torch.float64), again(torch.float32)
    floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(exact.abs().max())
    allowed = 2 * testing.error(theirs, exact) + floor
    actual = testing.error(logprobs.double(), exact)
    assert actual <= allowed, f"log-probabilities are off by {actual:.2g}, allowed {allowed:.2g}"
    counts = torch.bincount(tokens.flatten(), minlength=VOCAB)
    expected = min(VOCAB, tokens.numel()) // 4
    assert int((counts > 0).sum()) > expected, "the sampled tokens are not spread out"


def check_policy_step(args: Arguments) -> None:
    """Gradients are those of the ordinary forward and backward on the same tokens."""
    (model,) = args
    for a, b in zip(policy_step(model), forward_policy_step(model), strict=True):
        scale = float(b.abs().max())
        assert testing.error(a, b) <= 1e-4 * scale, "gradients differ from those of a forward"


def make_case(
    batch: int, kind: str, ours: Callable, plain: Callable, reach: str, **options: object
) -> Case:  # fmt: skip
    """Products: 3H x H and H x V a token forward, of the projected vocabulary none a token."""
    forward = 2.0 * batch * LENGTH * HIDDEN * (3 * HIDDEN + VOCAB)
    return Case(
        op="rollout",
        name=f"B{batch}-V{VOCAB}-H{HIDDEN}-{LENGTH}-tokens{kind}",
        make=lambda device: make_model(batch, device),
        ours=ours,
        plain=plain,
        needs=("nn.GRUDecoder", "generate"),
        backward=False,
        compiles=False,  # 256 unrolled steps
        # a policy step: the logits again, and two products for each forward one
        flops=forward if not kind else 3 * forward + 2.0 * batch * LENGTH * HIDDEN * VOCAB,
        unit_count=batch * LENGTH,
        reach=reach,
        **options,
    )


CASES = [
    make_case(32, "", ours, plain, ">= 4", check=check, others={"stepping": stepping}),
    make_case(1, "", ours, plain, ">= 3", check=check, others={"stepping": stepping}),
    make_case(
        32, "-policy-step", policy_step, plain_policy_step, ">= 2.5",
        check=check_policy_step, others={"second forward": forward_policy_step},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rollout(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
