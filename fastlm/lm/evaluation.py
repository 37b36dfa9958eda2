"""How well a model predicts held-out text: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .distributed import Ranks
from .kinds import LanguageModel
from .store import TokenStore
from .tokenizer import Tokenizer

ROWS, LENGTH = 16, 128


@dataclass(frozen=True)
class Score:
    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    def __str__(self) -> str:
        return (
            f"{self.bits_per_byte:.3f} bits/byte, {self.nats_per_token:.3f} nats/token, "
            f"perplexity {self.perplexity:,.1f} on {self.tokens:,} tokens"
        )

    def to_json(self) -> dict[str, float]:
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def evaluate(
    model: LanguageModel,
    store: TokenStore,
    tokenizer: Tokenizer,
    *,
    split: str = "held",
    limit: int | None = None,
    ranks: Ranks | None = None,
) -> Score:
    """Score the first `limit` tokens of a split, as one text."""
    return score(model, store.first(split, limit), tokenizer, ranks)


def by_document(
    model: LanguageModel, store: TokenStore, tokenizer: Tokenizer, split: str = "held"
) -> dict[str, Score]:
    """Every document for itself."""
    return {
        entry.name: score(model, store.ids[entry.start : entry.stop], tokenizer)
        for entry in store.split(split)
    }


@torch.no_grad()
def score(
    model: LanguageModel, ids: NDArray[Any], tokenizer: Tokenizer, ranks: Ranks | None = None
) -> Score:
    """Score a text of two tokens or more, in parallel lanes that carry their state.

    A lane starts without context, so the result is a little worse than reading in one piece. A
    Transformer reads half of its context and scores the other half. The lanes are shared out among
    ranks.
    """
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    length = LENGTH if model.window is None else model.window // 2
    rows = min(ROWS, max(1, len(ids) // length))
    lane = (len(ids) - 1) // rows
    lanes = np.stack([ids[row * lane : row * lane + lane + 1] for row in range(rows)])
    window, counts = ranks.share(torch.from_numpy(lanes.astype(np.int64)).to(device))
    was_training = model.training
    model.eval()
    state, nats = None, 0.0
    for start in range(0, lane, length):
        tokens = window[:, start : min(start + length, lane)].contiguous()
        targets = window[:, start + 1 : start + 1 + tokens.shape[1]].contiguous()
        loss, state = model.loss(tokens, targets, state)
        nats += float(loss) * targets.numel() * counts
    model.train(was_training)
    nats = ranks.total(nats)
    count = rows * lane
    size = int(tokenizer.byte_lengths()[lanes[:, 1:]].sum())
    return Score(nats / count, nats / math.log(2) / max(1, size), count, size)


def verdict(train_nats: float, held: list[float]) -> str:
    """What the curves say, in words; `held` is the held-out nats per token of every evaluation."""
    numbers = f"train {train_nats:.2f}, held-out {held[-1]:.2f} nats/token"
    if len(held) < 4:
        return f"too few evaluations for a verdict: {numbers}"
    best = min(held)
    if held[-1] > 1.01 * best:
        return (
            f"overfitting: {numbers}; the held-out loss was {best:.2f} before it rose. Use "
            "dropout, weight decay, --patience or more text"
        )
    if held[-1] < 0.99 * held[2 * len(held) // 3 - 1]:
        return f"underfitting: {numbers}, still falling; a larger budget or model would help"
    return f"levelled off: {numbers}; a larger model or more text would help more than time"
