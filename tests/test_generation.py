"""fastlm.generate, generation_logprobs: definition, what a row may not depend on, gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn
from fastlm import dispatch, extension, testing
from fastlm.bench import measure

BACKENDS = dispatch.ready("generation")
# vocabulary, embedding_dim, hidden, layers, bias: odd sizes, one vector and less, many panels
SHAPES = [(33, 7, 9, 1, True), (97, 20, 33, 2, True), (2, 1, 1, 1, False), (301, 16, 50, 3, False)]
RAGGED = [[1, 0, 1], [0], [1, 1], [0, 1, 1, 0, 1, 1, 0]]
SAMPLING = [{}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8, "min_p": 0.05}, {"temperature": 0}]
compiled = pytest.mark.skipif(
    extension.unavailable is not None, reason="the C++ kernels are not built"
)


class Model(nn.Module):
    """A language model as a user writes it."""

    def __init__(
        self, vocabulary: int, dim: int, hidden: int, layers: int = 1, bias: bool = True,
        tied: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body = fastlm.nn.EmbeddingGRU(vocabulary, dim, hidden, layers, bias)
        self.head = nn.Linear(hidden, vocabulary, bias=bias)
        with torch.no_grad():
            # far from uniform, so that a wrong state shows
            self.head.weight.mul_(8)
        if tied:
            self.body.embedding.weight = self.head.weight

    def decoder(self) -> fastlm.nn.GRUDecoder:
        return fastlm.nn.GRUDecoder(self.body, self.head)

    def logits(self, tokens: Tensor) -> Tensor:
        """In plain PyTorch."""
        cells = self.body.gru
        gru = nn.GRU(
            cells.input_size, cells.hidden_size, cells.num_layers, cells.bias, batch_first=True,
            dtype=self.head.weight.dtype,
        )  # fmt: skip
        # parameters of our module, in the graph of this call
        parameters = dict(cells.named_parameters())
        x = nn.functional.embedding(tokens, self.body.embedding.weight)
        return self.head(torch.func.functional_call(gru, parameters, (x,))[0])


def plain_logprobs(
    model: Model, prompts: list[list[int]], tokens: Tensor, lengths: Tensor, temperature: float
) -> Tensor:
    """Row by row, each as a whole sequence."""
    result = []
    for prompt, row, length in zip(prompts, tokens, lengths.tolist(), strict=True):
        whole = torch.cat([torch.tensor(prompt), row[:length]])
        logits = model.logits(whole[None, :-1])[0, len(prompt) - 1 :] / (temperature or 1.0)
        picked = logits.log_softmax(-1).gather(-1, row[:length, None])[:, 0]
        result.append(nn.functional.pad(picked, (0, len(row) - length)))
    return torch.stack(result)


def double(model: Model) -> Model:
    cells = model.body.gru
    sizes = (model.head.out_features, cells.input_size, cells.hidden_size, cells.num_layers)
    tied = model.head.weight is model.body.embedding.weight
    copy = Model(*sizes, cells.bias, tied).double()
    copy.load_state_dict(model.state_dict())
    return copy


def allowed(plain: Tensor, exact: Tensor) -> float:
    floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(exact.abs().max())
    return 2 * testing.error(plain.double(), exact) + floor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_follows_the_definition(backend, shape, options, poisoned):
    """A loop over one's own model and `sample` takes the same tokens; log-probs are as good."""
    model, new = Model(*shape), 11
    with fastlm.use_backend(backend):
        made = fastlm.generate(model, RAGGED, new, seed=5, return_logprobs=True, **options)
        for row, prompt in enumerate(RAGGED):
            state = None
            for token in prompt:
                logits, state = model.decoder()(torch.tensor([token]), state)
            for i in range(new):
                rows = torch.tensor([row])
                token, logprob = fastlm.sample(logits, seed=5, step=i, rows=rows, **options)
                assert token == made.tokens[row, i]
                if backend == "cpu":
                    assert torch.equal(logprob[0], made.logprobs[row, i])
                logits, state = model.decoder()(token, state)
    with torch.no_grad():
        arguments = (RAGGED, made.tokens, made.lengths, options.get("temperature", 1.0))
        exact = plain_logprobs(double(model), *arguments)
        plain = plain_logprobs(model, *arguments)
    assert testing.error(made.logprobs.double(), exact) <= allowed(plain, exact)
    assert made.tokens.dtype == torch.int64 and made.lengths.tolist() == [new] * len(RAGGED)


@compiled
@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("new", [1, 6, 33])
@pytest.mark.parametrize("layers", [1, 2])
def test_logprobs_are_those_of_scoring_to_the_bit(batch, new, layers):
    """Sampling, scoring, sampling for a backward, and single rows: one kernel, the same bits."""
    model = Model(331, 24, 40, layers)
    prompts = torch.randint(331, (batch, 4))
    lengths = torch.randint(1, 5, (batch,))
    how = {"temperature": 0.8, "prompt_lengths": lengths}
    made = fastlm.generate(model, prompts, new, return_logprobs=True, stop=[3, 5, 8], **how)
    scored = fastlm.generation_logprobs(model, prompts, made.tokens, **how)
    kept = fastlm.generate(model, prompts, new, save_for_backward=True, stop=[3, 5, 8], **how)
    assert torch.equal(made.logprobs, scored)
    assert torch.equal(made.tokens, kept.tokens) and torch.equal(made.logprobs, kept.logprobs)
    assert bool(((scored - made.logprobs).exp() == 1).all())  # the ratio of an on-policy step
    for row in {0, batch - 1}:
        prompt = prompts[row, : lengths[row]]
        one = fastlm.generation_logprobs(model, prompt, made.tokens[row], temperature=0.8)
        assert torch.equal(one, made.logprobs[row])


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_and_without_packed_weights_and_projected_vocabulary(shape):
    """A decoder that has read much has packed its weights, then looks projections up; the bits are
    the same."""
    decoder, seen = Model(*shape).decoder(), []
    prompts = [[1], [0, 1], *[[1]] * 7]
    for read in (0, 8, 400):
        fastlm.generate(decoder, [1], read + 1)
        *_, packed, table = decoder.weights.arguments(0, 0)
        seen.append((packed is not None, table is not None))
        made = fastlm.generate(decoder, prompts, 2, return_logprobs=True)
        h = decoder.start(3) + 0.5
        results = (*made, *decoder(torch.tensor([1, 0, 1]), h))
        if read == 0:
            first = results
        for a, b in zip(first, results, strict=True):
            assert torch.equal(a, b)
    assert seen[0] == (False, False) and seen[-1] == (True, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_batch(backend):
    model, prompts = Model(61, 8, 23), torch.randint(61, (19, 3))
    how = {"top_p": 0.9, "seed": 3, "return_logprobs": True, "stop": [7, 9]}
    with fastlm.use_backend(backend):
        made = fastlm.generate(model, prompts, 15, **how)
        order = torch.randperm(19)
        mixed = fastlm.generate(model, prompts[order], 15, rows=order, **how)
        for few in (order[:1], order[3:6], order[2:13]):
            part = fastlm.generate(model, prompts[few], 15, rows=few, **how)
            assert torch.equal(part.tokens, made.tokens[few])
            if backend == "cpu":
                assert torch.equal(part.logprobs, made.logprobs[few])
                assert torch.equal(part.state, made.state[:, few])
    assert torch.equal(mixed.tokens, made.tokens[order])
    assert torch.equal(mixed.lengths, made.lengths[order])
    other = fastlm.generate(model, prompts, 15, **{**how, "seed": 4})
    assert not torch.equal(other.tokens, made.tokens)


@compiled
def test_does_not_depend_on_threads():
    # large enough for several threads, and for two groups of logits
    model = Model(30011, 32, 64)
    prompts = torch.randint(30011, (41, 2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fastlm.generate(model, prompts, 4, return_logprobs=True))
    finally:
        torch.set_num_threads(before)
    for made in results[1:]:
        for a, b in zip(made, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stop_tokens_end_their_row_only(backend):
    model, prompts = Model(13, 6, 10), [[1], [2, 3], [4, 5, 6], [7]] * 5
    with fastlm.use_backend(backend):
        free = fastlm.generate(model, prompts, 12, return_logprobs=True)
        made = fastlm.generate(model, prompts, 12, return_logprobs=True, stop=[3, 11])
        every = fastlm.generate(model, prompts, 12, stop=torch.arange(13))
        one = fastlm.generate(model, prompts, 12, stop=3)
    ended = set()
    for row in range(len(prompts)):
        hits = [i for i, t in enumerate(free.tokens[row].tolist()) if t in (3, 11)]
        length = hits[0] + 1 if hits else 12
        ended.add(length)
        assert int(made.lengths[row]) == length
        assert torch.equal(made.tokens[row, :length], free.tokens[row, :length])
        same(made.logprobs[row, :length], free.logprobs[row, :length], backend)
        assert bool((made.tokens[row, length:] == -100).all())
        assert bool((made.logprobs[row, length:] == 0).all())
    assert len(ended) > 3
    assert every.lengths.tolist() == [1] * len(prompts)
    assert bool((one.lengths >= made.lengths).all())
    assert made.logprobs is not None and every.logprobs is None


def same(a: Tensor, b: Tensor, backend: str) -> None:
    if backend == "cpu":
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [False, True])
def test_state_continues(backend, tied):
    model, prompts = Model(29, 14, 14, 2, tied=tied), torch.randint(29, (3, 5))
    with fastlm.use_backend(backend):
        whole = fastlm.generate(model, prompts, 10, seed=2)
        begin = fastlm.generate(model, prompts, 4, seed=2)
        rest = fastlm.generate(model, begin.tokens[:, -1:], 6, seed=2, step=4, state=begin.state)
    assert torch.equal(whole.tokens, torch.cat([begin.tokens, rest.tokens], 1))
    same(whole.state, rest.state, backend)


GRADIENTS = [
    ((33, 7, 9, 1, True, False), [[1, 2, 3], [4], [5, 6, 7, 8]], 9, [3, 8], 1.0),
    ((97, 33, 33, 2, True, True), [[1, 2], [90, 4]], 7, None, 0.6),
    ((40, 5, 17, 3, False, False), [[0]], 1, None, 1.0),
    ((257, 16, 20, 1, False, False), [[1, 2]] * 11, 20, list(range(0, 257, 9)), 1.3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, prompts, new, stop, temperature", GRADIENTS)
@pytest.mark.parametrize("saved", [True, False], ids=["generate", "generation_logprobs"])
def test_gradients(backend, shape, prompts, new, stop, temperature, saved, poisoned):
    """All parameters, against a forward and backward of the whole sequence in float64."""
    model = Model(*shape)
    how = {"temperature": temperature}
    with fastlm.use_backend(backend):
        made = fastlm.generate(model, prompts, new, stop=stop, save_for_backward=saved, **how)
        logprobs = made.logprobs
        if not saved:
            logprobs = fastlm.generation_logprobs(model, prompts, made.tokens, **how)
        upstream = torch.randn(logprobs.shape)
        names, parameters = zip(*model.named_parameters(), strict=True)
        # of the transposed layout, as any upstream may be
        upstream = upstream.t().contiguous().t()
        got = torch.autograd.grad(logprobs, parameters, upstream)

    def whole(of: Model) -> tuple[Tensor, ...]:
        result = plain_logprobs(of, prompts, made.tokens, made.lengths, temperature)
        grads = torch.autograd.grad(result, list(of.parameters()), upstream.to(result.dtype))
        return result.detach(), *grads

    for name, a, plain, exact in zip(
        ("logprobs", *names), (logprobs.detach(), *got), whole(model), whole(double(model)),
        strict=True,
    ):  # fmt: skip
        actual, limit = testing.error(a.double(), exact), allowed(plain, exact)
        assert actual <= limit, f"{name}: {actual:.3g} > {limit:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient_gets_one(backend):
    model = Model(33, 8, 8)
    model.body.requires_grad_(False)
    with fastlm.use_backend(backend):
        made = fastlm.generate(model, [[1], [2]], 4, save_for_backward=True)
        made.logprobs.sum().backward()
        assert model.head.weight.grad is not None
        assert all(p.grad is None for p in model.body.parameters())
        with pytest.raises(RuntimeError, match="once_differentiable"):
            made = fastlm.generate(model, [[1]], 2, save_for_backward=True)
            (first,) = torch.autograd.grad(
                made.logprobs.sum(), model.head.weight, create_graph=True
            )
            first.sum().backward()


def test_changed_weights_are_seen():
    model = Model(33, 8, 8)
    decoder = model.decoder()
    made = fastlm.generate(decoder, [[1]], 4, save_for_backward=True)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made.logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="weights have changed since the decoder was made"):
        fastlm.generate(decoder, [[1]], 4)
    with pytest.raises(RuntimeError, match="weights have changed since the decoder was made"):
        decoder(torch.tensor([1]))
    model.body.gru.weight_hh_l0.data = torch.zeros_like(model.body.gru.weight_hh_l0)
    assert fastlm.generate(model, [[1]], 4).tokens.shape == (1, 4)


class OwnModel(nn.Module):
    """What no kernel knows: a state of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(19, 6), nn.LSTMCell(6, 12)
        self.head = nn.Linear(12, 19)

    def decoder(self) -> Any:
        def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            state = self.cell(self.embedding(tokens), state)
            return self.head(state[0]), state

        return step


@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4]], [5, 6]])
def test_a_module_of_ones_own(prompts):
    model = OwnModel()
    made = fastlm.generate(model, prompts, 6, stop=3, return_logprobs=True)
    same = fastlm.generate(model.decoder(), prompts, 6, stop=3, return_logprobs=True)
    again = fastlm.generation_logprobs(model, prompts, made.tokens)
    kept = fastlm.generate(model, prompts, 6, stop=3, save_for_backward=True)
    assert torch.equal(made.tokens, same.tokens) and torch.equal(made.tokens, kept.tokens)
    torch.testing.assert_close(made.logprobs, again)
    torch.testing.assert_close(kept.logprobs, again)
    kept.logprobs.sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    with pytest.raises(RuntimeError, match="save_for_backward needs gradients"), torch.no_grad():
        fastlm.generate(model, prompts, 6, save_for_backward=True)


def test_a_step_of_the_same_model_takes_the_same_tokens():
    model, prompts = Model(33, 8, 16), [[1, 2], [3], [4, 5, 6]]

    def step(tokens: Tensor, history: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens = tokens[:, None]
        history = tokens if history is None else torch.cat([history, tokens], 1)
        return model.logits(history)[:, -1], history

    ours = fastlm.generate(model, prompts, 9, seed=1, return_logprobs=True, stop=4)
    theirs = fastlm.generate(step, prompts, 9, seed=1, return_logprobs=True, stop=4)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.lengths, theirs.lengths)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    """Half precision weights are widened: the results are those of the widened model."""
    model = Model(53, 12, 20, 2).to(dtype)
    wide = double(model) if dtype == torch.float64 else double(model).float()
    kept = fastlm.generate(model, [[1, 2], [3]], 8, save_for_backward=True)
    of_wide = fastlm.generate(wide, [[1, 2], [3]], 8, save_for_backward=True)
    assert torch.equal(kept.tokens, of_wide.tokens)
    assert kept.logprobs.dtype == of_wide.logprobs.dtype == wide.head.weight.dtype
    torch.testing.assert_close(kept.logprobs, of_wide.logprobs)
    kept.logprobs.sum().backward()
    of_wide.logprobs.sum().backward()
    for half, full in zip(model.parameters(), wide.parameters(), strict=True):
        assert half.grad.dtype == dtype
        scale = float(full.grad.abs().max())
        assert testing.error(half.grad.double(), full.grad.double()) <= (
            4 * torch.finfo(dtype).eps * scale + 1e-12
        )
    ran = fastlm.explain("generate", model, [[1, 2], [3]], 8)[0].chosen
    if not extension.unavailable:
        assert ran == ("reference" if dtype == torch.float64 else "cpu")


@compiled
@pytest.mark.parametrize("sizes", [(53, 13, 21, 2), (97, 40, 64, 1)])
@pytest.mark.parametrize("new", [4, 30])
def test_matrices_in_bfloat16_are_those_widened_to_the_bit(sizes, new, poisoned):
    """Read from the parameters, and packed in half the bytes once that pays."""
    model = Model(*sizes).bfloat16()
    prompts = [[1, 2], [3], [4, 5, 6], [7], [8]]
    kept, of_wide = (
        fastlm.generate(m, prompts, new, save_for_backward=True)
        for m in (model, double(model).float())
    )
    assert torch.equal(kept.tokens, of_wide.tokens)
    assert torch.equal(kept.logprobs, of_wide.logprobs)
    decoder = model.decoder()
    logits = [decoder(torch.tensor([1, 5]))[0] for _ in range(14)]
    assert all(torch.equal(logits[0], again) for again in logits)


def test_layouts_of_prompts():
    model = Model(33, 8, 16)
    ragged = [torch.tensor([1, 2, 3]), torch.tensor([4], dtype=torch.int32), [5, 6]]
    padded = torch.tensor([[1, 2, 3, 99], [4, -1, 0, 0], [5, 6, 7, 8]])
    lengths = torch.tensor([3, 1, 2], dtype=torch.int32)
    want = fastlm.generate(model, ragged, 5).tokens
    assert torch.equal(fastlm.generate(model, padded, 5, prompt_lengths=lengths).tokens, want)
    wide = torch.empty(3, 8, dtype=torch.int64)[:, ::2].copy_(padded)
    assert torch.equal(fastlm.generate(model, wide, 5, prompt_lengths=lengths).tokens, want)
    one = fastlm.generate(model, torch.tensor([1, 2, 3]), 5, return_logprobs=True)
    assert torch.equal(one.tokens, want[0])
    assert one.lengths.shape == () and one.logprobs.shape == (5,)
    assert torch.equal(fastlm.generate(model, [1, 2, 3], 5).tokens, want[0])
    row = fastlm.generate(model, [4], 5, rows=torch.tensor(1)).tokens
    assert torch.equal(row, want[1])
    scored = fastlm.generation_logprobs(model, [1, 2, 3], one.tokens)
    torch.testing.assert_close(scored, one.logprobs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    model = Model(33, 8, 16)
    with fastlm.use_backend(backend):
        prompts = torch.empty(0, 3, dtype=torch.int64)
        made = fastlm.generate(model, prompts, 5, save_for_backward=True)
        assert made.tokens.shape == made.logprobs.shape == (0, 5)
        made.logprobs.sum().backward()
        assert all(not bool(p.grad.any()) for p in model.parameters())
        none = fastlm.generation_logprobs(model, [[1], [2]], torch.empty(2, 0).long())
        assert none.shape == (2, 0)
        unread = fastlm.generation_logprobs(model, [[1], [2, 3]], torch.full((2, 4), -100))
        assert not bool(unread.any())
        unread.sum().backward()
        logits, h = model.decoder()(torch.empty(0).long())
        assert logits.shape == (0, 33) and h.shape == (1, 0, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["head.weight", "body.gru.weight_hh_l0", "head.bias"])
def test_nan_weights_raise_and_score_as_nan(backend, where):
    model = Model(33, 8, 16)
    with torch.no_grad():
        dict(model.named_parameters())[where].view(-1)[5] = torch.nan
    with fastlm.use_backend(backend):
        message = "logits of row 0 at token 0 must be finite or -inf"
        with pytest.raises(ValueError, match=message):
            fastlm.generate(model, [[1, 2], [3]], 5)
        scored = fastlm.generation_logprobs(model, [[1, 2], [3]], torch.ones(2, 5).long())
        assert bool(scored.isnan().all())
        # one row only: the others are not waited for either
        with torch.no_grad():
            model = Model(33, 8, 16)
            model.body.embedding.weight[7] = torch.inf
            model.body.gru.weight_ih_l0[0, 0] = 0.0
        with pytest.raises(ValueError, match="logits of row 1 at token 0"):
            fastlm.generate(model, [[1, 2], [7]], 1)


def bad(**changes: Any) -> dict[str, Any]:
    return {"prompts": [[1, 2], [3]], "max_new_tokens": 4, **changes}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (bad(max_new_tokens=0), ValueError, "max_new_tokens must be >= 1, got 0"),
        (bad(max_new_tokens=-3), ValueError, "max_new_tokens must be >= 1, got -3"),
        (bad(temperature=-0.5), ValueError, "temperature must be finite and >= 0, got -0.5"),
        (bad(temperature=float("nan")), ValueError, "temperature must be finite"),
        (bad(top_k=0), ValueError, "top_k must be >= 1, got 0; None keeps all tokens"),
        (bad(top_p=1.5), ValueError, r"top_p must be in \[0, 1\], got 1.5"),
        (bad(top_p=-0.1), ValueError, r"top_p must be in \[0, 1\], got -0.1"),
        (bad(min_p=2.0), ValueError, r"min_p must be in \[0, 1\], got 2.0"),
        (bad(seed=2**64), ValueError, "seed must be in"),
        (bad(prompts=[[1, 33]]), IndexError, r"prompts must be in \[0, 33\), got 33 at \[0, 1\]"),
        (bad(prompts=[[-1]]), IndexError, r"prompts must be in \[0, 33\), got -1 at \[0, 0\]"),
        (bad(prompts=[[1], []]), ValueError, r"length of prompt 1 must be in \[1, 1\], got 0; beg"),
        (bad(prompts=[]), ValueError, r"length of prompt 0 must be in \[1, 1\], got 0"),
        (bad(prompts=torch.zeros(2, 0).long()), ValueError, "length of prompt 0 must be"),
        (bad(prompts=torch.zeros(2, 2)), TypeError, "prompts must be an integer tensor"),
        (bad(prompts=torch.zeros(2, 2, 2).long()), ValueError, r"prompts must be \[\*, \*\]"),
        (bad(prompt_lengths=torch.tensor([1, 1])), ValueError, "prompts with prompt_lengths"),
        (bad(stop=33), IndexError, r"stop must be in \[0, 33\), got 33"),
        (bad(stop=[2, -1]), IndexError, r"stop must be in \[0, 33\), got -1"),
        (bad(rows=torch.arange(3)), ValueError, r"rows must be \[2\]"),
        (bad(state=torch.zeros(1, 3, 16)), ValueError, r"state must be \[1, 2, 16\]"),
        (bad(state=0, save_for_backward=True), ValueError, "state with save_for_backward must be"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)  # fmt: skip
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=f"fastlm.generate: {message}"):
        fastlm.generate(Model(33, 8, 16), **arguments)


@pytest.mark.parametrize(
    "lengths, message",
    [([0, 2], r"length of prompt 0 must be in \[1, 3\], got 0"), ([1, 4], "prompt 1 must be in"),
     ([1], r"prompt_lengths must be \[2\]"), ([1, -2], r"prompt 1 must be in \[1, 3\], got -2")],
)  # fmt: skip
def test_rejects_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        fastlm.generate(
            Model(33, 8, 16), torch.ones(2, 3).long(), 4, prompt_lengths=torch.tensor(lengths)
        )


def test_rejects_models_and_tokens():
    model = Model(33, 8, 16)
    for wrong in (nn.Linear(3, 3), "model", model.body):
        with pytest.raises((TypeError, ValueError), match="fastlm.generate: model must be"):
            fastlm.generate(wrong, [[1]], 2)
    with pytest.raises(TypeError, match="body must be a module with `embedding` and `gru`"):
        fastlm.nn.GRUDecoder(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"head.weight must be \[\*, 16\]"):
        fastlm.nn.GRUDecoder(model.body, nn.Linear(15, 33))
    with pytest.raises(ValueError, match="head's classes must be <= 33, got 40"):
        fastlm.generate(fastlm.nn.GRUDecoder(model.body, nn.Linear(16, 40)), [[1]], 2)
    with pytest.raises(ValueError, match="head must be a Linear"):
        fastlm.nn.GRUDecoder(model.body)(torch.tensor([1]))
    for tokens, error, message in [
        ([[1, 33]], IndexError, r"tokens must be in \[0, 33\) or -100, got 33"),
        ([[-100, 1]], ValueError, "tokens must be -100 at the end of a row only"),
        ([[1], [2]], ValueError, r"tokens must be \[1, \*\]"),
    ]:
        with pytest.raises(error, match=f"fastlm.generation_logprobs: {message}"):
            fastlm.generation_logprobs(model, [[1]], torch.tensor(tokens))


def test_torch_modules_and_max_norm():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(33, 8, padding_idx=2, max_norm=0.5)
            self.gru = nn.GRU(8, 16, batch_first=True)

    body, head = Body(), nn.Linear(16, 33)
    made = fastlm.generate(fastlm.nn.GRUDecoder(body, head), [[2, 1]], 6, save_for_backward=True)
    grads = torch.autograd.grad(made.logprobs.sum(), list(body.parameters()))
    tokens = torch.cat([torch.tensor([[2, 1]]), made.tokens], 1)
    logits = head(body.gru(body.embedding(tokens[:, :-1]))[0])[:, 1:]
    want = logits.log_softmax(-1).gather(-1, made.tokens[..., None])[..., 0]
    torch.testing.assert_close(made.logprobs, want)
    for ours, theirs in zip(
        grads, torch.autograd.grad(want.sum(), list(body.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert not bool(grads[0][2].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    model, ops = Model(33, 8, 16, 2), torch.ops.fastlm
    weights = model.decoder().weights.arguments(1, 100)
    prompts, lengths = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    rows, stops = torch.arange(2), torch.zeros(33, dtype=torch.uint8)
    h = torch.zeros(2, 2, 16)
    with fastlm.use_backend(backend):
        how = (4, 1, 2, 0.8, 5, 0.9, 0.01)
        for save, h0, ends in ((True, None, stops), (False, h, None)):
            arguments = (prompts, lengths, rows, h0, *weights, ends, *how, save)
            torch.library.opcheck(ops.generation.default, arguments)
        for save in (True, False):
            arguments = (prompts, lengths, torch.ones(2, 3).long(), rows + 1, *weights, 1.0, save)
            torch.library.opcheck(ops.generation_logprobs.default, arguments)
        torch.library.opcheck(ops.generation_step.default, (rows, h, *weights))


@compiled
def test_every_instruction_set():
    code = """
import sys, torch, fastlm, fastlm.nn
torch.manual_seed(1)
body, head = fastlm.nn.EmbeddingGRU(97, 20, 33, 2), torch.nn.Linear(33, 97)
decoder = fastlm.nn.GRUDecoder(body, head)
with fastlm.use_backend(sys.argv[1]):
    made = fastlm.generate(decoder, torch.randint(97, (23, 3)), 9, stop=5, save_for_backward=True)
    made.logprobs.sum().backward()
print(made.tokens.tolist(), [round(float(made.logprobs.sum()), 2)])
"""
    every = ["base", "avx2", "avx512", "avx512_bf16"]
    runnable = every[: every.index(extension.cpu_isa()) + 1]

    def run(backend: str, **env: str) -> str:
        command = [sys.executable, "-c", code, backend]
        return subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True, check=True
        ).stdout

    # no draw lies within rounding of a border
    want = run("reference")
    for isa in runnable:
        assert run("cpu", FASTLM_CPU_ISA=isa) == want


@compiled
@pytest.mark.skipif(not measure.has_peak(), reason="no peak memory of a process on this system")
def test_memory_does_not_grow_with_the_tokens():
    code = """
import torch, fastlm, fastlm.nn
from fastlm.bench import measure
torch.set_num_threads(2)
body, head = fastlm.nn.EmbeddingGRU(500, 64, 128), torch.nn.Linear(128, 500)
decoder = fastlm.nn.GRUDecoder(body, head)
prompts = torch.zeros(8, 1, dtype=torch.int64)
measure.return_freed_memory()
for new in (400, 12000):
    print(measure.extra_memory(lambda: fastlm.generate(decoder, prompts, new)))
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    few, many = map(int, output.split())
    # log-probs are made in any case: 4 bytes a token
    assert many - few <= 8 * 12000 * 4 + (1 << 18), f"{few} bytes for 400 tokens, {many} for 12000"
