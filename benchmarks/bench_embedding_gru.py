"""GRU over tokens distributed as in text, with its embedding, and over dense input."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm.bench.case import Arguments, Case
from fastlm.bench.tokens import zipf_tokens

VOCAB = 10000
# a forced backend has rows of its own
FORCED = "".join(f"-{name}" for name in (os.environ.get("FASTLM_BACKEND"),) if name)


def weights(hidden: int) -> list[Tensor]:
    bound = hidden**-0.5
    shapes = ((3 * hidden, hidden), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
    return [torch.empty(*s).uniform_(-bound, bound) for s in shapes]


def make_tokens(batch: int, length: int, hidden: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        tokens = torch.from_numpy(zipf_tokens(batch * length, VOCAB)).view(batch, length)
        embedding = torch.randn(VOCAB, hidden)
        return tuple(t.to(device) for t in (tokens, embedding, *weights(hidden)))

    return build


def make_dense(batch: int, length: int, hidden: int) -> Callable[[str], Arguments]:
    def build(device: str) -> Arguments:
        input = torch.randn(batch, length, hidden)
        return tuple(t.to(device) for t in (input, *weights(hidden)))

    return build


def plain_dense(input: Tensor, *weights: Tensor) -> Tensor:
    """What nn.GRU(batch_first=True) runs, without the cost of the module."""
    h0 = input.new_zeros(1, input.shape[0], weights[1].shape[1])
    return torch._VF.gru(input, h0, weights, True, 1, 0.0, True, False, True)[0]


def plain_tokens(tokens: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    return plain_dense(functional.embedding(tokens, weight), *weights)


def dense(input: Tensor, *weights: Tensor) -> Tensor:
    return fastlm.gru(input, None, weights, batch_first=True)[0]


def tokens(tokens: Tensor, weight: Tensor, *weights: Tensor) -> Tensor:
    return fastlm.embedding_gru(tokens, weight, *weights)[0]


def token_flops(batch: int, length: int, hidden: int) -> float:
    """Forward, dinput, dweight: the recurrence, and the projection of each distinct token."""
    unique = len(set(zipf_tokens(batch * length, VOCAB).tolist()))
    return 3 * 2.0 * hidden * 3 * hidden * (batch * length + unique)


def dense_flops(batch: int, length: int, hidden: int) -> float:
    return 3 * 2.0 * hidden * 3 * hidden * 2 * batch * length


def case(op: str, batch: int, length: int, hidden: int) -> Case:
    embeds = op == "embedding_gru"
    return Case(
        op=op,
        name=f"B{batch}-T{length}-H{hidden}" + (f"-V{VOCAB}" if embeds else "") + FORCED,
        make=(make_tokens if embeds else make_dense)(batch, length, hidden),
        ours=tokens if embeds else dense,
        plain=plain_tokens if embeds else plain_dense,
        compiles=False,  # torch.compile unrolls the recurrence: minutes of compiling
        flops=(token_flops if embeds else dense_flops)(batch, length, hidden),
        unit_count=batch * length,
        reach=f"mean >= {2.0 if embeds else 1.3}, each >= 1.0",
        group=f"{op} fwd+bwd",
    )


def make_documents(batch: int, length: int, hidden: int) -> Callable[[str], Arguments]:
    """As `make_tokens`, with documents of 40 tokens on average."""

    def build(device: str) -> Arguments:
        return *make_tokens(batch, length, hidden)(device), torch.rand(batch, length) < 1 / 40

    return build


def with_resets(tokens: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return fastlm.embedding_gru(tokens, weight, *rest[:4], reset=rest[4].to(tokens.device))[0]


def without_resets(tokens: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return fastlm.embedding_gru(tokens, weight, *rest[:4])[0]


def save_hidden(tokens: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return fastlm.embedding_gru(tokens, weight, *rest[:4], save="hidden")[0]


def plain_documents(tokens: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
    return plain_tokens(tokens, weight, *rest[:4])


def first_document(args: Arguments) -> None:
    """Until its first reset a row is as without any."""
    with torch.no_grad():
        found, whole = with_resets(*args), without_resets(*args)
    starts = args[6].to(found.device)
    starts[:, 0] = False
    before = starts.cumsum(1) == 0
    assert torch.equal(found[before], whole[before])
    assert not torch.equal(found[~before], whole[~before])


def option_case(name: str, ours: Callable, beside: str, reach: str, check: Callable | None) -> Case:
    shape = (16, 64, 512)
    return Case(
        op="embedding_gru",
        name=f"{name}-B{shape[0]}-T{shape[1]}-H{shape[2]}" + FORCED,
        make=make_documents(*shape),
        ours=ours,
        plain=plain_documents,
        others={beside: without_resets},
        check=check,
        compiles=False,
        flops=token_flops(*shape),
        unit_count=shape[0] * shape[1],
        reach=reach,
    )


OPTIONS = [
    option_case("resets", with_resets, "without", "without >= 0.98", first_document),
    option_case("save-hidden", save_hidden, "gates", "gates >= 0.92", None),
]


def usual(batch: int, length: int, hidden: int) -> bool:
    return length == 64 and (hidden == 512 or batch in (1, 16))


SHAPES = [(b, t, h) for h in (256, 512, 1024) for t in (64, 256) for b in (1, 4, 16, 64)]
CASES = [case(op, *shape) for op in ("embedding_gru", "gru") for shape in SHAPES] + OPTIONS
USUAL = {case(op, *s).id for op in ("embedding_gru", "gru") for s in SHAPES if usual(*s)}
USUAL |= {c.id for c in OPTIONS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [c for c in CASES if metafunc.config.option.grid or c.id in USUAL]
    metafunc.parametrize("case", chosen, ids=[f"{c.op}-{c.name}" for c in chosen])


def test_embedding_gru(case: Case, race: Callable[[Case], None]) -> None:
    race(case)
