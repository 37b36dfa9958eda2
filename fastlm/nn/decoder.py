"""Decoding from modules: an embedding, GRU layers and a head as `fastlm.generate` takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..ops.generation.op import generation_step
from ..ops.generation.weights import DecoderWeights


class GRUDecoder:
    """One token at a time, or a whole generation with `fastlm.generate(decoder, prompts, n)`.

    A decoder is of the weights as they were: once one of them has been changed in place it raises,
    and another has to be made. After a few steps it holds a packed copy of all matrices, and after
    about V / 2 tokens the input projection of the whole vocabulary, V x 3H values; so keep one for
    many short generations.

    A model of one's own gets the compiled generation by this method:
        def decoder(self):
            return fastlm.nn.GRUDecoder(self.body, self.head)

    Args:
        body: `fastlm.nn.EmbeddingGRU`, or a module with an nn.Embedding `embedding` and an nn.GRU
            `gru` (ours or torch's) of one direction.
        head: nn.Linear from H to the vocabulary, or None: `step` only.
    """

    def __init__(self, body: nn.Module, head: nn.Linear | None = None) -> None:
        op = "nn.GRUDecoder"
        embedding: Any = getattr(body, "embedding", None)
        cells: Any = getattr(body, "gru", None)
        if not isinstance(embedding, nn.Embedding) or getattr(cells, "mode", None) != "GRU":
            got = type(body).__name__
            checks.bad_type(op, "body", "a module with `embedding` and `gru`", got)
        if cells.bidirectional:
            checks.bad_value(op, "body.gru", "of one direction", "a bidirectional one")
        if head is not None:
            checks.shape(op, "head.weight", head.weight, (None, cells.hidden_size), "[V, H]")
            checks.same_dtype(op, "head.weight", head.weight, "embedding", embedding.weight)
        flat = [getattr(cells, name) for name in cells._flat_weights_names]
        size = 4 if cells.bias else 2
        groups = (flat[i : i + size] for i in range(0, len(flat), size))
        self.weights = DecoderWeights(
            embedding.weight,
            [(g[0], g[1], *(g[2:] or (None, None))) for g in groups],
            None if head is None else head.weight,
            None if head is None else head.bias,
            padding_idx=embedding.padding_idx,
            max_norm=embedding.max_norm,
            norm_type=embedding.norm_type,
        )

    def start(self, batch: int) -> Tensor:
        """The zero state [num_layers, batch, H], in float32 at least."""
        weights = self.weights
        return weights.wide.embedding.new_zeros(weights.layers, batch, weights.hidden)

    @torch.no_grad()
    def _advance(self, tokens: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        op, weights = "nn.GRUDecoder", self.weights
        weights.check_fresh(op)
        checks.integer(op, "tokens", tokens)
        checks.shape(op, "tokens", tokens, (None,), "[B]")
        checks.index_range(op, "tokens", tokens, weights.vocabulary, None)
        batch = tokens.shape[0]
        h = self.start(batch) if h is None else h
        checks.shape(op, "h", h, (weights.layers, batch, weights.hidden), "layers, B, H")
        h = h.to(weights.wide.embedding.dtype)
        return generation_step(tokens.long(), h, *weights.arguments(batch, 1))

    def step(self, tokens: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """tokens [B], h [num_layers, B, H] or None -> output [B, H] of the last layer, next h."""
        _, h = self._advance(tokens, h)
        return h[-1].to(self.weights.dtype), h

    def __call__(self, tokens: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens [B], h [num_layers, B, H] or None -> logits [B, V], next h.

        To the bit the logits that `fastlm.generate` samples from.
        """
        if self.weights.classes == 0:
            checks.bad_value("nn.GRUDecoder", "head", "a Linear, for logits", None)
        return self._advance(tokens, h)
