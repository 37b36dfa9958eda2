"""The Transformer one token at a time, with the keys and values of what was read before.

A row keeps at most `context` tokens of its document. When they are full, the older half of them is
forgotten and the rest is read again as the beginning of a row, which is how training saw it. So
memory stays constant, and for the n-th token of a document the first of its tokens that counts is
`window_start(n, context)`, whether the tokens were prompts or made, and whatever other rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastlm

if TYPE_CHECKING:
    from .transformer import TransformerLM


def window_start(count: int, context: int) -> int:
    """The first token that is still there when `count` tokens of a document were read."""
    half = context // 2
    return half * -(-max(0, count - context) // half)


@dataclass(frozen=True)
class Cache:
    """What was read. Belongs to one continuation: a step writes into the tensors."""

    keys: Tensor  # [L, B, context, Hk, D], turned by their position in the row
    values: Tensor  # [L, B, context, Hk, D]
    tokens: Tensor  # [B, context]
    lengths: Tensor  # [B] int32: how many of them each row holds

    def rows(self, chosen: Tensor) -> Cache:
        """A copy of rows, in that order; a row may be asked for more than once."""
        return Cache(
            self.keys[:, chosen], self.values[:, chosen], self.tokens[chosen], self.lengths[chosen]
        )

    @staticmethod
    def join(parts: Sequence[Cache]) -> Cache:
        """The rows of all parts, one part after the other."""
        return Cache(
            torch.cat([part.keys for part in parts], 1),
            torch.cat([part.values for part in parts], 1),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.lengths for part in parts]),
        )


class Decoder:
    """step(tokens [B], cache or None) -> (logits [B, V], cache), as `fastlm.generate` takes it."""

    def __init__(self, model: TransformerLM) -> None:
        self.model, self.config = model, model.config

    def start(self, batch: int) -> Cache:
        config, like = self.config, self.model.embedding.weight
        shape = (config.num_layers, batch, config.context, config.kv_heads, config.head_size)
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        tokens = torch.zeros(batch, config.context, dtype=torch.int64, device=like.device)
        return Cache(keys, values, tokens, tokens.new_zeros(batch, dtype=torch.int32))

    @torch.no_grad()
    def read(self, prompts: Tensor) -> Cache:
        """Prompts [B, P] at once, as if step by step."""
        cache, rows = self.start(prompts.shape[0]), []
        for row in prompts:
            if self.config.end is not None:
                begins = (row == self.config.end).nonzero()
                row = row[int(begins[-1]) :] if len(begins) else row
            rows.append(row[window_start(len(row), self.config.context) :])
        lengths = torch.tensor([len(row) for row in rows], device=prompts.device)
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self._fill(cache, torch.arange(len(rows), device=prompts.device), tokens, lengths)

    def _fill(self, cache: Cache, rows: Tensor, tokens: Tensor, lengths: Tensor) -> Cache:
        """Read tokens [n, T], padded behind `lengths`, into rows of the cache from their start."""
        count = tokens.shape[1]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.keys[layer, rows, :count] = k
            cache.values[layer, rows, :count] = v
            out = fastlm.attention(q, k, v, mask="causal")
            assert isinstance(out, Tensor)
            return out

        if count:
            attends = [partial(attend, layer) for layer in range(self.config.num_layers)]
            self.model.through(tokens, self.model.turns()[:count], attends)
        cache.tokens[rows, :count] = tokens
        held = cache.lengths.index_copy(0, rows, lengths.to(cache.lengths.dtype))
        return replace(cache, lengths=held)

    def _make_room(self, cache: Cache) -> Cache:
        """Forget the older half of each row that is full."""
        rows = (cache.lengths == self.config.context).nonzero()[:, 0]
        if not len(rows):
            return cache
        kept = cache.tokens[rows, self.config.context // 2 :]
        return self._fill(cache, rows, kept, torch.full_like(rows, kept.shape[1]))

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        batch = tokens.shape[0]
        cache = self.start(batch) if cache is None else cache
        if self.config.end is not None:
            begins = tokens == self.config.end
            cache = replace(cache, lengths=cache.lengths.masked_fill(begins, 0))
        cache = self._make_room(cache)
        lengths, every = cache.lengths, torch.arange(batch, device=tokens.device)
        cache.tokens[every, lengths] = tokens

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            out = fastlm.decode_attention(q, keys, values, lengths, k_new=k, v_new=v)
            assert isinstance(out, Tensor)
            return out

        attends = [partial(attend, layer) for layer in range(self.config.num_layers)]
        turns = self.model.turns()[lengths.long()][:, None]
        hidden = self.model.through(tokens[:, None], turns, attends)[:, 0]
        return self.model.head(hidden), replace(cache, lengths=lengths + 1)
