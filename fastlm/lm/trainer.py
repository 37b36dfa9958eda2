"""Training: truncated backpropagation through time with a carried state, resumable bit for bit."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, files, machine
from .budget import Budget, learning_rate
from .config import TrainConfig, difference
from .errors import OutOfSpace, TrainingError, UsageError
from .evaluation import Score, evaluate, verdict
from .interrupt import Interrupt
from .kinds import LanguageModel
from .progress import Progress, Quiet, Reporter
from .store import Lanes, TokenStore
from .tokenizer import Tokenizer

MAX_BAD_STEPS = 3
KEPT_CHECKPOINTS = 2
SPEED_WINDOW = 20  # steps


@dataclass
class Result:
    """`stopped`: "budget", "patience" or "interrupted"."""

    stopped: str
    steps: int
    seconds: float
    skipped_steps: int
    train_nats: float
    score: Score | None
    verdict: str
    checkpoint: Path | None


@dataclass
class Counters:
    """Everything scalar that a resumed run continues from."""

    steps: int = 0
    seconds: float = 0.0
    evals: int = 0
    skipped: int = 0
    loss_ema: float = 0.0
    best: float = float("inf")
    since_best: int = 0
    evaluated: int = -1  # the step of the last evaluation


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases and other vectors are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


class Trainer:
    """Train `model` on the "train" split of `store`, scored on its "held" split.

    Args:
        out: run folder for checkpoints and metrics.jsonl; None keeps nothing on disk.
        on_save_error: "stop", or "warn" to train on when the disk is full between two saves.
        settings: stored in every checkpoint for whoever resumes; not compared.
        on_step: called with the number of finished steps; for tests and callbacks.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore,
        tokenizer: Tokenizer,
        config: TrainConfig,
        *,
        out: Path | None = None,
        reporter: Reporter | None = None,
        save_every: float = 30.0,
        on_save_error: str = "stop",
        settings: dict[str, Any] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        if store.tokenizer_sha256 != tokenizer.sha256:
            raise UsageError("the token store was written with another tokenizer")
        self.model, self.store, self.tokenizer, self.config = model, store, tokenizer, config
        self.out, self.reporter = out, reporter or Quiet()
        self.save_every, self.settings, self.on_step = save_every, settings or {}, on_step
        self.on_save_error = on_save_error
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.lanes = Lanes(
            store.ids, store.spans("train"), batch=config.batch, length=config.seq, seed=config.seed
        )
        self.budget = Budget.parse(config.budget).resolve(self.lanes.steps_per_epoch)
        self.counters = Counters()
        self.hidden: Tensor | None = None
        self.scores: list[Score] = []
        self.best_model: checkpoint.Tensors | None = None
        self._bad_in_a_row = 0
        self._resumed = False
        self._metrics: files.Lines | None = None
        totals = store.totals("train")
        self._bits_per_nat = totals["tokens"] / totals["bytes"] / math.log(2)
        self._device = next(model.parameters()).device
        if out is not None:
            checkpoint.require()

    # ---- state on disk ------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """What a resumed run must share with the run that wrote the checkpoint."""
        return {
            "model": {"kind": type(self.model).__name__, **self.model.config_dict()},
            "train": asdict(self.config),
            "data": {"tokenizer": self.tokenizer.sha256, "tokens": self.store.sha256},
        }

    def _training_tensors(self) -> tuple[checkpoint.Tensors, dict[str, Any]]:
        tensors = checkpoint.optimizer_tensors(self.optimizer)
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        if self.best_model is not None:
            tensors |= {f"best.{name}": value for name, value in self.best_model.items()}
        generators, random_json = checkpoint.random_state()
        return tensors | generators, random_json

    def save(self) -> Path:
        """Write a checkpoint of the current step and drop all but the newest ones."""
        assert self.out is not None
        training, random_json = self._training_tensors()
        state = {
            "config": self.described(),
            "settings": self.settings,
            "counters": asdict(self.counters),
            "cursor": self.lanes.state(),
            "scores": [asdict(score) for score in self.scores],
            "random": random_json,
            "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }
        path = checkpoint.folder(self.out) / checkpoint.name(self.counters.steps)
        checkpoint.write(path, self.model.state_dict(), training, state, self.tokenizer)
        checkpoint.prune(self.out, KEPT_CHECKPOINTS, path)
        return path

    def save_model(self, path: Path, score: Score) -> None:
        """The model alone, for generating."""
        state = {"config": self.described(), "settings": self.settings, "score": score.to_json()}
        checkpoint.write(path, self.model.state_dict(), {}, state, self.tokenizer)

    def resume(self, saved: checkpoint.Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
        """Continue from a checkpoint.

        Args:
            allow: keys of the configuration, such as "budget", that may differ.

        Raises:
            UsageError: the configuration differs elsewhere; the message lists the differences.
        """
        checkpoint.require_same(saved, self.described(), allow)
        checkpoint.load_parameters(self.model, saved)
        tensors = saved.tensors(checkpoint.TRAINING)
        checkpoint.load_optimizer(self.optimizer, tensors)
        hidden = tensors.get("hidden")
        self.hidden = None if hidden is None else hidden.to(self._device)
        best = {
            name.removeprefix("best."): value
            for name, value in tensors.items()
            if name.startswith("best.")
        }
        self.best_model = best or None
        self.counters = Counters(**saved.state["counters"])
        checkpoint.set_aside(self.out, saved)
        self.lanes.restore(saved.state["cursor"])
        self.scores = [Score(**score) for score in saved.state["scores"]]
        checkpoint.restore_random_state(tensors, saved.state["random"])
        self._resumed = True
        here = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        for line in difference(saved.state["machine"], here):
            self.reporter.line(f"note: {line} since the checkpoint; the last bits may differ")

    def finished(self) -> bool:
        return self.budget.share(self.counters.steps, self.counters.seconds) >= 1.0

    def _record(self, event: str, **values: Any) -> None:
        if self._metrics is not None:
            line = {"event": event, "step": self.counters.steps, **values}
            with self._room():
                self._metrics.write(json.dumps(line))

    @contextmanager
    def _room(self) -> Iterator[None]:
        """A full disk ends the run, or is said where `on_save_error` is "warn"."""
        try:
            yield
        except OutOfSpace as error:
            if self.on_save_error != "warn":
                raise
            print(f"fastlm: warning: not saved: {error}", file=sys.stderr)

    # ---- one step -----------------------------------------------------------------------------

    def step(self) -> float:
        """One update. A loss or gradient that is not finite changes nothing; returns the loss.

        Raises:
            TrainingError: three such steps in a row.
        """
        counters, config = self.counters, self.config
        tokens, targets, fresh = self.lanes.next()
        share = self.budget.share(counters.steps, counters.seconds)
        rate = learning_rate(config.lr, share, config.warmup, config.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        state = None if fresh else self.hidden
        loss, h_n = self.model.loss(tokens.to(self._device), targets.to(self._device), state)
        value = float(loss.detach())
        bad = "loss" if not math.isfinite(value) else ""
        if not bad:
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
            bad = "" if math.isfinite(float(norm)) else "gradient"
        if bad:
            self._skip(bad)
            # the state of a bad step would poison every later one
            self.hidden = state
        else:
            self.optimizer.step()
            self.hidden = h_n.detach() if self.model.carries_state else None
            self._bad_in_a_row = 0
            smooth = max(0.1, 1.0 / (counters.steps - counters.skipped + 1))
            counters.loss_ema += smooth * (value - counters.loss_ema)
        self.optimizer.zero_grad(set_to_none=True)
        counters.steps += 1
        return value

    def _skip(self, what: str) -> None:
        self.counters.skipped += 1
        self._bad_in_a_row += 1
        position = self.lanes.state()
        self._record("skipped", reason=f"{what} not finite", **{"cursor": position})
        if self._bad_in_a_row == MAX_BAD_STEPS:
            raise TrainingError(
                f"the {what} was not finite in {MAX_BAD_STEPS} steps in a row (the last is step "
                f"{self.counters.steps}); lower --lr or --clip and resume from the last checkpoint"
            )

    # ---- the loop -----------------------------------------------------------------------------

    def _evaluate(self, limit: int) -> None:
        score = evaluate(self.model, self.store, self.tokenizer, limit=limit)
        self.scores.append(score)
        counters = self.counters
        counters.evals += 1
        counters.evaluated = counters.steps
        if score.bits_per_byte < counters.best:
            counters.best, counters.since_best = score.bits_per_byte, 0
            if self.config.patience is not None:
                self.best_model = checkpoint.own(self.model.state_dict())
        else:
            counters.since_best += 1
        self._record("eval", seconds=counters.seconds, **score.to_json())
        self.reporter.line(f"held-out at step {counters.steps}: {score}")

    def fit(self) -> Result:
        """Train until the budget is used, patience runs out, or a signal asks to stop."""
        if not self._resumed:
            self._seed()
        if self.out is not None:
            files.make_folder(self.out)
            files.remove_leftovers(self.out)
            files.remove_leftovers(checkpoint.folder(self.out))
            self._metrics = files.Lines(self.out / "metrics.jsonl")
        self._record("resume" if self._resumed else "start", config=self.described())
        self.model.train()
        try:
            with Interrupt() as interrupt:
                stopped = self._loop(interrupt)
                self.reporter.close()
                return self._finish(stopped)
        finally:
            self.reporter.close()
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None

    def _seed(self) -> None:
        torch.manual_seed(self.config.seed)
        np.random.seed(self.config.seed % 2**32)
        random.seed(self.config.seed)

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.counters.since_best >= patience

    def _loop(self, interrupt: Interrupt) -> str:
        counters, config = self.counters, self.config
        already, started = counters.seconds, time.perf_counter()
        saved_at, durations = started, deque[float](maxlen=SPEED_WINDOW)
        if self._out_of_patience():  # as the checkpoint says
            return "patience"
        while (share := self.budget.share(counters.steps, counters.seconds)) < 1.0:
            # the last of the evaluations is the one at the end
            if share >= (counters.evals + 1) / config.evals:
                self._evaluate(config.eval_tokens)
                if self._out_of_patience():
                    return "patience"
            before = time.perf_counter()
            loss = self.step()
            now = time.perf_counter()
            durations.append(now - before)
            counters.seconds = already + now - started
            self._show(loss, len(durations) / sum(durations))
            if self.on_step is not None:
                self.on_step(counters.steps)
            if interrupt.requested:
                return "interrupted"
            if self.out is not None and now - saved_at >= self.save_every:
                with self._room():
                    self.save()
                saved_at = time.perf_counter()
        return "budget"

    def _show(self, loss: float, steps_per_second: float) -> None:
        counters, config = self.counters, self.config
        speed = steps_per_second * config.batch * config.seq
        progress = Progress(
            step=counters.steps,
            share=self.budget.share(counters.steps, counters.seconds),
            loss=loss,
            loss_ema=counters.loss_ema,
            bits_per_byte=counters.loss_ema * self._bits_per_nat,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            tokens_per_second=speed,
            gemm_share=speed * self.model.config.flops_per_token() / machine.gemm_rate(),
            peak_bytes=machine.peak_memory(),
            seconds_left=self.budget.seconds_left(counters.steps, counters.seconds),
        )
        self._record("step", seconds=counters.seconds, **asdict(progress))
        self.reporter.update(progress)

    def _finish(self, stopped: str) -> Result:
        score, words, path = None, "", None
        # a run that died between its last save and its end has done it
        if stopped == "budget" and self.counters.evaluated != self.counters.steps:
            self._evaluate(self.config.eval_tokens)
        if self.out is not None:
            path = self.save()
        if stopped != "interrupted":
            words = verdict(self.counters.loss_ema, [s.nats_per_token for s in self.scores])
            if self.best_model is not None:
                self.model.load_state_dict(self.best_model)
            score = evaluate(self.model, self.store, self.tokenizer)
            self._record("held-out", **score.to_json())
            if self.out is not None:
                self.save_model(self.out / "model", score)
        self._record("end", stopped=stopped, verdict=words)
        counters = self.counters
        return Result(
            stopped,
            counters.steps,
            counters.seconds,
            counters.skipped,
            counters.loss_ema,
            score,
            words,
            path,
        )
