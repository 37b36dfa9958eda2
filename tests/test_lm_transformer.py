"""The Transformer language model: against plain PyTorch, its documents, its decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastlm
from fastlm import testing
from fastlm.lm.decoding import window_start
from fastlm.lm.errors import UsageError
from fastlm.lm.transformer import PlainTransformerLM, TransformerLM, rotate, rotations

V, END = 33, 32
SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "context": 24}
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_heads": 2, "num_kv_heads": 1, "ffn_size": 20, "num_layers": 1},
    {"tied": True, "z_loss": 1e-2, "num_kv_heads": 2},
]


def pair(**settings: Any) -> tuple[TransformerLM, PlainTransformerLM]:
    torch.manual_seed(2)
    settings = {**SMALL, **settings}
    ours, plain = TransformerLM(V, **settings), PlainTransformerLM(V, **settings)
    plain.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def documents(*lengths: int) -> torch.Tensor:
    """One row of documents, each beginning with END."""
    rows = [torch.randint(END, (n,)) for n in lengths]
    return torch.cat([torch.cat([torch.tensor([END]), row[1:]]) for row in rows])[None]


def loss_of(model: Any, tokens: torch.Tensor, targets: torch.Tensor, **options: Any) -> Any:
    """The loss as a function of the parameters."""

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            return self.model.loss(*args, **options)[0]

    def run(*parameters: torch.Tensor) -> Any:
        names = [f"model.{name}" for name, _ in model.named_parameters()]
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(Loss(), values, (tokens, targets), tie_weights=True)

    return run


@pytest.mark.parametrize("settings", SHAPES)
@pytest.mark.parametrize("batch, length", [(1, 1), (3, 7)])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_match_plain(
    settings: dict[str, Any], batch: int, length: int, packed: bool
) -> None:
    ours, plain = pair(**settings, end=END)
    tokens, targets = torch.randint(END, (2, batch, length))
    if packed:
        tokens[-1, length // 2] = END
        targets[0, 0] = -100 if length > 1 else 0
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    parameters = [p.detach() for p in plain.parameters()]
    testing.check(loss_of(ours, tokens, targets), loss_of(plain, tokens, targets), parameters)


@pytest.mark.parametrize("way", ["end", "documents"])
def test_a_document_alone_is_the_document_in_company(way: str) -> None:
    ours, _ = pair(end=END if way == "end" else None)
    lengths = (7, 1, 10)
    row = documents(*lengths)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    options = {} if way == "end" else {"documents": ids}
    exact = TransformerLM(V, **{**SMALL, "end": END}).double()
    exact.load_state_dict(ours.state_dict())
    exact.requires_grad_(False), ours.requires_grad_(False)
    packed, at = ours.hidden(row, **options)[0], 0
    for length in lengths:
        alone = row[:, at : at + length]
        want = exact.hidden(alone)[0]
        single = testing.error(ours.hidden(alone)[0].double(), want)
        got = testing.error(packed[:, at : at + length].double(), want)
        floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(want.abs().max())
        assert got <= 2 * single + floor
        at += length


def test_no_document_hears_of_another() -> None:
    ours, _ = pair(end=END)
    row = documents(6, 9)
    other = row.clone()
    other[0, 1:6] = (row[0, 1:6] + 1) % END
    assert torch.equal(ours.hidden(row)[0][:, 6:], ours.hidden(other)[0][:, 6:])
    assert not torch.equal(ours.hidden(row)[0][:, 1:6], ours.hidden(other)[0][:, 1:6])
    # and the embedding of a token of the first has no gradient from the second
    row[0, 1:6], row[0, 7:] = 3, 5
    ours.hidden(row)[0][:, 6:].square().sum().backward()
    grad = ours.embedding.weight.grad
    assert grad is not None and not grad[3].any() and grad[5].any()


def test_positions_are_relative() -> None:
    x, turns = torch.randn(2, 3, 1, 8).double(), rotations(50, 8, 100.0, torch.float64, CPU)

    def score(i: int, j: int) -> torch.Tensor:
        q, k = rotate(x[:1, :1], turns[i : i + 1]), rotate(x[1:, :1], turns[j : j + 1])
        return (q * k).sum()

    torch.testing.assert_close(score(7, 3), score(40, 36))
    assert abs(float(score(7, 3) - score(7, 4))) > 1e-3
    torch.testing.assert_close(rotate(x, turns[:3]).norm(), x.norm())


CPU = torch.device("cpu")


def test_a_state_is_what_was_read() -> None:
    ours, _ = pair()
    tokens = torch.randint(V, (2, 24))
    whole = ours.hidden(tokens)[0]
    _, state = ours.hidden(tokens[:, :10])
    _, state = ours.hidden(tokens[:, 10:15], state)
    last, state = ours.hidden(tokens[:, 15:], state)
    torch.testing.assert_close(last, whole[:, 15:])
    # with the context full, the oldest tokens go
    more = torch.randint(V, (2, 4))
    want = ours.hidden(torch.cat([tokens[:, 4:], more], 1))[0][:, -4:]
    torch.testing.assert_close(ours.hidden(more, state)[0], want)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_no_bit(dropout: float) -> None:
    kept, _ = pair(dropout=dropout)
    again, _ = pair(dropout=dropout, recompute=True)
    again.load_state_dict(kept.state_dict())
    tokens, targets = torch.randint(V, (2, 3, 9))
    found = []
    for model in (kept, again):
        torch.manual_seed(5)
        loss, _ = model.loss(tokens, targets)
        loss.backward()
        after = torch.rand(1)
        found.append([loss, after, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_recomputing_keeps_less() -> None:
    kept, _ = pair(num_layers=6, hidden_size=64)
    again, _ = pair(num_layers=6, hidden_size=64, recompute=True)
    sizes = []
    for model in (kept, again):
        total = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.hidden(torch.randint(V, (4, 24)))
        sizes.append(total)
    assert sizes[1] < sizes[0] / 4


def test_dropout_is_off_in_evaluation_and_everywhere_in_training() -> None:
    ours, _ = pair(dropout=0.5)
    tokens = torch.randint(V, (2, 9))
    assert not torch.equal(ours.hidden(tokens)[0], ours.hidden(tokens)[0])
    ours.eval()
    assert torch.equal(ours.hidden(tokens)[0], ours.hidden(tokens)[0])


def test_z_loss_is_in_training_alone() -> None:
    ours, plain = pair(z_loss=0.5)
    tokens, targets = torch.randint(V, (2, 2, 9))
    plain.eval()
    without = plain.loss(tokens, targets)[0]
    assert float(ours.loss(tokens, targets)[0]) > float(without) + 0.1
    torch.testing.assert_close(ours.eval().loss(tokens, targets)[0], without)


def test_flops_are_those_of_the_matrix_products() -> None:
    ours, _ = pair(num_kv_heads=2)
    matrices = {name: p for name, p in ours.named_parameters() if p.dim() == 2}
    products = sum(p.numel() for name, p in matrices.items() if "embedding" not in name)
    scores = 2 * 16 * 24  # layers x width x half a context, twice
    assert ours.config.flops_per_token() == 6 * (products + scores)


def test_start_predicts_the_frequencies() -> None:
    ours: Any = TransformerLM(4, **SMALL)
    ours.start_from_counts(torch.tensor([0, 1, 3, 12]))
    share = ours.head.bias.softmax(0)
    torch.testing.assert_close(share, torch.tensor([1.0, 2.0, 4.0, 13.0]) / 20)


def test_tied_head_is_the_embedding() -> None:
    ours, _ = pair(tied=True)
    assert ours.head.weight is ours.embedding.weight


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"num_heads": 3}, "multiple of twice num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"context": 1}, "context must be at least 2"),
    ],
)
def test_rejects(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        TransformerLM(V, **{**SMALL, **settings})


def test_rejects_calls() -> None:
    ours, _ = pair()
    with pytest.raises(UsageError, match=r"at most 24 tokens \(context\), got 25"):
        ours.hidden(torch.zeros(1, 25, dtype=torch.int64))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UsageError, match="without a state"):
        ours.hidden(tokens, tokens, documents=tokens)
    tokens[1, 2] = V
    with pytest.raises(IndexError, match=r"33 at \[1, 2\]"):
        ours.hidden(tokens)
    with pytest.raises(IndexError, match="33"):
        ours.loss(torch.zeros_like(tokens), tokens)


# ---- one token at a time ------------------------------------------------------------------------


def logits_after(model: TransformerLM, row: torch.Tensor) -> torch.Tensor:
    """Of the token behind `row` [n], by one call over all that the decoder still has."""
    if model.config.end is not None and bool((row == END).any()):
        row = row[int((row == END).nonzero()[-1]) :]
    row = row[window_start(len(row), model.config.context) :]
    return model(row[None])[0][0, -1]


@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 2, "end": END, "context": 7}])
def test_stepping_is_the_forward(settings: dict[str, Any]) -> None:
    ours, _ = pair(**settings)
    exact = TransformerLM(V, **{**SMALL, **settings}).double().eval()
    exact.load_state_dict(ours.state_dict())
    ours.eval()
    # past the context, the documents of the rows at different places
    tokens = torch.randint(V, (3, 60))
    decoder, cache = ours.decoder(), None
    with torch.no_grad():
        for t in range(60):
            logits, cache = decoder(tokens[:, t], cache)
            for row in range(3):
                want = logits_after(exact, tokens[row, : t + 1])
                whole = testing.error(logits_after(ours, tokens[row, : t + 1]).double(), want)
                got = testing.error(logits[row].double(), want)
                scale = float(want.abs().max()) * torch.finfo(torch.float32).eps
                assert got <= 2 * whole + testing.FLOOR_EPS * scale


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 30])
def test_reading_at_once_is_stepping(count: int) -> None:
    ours, _ = pair(context=7, end=END)
    ours.eval()
    tokens = torch.randint(V, (4, count + 1))
    decoder = ours.decoder()
    stepped = decoder.start(4)
    for t in range(count):
        _, stepped = decoder(tokens[:, t], stepped)
    at_once = ours.read(tokens[:, :count])
    assert torch.equal(at_once.lengths, stepped.lengths)
    torch.testing.assert_close(
        decoder(tokens[:, count], at_once)[0], decoder(tokens[:, count], stepped)[0]
    )


def test_greedy_by_cache_is_greedy_by_recomputing() -> None:
    ours, _ = pair(context=16)
    ours.eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)  # clear winners
    prompts = [torch.randint(V, (n,)) for n in (1, 5, 20)]
    made = fastlm.generate(ours, prompts, 40, temperature=0.0, return_logprobs=True)
    assert made.logprobs is not None
    for row, prompt in enumerate(prompts):
        text = prompt
        for i in range(40):
            logits = logits_after(ours, text).detach()
            assert int(logits.argmax()) == int(made.tokens[row, i])
            want = logits.log_softmax(0).max()
            torch.testing.assert_close(made.logprobs[row, i], want)
            text = torch.cat([text, made.tokens[row, i : i + 1]])


def test_sampling_is_by_seed_and_row() -> None:
    ours, _ = pair()
    ours.eval()
    prompts = [[1, 2, 3], [4], [5, 6]]
    first = fastlm.generate(ours, prompts, 30, seed=3).tokens
    assert torch.equal(first, fastlm.generate(ours, prompts, 30, seed=3).tokens)
    assert not torch.equal(first, fastlm.generate(ours, prompts, 30, seed=4).tokens)
    alone = fastlm.generate(ours, [prompts[1]], 30, seed=3, rows=torch.tensor([1])).tokens
    assert torch.equal(first[1:2], alone)


def test_memory_does_not_grow() -> None:
    ours, _ = pair(context=8)
    ours.eval()
    decoder = ours.decoder()
    cache = decoder.start(1)
    sizes = set()
    token = torch.zeros(1, dtype=torch.int64)
    for _ in range(100):
        logits, cache = decoder(token, cache)
        token = logits.argmax(1)
        sizes.add(sum(x.untyped_storage().nbytes() for x in vars(cache).values()))
    assert len(sizes) == 1 and int(cache.lengths) <= 8
