"""Plain PyTorch and fastlm side by side: equal parameters, the same batches, alternating steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from . import machine
from .config import TrainConfig
from .kinds import KINDS, LanguageModel
from .optimizer import make_optimizer
from .recipe import Recipe
from .store import Lanes, TokenStore

WARM_UP = 2  # steps that are compared but not timed


class _Runner:
    """One model with its optimizer and carried state."""

    def __init__(self, model: LanguageModel, config: TrainConfig) -> None:
        self.model, self.clip = model, config.clip or math.inf
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.state: torch.Tensor | None = None
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        start = time.perf_counter()
        loss, h_n = self.model.loss(tokens, targets, self.state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = h_n.detach() if self.model.carries_state else None
        self.losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Comparison:
    """Timed steps of both in seconds, and how far their losses and parameters are apart."""

    plain_seconds: list[float]
    fast_seconds: list[float]
    tokens_per_step: int
    losses: list[tuple[float, float]]
    loss_difference: float
    parameter_difference: float

    @staticmethod
    def _speed(tokens: int, seconds: list[float]) -> dict[str, float]:
        low, middle, high = (tokens / s for s in reversed(machine.spread(seconds)))
        return {"median": middle, "low_quartile": low, "high_quartile": high}

    @property
    def ratio(self) -> float:
        """Median speed of fastlm over that of plain PyTorch."""
        return machine.spread(self.plain_seconds)[1] / machine.spread(self.fast_seconds)[1]

    def to_json(self) -> dict[str, Any]:
        return {
            "steps_timed": len(self.fast_seconds),
            "plain_tokens_per_second": self._speed(self.tokens_per_step, self.plain_seconds),
            "fastlm_tokens_per_second": self._speed(self.tokens_per_step, self.fast_seconds),
            "ratio": self.ratio,
            "largest_relative_loss_difference": self.loss_difference,
            "largest_parameter_difference": self.parameter_difference,
        }

    def __str__(self) -> str:
        lines = []
        for name, seconds in (("plain", self.plain_seconds), ("fastlm", self.fast_seconds)):
            speed = self._speed(self.tokens_per_step, seconds)
            lines.append(
                f"{name:6} {speed['median']:>9,.0f} tokens/s (quartiles "
                f"{speed['low_quartile']:,.0f} to {speed['high_quartile']:,.0f}, "
                f"{len(seconds)} steps)"
            )
        lines.append(
            f"ratio {self.ratio:.2f}x; largest difference of the loss "
            f"{self.loss_difference:.1e} relative, of a parameter {self.parameter_difference:.1e}"
        )
        return "\n".join(lines)


def side_by_side(store: TokenStore, recipe: Recipe, *, steps: int) -> Comparison:
    """Train both from equal parameters; the order within a pair alternates, so that a busy
    neighbour hits both."""
    config, fast = recipe.train_config(), recipe.make_model(store)
    plain = KINDS[recipe.model][1](**recipe.model_arguments(store.vocab_size))
    plain.load_state_dict(fast.state_dict())
    first, second = _Runner(plain, config), _Runner(fast, config)
    lanes = Lanes(
        store.ids, store.spans("train"), batch=config.batch, length=config.seq, seed=config.seed
    )
    for index in range(WARM_UP + steps):
        tokens, targets, fresh = lanes.next()
        order = (first, second) if index % 2 == 0 else (second, first)
        for runner in order:
            runner.state = None if fresh else runner.state
            runner.step(tokens, targets)
    pairs = list(zip(first.losses, second.losses, strict=True))
    apart = (
        float((a.detach() - b.detach()).abs().max())
        for a, b in zip(plain.parameters(), fast.parameters(), strict=True)
    )
    return Comparison(
        first.seconds[WARM_UP:],
        second.seconds[WARM_UP:],
        config.batch * config.seq,
        pairs,
        max(abs(a - b) / abs(a) for a, b in pairs),
        max(apart),
    )
