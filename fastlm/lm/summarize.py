"""Extractive summaries of text of any length, by what a language model says about each sentence.

A sentence tells much about its text when the text makes it likely:
    gain(s) = (log p(s | text) - log p(s)) / tokens of s
The text is read once, in pieces; a GRU keeps a state of constant size, a Transformer the end of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastlm

from .errors import InputError, UsageError
from .kinds import LanguageModel
from .pairs import IGNORED
from .tokenizer import Tokenizer

ROWS = 32  # sentences scored at once
LEAST_TOKENS = 5  # what is shorter is a heading, a date or an exclamation

# an end mark and what closes behind it, then a space and what may begin a sentence; or a blank line
_END = re.compile(r"(?<=[.!?])[\"')\]\u201d\u2019]*\s+(?=[\"'(\[\u201c\u2018]?[A-Z0-9_])|\n\s*\n")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Sir|Esq|No|vs|etc|e\.g|i\.e|[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """Sentences of a text, in order, each with its inner white space squeezed."""
    found: list[str] = []
    start = 0
    for match in _END.finditer(text):
        piece = text[start : match.end()].strip()
        if _ABBREVIATION.search(piece) and "\n\n" not in match[0]:
            continue
        start = match.end()
        if piece:
            found.append(" ".join(piece.split()))
    rest = " ".join(text[start:].split())
    return [*found, rest] if rest else found


def lead(text: str, count: int = 1) -> str:
    """The first sentences: the baseline that a summary has to beat."""
    return " ".join(sentences(text)[:count])


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, before: Tensor, continuations: Sequence[Tensor]
) -> list[float]:
    """log p(continuation | before) in nats, each for itself; `before` has at least one token.

    A Transformer sees the end of `before`, as much as fits beside the longest continuation.
    """
    was_training = model.training
    model.eval()
    found: list[float] = []
    for start in range(0, len(continuations), ROWS):
        rows = continuations[start : start + ROWS]
        if model.carries_state:
            found += _carried(model, before, rows)
        else:
            found += _whole(model, before, rows)
    model.train(was_training)
    return found


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), True, IGNORED)


def _carried(model: LanguageModel, before: Tensor, rows: Sequence[Tensor]) -> list[float]:
    state: Any = model.read(before[None, :-1])
    if state is not None:
        state = state.expand(-1, len(rows), -1).contiguous()
    targets = _padded(rows)
    first = before[-1:].expand(len(rows), 1)
    read = torch.cat([first, targets[:, :-1].clamp(min=0)], 1)
    hidden, _ = model.hidden(read, state)
    return _sums(model, hidden, targets)


def _whole(model: LanguageModel, before: Tensor, rows: Sequence[Tensor]) -> list[float]:
    targets = _padded(rows)
    assert model.window is not None
    room = model.window - targets.shape[1]
    if room < 1:
        raise InputError(
            f"a sentence of {targets.shape[1]} tokens does not fit into the model's context of "
            f"{model.window}"
        )
    kept = before[-room:]
    read = torch.cat([kept.expand(len(rows), -1), targets[:, :-1].clamp(min=0)], 1)
    hidden, _ = model.hidden(read)
    return _sums(model, hidden[:, len(kept) - 1 :], targets)


def _sums(model: LanguageModel, hidden: Tensor, targets: Tensor) -> list[float]:
    logprobs: Any = fastlm.linear_token_logprobs(
        hidden, model.head.weight, targets, linear_bias=model.head.bias, ignore_index=IGNORED
    )
    return logprobs.sum(1).tolist()


@dataclass(frozen=True)
class Sentence:
    """`gain` in nats a token; None where it was too short to count."""

    place: int
    text: str
    gain: float | None


def scored(model: LanguageModel, tokenizer: Tokenizer, text: str) -> list[Sentence]:
    """Every sentence with its gain.

    Raises:
        InputError: there is no sentence.
    """
    found = sentences(text)
    if not found:
        raise InputError("no sentence to choose from")
    # a sentence starts in the middle of a text as behind a space
    ids = [torch.from_numpy(tokenizer.encode(" " + sentence)) for sentence in found]
    if model.window is not None:
        ids = [row[: model.window - 1] for row in ids]
    end = torch.tensor([tokenizer.end])
    whole = torch.cat([end, torch.from_numpy(tokenizer.encode(text))])
    informed = log_likelihoods(model, whole, ids)
    blind = log_likelihoods(model, end, ids)
    return [
        Sentence(
            place, sentence, None if len(row) < LEAST_TOKENS else (with_text - without) / len(row)
        )
        for place, (sentence, row, with_text, without) in enumerate(
            zip(found, ids, informed, blind, strict=True)
        )
    ]


def summarize(model: LanguageModel, tokenizer: Tokenizer, text: str, count: int = 3) -> str:
    """The sentences of the largest gain, in the order of the text."""
    if count < 1:
        raise UsageError(f"a summary has at least 1 sentence, got {count}")
    candidates = [s for s in scored(model, tokenizer, text) if s.gain is not None]
    candidates = candidates or scored(model, tokenizer, text)
    best = sorted(candidates, key=lambda s: -(s.gain or 0.0))[:count]
    return " ".join(s.text for s in sorted(best, key=lambda s: s.place))
