"""The GRU language model, and the same model in plain PyTorch to compare it with.

Both have the parameters `body.embedding.weight`, `body.gru.*` and `head.*`: a state_dict of one
loads into the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlm
import fastlm.nn

from .errors import UsageError

# a long text is read in pieces of this many tokens, so that it needs no more memory
PIECE = 1024

# one token per row and the state in; logits [B, V] and the state out
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int = 256
    embedding_dim: int | None = None
    num_layers: int = 1
    dropout: float = 0.0
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "embedding_dim", "num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.tied and self.embedding != self.hidden_size:
            raise UsageError(
                f"a tied head needs embedding_dim equal to hidden_size ({self.hidden_size}), "
                f"got {self.embedding_dim}"
            )

    @property
    def embedding(self) -> int:
        return self.hidden_size if self.embedding_dim is None else self.embedding_dim

    def flops_per_token(self) -> int:
        """Forward and backward, a multiply-add as two; the lookup and its gradient are free."""
        width, inputs, gru = self.hidden_size, self.embedding, 0
        for _ in range(self.num_layers):
            gru += 3 * width * (inputs + width)
            inputs = width
        return 6 * (gru + width * self.vocab_size)


class _PlainBody(nn.Module):
    """nn.Embedding and nn.GRU with the interface of `fastlm.nn.EmbeddingGRU`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.embedding)
        self.gru = nn.GRU(
            config.embedding,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )

    def forward(self, tokens: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.gru(self.embedding(tokens), h0)


class Trainable:
    """What every language model here has beside its mathematics."""

    def fit(self, tokens: Any, tokenizer: Any, **options: Any) -> Any:
        """Train on a store that `prepare` made; options are fields of `TrainConfig`, and `out`,
        `reporter` and `save_every` of `Trainer`, whose `Result` it gives.

            found = lm.prepare(lm.DataConfig(("books/",)))
            result = model.fit(found.tokens, found.tokenizer, budget="60s", lr=4e-3)
        """
        from . import training  # which is made of models

        return training.fit(self, tokens, tokenizer, **options)


class _LanguageModel(Trainable, nn.Module):
    """What the two models share; they differ in `body` and in how the loss is computed."""

    body: nn.Module
    window: int | None = None  # tokens that a call can read; None is any number
    carries_state = True  # from one training step to the next

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 256,
        embedding_dim: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size, hidden_size, embedding_dim, num_layers, dropout, tied)
        self.body = self._make_body()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, vocab_size)
        if tied:
            # an embedding drawn from N(0, 1) would give logits of size sqrt(H)
            embedding: Any = self.body.embedding
            nn.init.normal_(embedding.weight, std=hidden_size**-0.5)
            self.head.weight = embedding.weight

    def _make_body(self) -> nn.Module:
        raise NotImplementedError

    def _loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        raise NotImplementedError

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """Start from the log frequency of each token [V] as the bias of the head."""
        share = (counts + 1.0) / (counts + 1.0).sum()
        self.head.bias.copy_(share.log())

    def hidden(self, tokens: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (the head's input [B, T, H], state [L, B, H])."""
        output, h_n = self.body(tokens, h0)
        return self.dropout(output), h_n

    def forward(self, tokens: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (logits [B, T, V], state [L, B, H])."""
        hidden, h_n = self.hidden(tokens, h0)
        return self.head(hidden), h_n

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        h0: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy in nats per token, state [L, B, H])."""
        hidden, h_n = self.hidden(tokens, h0)
        return self._loss(hidden, targets, label_smoothing), h_n

    def decoder(self) -> Step:
        """One token per call, with the parameters as they are now; for inference."""
        return self.step

    def read(self, tokens: Tensor) -> Tensor | None:
        """The state after tokens [B, T], read in pieces; None for no token."""
        state: Tensor | None = None
        for piece in tokens.split(PIECE, 1) if tokens.shape[1] else ():
            _, state = self.hidden(piece, state)
        return state

    def step(self, tokens: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens [B] -> (logits [B, V], state [L, B, H]); `decoder` is faster for many steps."""
        logits, h_n = self(tokens[:, None], h)
        return logits[:, 0], h_n


class GRULM(_LanguageModel):
    """Embedding, GRU and output projection on the fused ops of fastlm; logits are never stored."""

    def _make_body(self) -> nn.Module:
        config = self.config
        return fastlm.nn.EmbeddingGRU(
            config.vocab_size,
            config.embedding,
            config.hidden_size,
            num_layers=config.num_layers,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )

    def decoder(self) -> Step:
        return fastlm.nn.GRUDecoder(self.body, self.head)

    def _loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        loss: Any = fastlm.linear_cross_entropy(
            hidden,
            self.head.weight,
            targets,
            linear_bias=self.head.bias,
            label_smoothing=smoothing,
        )
        return loss


class PlainGRULM(_LanguageModel):
    """The same model as a PyTorch user would write it: the baseline of every comparison."""

    def _make_body(self) -> nn.Module:
        return _PlainBody(self.config)

    def _loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        logits = self.head(hidden).flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
