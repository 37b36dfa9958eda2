"""fastlm.sample: the definition, the distribution, and what a sample may not depend on."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch, extension, testing
from fastlm.philox import philox, signed, uniform

BACKENDS = dispatch.ready("sample")
FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
]


def draws(count: int, seed: int = 0, step: int = 0) -> Tensor:
    row = torch.arange(count)
    return uniform(torch.full_like(row, seed), row, torch.full_like(row, step))


def kept_weights(row: Tensor, temperature: float, options: dict[str, float]) -> Tensor:
    """float64 weights of one row after the filters, written from the sentences of the docstring."""
    weights = (row.double() / temperature).softmax(-1)
    alive = torch.ones_like(weights, dtype=torch.bool)
    if "top_k" in options:
        alive &= row >= row.sort(descending=True).values[min(int(options["top_k"]), len(row)) - 1]
    if "top_p" in options:
        left = weights * alive
        taken = 0.0
        for index in left.argsort(descending=True).tolist():
            taken += float(left[index])
            last = row[index]
            if taken >= options["top_p"] * float(left.sum()):
                break
        alive &= row >= last
    if "min_p" in options:
        alive &= weights >= options["min_p"] * weights.max() * (1 - 1e-9)
    return weights * alive


def obeys(logits: Tensor, tokens: Tensor, u: Tensor, temperature: float, options: dict) -> None:
    """u lies between the cumulative mass before and after each token, up to float32 rounding."""
    for row, token, draw in zip(logits, tokens.tolist(), u.tolist(), strict=True):
        kept = kept_weights(row, temperature, options)
        assert kept[token] > 0
        after = kept.cumsum(0) / kept.sum()
        before = 0.0 if token == 0 else float(after[token - 1])
        assert before - 1e-6 <= draw <= float(after[token]) + 1e-6


def test_philox_known_answers():
    """The vectors published with Random123 for philox4x32-10."""
    words = [
        ((0, 0, 0), "6627e8d5e169c58dbc57ac4c9b00dbd8"),
        ((-1, -1, -1), "408f276d41c83b0ea20bc7c66d5451fd"),
        (
            (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E),
            "d16cfe0994fdcceb5001e42024126ea1",
        ),
    ]
    for arguments, want in words:
        got = philox(*(torch.tensor(signed(a)) for a in arguments))
        assert "".join(f"{int(word):08x}" for word in got) == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_show_the_draw(backend):
    """Among 2^16 equal logits the token is the first 16 bits of the row's Philox draw."""
    seed, step = 2**64 - 3, 2**40 + 1
    rows = torch.tensor([0, 1, 2**33 + 5, -7])
    with fastlm.use_backend(backend):
        tokens, logprobs = fastlm.sample(torch.zeros(4, 1 << 16), seed=seed, step=step, rows=rows)
    u = uniform(torch.full_like(rows, -3), rows, torch.full_like(rows, step))
    assert torch.equal(tokens, (u * (1 << 16)).long())
    torch.testing.assert_close(logprobs, torch.full((4,), -16 * math.log(2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_follows_the_definition(backend, dtype, options, temperature, poisoned):
    for rows, classes in [(1, 1), (5, 3), (9, 257), (4, 2100)]:
        logits = (3 * torch.randn(rows, classes)).to(dtype)
        with fastlm.use_backend(backend):
            tokens, _ = fastlm.sample(logits, temperature=temperature, seed=4, step=2, **options)
        obeys(logits, tokens, draws(rows, 4, 2), temperature, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_before_truncation(backend, temperature):
    logits = 4 * torch.randn(6, 1000)
    with fastlm.use_backend(backend):
        tokens, logprobs = fastlm.sample(logits, temperature=temperature, top_k=3)
    assert logprobs.dtype == torch.float32
    scaled = logits.double() / (temperature or 1.0)
    want = scaled.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    plain = scaled.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(want.abs().max())
    assert testing.error(logprobs.double(), want) <= 2 * testing.error(plain.double(), want) + floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_distribution(backend):
    """Chi-square over 20000 draws with fixed seeds; 61.1 is the 0.1 % point for 31 degrees."""
    logits = torch.randn(32)
    with fastlm.use_backend(backend):
        tokens, _ = fastlm.sample(logits.expand(20000, 32), seed=11)
    want = 20000 * logits.softmax(0)
    assert float(((tokens.bincount(minlength=32) - want) ** 2 / want).sum()) < 61.1


def test_rows_and_steps_are_independent_draws():
    """Successive steps, rows and seeds: pairs fill the unit square evenly."""
    base = draws(4096)
    for other in (draws(4096, step=1), draws(4096, seed=1), base.roll(1)):
        cells = (base * 8).long() * 8 + (other * 8).long()
        chi = ((cells.bincount(minlength=64) - 64.0) ** 2 / 64).sum()
        assert float(chi) < 103.4  # the 0.1 % point for 63 degrees of freedom


@pytest.mark.parametrize("backend", BACKENDS)
def test_does_not_depend_on_batch_order_or_layout(backend):
    logits = 2 * torch.randn(11, 515)
    options = {"top_k": 100, "top_p": 0.9, "seed": 3, "step": 8}
    with fastlm.use_backend(backend):
        tokens, logprobs = fastlm.sample(logits, **options)
        order = torch.randperm(11)
        mixed = fastlm.sample(logits[order], rows=order, **options)
        alone = fastlm.sample(logits[7], rows=torch.tensor(7), **options)
        layouts = [fastlm.sample(testing.strided(logits, k), **options) for k in testing.LAYOUTS]
    assert torch.equal(mixed[0], tokens[order]) and torch.equal(mixed[1], logprobs[order])
    assert alone[0].shape == () and alone[0] == tokens[7] and alone[1] == logprobs[7]
    for got in layouts:
        assert torch.equal(got[0], tokens) and torch.equal(got[1], logprobs)


def test_does_not_depend_on_threads():
    logits = 2 * torch.randn(64, 3000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fastlm.sample(logits, top_p=0.8, seed=1))
    finally:
        torch.set_num_threads(before)
    for tokens, logprobs in results[1:]:
        assert torch.equal(tokens, results[0][0]) and torch.equal(logprobs, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_counters_as_tensors(backend):
    logits = torch.randn(3, 4, 50)
    steps = torch.arange(4)
    with fastlm.use_backend(backend):
        tokens, _ = fastlm.sample(logits, seed=torch.tensor(9), step=steps)
        for s in range(4):
            rows = torch.arange(12).view(3, 4)[:, s]
            one, _ = fastlm.sample(logits[:, s], seed=9, step=s, rows=rows)
            assert torch.equal(one, tokens[:, s])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_extremes(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, -math.inf, 2.0]]).expand(400, 7)

    def seen(**options: float) -> set[int]:
        return set(fastlm.sample(logits, temperature=5.0, **options)[0].tolist())

    with fastlm.use_backend(backend):
        assert seen() == {0, 1, 2, 3, 4, 6}  # never the forbidden one
        assert seen(top_k=1) == seen(top_p=0.0) == seen(min_p=1.0) == {1, 2}
        assert seen(top_k=3) == {1, 2, 6}
        assert seen(top_k=5) == {0, 1, 2, 3, 4, 6}
        assert seen(top_k=7) == seen(top_k=100) == seen(top_p=1.0) == seen(min_p=0.0) == seen()
        assert fastlm.sample(logits[0], temperature=0.0)[0] == 1
        tiny = fastlm.sample(logits, temperature=1e-300, top_p=0.5, min_p=0.5)
        assert set(tiny[0].tolist()) == {1, 2}
        torch.testing.assert_close(tiny[1], torch.full((400,), -math.log(2)))
        huge = fastlm.sample(logits, temperature=1e300, top_p=0.9)[0]
        assert set(huge.tolist()) == {0, 1, 2, 3, 4, 6}
        shifted = [fastlm.sample(logits + c, seed=5)[0] for c in (0.0, 2.0**20, -(2.0**20))]
    assert torch.equal(shifted[0], shifted[1]) and torch.equal(shifted[0], shifted[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rejects_rows_without_a_distribution(backend, bad, temperature):
    logits = torch.randn(5, 300)
    logits[3, slice(None) if bad < 0 else 299] = bad
    with fastlm.use_backend(backend), pytest.raises(ValueError, match="row 3 of logits must be"):
        fastlm.sample(logits, temperature=temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    with fastlm.use_backend(backend):
        tokens, logprobs = fastlm.sample(torch.empty(0, 4, 9), top_k=2)
    assert tokens.shape == logprobs.shape == (0, 4) and tokens.dtype == torch.int64


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be >= 1, got 0; None keeps all tokens"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"seed": 2**64}, "seed must be in"),
        ({"rows": torch.arange(4)}, r"rows.shape must be \[3\] or broadcast to it, got \[4\]"),
    ],
)
def test_rejects_options(options, message):
    with pytest.raises(ValueError, match=message):
        fastlm.sample(torch.zeros(3, 7), **options)


def test_rejects_types_and_shapes():
    with pytest.raises(TypeError, match="rows must be int64, got int32"):
        fastlm.sample(torch.zeros(3, 7), rows=torch.arange(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="logits must be float64"):
        fastlm.sample(torch.zeros(3, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits must be \[..., V\] with V >= 1"):
        fastlm.sample(torch.zeros(3, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    logits = torch.randn(4, 40).to(dtype)
    tokens, _ = fastlm.sample(logits, top_p=0.9)
    obeys(logits, tokens, draws(4), 1.0, {"top_p": 0.9})


def test_carries_no_gradient():
    tokens, logprobs = fastlm.sample(torch.randn(3, 7, requires_grad=True))
    assert not tokens.requires_grad and not logprobs.requires_grad


def test_more_than_2_31_elements():
    """A view of one row: nothing may copy it, and addresses are 64-bit."""
    row = torch.randn(1, 1 << 16).bfloat16()
    count = (1 << 15) + 3
    tokens, _ = fastlm.sample(row.expand(count, -1), temperature=0)
    assert tokens.shape == (count,) and bool((tokens == row[0].argmax()).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    logits, ids = torch.randn(5, 33), torch.arange(5)
    op = torch.ops.fastlm.sample.default
    compiled = torch.compile(
        lambda x, step: fastlm.sample(x, top_k=4, seed=2, step=step), fullgraph=True, dynamic=True
    )
    with fastlm.use_backend(backend):
        torch.library.opcheck(op, (logits, None, None, None, 1, 2, 1.0, 0, 1.0, 0.0))
        torch.library.opcheck(op, (logits, ids, ids, ids, 0, 0, 0.5, 3, 0.9, 0.1))
        for step in (3, 4):
            want = fastlm.sample(logits, top_k=4, seed=2, step=step)
            assert torch.equal(compiled(logits, step)[0], want[0])


@pytest.mark.skipif(extension.unavailable is not None, reason="the C++ kernels are not built")
def test_every_instruction_set():
    code = """
import sys, torch, fastlm
x = 3 * torch.randn(50, 777, generator=torch.Generator().manual_seed(1))
with fastlm.use_backend(sys.argv[1]):
    t, p = fastlm.sample(x, top_k=200, top_p=0.95, min_p=0.001)
    u, q = fastlm.sample(x.bfloat16())
print(t.tolist(), u.tolist())
"""
    every = ["base", "avx2", "avx512", "avx512_bf16"]
    # set by hand, or the best this processor has: those above it cannot run
    runnable = every[: every.index(extension.cpu_isa()) + 1]

    def run(backend: str, **env: str) -> str:
        command = [sys.executable, "-c", code, backend]
        return subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True, check=True
        ).stdout

    # no u of these 100 rows lies within rounding of a border
    want = run("reference")
    for isa in runnable:
        assert run("cpu", FASTLM_CPU_ISA=isa) == want
