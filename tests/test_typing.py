"""What a type checker infers for calls whose result depends on their options, and that it is true.

`mypy` reads this file (pyproject.toml); the tests run it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import fastlm
from fastlm import TokenLogprobs
from fastlm.ops.attention import signatures as attending
from fastlm.ops.cross_entropy import signatures as losses
from fastlm.ops.decode_attention import signatures as decoding
from fastlm.ops.embedding_gru import signatures as recurrent
from fastlm.ops.token_logprobs import signatures as logprobs

WithAux = tuple[Tensor, dict[str, Tensor]]
LOGITS, TARGET = torch.zeros(3, 5), torch.tensor([0, 1, 4])
LAYER = (torch.zeros(3, 4), torch.zeros(5, 4))
AUX: Sequence[str] = ["lse"]


def with_aux(result: WithAux) -> None:
    assert isinstance(result[0], Tensor) and set(result[1]) == {"lse"}


def test_cross_entropy() -> None:
    loss = fastlm.cross_entropy(LOGITS, TARGET, torch.ones(5), reduction="sum", ignore_index=1)
    assert assert_type(loss, Tensor) is loss and loss.dim() == 0
    with_aux(assert_type(fastlm.cross_entropy(LOGITS, TARGET, return_aux=("lse",)), WithAux))
    with_aux(assert_type(fastlm.cross_entropy(LOGITS, TARGET, return_aux=AUX), WithAux))


def test_linear_cross_entropy() -> None:
    loss = fastlm.linear_cross_entropy(*LAYER, TARGET, ignore_index=None, reduction="none")
    assert assert_type(loss, Tensor).shape == (3,)
    found = fastlm.linear_cross_entropy(*LAYER, TARGET, linear_bias=None, return_aux=["lse"])
    with_aux(assert_type(found, WithAux))


def test_token_logprobs() -> None:
    alone = fastlm.token_logprobs(LOGITS, TARGET, return_entropy=False, temperature=2.0)
    assert assert_type(alone, Tensor).shape == (3,)
    found = fastlm.token_logprobs(LOGITS, TARGET, return_entropy=True, return_lse=False)
    assert assert_type(found, TokenLogprobs).entropy is not None and found.lse is None
    found = fastlm.token_logprobs(LOGITS, TARGET, return_lse=True)
    assert assert_type(found, TokenLogprobs).lse is not None
    found = fastlm.token_logprobs(LOGITS, TARGET, return_argmax=True)
    assert assert_type(found, TokenLogprobs).argmax is not None
    found = fastlm.token_logprobs(LOGITS, TARGET, return_sum_sq=True)
    assert assert_type(found, TokenLogprobs).sum_sq is not None


def test_linear_token_logprobs() -> None:
    alone = fastlm.linear_token_logprobs(*LAYER, TARGET, linear_bias=None, options=None)
    assert assert_type(alone, Tensor).shape == (3,)
    found = fastlm.linear_token_logprobs(*LAYER, TARGET, return_entropy=True, linear_bias=None)
    assert assert_type(found, TokenLogprobs).entropy is not None
    found = fastlm.linear_token_logprobs(*LAYER, TARGET, return_lse=True)
    assert assert_type(found, TokenLogprobs).lse is not None
    found = fastlm.linear_token_logprobs(*LAYER, TARGET, return_argmax=True)
    assert assert_type(found, TokenLogprobs).argmax is not None
    found = fastlm.linear_token_logprobs(*LAYER, TARGET, return_sum_sq=True)
    assert assert_type(found, TokenLogprobs).sum_sq is not None


def test_attention() -> None:
    q = torch.zeros(1, 3, 2, 8)
    assert assert_type(fastlm.attention(q, q, q, mask="causal"), Tensor).shape == q.shape
    assert assert_type(fastlm.attention(q, q, q, return_lse=False), Tensor).shape == q.shape
    out, lse = assert_type(fastlm.attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert out.shape == q.shape and lse.shape == (1, 2, 3)
    one = fastlm.decode_attention(q[:, :1], q, q, 3, softcap=2.0)
    assert assert_type(one, Tensor).shape == (1, 1, 2, 8)
    found = fastlm.decode_attention(q[:, :1], q, q, 3, return_lse=True)
    assert len(assert_type(found, tuple[Tensor, Tensor])) == 2


def test_gru() -> None:
    weights = [p.detach() for p in torch.nn.GRU(4, 5).parameters()]
    output, h_n = fastlm.gru(torch.zeros(3, 2, 4), None, weights, training=False)
    assert assert_type(output, Tensor).shape == (3, 2, 5) and h_n.shape == (1, 2, 5)
    packed, _ = fastlm.gru(pack_sequence([torch.zeros(3, 4)]), None, weights)
    assert isinstance(assert_type(packed, PackedSequence), PackedSequence)


@pytest.mark.parametrize("flag", [False, True])
def test_a_flag_known_at_run_time(flag: bool) -> None:
    for found in (
        assert_type(fastlm.token_logprobs(LOGITS, TARGET, return_lse=flag), Tensor | TokenLogprobs),
        assert_type(
            fastlm.linear_token_logprobs(*LAYER, TARGET, return_lse=flag), Tensor | TokenLogprobs
        ),
    ):
        assert isinstance(found, TokenLogprobs if flag else Tensor)


@pytest.mark.parametrize(
    "function, typed, named",
    [
        (fastlm.cross_entropy, losses.LossOptions, {"input", "target", "weight", "return_aux"}),
        (
            fastlm.linear_cross_entropy,
            losses.LinearLossOptions,
            {"input", "linear_weight", "target", "return_aux"},
        ),
        (fastlm.attention, attending.Options, {"q", "k", "v", "return_lse"}),
        (
            fastlm.decode_attention,
            decoding.Options,
            {"q", "k_cache", "v_cache", "cache_seqlens", "return_lse"},
        ),
        (fastlm.gru, recurrent.Options, {"input", "hx", "flat_weights"}),
        (fastlm.token_logprobs, logprobs.Alone, {"logits", "target"}),
        (fastlm.token_logprobs, logprobs.Either, {"logits", "target"}),
        (
            fastlm.linear_token_logprobs,
            logprobs.LinearAlone,
            {"input", "linear_weight", "target"},
        ),
        (
            fastlm.linear_token_logprobs,
            logprobs.LinearEither,
            {"input", "linear_weight", "target"},
        ),
    ],
)
def test_overloads_have_every_option(function: Any, typed: Any, named: set[str]) -> None:
    assert set(inspect.signature(function).parameters) == set(typed.__annotations__) | named


def wrong_calls() -> list[Any]:
    """Each is refused by the type checker; an unused ignore is an error."""
    return [
        lambda: fastlm.cross_entropy(LOGITS, TARGET, reductoin="sum"),  # type: ignore[call-overload]
        lambda: fastlm.token_logprobs(LOGITS, TARGET, linear_bias=None),  # type: ignore[call-overload]
        lambda: fastlm.linear_cross_entropy(*LAYER, TARGET, shift="1"),  # type: ignore[call-overload]
    ]


@pytest.mark.parametrize("call", wrong_calls())
def test_wrong_calls_raise(call: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        call()
