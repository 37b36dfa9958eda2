"""What learning from preferences makes small, of the log-probs of chosen and rejected texts.

    dpo     -log sigmoid(beta * m),  m = log p(chosen)/p0(chosen) - log p(rejected)/p0(rejected)

where p0 is the model that training starts from. `ipo` and `hinge` are of the same m; `simpo`,
`orpo` and `cpo` need no p0. The formulas are those of the functions of fastlm that carry the names;
ipo, simpo and orpo take the mean log-prob of a text's tokens, the others their sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastlm

from . import pairs
from .budget import Budget
from .errors import InputError, UsageError
from .kinds import LanguageModel
from .preferences import Preference
from .tokenizer import Ids, Tokenizer

# the strength where none is given, that of the function of the same name
BETAS = {"dpo": 0.1, "ipo": 0.1, "hinge": 0.1, "cpo": 0.1, "simpo": 2.0, "orpo": 0.1}
OF_REFERENCE = {"dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge"}
AVERAGED = ("ipo", "simpo", "orpo")
ENDS = ("auto", "yes", "no")


@dataclass(frozen=True)
class DPOConfig:
    """`beta` None: the one of the loss, in `BETAS`. `gamma`: the margin of simpo. `longest`: tokens
    of a prompt and its text. `end`: whether a text counts as complete, so that its end is learned
    too; "auto" takes no end of human-over-model ones, which are cut somewhere."""

    loss: str = "dpo"
    beta: float | None = None
    gamma: float = 0.5
    label_smoothing: float = 0.0
    budget: str = "1epochs"
    batch: int = 16
    lr: float = 3e-4
    warmup: float = 0.1
    floor: float = 0.1
    clip: float = 1.0
    longest: int = 512
    end: str = "auto"
    evals: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        for name, known in {"loss": tuple(BETAS), "end": ENDS}.items():
            if getattr(self, name) not in known:
                listed = ", ".join(known)
                raise UsageError(f"{name} must be one of {listed}, got {getattr(self, name)!r}")
        for name, least in {"batch": 1, "evals": 1, "longest": 2}.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not all(0 < value < math.inf for value in (self.lr, self.clip, self.strength)):
            raise UsageError("lr, clip and beta must be finite and above 0")
        if not math.isfinite(self.gamma):
            raise UsageError(f"gamma must be finite, got {self.gamma}")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise UsageError("warmup must be in [0, 1) and floor in [0, 1]")
        if not 0 <= self.label_smoothing <= 0.5:
            raise UsageError(f"label_smoothing must be in [0, 0.5], got {self.label_smoothing}")
        if self.label_smoothing and self.loss in ("ipo", "hinge", "orpo"):
            raise UsageError(f"{self.loss} has no label_smoothing")

    @property
    def strength(self) -> float:
        return BETAS[self.loss] if self.beta is None else self.beta


def sequence_logprobs(
    model: LanguageModel, tokens: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(log-probs of the targets summed [N], in nats, with gradient; their number [N])."""
    hidden, _ = model.hidden(tokens)
    found: Any = fastlm.linear_token_logprobs(
        hidden,
        model.head.weight,
        targets,
        linear_bias=model.head.bias,
        ignore_index=pairs.IGNORED,
    )
    return found.sum(1), (targets != pairs.IGNORED).sum(1)


def objective(
    config: DPOConfig, sums: Tensor, counts: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss [], rewards [2B] without gradient) of B chosen texts, then B rejected ones: their
    log-probs, numbers of tokens, and log-probs under the starting model."""
    scale = counts if config.loss in AVERAGED else torch.ones_like(counts)
    values, then = sums / scale, (reference / scale).to(sums.dtype)
    chosen, rejected = values.chunk(2)
    beta, smooth = config.strength, config.label_smoothing
    if config.loss in OF_REFERENCE:
        loss = fastlm.dpo_loss(
            chosen,
            rejected,
            *then.chunk(2),
            beta=beta,
            label_smoothing=smooth,
            loss_type=OF_REFERENCE[config.loss],
        )
        return loss, beta * (values - then).detach()
    if config.loss == "simpo":
        loss = fastlm.simpo_loss(
            chosen, rejected, beta=beta, gamma=config.gamma, label_smoothing=smooth
        )
    elif config.loss == "cpo":
        loss = fastlm.cpo_loss(chosen, rejected, beta=beta, label_smoothing=smooth)
    else:
        loss = fastlm.orpo_loss(chosen, rejected, beta=beta)
    return loss, beta * values.detach()


class Encoded:
    """Preferences as tokens, at most `longest` of a prompt and its text. Both texts of one stand
    behind the same tokens: a prompt loses its beginning to the longer of them."""

    def __init__(
        self, found: Sequence[Preference], tokenizer: Tokenizer, longest: int, end: str
    ) -> None:
        self.rows: list[tuple[Ids, Ids, Ids]] = []  # prompt, chosen, rejected
        for one in found:
            whole = one.provenance != "human-over-model" if end == "auto" else end == "yes"
            texts = [tokenizer.encode(text) for text in (one.chosen, one.rejected)]
            if whole:
                texts = [np.append(text, tokenizer.end) for text in texts]
            if not all(map(len, texts)):
                raise InputError(f"a text without a token, after the prompt {one.prompt[-60:]!r}")
            chosen, rejected = (text[: longest - 1] for text in texts)
            room = longest - max(len(chosen), len(rejected))
            prompt = pairs.prompt_ids(tokenizer, one.prompt, 0, room)
            self.rows.append((prompt, chosen, rejected))
        self.lengths = np.array([len(p) + max(len(c), len(r)) for p, c, r in self.rows])

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(tokens, targets) [2B, T]: the chosen texts, then the rejected ones."""
        rows = [self.rows[i] for i in chosen]
        return pairs.padded([(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows])
