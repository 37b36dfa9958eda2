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
from .pairs import IGNORED, PairStore
from .store import Lanes, TokenStore
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
    store: TokenStore | PairStore,
    tokenizer: Tokenizer,
    *,
    split: str = "held",
    limit: int | None = None,
    ranks: Ranks | None = None,
) -> Score:
    """Score the first `limit` tokens of a split, as one text; of pairs, what is learned of them."""
    if isinstance(store, PairStore):  # by every rank: they are few
        return score_pairs(model, store, tokenizer, split=split, limit=limit)
    return score(model, store.first(split, limit), tokenizer, ranks)


@torch.no_grad()
def score_pairs(
    model: LanguageModel,
    store: PairStore,
    tokenizer: Tokenizer,
    *,
    split: str = "held",
    limit: int | None = None,
) -> Score:
    """Targets after their prompts; a pair that passes `limit` tokens of targets is the last."""
    sizes = store.places[:, 2] - store.places[:, 1]
    rows = store.rows(split)
    if limit is not None:
        rows = rows[: int(np.searchsorted(np.cumsum(sizes[rows]), limit)) + 1]
    rows.sort(key=lambda row: store.places[row, 2] - store.places[row, 0])
    device, bytes_of = next(model.parameters()).device, tokenizer.byte_lengths()
    was_training = model.training
    model.eval()
    nats, count, size = 0.0, 0, 0
    for start in range(0, len(rows), ROWS):
        tokens, targets = store.collate(rows[start : start + ROWS])
        loss, _ = model.loss(tokens.to(device), targets.to(device), None)
        kept = targets[targets != IGNORED]
        nats += float(loss) * len(kept)
        count += len(kept)
        size += int(bytes_of[kept.numpy()].sum())
    model.train(was_training)
    return Score(nats / count, nats / math.log(2) / max(1, size), count, size)


def by_document(
    model: LanguageModel, store: TokenStore, tokenizer: Tokenizer, split: str = "held"
) -> dict[str, Score]:
    """Every document for itself."""
    return {
        entry.name: score(model, store.ids[entry.start : entry.stop], tokenizer)
        for entry in store.split(split)
    }


def score(
    model: LanguageModel, ids: NDArray[Any], tokenizer: Tokenizer, ranks: Ranks | None = None
) -> Score:
    """Score a text of two tokens or more, in parallel lanes that carry their state.

    A lane starts without context, so the result is a little worse than reading in one piece; lanes
    are of one length, so up to 15 tokens at the end are left out. A Transformer reads half of its
    context and scores the other half. The lanes are shared out among ranks.
    """
    rows = min(ROWS, max(1, len(ids) // _length(model)))
    lane = (len(ids) - 1) // rows
    lanes = np.stack([ids[row * lane : row * lane + lane + 1] for row in range(rows)])
    return _score(model, lanes.astype(np.int64), tokenizer, ranks)


def sample(
    model: LanguageModel,
    store: TokenStore | PairStore,
    tokenizer: Tokenizer,
    *,
    split: str,
    limit: int,
    ranks: Ranks | None = None,
) -> Score:
    """Score about `limit` tokens of a split, in lanes at equal distances over all of it."""
    if isinstance(store, PairStore):  # their order is no order of time or topic
        return score_pairs(model, store, tokenizer, split=split, limit=limit)
    size = min(limit, store.totals(split)["tokens"])
    rows = min(ROWS, max(1, size // _length(model)))
    lanes = Lanes(store.ids, store.spans(split), batch=rows, length=max(1, size // rows - 1))
    tokens, targets, _ = lanes.at(0, 0)
    return _score(model, torch.cat([tokens, targets[:, -1:]], 1).numpy(), tokenizer, ranks)


def _length(model: LanguageModel) -> int:
    """Tokens of a lane that are scored at a time."""
    return LENGTH if model.window is None else model.window // 2


@torch.no_grad()
def _score(
    model: LanguageModel,
    lanes: NDArray[np.int64],
    tokenizer: Tokenizer,
    ranks: Ranks | None = None,
) -> Score:
    """lanes [rows, tokens and one more], shared out among ranks."""
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    rows, lane, length = lanes.shape[0], lanes.shape[1] - 1, _length(model)
    window, counts = ranks.share(torch.from_numpy(lanes).to(device))
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
