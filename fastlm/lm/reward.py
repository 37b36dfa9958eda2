"""A reward model: which of two continuations of a prompt is preferred, by Bradley and Terry.

    P(a preferred to b) = sigmoid(r(a) - r(b))

Two kinds, unlike enough that one can be asked whether the other is being deceived:
    ngrams  r is a sum of weights of the runs of one to three tokens, hashed into a table: learns in
            seconds which words exist (as fastText, Joulin et al. 2016, arXiv:1607.01759)
    gru     r is linear in the mean of a GRU's outputs over the continuation
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn

from . import checkpoint, metrics, tokenizer
from .budget import Budget, learning_rate
from .errors import CheckpointError, InputError, TrainingError, UsageError
from .optimizer import make_optimizer
from .preferences import Preference
from .progress import Quiet, Reporter
from .tokenizer import Tokenizer

LONGEST = 256  # tokens of a prompt and its continuation; a prompt loses its beginning
ROWS = 256  # scored at once
TABLE_BITS, LONGEST_GRAM = 18, 3
# a table starts from zero and each weight is seldom met; a matrix is met in every step
RATES = {"ngrams": 2e-2, "gru": 4e-3}

# texts of one batch: tokens [N, T], where the continuation of each begins and ends [N]
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class RewardConfig:
    """`lr` None: the one of the kind, in `RATES`."""

    kind: str = "ngrams"
    budget: str = "20s"
    hidden: int = 128
    dropout: float = 0.2
    batch: int = 64
    lr: float | None = None
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        if self.kind not in RATES:
            raise UsageError(f"kind must be one of {', '.join(RATES)}, got {self.kind!r}")
        if self.batch < 1 or self.hidden < 1:
            raise UsageError("batch and hidden must be at least 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"lr must be finite and above 0, got {self.lr}")


def _inside(tokens: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    """[N, T]: 1.0 at the continuation."""
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return ((at >= begins[:, None]) & (at < ends[:, None])).float()


class NGrams(nn.Module):
    """The sum of the weights of a text's n-grams, over the root of its length."""

    def __init__(self, vocab_size: int, hidden_size: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(1 << TABLE_BITS, 1)
        nn.init.zeros_(self.table.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
        inside = _inside(tokens, begins, ends)
        total = torch.zeros_like(inside)
        for n in range(1, LONGEST_GRAM + 1):
            code = torch.full_like(tokens, n)
            for back in range(n):
                # before the first token there is token 0; int64 products wrap around
                code = code * 1_000_003 + nn.functional.pad(tokens, (back, 0))[:, : tokens.shape[1]]
            code = (code * 0x9E3779B1) >> 20 & ((1 << TABLE_BITS) - 1)
            total = total + self.dropout(self.table(code)[..., 0])
        return (total * inside).sum(1) / inside.sum(1).clamp(min=1).sqrt()


class Recurrent(nn.Module):
    """A linear function of the mean output of a GRU."""

    def __init__(self, vocab_size: int, hidden_size: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = fastlm.nn.EmbeddingGRU(vocab_size, hidden_size, hidden_size)
        nn.init.normal_(self.body.embedding.weight, std=hidden_size**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, tokens: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
        inside = _inside(tokens, begins, ends)
        output, _ = self.body(tokens, lengths=ends)
        mean = (output * inside[..., None]).sum(1) / inside.sum(1, keepdim=True).clamp(min=1)
        return self.head(self.dropout(mean))[:, 0]


KINDS: dict[str, type[NGrams] | type[Recurrent]] = {"ngrams": NGrams, "gru": Recurrent}


class RewardModel(nn.Module):
    """Tokens of a prompt and a continuation -> one number, without unit."""

    def __init__(
        self, vocab_size: int, kind: str = "ngrams", hidden_size: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.settings = {
            "vocab_size": vocab_size,
            "kind": kind,
            "hidden_size": hidden_size,
            "dropout": dropout,
        }
        self.score = KINDS[kind](vocab_size, hidden_size, dropout)

    def forward(self, tokens: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
        """tokens [N, T]; the score [N] is of the tokens begins <= t < ends of each row."""
        return self.score(tokens, begins, ends)


def batch_of(rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Prompts and continuations as token lists; an empty continuation scores what nothing does."""
    tokens, begins, ends = [], [], []
    for prompt, continuation in rows:
        continuation = continuation[:LONGEST]
        prompt = prompt[max(0, len(prompt) + len(continuation) - LONGEST) :]
        both = prompt + continuation
        begins.append(len(prompt))
        ends.append(max(1, len(both)))
        tokens.append(torch.tensor(both or [0]))
    padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return padded, torch.tensor(begins), torch.tensor(ends)


class Encoded:
    """Preferences as tokens."""

    def __init__(self, preferences: Sequence[Preference], tokenizer: Tokenizer) -> None:
        if not preferences:
            raise InputError("no preference to learn from")

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text).tolist()

        self.rows = [(ids(p.prompt), ids(p.chosen), ids(p.rejected)) for p in preferences]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Of n pairs: the n preferred texts, then the n others."""
        rows = [self.rows[i] for i in chosen]
        return batch_of([(p, c) for p, c, _ in rows] + [(p, r) for p, _, r in rows])


@dataclass(frozen=True)
class RewardReport:
    """On preferences that were not trained on."""

    pairs: int
    auc: metrics.Interval
    accuracy: metrics.Interval
    calibration_error: float
    bins: list[metrics.Bin]
    origins: dict[str, int]

    def lines(self) -> list[str]:
        by = ", ".join(f"{count:,} {kind}" for kind, count in self.origins.items())
        return [
            f"AUC-ROC {self.auc}, pair accuracy {self.accuracy}, "
            f"calibration error {self.calibration_error:.3f} on {self.pairs:,} pairs ({by})",
            f"right when it said so: {'; '.join(map(self._bin, self._upper()))}",
        ]

    def _upper(self) -> list[metrics.Bin]:
        """The half at and above 1/2; the other one is its mirror image."""
        return [b for b in self.bins if b.low >= 0.5]

    @staticmethod
    def _bin(b: metrics.Bin) -> str:
        return f"{b.observed:.0%} of {b.count} at {b.low:.0%} to {b.high:.0%}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def scores(model: RewardModel, batches: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Of prompts and continuations; the model is in eval mode for that."""
    was_training = model.training
    model.eval()
    found: list[float] = []
    for start in range(0, len(batches), ROWS):
        found += model(*batch_of(batches[start : start + ROWS])).tolist()
    model.train(was_training)
    return found


def evaluate(
    model: RewardModel, preferences: Sequence[Preference], tokenizer: Tokenizer, seed: int = 0
) -> RewardReport:
    """AUC-ROC of preferred against other texts, how often a pair is ordered rightly, and whether
    sigmoid(difference) is the chance it claims to be."""
    from .preferences import origins

    encoded = Encoded(preferences, tokenizer)
    high = scores(model, [(p, c) for p, c, _ in encoded.rows])
    low = scores(model, [(p, r) for p, _, r in encoded.rows])
    difference = torch.tensor(high, dtype=torch.float64) - torch.tensor(low, dtype=torch.float64)
    right = ((difference > 0).double() + (difference == 0).double() / 2).tolist()
    # seen from both sides, since the first of a pair is always the preferred one
    chance = torch.cat([difference, -difference]).sigmoid().tolist()
    outcome = [True] * len(high) + [False] * len(low)
    error, bins = metrics.calibration(chance, outcome)
    return RewardReport(
        len(encoded),
        metrics.auc_interval(high, low, seed=seed),
        metrics.mean_interval(right, seed=seed),
        error,
        bins,
        origins(preferences),
    )


def fit(
    preferences: Sequence[Preference],
    tokenizer: Tokenizer,
    config: RewardConfig | None = None,
    *,
    reporter: Reporter | None = None,
    record: Callable[[dict[str, Any]], None] | None = None,
) -> RewardModel:
    """Train on preferences until the budget is used.

    Raises:
        TrainingError: the loss is not finite.
    """
    config, reporter = config or RewardConfig(), reporter or Quiet()
    encoded = Encoded(preferences, tokenizer)
    draw = random.Random(f"reward/{config.seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RewardModel(tokenizer.vocab_size, config.kind, config.hidden, config.dropout)
        rate = RATES[config.kind] if config.lr is None else config.lr
        optimizer = make_optimizer(model, rate, config.weight_decay)
        budget = Budget.parse(config.budget).resolve(max(1, len(encoded) // config.batch))
        steps, started, order = 0, time.perf_counter(), list[int]()
        while (share := budget.share(steps, time.perf_counter() - started)) < 1.0:
            if len(order) < config.batch:
                order = draw.sample(range(len(encoded)), len(encoded))
            chosen, order = order[: config.batch], order[config.batch :]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(rate, share, 0.05, 0.05)
            both = model(*encoded.batch(chosen))
            preferred, other = both.chunk(2)
            loss = fastlm.reward_loss(preferred, other, center_rewards_coefficient=0.01)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not bool(torch.isfinite(loss.detach() + norm)):
                raise TrainingError(
                    f"the reward model's loss is not finite at step {steps}; lower --lr"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
            if record is not None:
                accuracy = float((preferred > other).float().mean())
                record({"step": steps, "loss": float(loss.detach()), "accuracy": accuracy})
        seconds = time.perf_counter() - started
        reporter.line(f"reward model: {steps} steps in {seconds:.0f} s on {len(encoded):,} pairs")
    return model.eval()


class Judge:
    """A reward model with its tokenizer: a function of texts, as `fastlm rl --reward` takes it."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        def ids(text: str) -> list[int]:
            return self.tokenizer.encode(text).tolist()

        rows = [(ids(p), ids(t)) for p, t in zip(prompts, texts, strict=True)]
        return scores(self.model, rows)


def save(path: Path, model: RewardModel, tokenizer: Tokenizer, report: RewardReport | None) -> None:
    settings = {"class": "RewardModel", **model.settings}
    state = {"config": {"model": settings}, "report": None if report is None else report.to_json()}
    checkpoint.write(path, model.state_dict(), {}, state, tokenizer)


def is_reward(saved: checkpoint.Checkpoint) -> bool:
    model = saved.state.get("config", {}).get("model")
    return isinstance(model, dict) and model.get("class") == "RewardModel"


def load(path: Path) -> Judge:
    """What `save` wrote.

    Raises:
        CheckpointError: it is damaged, or no reward model.
    """
    saved = checkpoint.read(path)
    try:
        settings = dict(saved.state["config"]["model"])
        settings.pop("class")
        model = RewardModel(**settings)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no reward model ({error})") from None
    checkpoint.load_parameters(model, saved)
    found = tokenizer.load(saved.path / checkpoint.TOKENIZER)
    if found.vocab_size != model.settings["vocab_size"]:
        raise CheckpointError(f"{path}: tokenizer and reward model have different vocabularies")
    return Judge(model, found)
