"""The log-probs of a generation are those of the training forward, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm import extension, matmul
from fastlm.ops.generation import reference

pytestmark = pytest.mark.skipif(
    extension.unavailable is not None, reason="the C++ kernels are not built"
)

# vocabulary, embedding_dim, hidden, layers, bias: one vector and less, odd, several blocks of a sum
# (128), of a row's statistics (4096)
SHAPES = [
    (2, 1, 1, 1, False),
    (33, 7, 9, 2, True),
    (301, 16, 50, 3, False),
    (4099, 300, 257, 2, True),
    (10007, 129, 130, 1, True),
]


class Model(nn.Module):
    def __init__(self, vocabulary: int, dim: int, hidden: int, layers: int, bias: bool) -> None:
        super().__init__()
        self.body = fastlm.nn.EmbeddingGRU(vocabulary, dim, hidden, layers, bias)
        self.head = nn.Linear(hidden, vocabulary, bias=bias)
        with torch.no_grad():
            self.head.weight.mul_(6)  # far from uniform

    def decoder(self) -> fastlm.nn.GRUDecoder:
        return fastlm.nn.GRUDecoder(self.body, self.head)


class Rollout(NamedTuple):
    made: Any
    read: Tensor  # [B, P + N - 1]
    target: Tensor  # -100 where no token was made
    source: Tensor  # where of `read` the made tokens stand, row by row
    place: Tensor  # where of `made.tokens`

    def spread(self, logprobs: Tensor) -> Tensor:
        """From the order of `read` to that of `made.tokens`."""
        result = torch.zeros(self.made.tokens.shape)
        result.view(-1)[self.place] = logprobs.detach().flatten()[self.source]
        return result


def rollout(model: Any, prompts: Tensor, new: int, **how: Any) -> Rollout:
    made = fastlm.generate(model, prompts, new, return_logprobs=True, seed=3, **how)
    lengths = how.get("prompt_lengths")
    if lengths is None:
        lengths = torch.full(prompts.shape[:1], prompts.shape[1])
    at = torch.arange(prompts.shape[1])
    given = reference.Prompts(torch.where(at < lengths[:, None], prompts, 0), lengths)
    place, source = reference.scored(given, made.lengths, new)
    read = reference.sequence(given, made.tokens, made.lengths)
    target = torch.full_like(read, -100)
    target.view(-1)[source] = made.tokens.flatten()[place]
    return Rollout(made, read, target, source, place)


def forward_logprobs(model: Model, run: Rollout, temperature: float) -> Tensor:
    output, _ = model.body(run.read)
    weight, bias = model.head.weight, model.head.bias
    found = fastlm.linear_token_logprobs(
        output, weight, run.target, linear_bias=bias, temperature=temperature or 1.0
    )
    assert isinstance(found, Tensor)
    return run.spread(found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9, 0.0])
def test_equal_on_one_backend(shape, batch, temperature):
    model, vocabulary = Model(*shape).eval(), shape[0]
    prompts = torch.randint(vocabulary, (batch, 4))
    how = {"temperature": temperature}
    if batch == 17:  # of several lengths, with filters, and rows that end early
        how |= {"top_p": 0.8, "top_k": 40, "repetition_penalty": 1.2}
        how |= {"prompt_lengths": torch.randint(1, 5, (batch,)), "stop": [1]}
    for new in (1, 9):
        with fastlm.use_backend("cpu"):
            run = rollout(model, prompts, new, **how)
            assert torch.equal(forward_logprobs(model, run, temperature), run.made.logprobs)
    # log-probs at all, and not the same one everywhere
    assert vocabulary < 30 or temperature == 0 or len(run.made.logprobs.unique()) > new // 2


@pytest.mark.skipif(not matmul.own_is_faster(), reason="the library's product runs by default")
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_equal_by_default_where_the_compiled_product_is_faster(shape, batch):
    model = Model(*shape).eval()
    run = rollout(model, torch.randint(shape[0], (batch, 3)), 14)
    assert torch.equal(forward_logprobs(model, run, 1.0), run.made.logprobs)


@pytest.mark.parametrize("shape", [*SHAPES, (401, 300, 257, 2, True)], ids=str)
@pytest.mark.parametrize("batch", [1, 17])
def test_bfloat16_weights_give_the_forward_of_the_widened_model(shape, batch):
    """Before and after the decoder has packed them and projected the vocabulary."""
    model = Model(*shape).eval().bfloat16()
    wide = Model(*shape).eval()
    wide.load_state_dict(model.state_dict())
    prompts = torch.randint(shape[0], (batch, 3))
    for new in (1, 25):
        with fastlm.use_backend("cpu"):
            run = rollout(model, prompts, new, temperature=0.8)
            assert torch.equal(forward_logprobs(wide, run, 0.8), run.made.logprobs)
            scored = fastlm.generation_logprobs(model, prompts, run.made.tokens, temperature=0.8)
            assert torch.equal(scored, run.made.logprobs)


def test_every_loss_sees_a_ratio_of_one():
    """The forward of linear_policy_loss, linear_cross_entropy and policy_loss, with gradients."""
    model = Model(301, 16, 50, 2, True)
    with fastlm.use_backend("cpu"):
        run = rollout(model, torch.randint(301, (9, 3)), 12, stop=[4, 9, 200])
        old = torch.zeros(run.read.shape)
        old.view(-1)[run.source] = run.made.logprobs.flatten()[run.place]
        output, _ = model.body(run.read)
        weight, bias = model.head.weight, model.head.bias
        ratios = []

        def row_loss(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
            ratios.append((logprobs - old.flatten()[rows]).exp())
            return ratios[-1]

        fastlm.linear_policy_loss(
            output, weight, run.target, None, linear_bias=bias, row_loss=row_loss
        ).backward()
        ratio = torch.cat(ratios)
        assert len(ratio) == int(run.made.lengths.sum()) and bool((ratio == 1).all())

        losses = fastlm.linear_cross_entropy(
            *(output, weight, run.target), linear_bias=bias, reduction="none"
        )
        assert torch.equal(-losses, old)

        # ratio 1 and advantages 1: the clipped objective is -1 in every token, exactly
        logprobs = fastlm.linear_token_logprobs(output, weight, run.target, linear_bias=bias)
        mask = run.target != -100
        loss = fastlm.policy_loss(
            logprobs, torch.ones(9), old_logprobs=old, mask=mask, loss_type="ppo"
        )
        assert float(loss.detach()) == -1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 5, 257, 4096, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
def test_a_sample_has_the_log_prob_of_token_logprobs(classes, temperature, dtype):
    logits = (torch.randn(23, classes) * 5).to(dtype)
    logits[3, : classes // 2] = -torch.inf
    logits[4, classes // 2] = 60.0  # certain
    for options in ({}, {"top_p": 0.7}):
        tokens, logprobs = fastlm.sample(logits, temperature=temperature, seed=1, **options)
        want = fastlm.token_logprobs(logits, tokens, temperature=temperature or 1.0)
        assert torch.equal(logprobs, want)


def test_every_instruction_set_and_threads():
    code = """
import torch, fastlm
from test_on_policy import Model, forward_logprobs, rollout
torch.manual_seed(1)
with fastlm.use_backend("cpu"):
    for shape in ((301, 16, 50, 2, True), (4099, 140, 257, 1, False)):
        model = Model(*shape).eval()
        prompts, seen = torch.randint(301, (11, 2)), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run = rollout(model, prompts, 7, temperature=0.8, stop=5)
            assert torch.equal(forward_logprobs(model, run, 0.8), run.made.logprobs)
            assert not seen or torch.equal(seen[0], run.made.logprobs)
            seen.append(run.made.logprobs)
print(fastlm.extension.cpu_isa())
"""
    every = ["base", "avx2", "avx512", "avx512_bf16"]
    here = os.path.dirname(__file__)
    for isa in every[: every.index(extension.cpu_isa()) + 1]:
        env = os.environ | {"FASTLM_CPU_ISA": isa}
        env["PYTHONPATH"] = os.pathsep.join([here, env.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa


def test_the_backend_may_come_from_the_environment():
    code = """
import torch
from fastlm import matmul
calls, own = [], matmul.own_into
matmul.own_into = lambda *a, **k: calls.append(1) or own(*a, **k)
matmul.into(torch.empty(1, 1), torch.ones(1, 1), torch.ones(1, 1))
print(len(calls))
"""
    for backend, want in (("cpu", "1"), ("reference", "0"), ("", "0")):
        env = os.environ | {"FASTLM_BACKEND": backend}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == want
