"""Training: truncated backpropagation through time with a carried state, resumable bit for bit."""

from __future__ import annotations

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

from . import anomaly, checkpoint, distributed, files, gradients, machine, sharding, trainstate
from .budget import Budget, learning_rate
from .config import TrainConfig, require_not_negative
from .diagnosis import verdict
from .errors import OutOfSpace, TrainingError, UsageError
from .evaluation import Score, evaluate, sample
from .interrupt import Interrupt
from .kinds import LanguageModel
from .optimizer import make_optimizer
from .pairs import IGNORED, PairStore
from .progress import Progress, Quiet, Reporter
from .sinks import Callbacks, Sink
from .store import Batches, TokenStore, loaded
from .tokenizer import Tokenizer
from .trainstate import Counters

MAX_BAD_STEPS = 3
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


class Trainer(Callbacks):
    """Train `model` on the "train" split of `store`, scored on its "held" split.

    Args:
        out: run folder for checkpoints and metrics.jsonl; None keeps nothing on disk.
        on_save_error: "stop", or "warn" to train on when the disk is full between two saves.
        settings: stored in every checkpoint for whoever resumes; not compared.
        on_step: called with the number of finished steps; for tests and callbacks.
        ranks: this process among several, from `distributed.connected`.
        workers: processes that read text ahead; the batches are the same with any number.
        on_empty: "zero": a batch without a target that counts has loss 0 and zero gradients for
            every parameter, and is said; "nan": it is as PyTorch has it, and skipped.
    """

    def __init__(
        self,
        model: LanguageModel,
        store: TokenStore | PairStore,
        tokenizer: Tokenizer,
        config: TrainConfig,
        *,
        out: Path | str | None = None,
        reporter: Reporter | None = None,
        save_every: float = 30.0,
        on_save_error: str = "stop",
        settings: dict[str, Any] | None = None,
        on_step: Callable[[int], None] | None = None,
        ranks: distributed.Ranks | None = None,
        workers: int = 0,
        on_empty: str = "zero",
    ) -> None:
        super().__init__()
        require_not_negative(save_every=save_every)
        for name, value, known in (
            ("on_empty", on_empty, ("zero", "nan")),
            ("on_save_error", on_save_error, ("stop", "warn")),
        ):
            if value not in known:
                raise UsageError(f"{name} must be {' or '.join(known)}, got {value!r}")
        if store.tokenizer_sha256 != tokenizer.sha256:
            raise UsageError("the token store was written with another tokenizer")
        self.model, self.store, self.tokenizer, self.config = model, store, tokenizer, config
        self.ranks, self._kind = ranks or distributed.Ranks(), type(model).__name__
        self.loss = self.ranks.wrap(model)
        self.out = None if out is None else Path(out)
        self.reporter = reporter if reporter and self.ranks.chief else Quiet()
        self.save_every, self.settings, self.on_step = save_every, settings or {}, on_step
        self.on_save_error, self.on_empty = on_save_error, on_empty
        self.optimizer = make_optimizer(model, config.lr, config.weight_decay)
        self.ranks.adopt(self.optimizer)
        batches = loaded(
            store.batches(batch=config.batch, length=config.seq, seed=config.seed), workers
        )
        self.lanes: Batches = self.ranks.rows_of(batches, config.batch)
        self.budget = Budget.parse(config.budget).resolve(self.lanes.steps_per_epoch)
        self.counters = Counters()
        self.hidden: Tensor | None = None
        self.scores: list[Score] = []
        self.train_curve: list[float] = []  # the average loss at each of `scores`
        self.sinks: list[Sink] = []
        self.best_model: checkpoint.Tensors | None = None
        self._bad_in_a_row = 0
        self._resumed = False
        self._metrics: files.Lines | None = None
        totals = store.totals("train")
        self._bits_per_nat = totals["tokens"] / totals["bytes"] / math.log(2)
        self.device = next(model.parameters()).device
        if out is not None:
            checkpoint.require()

    # ---- state on disk ------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """As `trainstate.described`."""
        # FSDP2 makes the model one of another class
        about = trainstate.described(self.model, self.config, self.tokenizer, self.store)
        return {**about, "model": {**about["model"], "kind": self._kind}}

    def save(self) -> Path:
        """Write a checkpoint of the current step and drop all but the newest ones."""
        assert self.out is not None
        training, state = trainstate.capture(self)
        model = self.ranks.whole(self.model.state_dict())
        path = checkpoint.folder(self.out) / checkpoint.name(self.counters.steps)
        if self.ranks.chief:
            checkpoint.write_step(
                self.out, self.counters.steps, model, training, state, self.tokenizer
            )
            self.emit("save", path)
        return path

    def save_model(self, path: Path, score: Score) -> None:
        """The model alone, for generating."""
        state = {"config": self.described(), "settings": self.settings, "score": score.to_json()}
        model = self.ranks.whole(self.model.state_dict())
        if self.ranks.chief:
            checkpoint.write(path, model, {}, state, self.tokenizer)

    def resume(self, saved: checkpoint.Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
        """Continue from a checkpoint.

        Args:
            allow: keys of the configuration, such as "budget", that may differ.

        Raises:
            UsageError: the configuration differs elsewhere; the message lists the differences.
        """
        trainstate.restore(self, saved, allow)
        self._resumed = True

    def finished(self) -> bool:
        return self.budget.share(self.counters.steps, self.counters.seconds) >= 1.0

    def _record(self, event: str, **values: Any) -> None:
        for sink in self.sinks:
            sink.record(event, self.counters.steps, values)
        if self._metrics is not None:
            line = {"event": event, "step": self.counters.steps, **values}
            with self._room():
                self._metrics.write(files.dumps(line))

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
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        share = self.budget.share(counters.steps, counters.seconds)
        rate = learning_rate(
            config.lr, share, config.warmup, config.floor, config.schedule, config.decay
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        state = None if fresh else self.hidden
        loss, after = gradients.backward(
            self.model, tokens, targets, state, config, loss_of=self.loss, ranks=self.ranks
        )
        value = float(loss)
        if empty := not math.isfinite(value) and self._empty(targets):
            value = 0.0
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(found)
        if not (math.isfinite(value) and math.isfinite(float(sharding.whole(norm)))):
            self._skip("gradient" if math.isfinite(value) else "loss", tokens, targets, state)
            # the state of a bad step would poison every later one
            self.hidden = state
        else:
            if config.clip:
                nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip, norm)
            self.optimizer.step()
            self.hidden = after
            self._bad_in_a_row = 0
            if not empty:
                smooth = max(0.1, 1.0 / (counters.steps - counters.skipped + 1))
                counters.loss_ema += smooth * (value - counters.loss_ema)
        self.optimizer.zero_grad(set_to_none=True)
        counters.steps += 1
        return value

    def _empty(self, targets: Tensor) -> bool:
        """Whether no rank has a target that counts, of which the mean is NaN; then the gradient of
        every parameter is zero, on every rank."""
        if self.on_empty == "nan" or self.ranks.total(int((targets != IGNORED).sum())):
            return False
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self._record("empty", valid_tokens=0)
        self.reporter.line(f"step {self.counters.steps + 1}: 0 valid tokens, its loss is 0")
        return True

    def _skip(self, what: str, tokens: Tensor, targets: Tensor, state: Tensor | None) -> None:
        """Write down the batch and where it went wrong."""
        self.counters.skipped += 1
        self._bad_in_a_row += 1
        where = "in a model that is in parts; --parallel ddp finds the module"
        if not self.ranks.in_parts:
            tried = (self.model.loss, tokens, targets, state, self.config)
            where = anomaly.where(self.model, lambda: gradients.forward(*tried))
        found = {"reason": f"{what} not finite", "where": where, "cursor": self.lanes.state()}
        if self.out is not None:
            rank = f"-rank{self.ranks.rank}" if self.ranks.world > 1 else ""
            path = self.out / "skipped" / f"step-{self.counters.steps:08d}{rank}.json"
            rows = anomaly.rows(self.lanes, self.store, self.tokenizer)
            batch = {"tokens": tokens.tolist(), "targets": targets.tolist()}
            files.write_json(path, {**found, "rows": rows, **batch})
            found["batch"] = str(path)
        self._record("skipped", **found)
        self.emit("skipped", found)
        self.reporter.line(f"skipped step {self.counters.steps}: {what} not finite: {where}")
        if self._bad_in_a_row == MAX_BAD_STEPS:
            raise TrainingError(
                f"the {what} was not finite in {MAX_BAD_STEPS} steps in a row (the last is step "
                f"{self.counters.steps}): {where}; lower --lr or --clip and resume from the last "
                "checkpoint"
            )

    # ---- the loop -----------------------------------------------------------------------------

    def _evaluate(self, limit: int) -> None:
        score = evaluate(self.model, self.store, self.tokenizer, limit=limit, ranks=self.ranks)
        self.scores.append(score)
        self.train_curve.append(self.counters.loss_ema)
        counters = self.counters
        counters.evals += 1
        counters.evaluated = counters.steps
        if score.bits_per_byte < counters.best:
            counters.best, counters.since_best = score.bits_per_byte, 0
            if self.config.patience is not None:
                self.best_model = checkpoint.own(
                    self.ranks.whole(self.model.state_dict(), everywhere=True)
                )
        else:
            counters.since_best += 1
        self._record("eval", seconds=counters.seconds, **score.to_json())
        self.reporter.line(f"held-out at step {counters.steps}: {score}")
        self.emit("eval", score)

    def fit(self) -> Result:
        """Train until the budget is used, patience runs out, or a signal asks to stop."""
        if not self._resumed:
            self.seed()
        self.ranks.require_same([self.described(), self.counters.steps])
        if self.out is not None and self.ranks.chief:
            files.make_folder(self.out)
            files.remove_leftovers(self.out)
            files.remove_leftovers(checkpoint.folder(self.out))
            self._metrics = files.Lines(self.out / "metrics.jsonl")
        self._record("resume" if self._resumed else "start", config=self.described())
        if note := gradients.slow_precision(self.device, self.config.precision):
            self.reporter.line(note)
        self.model.train()
        try:
            with Interrupt() as interrupt:
                stopped = self._loop(interrupt)
                self.reporter.close()
                return self._finish(stopped, interrupt)
        finally:
            self.reporter.close()
            for sink in self.sinks:
                sink.close()
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None

    def seed(self) -> None:
        """Of everything that draws: dropout, and what a caller may use."""
        seed = self.ranks.seed(self.config.seed, self.counters.steps)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

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
            self.emit("step", counters.steps)
            due = self.out is not None and now - saved_at >= self.save_every
            # the clocks and signals of other ranks would make them part
            counters.seconds, stop, due = self.ranks.decide(
                counters.seconds, interrupt.requested or self.reporter.closed, due
            )
            if stop:
                return "interrupted"
            if due:
                with self._room():
                    self.save()
                saved_at = time.perf_counter()
        return "budget"

    def _show(self, loss: float, steps_per_second: float) -> None:
        counters, sizes = self.counters, self.model.config
        speed = steps_per_second * self.lanes.tokens_per_step
        idle = 6 * sizes.hidden_size * sizes.vocab_size * (1.0 - self.lanes.learned_share)
        rate = machine.gemm_rate(device=self.device, precision=self.config.precision)
        rate *= self.ranks.world
        progress = Progress(
            step=counters.steps,
            steps=int(self.budget.amount) if self.budget.unit == "steps" else None,
            share=self.budget.share(counters.steps, counters.seconds),
            loss=loss,
            loss_ema=counters.loss_ema,
            bits_per_byte=counters.loss_ema * self._bits_per_nat,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            tokens_per_second=speed,
            mfu=speed * (sizes.flops_per_token() - idle) / rate,
            peak_bytes=machine.peak_memory(self.device),
            seconds_left=self.budget.seconds_left(counters.steps, counters.seconds),
        )
        self._record("step", seconds=counters.seconds, **asdict(progress))
        self.reporter.update(progress)

    def _verdict(self) -> str:
        """What the curves say; training text is scored as held-out text is where dropout, smoothing
        or a z-loss makes the training loss another quantity."""
        settings, now = self.model.config, None
        other = settings.dropout or self.config.label_smoothing or getattr(settings, "z_loss", 0.0)
        if other and isinstance(self.store, TokenStore):
            limit = self.config.eval_tokens
            same = sample(
                self.model, self.store, self.tokenizer, split="train", limit=limit, ranks=self.ranks
            )
            self._record("train", **same.to_json())
            now = same.nats_per_token
        return verdict(self.train_curve, [s.nats_per_token for s in self.scores], now)

    def _finish(self, stopped: str, interrupt: Interrupt) -> Result:
        score, words, path = None, "", None
        # a run that died between its last save and its end has done it
        if stopped == "budget" and self.counters.evaluated != self.counters.steps:
            self._evaluate(self.config.eval_tokens)
        if self.out is not None:
            path = self.save()
            interrupt.saved = stopped == "interrupted"
        if stopped != "interrupted":
            words = self._verdict()
            if self.best_model is not None:
                self.model.load_state_dict(self.best_model)
            score = evaluate(self.model, self.store, self.tokenizer, ranks=self.ranks)
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
