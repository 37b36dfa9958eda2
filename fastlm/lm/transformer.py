"""The Transformer language model, and the same model in plain PyTorch to compare it with.

    x = embedding(tokens)
    for each layer:  x = x + out(attention(qkv(norm(x))));  x = x + down(silu(gate) * up)
    logits = head(norm(x))

RMSNorm in front of each branch, rotary positions, several query heads for each key head, SwiGLU, no
bias but that of the head. Neither the logits nor the scores of attention are ever stored.

Documents stand one behind the other in a row. The token `end` begins one: nothing behind it sees
anything in front of it, and positions restart there, so that a document has the same loss alone and
in company. A call reads at most `context` tokens; what a text of any length does is in
`decoding.py`.

Sources: Vaswani et al. 2017 (arXiv:1706.03762); RMSNorm, Zhang & Sennrich 2019 (arXiv:1910.07467);
rotary positions, Su et al. 2021 (arXiv:2104.09864); SwiGLU, Shazeer 2020 (arXiv:2002.05202);
grouped heads, Ainslie et al. 2023 (arXiv:2305.13245); smaller branches, Radford et al. 2019.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm import checks

from .decoding import Cache, Decoder
from .errors import UsageError
from .model import Trainable

EPS = 1e-6
# q [B, T, H, D], k and v [B, T, Hk, D] -> [B, T, H, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """`context`: tokens that a prediction can depend on. `end`: the token that begins a document,
    None when rows hold one each. `recompute`: layers run again in the backward instead of keeping
    what it needs; `z_loss`: weight of the squared log-sum-exp, in training alone."""

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    ffn_size: int | None = None
    context: int = 256
    dropout: float = 0.0
    tied: bool = False
    z_loss: float = 0.0
    rope_base: float = 10000.0
    end: int | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.context < 2:
            raise UsageError(f"context must be at least 2, got {self.context}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 < self.rope_base < math.inf:
            raise UsageError(f"rope_base must be finite and above 0, got {self.rope_base}")
        if self.end is not None and self.end < 0:
            raise UsageError(f"end must not be negative, got {self.end}")
        if not 0.0 <= self.z_loss < math.inf:
            raise UsageError(f"z_loss must be finite and not negative, got {self.z_loss}")
        if self.hidden_size % (2 * self.num_heads):
            raise UsageError(
                f"hidden_size must be a multiple of twice num_heads ({2 * self.num_heads}), "
                f"got {self.hidden_size}"
            )
        if self.num_heads % self.kv_heads:
            raise UsageError(
                f"num_heads must be a multiple of num_kv_heads ({self.kv_heads}), "
                f"got {self.num_heads}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ffn(self) -> int:
        """8/3 of the width, which makes the three matrices as large as two of four widths."""
        return self.ffn_size or -(-8 * self.hidden_size // (3 * 32)) * 32

    def flops_per_token(self) -> int:
        """Forward and backward, a multiply-add as two; half a context of keys on average."""
        width, size = self.hidden_size, self.head_size
        layer = width * (self.num_heads + 2 * self.kv_heads) * size  # qkv
        layer += width * self.num_heads * size + 3 * width * self.ffn
        layer += self.num_heads * size * self.context  # scores and their sum over values
        return 6 * (self.num_layers * layer + width * self.vocab_size)


# ---- positions and documents --------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def rotations(
    count: int, size: int, base: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[count, size / 2] complex: position p turns pair i by the angle p * base ** (-2i / size)."""
    with torch.inference_mode(False):  # kept for whoever trains later
        rate = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.arange(count, dtype=torch.float64)[:, None] * rate
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        return torch.polar(torch.ones_like(angle), angle).to(kind).to(device)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, T, heads, D], turns [T, D / 2] or [B, T, D / 2]: neighbours as complex numbers."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[..., None, :]).flatten(-2).to(x.dtype)


def places(documents: Tensor) -> Tensor:
    """How far each token of [B, T] is from the beginning of its run of equal numbers."""
    index = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


# ---- the model ----------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention, then the feed-forward part, each added to its input."""

    linear = staticmethod(fastlm.linear)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_size
        self.query_heads, self.key_heads = config.num_heads, config.kv_heads
        self.attention_norm = nn.RMSNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, (config.num_heads + 2 * config.kv_heads) * size, bias=False)
        self.out = nn.Linear(config.num_heads * size, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=EPS)
        self.gate_up = nn.Linear(width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """x [B, T, width]; turns as in `rotate`."""
        queries, keys = self.query_heads, self.key_heads
        heads = self.linear(self.attention_norm(x), self.qkv.weight)
        heads = heads.unflatten(-1, (queries + 2 * keys, -1))
        q_k, v = heads.split((queries + keys, keys), 2)
        q, k = rotate(q_k, turns).split((queries, keys), 2)
        x = x + self.dropout(self.linear(attend(q, k, v).flatten(2), self.out.weight))
        gate, up = self.linear(self.ffn_norm(x), self.gate_up.weight).chunk(2, -1)
        return x + self.dropout(self.linear(F.silu(gate) * up, self.down.weight))


class TransformerLM(Trainable, nn.Module):
    """Decoder-only Transformer; the arguments are those of `TransformerConfig`."""

    # a state of the model is the tokens before; reading them again is for evaluation alone
    carries_state = False
    layer: type[Layer] = Layer

    def __init__(self, vocab_size: int, **settings: Any) -> None:
        super().__init__()
        self.config = config = TransformerConfig(vocab_size, **settings)
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=EPS)
        self.head = nn.Linear(config.hidden_size, vocab_size)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices keep the size of what goes through them; what is added to x starts smaller, by
        the root of how often that happens, so that x does not grow with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if name.endswith(("out.weight", "down.weight")):
                parameter.mul_((2 * self.config.num_layers) ** -0.5)
        if not self.config.tied:
            self.head.weight.mul_(0.1)  # start close to what the bias says
        nn.init.zeros_(self.head.bias)

    @property
    def window(self) -> int:
        """Tokens that a call can read."""
        return self.config.context

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """Start from the log frequency of each token [V] as the bias of the head."""
        share = (counts + 1.0) / (counts + 1.0).sum()
        self.head.bias.copy_(share.log())

    def turns(self) -> Tensor:
        """The rotations of all positions."""
        config, like = self.config, self.embedding.weight
        return rotations(
            config.context, config.head_size, config.rope_base, like.dtype, like.device
        )

    def _documents(self, tokens: Tensor) -> Tensor | None:
        """Number of the document of each token; None when there is one in each row."""
        if self.config.end is None:
            return None
        begins = tokens == self.config.end
        # a GPU is not waited for
        alone = tokens.device.type == "cpu" and not bool(begins[:, 1:].any())
        return None if alone else begins.cumsum(1)

    def _attend(self, documents: Tensor | None) -> Attend:
        mask = fastlm.AttnMask.causal()
        if documents is not None:
            mask = mask & fastlm.AttnMask.documents(documents)
        dropout = self.config.dropout if self.training else 0.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Any = fastlm.attention(q, k, v, mask=mask, dropout_p=dropout)
            return out

        return attend

    def through(self, tokens: Tensor, turns: Tensor, attends: Sequence[Attend]) -> Tensor:
        """tokens [B, T] through all layers, with one way to attend for each -> [B, T, H]."""
        checks.index_range("lm.TransformerLM", "tokens", tokens, self.config.vocab_size, None)
        x = self.dropout(self.embedding(tokens))
        again = self.config.recompute and torch.is_grad_enabled()
        for layer, attend in zip(self.layers, attends, strict=True):
            if again:
                x = checkpoint(layer, x, turns, attend, use_reentrant=False)
            else:
                x = layer(x, turns, attend)
        return self.norm(x)

    def hidden(
        self, tokens: Tensor, state: Tensor | None = None, *, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (the head's input [B, T, H], state [B, S]).

        The state is the tokens read so far, as many as fit into `context` with those given; they
        are read again. `documents` [B, T] numbers the documents, where `end` does not say it.
        """
        length, context = tokens.shape[1], self.config.context
        if length > context:
            raise UsageError(f"a call reads at most {context} tokens (context), got {length}")
        if state is not None:
            if documents is not None:
                raise UsageError("documents are for rows that are complete, without a state")
            tokens = torch.cat([state, tokens], 1)[:, -context:]
        if documents is None:
            documents = self._documents(tokens)
        turns = self.turns()
        turns = turns[: tokens.shape[1]] if documents is None else turns[places(documents)]
        x = self.through(tokens, turns, [self._attend(documents)] * len(self.layers))
        return x[:, tokens.shape[1] - length :], tokens

    def forward(
        self, tokens: Tensor, state: Tensor | None = None, *, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, T] -> (logits [B, T, V], state [B, S])."""
        hidden, state = self.hidden(tokens, state, documents=documents)
        return self.head(hidden), state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy in nats per token, state [B, S]); a target of -100 does not count."""
        hidden, state = self.hidden(tokens, state, documents=documents)
        return self._loss(hidden, targets, label_smoothing), state

    def _loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        loss: Any = fastlm.linear_cross_entropy(
            hidden,
            self.head.weight,
            targets,
            linear_bias=self.head.bias,
            label_smoothing=smoothing,
            z_loss_weight=self.config.z_loss if self.training else 0.0,
        )
        return loss

    def decoder(self) -> Decoder:
        """One token per call, with keys and values kept; for inference."""
        return Decoder(self)

    def read(self, tokens: Tensor) -> Cache:
        """The state of a decoder after tokens [B, T]."""
        return self.decoder().read(tokens)


class _PlainLayer(Layer):
    linear = staticmethod(F.linear)


class PlainTransformerLM(TransformerLM):
    """The same model as a PyTorch user would write it: the baseline of every comparison."""

    layer = _PlainLayer

    def _attend(self, documents: Tensor | None) -> Attend:
        mask = None
        if documents is not None:
            mask = (documents[:, :, None] == documents[:, None]).tril()[:, None]
        dropout = self.config.dropout if self.training else 0.0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                enable_gqa=True,
            ).transpose(1, 2)

        return attend

    def _loss(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        logits = self.head(hidden)
        flat = logits.flatten(0, -2)
        loss = F.cross_entropy(flat, targets.flatten(), label_smoothing=smoothing)
        if self.training and self.config.z_loss:
            kept = targets != -100
            loss = loss + self.config.z_loss * logits[kept].logsumexp(-1).square().mean()
        return loss
