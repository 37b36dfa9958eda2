"""Penalties of fastlm.generate: the usual definition written out, log-probs, continuing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm import dispatch, extension

BACKENDS = dispatch.ready("generation")
PROMPTS = [[1, 0, 1], [0], [5, 5, 7, 30]]
NEW = 24
PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.8, "presence_penalty": -0.4, "frequency_penalty": 0.9},
]


class Model(nn.Module):
    def __init__(self, vocabulary: int = 37) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = fastlm.nn.EmbeddingGRU(vocabulary, 7, 19)
        self.head = nn.Linear(19, vocabulary)
        with torch.no_grad():
            self.head.weight.mul_(6)  # some logits below 0, some above, and greedy text repeats

    def decoder(self) -> fastlm.nn.GRUDecoder:
        return fastlm.nn.GRUDecoder(self.body, self.head)


def penalised(scores: list[float], read: list[int], made: list[int], how: dict) -> list[float]:
    """As transformers' RepetitionPenaltyLogitsProcessor, over prompt and text; then presence and
    frequency as text-generation APIs document them, over the text."""
    scores = list(scores)
    penalty = how.get("repetition_penalty", 1.0)
    for token in set(read + made):
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in set(made):
        scores[token] -= how.get("presence_penalty", 0.0)
        scores[token] -= how.get("frequency_penalty", 0.0) * made.count(token)
    return scores


def by_hand(model: Model, row: int, sampling: dict, how: dict) -> list[int]:
    state, decoder, made = None, model.decoder(), []
    for token in PROMPTS[row]:
        logits, state = decoder(torch.tensor([token]), state)
    for i in range(NEW):
        moved = torch.tensor([penalised(logits[0].tolist(), PROMPTS[row], made, how)])
        rows = torch.tensor([row])
        token, _ = fastlm.sample(moved, seed=5, step=i, rows=rows, **sampling)
        made.append(int(token))
        logits, state = decoder(token, state)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}])
@pytest.mark.parametrize("how", PENALTIES, ids=str)
def test_follows_the_definition(backend, sampling, how, poisoned):
    model = Model()
    with fastlm.use_backend(backend):
        made = fastlm.generate(model, PROMPTS, NEW, seed=5, return_logprobs=True, **sampling, **how)
        without = fastlm.generate(model, PROMPTS, NEW, seed=5, **sampling)
        for row in range(len(PROMPTS)):
            assert made.tokens[row].tolist() == by_hand(model, row, sampling, how)
        # of the model itself
        own = fastlm.generation_logprobs(
            model, PROMPTS, made.tokens, temperature=sampling["temperature"]
        )
    assert not torch.equal(made.tokens, without.tokens)
    if backend == "cpu":
        assert torch.equal(made.logprobs, own)
    torch.testing.assert_close(made.logprobs, own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loop", [False, True], ids=["decoder", "step"])
def test_state_and_history_continue(backend, loop):
    model: Any = Model()
    how: dict[str, Any] = {"seed": 2, "temperature": 0.5, **PENALTIES[-1]}
    # the state of a step goes on in rows that have ended
    prompts = [prompt[-1:] for prompt in PROMPTS] if loop else PROMPTS
    with fastlm.use_backend(backend):
        decoder = model.decoder()
        run = (lambda tokens, state: decoder(tokens, state)) if loop else decoder
        whole = fastlm.generate(run, prompts, NEW, **how)
        begin = fastlm.generate(run, prompts, 9, **how)
        rest = fastlm.generate(run, begin.tokens[:, -1:], NEW - 9, step=9, state=begin.state, **how)
        assert torch.equal(whole.tokens, torch.cat([begin.tokens, rest.tokens], 1))
        assert torch.equal(whole.state.seen, rest.state.seen)
        # a prompt that was read elsewhere
        _, state = decoder(torch.tensor([6]))
        _, state = decoder(torch.tensor([30]), state)
        read = torch.tensor([[6, 30, -100, 99]])
        joined = fastlm.generate(run, [[2]], NEW, state=state, history=read, **how)
        assert torch.equal(joined.tokens, fastlm.generate(run, [[6, 30, 2]], NEW, **how).tokens)
        other = fastlm.generate(run, [[2]], NEW, state=state, **how)
        assert not bool(other.state.seen[0, 30] & 1) and bool(joined.state.seen[0, 30] & 1)


@pytest.mark.skipif(extension.unavailable is not None, reason="the C++ kernels are not built")
def test_a_row_depends_on_itself_alone_and_has_a_gradient():
    """More rows than threads, rows that end early, a vocabulary of several blocks."""
    model, prompts = Model(700), torch.randint(700, (19, 3))
    how: dict[str, Any] = {"stop": list(range(0, 700, 9)), "temperature": 0.8, **PENALTIES[-1]}
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(fastlm.generate(model, prompts, 30, return_logprobs=True, **how))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made.tokens, seen[0].tokens) for made in seen)
    assert len(seen[0].lengths.unique()) > 3
    for row in (0, 7, 18):
        rows = torch.tensor([row])
        alone = fastlm.generate(model, prompts[rows], 30, rows=rows, return_logprobs=True, **how)
        assert torch.equal(alone.tokens[0], seen[0].tokens[row])
        assert torch.equal(alone.logprobs[0], seen[0].logprobs[row])
        assert torch.equal(alone.state.seen[0], seen[0].state.seen[row])
    kept = fastlm.generate(model, prompts, 30, save_for_backward=True, **how)
    again = fastlm.generation_logprobs(model, prompts, kept.tokens, temperature=0.8)
    assert torch.equal(kept.logprobs, again)
    for a, b in zip(*(_gradients(x, model) for x in (kept.logprobs, again)), strict=True):
        assert torch.equal(a, b)


def _gradients(logprobs: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(logprobs.sum(), list(model.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    weights = Model().decoder().weights.arguments(1, 100)
    prompts, lengths = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    seen = torch.zeros(2, 37, dtype=torch.int32)
    how = (None, 4, 1, 2, 0.8, 5, 0.9, 0.01, False, seen, 1.2, 0.1, 0.2)
    with fastlm.use_backend(backend):
        arguments = (prompts, lengths, torch.arange(2), None, *weights, *how)
        torch.library.opcheck(torch.ops.fastlm.generation.default, arguments)
    assert not bool(seen.any())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and > 0, got 0.0; 1 is"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be finite and > 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be finite, got inf"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be finite, got nan"),
        ({"history": torch.zeros(2, 2).long()}, r"history must be \[1, \*\]"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=f"fastlm.generate: {message}"):
        fastlm.generate(Model(), [[1]], 2, **arguments)
