"""Learning from preferences without writing anything: raise the chosen text over the rejected one.

What becomes small is in `objectives`. The log-probs of the starting model are asked once, at the
beginning, and are part of every checkpoint. Dropout is off: the model and the one it started from
differ by what was learned alone.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, files, metrics, pairs
from .budget import Budget, learning_rate
from .config import require_not_negative
from .errors import InputError, TrainingError
from .interrupt import Interrupt
from .kinds import LanguageModel
from .objectives import DPOConfig, Encoded, objective, sequence_logprobs
from .optimizer import make_optimizer
from .preferences import Preference
from .progress import Quiet, Reporter
from .tokenizer import Tokenizer

ROWS = 32  # preferences scored at once


@dataclass(frozen=True)
class PreferenceScore:
    """On preferences that were not trained on. `accuracy`, `margin`: of the rewards, beta times
    what the log-prob of a text has gained (or is, without a reference). `likelier`: how often the
    chosen text has the higher log-prob per token, and `chosen_nats`, `rejected_nats` what it is."""

    pairs: int
    loss: float
    accuracy: metrics.Interval
    margin: float
    likelier: metrics.Interval
    chosen_nats: float
    rejected_nats: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.3f}, reward margin {self.margin:+.3f}, accuracy {self.accuracy}; "
            f"chosen {self.chosen_nats:.3f} and rejected {self.rejected_nats:.3f} nats/token, "
            f"chosen likelier in {self.likelier} of {self.pairs:,} held-out pairs"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: dict[str, Any]) -> PreferenceScore:
        """From `to_json`."""
        intervals = {name: metrics.Interval(**value[name]) for name in ("accuracy", "likelier")}
        return cls(**{**value, **intervals})


@dataclass
class Step:
    """`margin`, `accuracy`: of the batch, before its update."""

    step: int
    loss: float
    margin: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    seconds: float  # of all steps so far

    def __str__(self) -> str:
        return (
            f"step {self.step} | loss {self.loss:.3f} | reward margin {self.margin:+.3f} | "
            f"accuracy {self.accuracy:.2f} | lr {self.learning_rate:.1e} | "
            f"gradient {self.gradient_norm:.2g}"
        )


@dataclass
class DPOResult:
    """`stopped`: "budget" or "interrupted"."""

    stopped: str
    steps: int
    seconds: float
    before: PreferenceScore
    after: PreferenceScore


def fingerprint(model: nn.Module) -> str:
    """sha256 of all parameters."""
    hasher = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().cpu().flatten().view(torch.uint8)  # numpy has no bfloat16
        hasher.update(name.encode() + flat.numpy().tobytes())
    return hasher.hexdigest()


def _wins(difference: Tensor) -> list[float]:
    """1 where it is positive, a half where it is zero."""
    return ((difference > 0).double() + (difference == 0).double() / 2).tolist()


class DPO:
    """Fine-tune `model` in place on preferences.

    Args:
        test: preferences to judge by; None holds out a tenth of the prompts.
        out: run folder for checkpoints and metrics.jsonl; None keeps nothing on disk.
        settings: of the training of `model`, stored in every checkpoint.
        on_step: called with each `Step`; for tests and callbacks.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        preferences: Sequence[Preference],
        config: DPOConfig | None = None,
        *,
        test: Sequence[Preference] | None = None,
        holdout: float = 0.1,
        out: Path | None = None,
        reporter: Reporter | None = None,
        save_every: float = 30.0,
        settings: dict[str, Any] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        require_not_negative(save_every=save_every)
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config or DPOConfig()
        self.out, self.reporter, self.save_every = out, reporter or Quiet(), save_every
        self.on_step, self.settings = on_step, settings or {}
        train, test = self._split(preferences, test, holdout)
        longest = self.config.longest
        if model.window is not None:
            longest = min(longest, model.window + 1)
        self.encoded = Encoded([*train, *test], tokenizer, longest, self.config.end)
        self.held = list(range(len(train), len(train) + len(test)))
        self.order = pairs.Order(
            range(len(train)),
            batch=self.config.batch,
            seed=self.config.seed,
            lengths=self.encoded.lengths,
        )
        self.optimizer = make_optimizer(model, self.config.lr, 0.0)
        self.budget = Budget.parse(self.config.budget).resolve(self.order.steps_per_epoch)
        self.steps, self.seconds = 0, 0.0
        self.scores: list[PreferenceScore] = []  # the first is of the starting model
        self.judged_at = 0  # steps
        self.reference: Tensor | None = None  # [preferences, 2]
        self._start = fingerprint(model)
        self._data = files.digest([p.to_json() for p in [*train, *test]])
        self._metrics: files.Lines | None = None

    @staticmethod
    def _split(
        found: Sequence[Preference], test: Sequence[Preference] | None, share: float
    ) -> tuple[list[Preference], list[Preference]]:
        if not found or (test is not None and not test):
            raise InputError("no preference to learn from, or none to judge by")
        if test is not None:
            return list(found), list(test)
        held = pairs.hold_out([one.prompt for one in found], share)
        parts: tuple[list[Preference], list[Preference]] = ([], [])
        for one, out in zip(found, held, strict=True):
            parts[int(out)].append(one)
        return parts

    # ---- log-probs ------------------------------------------------------------------------------

    @torch.no_grad()
    def _logprobs(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """([n, 2], [n, 2]): summed log-probs of chosen and rejected, and their tokens."""
        found, counted = torch.zeros(len(rows), 2), torch.ones(len(rows), 2, dtype=torch.int64)
        places = sorted(range(len(rows)), key=lambda place: self.encoded.lengths[rows[place]])
        for start in range(0, len(places), ROWS):
            part = places[start : start + ROWS]
            sums, counts = self._of([rows[place] for place in part])
            found[part] = torch.stack(sums.float().cpu().chunk(2), 1)
            counted[part] = torch.stack(counts.cpu().chunk(2), 1)
        return found, counted

    def _of(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        device = self.model.head.weight.device
        tokens, targets = self.encoded.batch(rows)
        return sequence_logprobs(self.model, tokens.to(device), targets.to(device))

    def _of_start(self) -> Tensor:
        """What the starting model says of all; held-out ones in the batches of `evaluate`, so that
        before training the rewards there are exactly zero."""
        train = range(len(self.encoded.rows) - len(self.held))
        return torch.cat([self._logprobs(rows)[0] for rows in (train, self.held)])

    def _begin(self) -> None:
        if self.reference is None:
            self.reference = self._of_start()
            self._judge("before")

    def _reference_of(self, rows: Sequence[int]) -> Tensor:
        """[2B], as `Encoded.batch` has the texts."""
        assert self.reference is not None
        return self.reference[list(rows)].t().reshape(-1)

    def evaluate(self) -> PreferenceScore:
        """On the preferences that are held out."""
        sums, counts = self._logprobs(self.held)
        loss, rewards = objective(
            self.config,
            sums.t().reshape(-1),
            counts.t().reshape(-1),
            self._reference_of(self.held),
        )
        chosen, rejected = rewards.double().chunk(2)
        nats = -(sums.double() / counts)
        return PreferenceScore(
            len(self.held),
            float(loss),
            metrics.mean_interval(_wins(chosen - rejected)),
            float((chosen - rejected).mean()),
            metrics.mean_interval(_wins(nats[:, 1] - nats[:, 0])),
            *nats.mean(0).tolist(),
        )

    # ---- one step -------------------------------------------------------------------------------

    def step(self) -> Step:
        """One update.

        Raises:
            TrainingError: the gradient is not finite; nothing has changed.
        """
        started, config = time.perf_counter(), self.config
        self._begin()
        share = self.budget.share(self.steps, self.seconds)
        rate = learning_rate(config.lr, share, config.warmup, config.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.order.chosen()
        sums, counts = self._of(rows)
        loss, rewards = objective(config, sums, counts, self._reference_of(rows).to(sums.device))
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient is not finite in step {self.steps + 1}; lower --lr")
        chosen, rejected = rewards.chunk(2)
        apart = chosen - rejected
        right = sum(_wins(apart)) / len(rows)
        self.steps += 1
        self.seconds += time.perf_counter() - started
        return Step(
            self.steps, float(loss.detach()), float(apart.mean()), right, rate, norm, self.seconds
        )

    # ---- the loop -------------------------------------------------------------------------------

    def finished(self) -> bool:
        return self.budget.share(self.steps, self.seconds) >= 1.0

    def fit(self) -> DPOResult:
        """Train until the budget is used or a signal asks to stop."""
        if self.out is not None:
            checkpoint.require()
            files.make_folder(self.out)
            files.remove_leftovers(self.out)
            files.remove_leftovers(checkpoint.folder(self.out))
            self._metrics = files.Lines(self.out / "metrics.jsonl")
        stopped = "interrupted"
        try:
            with Interrupt() as interrupt:
                self._begin()
                if self._loop(interrupt):
                    stopped = "budget"
                    if self.judged_at < self.steps:
                        self._judge("after")
                if self.out is not None:
                    self.save()
                    interrupt.saved = stopped == "interrupted"
        finally:
            self.reporter.close()
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None
        return DPOResult(stopped, self.steps, self.seconds, self.scores[0], self.scores[-1])

    def _loop(self, interrupt: Interrupt) -> bool:
        """Whether the budget is used."""
        saved_at = time.perf_counter()
        while not self.finished():
            # the first judgement was before training, the last one is behind it
            if self.budget.share(self.steps, self.seconds) >= len(self.scores) / self.config.evals:
                self._judge(f"at step {self.steps}")
            done = self.step()
            self._record("step", asdict(done))
            self.reporter.update(done)
            if self.on_step is not None:
                self.on_step(done)
            if interrupt.requested or self.reporter.closed:
                return False
            if self.out is not None and time.perf_counter() - saved_at >= self.save_every:
                self.save()
                saved_at = time.perf_counter()
        self.reporter.close()  # the last step is shown before what comes of it
        return True

    def _judge(self, when: str) -> None:
        self.scores.append(self.evaluate())
        self.judged_at = self.steps
        self._record("eval", {"step": self.steps, **self.scores[-1].to_json()})
        self.reporter.line(f"{when}: {self.scores[-1]}")

    def _record(self, event: str, values: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(files.dumps({"event": event, **values}))

    # ---- state on disk --------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        return {
            "model": {"kind": type(self.model).__name__, **self.model.config_dict()},
            "dpo": asdict(self.config),
            "data": {
                "tokenizer": self.tokenizer.sha256,
                "preferences": self._data,
                "start": self._start,
            },
        }

    def save(self) -> Path:
        """A checkpoint of this step; what the starting model said is part of it."""
        assert self.out is not None and self.reference is not None
        tensors = checkpoint.optimizer_tensors(self.optimizer) | {"reference": self.reference}
        state = {
            "config": self.described(),
            "settings": self.settings,
            "steps": self.steps,
            "seconds": self.seconds,
            "judged_at": self.judged_at,
            "cursor": self.order.state(),
            "scores": [score.to_json() for score in self.scores],
        }
        model = self.model.state_dict()
        return checkpoint.write_step(self.out, self.steps, model, tensors, state, self.tokenizer)

    def resume(self, saved: checkpoint.Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
        """Continue to the bit from what `save` wrote; `model` was the one training started from.

        Raises:
            UsageError: the configuration differs; the message lists the differences.
        """
        with saved.understood():
            self._restore(saved, allow)

    def _restore(self, saved: checkpoint.Checkpoint, allow: tuple[str, ...]) -> None:
        checkpoint.require_same(saved, self.described(), allow)
        tensors = checkpoint.load_training(saved, self.model, self.optimizer)
        self.reference = tensors["reference"]
        self.steps, self.seconds = saved.state["steps"], saved.state["seconds"]
        self.judged_at = saved.state["judged_at"]
        self.order.restore(saved.state["cursor"])
        self.scores = [PreferenceScore.of(score) for score in saved.state["scores"]]
        checkpoint.set_aside(self.out, saved)
