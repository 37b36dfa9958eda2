"""One iteration of policy gradient: texts are written, judged, and the model is changed.

`update` is the iteration in the fewest calls. `fastlm-rl` is that of `fastlm rl` with all it does:
contexts drawn, texts decoded, the reward asked, the divergence from the model at the start, the
numbers of its line; the plain version does the same things.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm import testing
from fastlm.bench.case import Arguments, Case
from fastlm.lm import metrics, policy, rollouts
from fastlm.lm.model import GRULM
from fastlm.lm.tokenizer import Tokenizer

VOCAB, HIDDEN, BATCH, PROMPT, LENGTH, GROUP = 2048, 256, 64, 24, 40, 8
CLIP, RATE, KL = 0.2, 1e-4, 0.05


class Words(Tokenizer):
    """A vocabulary of short words, for texts that nobody reads."""

    kind = "words"

    def __init__(self) -> None:
        self.table = [f" w{i}".encode() for i in range(VOCAB - 1)] + [b""]

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        raise NotImplementedError

    def _payload(self) -> Any:
        return self.kind


class Store:
    """One document of random tokens, as `rollouts.contexts` reads a store."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer_sha256 = tokenizer.sha256
        self.ids = torch.randint(VOCAB - 1, (100_000,)).numpy()

    def spans(self, split: str) -> list[tuple[int, int]]:
        return [(0, len(self.ids))]


class PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB)

    @torch.no_grad()
    def write(self, prompts: Tensor) -> Tensor:
        inputs, h, made = prompts, None, []
        for _ in range(LENGTH):
            output, h = self.gru(self.embedding(inputs), h)
            inputs = torch.multinomial(self.head(output[:, -1]).softmax(-1), 1)
            made.append(inputs)
        return torch.cat(made, 1)

    def logprobs(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        read = torch.cat([prompts, tokens[:, :-1]], 1)
        output = self.gru(self.embedding(read))[0][:, prompts.shape[1] - 1 :]
        return self.head(output).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@dataclass
class Agents:
    """The same parameters twice, an optimiser for each, prompts, and what `fastlm rl` needs."""

    ours: GRULM
    plain: PlainModel
    reference: PlainModel
    prompts: Tensor
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    trainer: Any


def reward(prompts: Any, texts: Any) -> list[float]:
    """Something of each text, cheap."""
    return [text.count("1") / 10.0 for text in texts]


def make_agents(device: str) -> Arguments:
    ours, plain = GRULM(VOCAB, HIDDEN).to(device), PlainModel().to(device)
    with torch.no_grad():
        for new, old in zip(plain.parameters(), ours.parameters(), strict=True):
            new.copy_(old)
    tokenizer = Words()
    # texts of full length: they end at one token in 2048
    options: Any = {"batch": BATCH, "group": GROUP, "prompt": PROMPT, "length": LENGTH}
    config = policy.PolicyConfig("ppo", lr=RATE, kl_coef=KL, clip_eps=CLIP, **options)
    store: Any = Store(tokenizer)
    trainer = policy.PolicyGradient(ours, tokenizer, store, reward, config)
    optimizers = tuple(
        torch.optim.AdamW(m.parameters(), lr=RATE, fused=True) for m in (ours, plain)
    )
    prompts = torch.randint(VOCAB, (BATCH, PROMPT), device=device)
    reference = copy.deepcopy(plain).requires_grad_(False)
    return (Agents(ours, plain, reference, prompts, optimizers, trainer),)


def score(tokens: Tensor) -> Tensor:
    """Advantages [B] of a reward that costs nothing: even tokens are good."""
    rewards = (tokens % 2 == 0).float().mean(1)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)


def change(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.enable_grad()
def ours(agents: Agents) -> Tensor:
    model = agents.ours
    made = fastlm.generate(model, agents.prompts, LENGTH, seed=1, save_for_backward=True)
    now = made.logprobs
    loss = fastlm.policy_loss(
        now, score(made.tokens), old_logprobs=now.detach(), loss_type="ppo", clip_eps_low=CLIP
    )
    return change(loss, model, agents.optimizers[0])


def clipped(now: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio, advantages = (now - old).exp(), advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


@torch.enable_grad()
def plain(agents: Agents, old_pass: bool = True) -> Tensor:
    model, prompts = agents.plain, agents.prompts
    tokens = model.write(prompts)
    advantages = score(tokens)
    if old_pass:  # as usual: the log-probs of the model that wrote, before it is changed
        with torch.no_grad():
            old = model.logprobs(prompts, tokens)
    now = model.logprobs(prompts, tokens)
    return change(
        clipped(now, old if old_pass else now.detach(), advantages), model, agents.optimizers[1]
    )


def plain_one_pass(agents: Agents) -> Tensor:
    return plain(agents, old_pass=False)


@torch.enable_grad()
def ours_rl(agents: Agents) -> Any:
    return agents.trainer.step().gradient_norm


@torch.enable_grad()
def plain_rl(agents: Agents, old_pass: bool = True) -> Any:
    model, trainer = agents.plain, agents.trainer
    places = rollouts.contexts(trainer.store, "train", BATCH // GROUP, PROMPT, 1, seed=1)
    prompts = rollouts.repeat_each([place.prompt for place in places], GROUP)
    tokens = model.write(prompts)
    texts = [trainer.tokenizer.decode(row) for row in tokens.tolist()]
    before = [trainer.tokenizer.decode(row) for row in prompts.tolist()]
    rewards = torch.tensor(reward(before, texts))
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    with torch.no_grad():
        old = model.logprobs(prompts, tokens) if old_pass else None
        start = agents.reference.logprobs(prompts, tokens)
    now = model.logprobs(prompts, tokens)
    old = now.detach() if old is None else old
    apart = start - now
    penalty = (apart.exp() - 1 - apart).mean()
    change(clipped(now, old, advantages) + KL * penalty, model, agents.optimizers[1])
    return float(-old.mean()), float((old - start).sum(1).mean()), metrics.distinct(texts)


def plain_rl_one_pass(agents: Agents) -> Any:
    return plain_rl(agents, old_pass=False)


def check(args: Arguments) -> None:
    """The tokens are as likely as the plain model says; one step from equal weights on the same
    tokens gives equal weights, up to the rounding of the gradients."""
    (agents,) = args
    made = fastlm.generate(agents.ours, agents.prompts, LENGTH, seed=1, save_for_backward=True)
    now = agents.plain.logprobs(agents.prompts, made.tokens)
    with torch.no_grad():
        exact = copy.deepcopy(agents.plain).double().logprobs(agents.prompts, made.tokens)
    floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(exact.abs().max())
    limit = 2 * testing.error(now.detach().double(), exact) + floor
    assert testing.error(made.logprobs.detach().double(), exact) <= limit
    advantages = score(made.tokens)
    loss = fastlm.policy_loss(
        made.logprobs, advantages, old_logprobs=made.logprobs.detach(), loss_type="ppo"
    )
    both = (loss, agents.ours), (clipped(now, now.detach(), advantages), agents.plain)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in both]
    for a, b in zip(*grads, strict=True):
        assert testing.error(a, b) <= 1e-4 * float(b.abs().max()), "the gradients differ"


def make_case(name: str, ours: Callable, plain: Callable, one_pass: Callable) -> Case:
    return Case(
        op="policy",
        name=f"{name}-B{BATCH}-V{VOCAB}-H{HIDDEN}-{LENGTH}-tokens",
        make=make_agents,
        ours=ours,
        plain=plain,
        needs=("nn.GRUDecoder", "generate", "policy_loss"),
        backward=False,
        compiles=False,
        check=check,
        others={"plain without the old pass": one_pass},
        unit_count=BATCH * LENGTH,
        reach=">= 2",
    )


CASES = [
    make_case("update", ours, plain, plain_one_pass),
    make_case("fastlm-rl", ours_rl, plain_rl, plain_rl_one_pass),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_policy(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
