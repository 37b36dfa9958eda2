"""Policy gradient on a language model: write, judge, change the probability of what was written.

    grad J = E[ advantage(text) * grad log p(text) ],   advantage = reward - baseline

with a penalty on the divergence from the model that training started from. Baselines and losses are
those of `fastlm.policy_loss`: REINFORCE (mean of the batch), RLOO, PPO and GRPO (of the group of
texts from one prompt).

Texts are drawn from the whole softmax at `temperature`, whose log-probs the losses use. Those of
the texts come from the forward that the gradient goes through, so the ratio of the first update is
exactly 1 and no pass asks for the old ones. A GRU keeps what the backward reads while it writes; a
Transformer runs once more over what it wrote, and that run's log-probs, which differ from those of
its decoder by rounding, are the old ones.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlm

from . import checkpoint, files, metrics, rollouts
from .budget import Budget
from .config import require_not_negative
from .errors import TrainingError, UsageError
from .interrupt import Interrupt
from .judging import Reward, judged
from .kinds import LanguageModel
from .optimizer import make_optimizer
from .progress import Quiet, Reporter
from .store import TokenStore
from .tokenizer import Tokenizer

ALGORITHMS = ("reinforce", "rloo", "ppo", "grpo")


@dataclass(frozen=True)
class PolicyConfig:
    """`batch`: texts an iteration, `group` of them from one prompt. `updates`: of the weights on
    the same texts (PPO, GRPO). `until`: stop when the mean reward reaches it. `largest_kl`: stop
    when a text's divergence from the starting model passes it, in nats."""

    algorithm: str = "reinforce"
    budget: str = "60steps"
    batch: int = 64
    group: int = 8
    prompt: int = 24
    length: int = 40
    temperature: float = 1.0
    lr: float = 3e-4
    updates: int = 1
    clip_eps: float = 0.2
    kl_coef: float = 0.05
    clip: float = 1.0
    until: float | None = None
    largest_kl: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        if self.algorithm not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise UsageError(f"algorithm must be one of {known}, got {self.algorithm!r}")
        for name in ("batch", "group", "prompt", "length", "updates"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.group:
            raise UsageError(f"batch must be a multiple of group ({self.group}), got {self.batch}")
        if self.group == 1 and self.algorithm in ("rloo", "grpo"):
            raise UsageError(
                f"{self.algorithm} compares texts of one prompt: group must be above 1"
            )
        if self.updates > 1 and self.algorithm in ("reinforce", "rloo"):
            raise UsageError(f"{self.algorithm} is on-policy: updates must be 1")
        if not (0 < self.lr < math.inf and 0 < self.temperature < math.inf):
            raise UsageError("lr and temperature must be finite and above 0")
        if not self.clip > 0:
            raise UsageError("clip must be above 0")
        if not (0 <= self.kl_coef < math.inf and 0 <= self.clip_eps < math.inf):
            raise UsageError("kl_coef and clip_eps must be finite and not negative")
        if self.until is not None and math.isnan(self.until):
            raise UsageError("until must be a number, got nan")
        if self.largest_kl is not None:
            require_not_negative(largest_kl=self.largest_kl)


@dataclass
class Iteration:
    """What one round of writing and updating did."""

    iteration: int
    reward: float
    reward_spread: float
    kl: float  # from the starting model, nats a text
    entropy: float  # -log p of what was written, nats a token
    distinct_2: float
    gradient_norm: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"iteration {self.iteration} | reward {self.reward:+.3f} | "
            f"KL {self.kl:.2f} nats/text | {self.entropy:.2f} nats/token | "
            f"distinct-2 {self.distinct_2:.2f} | gradient {self.gradient_norm:.2g}"
        )


@dataclass
class PolicyResult:
    """`stopped`: "budget", "reward", "kl" or "interrupted"."""

    stopped: str
    iterations: int
    seconds: float
    history: list[Iteration] = field(default_factory=list)


def advantages_of(config: PolicyConfig, rewards: Tensor) -> Tensor:
    """[B]. Equal rewards give 0: there is nothing to prefer."""
    if config.algorithm == "rloo":
        return fastlm.leave_one_out_advantages(rewards, group_size=config.group)
    if config.algorithm == "grpo":
        return fastlm.group_advantages(rewards, group_size=config.group)
    # of the whole batch; its spread makes the step size independent of the reward's unit
    return fastlm.group_advantages(rewards, group_size=len(rewards))


def passes_of(model: LanguageModel) -> str:
    """Which forward the log-probs of an iteration come from, for whoever reads its lines."""
    if model.carries_state:
        return "log-probs: kept with their gradient while the texts are written; no other pass"
    return "log-probs: a pass over the texts, whose gradient is taken; no other for the old ones"


class PolicyGradient:
    """Fine-tune `model` in place, from contexts of the store's "train" split.

    Args:
        reward: two lists of texts, prompts and continuations, to one number each.
        out: run folder for checkpoints and metrics.jsonl; None keeps nothing on disk.
        settings: of the training of `model`, stored in every checkpoint.
        on_iteration: called with each `Iteration`; for tests and callbacks.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        store: TokenStore,
        reward: Reward,
        config: PolicyConfig | None = None,
        *,
        out: Path | None = None,
        reporter: Reporter | None = None,
        save_every: float = 30.0,
        settings: dict[str, Any] | None = None,
        on_iteration: Callable[[Iteration], None] | None = None,
    ) -> None:
        require_not_negative(save_every=save_every)
        if store.tokenizer_sha256 != tokenizer.sha256:
            raise UsageError("the token store was written with another tokenizer")
        self.model, self.tokenizer, self.store, self.reward = model, tokenizer, store, reward
        self.config = config or PolicyConfig()
        self.out, self.reporter, self.save_every = out, reporter or Quiet(), save_every
        self.on_iteration, self.settings = on_iteration, settings or {}
        self.reference: LanguageModel = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(model, self.config.lr, 0.0)
        self.budget = Budget.parse(self.config.budget)
        if self.budget.unit == "epochs":
            raise UsageError("a policy is trained for seconds or steps, not for epochs")
        context = getattr(model.config, "context", None)
        prompt, length = self.config.prompt, self.config.length
        if context is not None and prompt + length > context:
            raise UsageError(
                f"prompt and length must fit into the model's context of {context} tokens, "
                f"got {prompt} + {length}"
            )
        self.iterations, self.seconds = 0, 0.0
        self.history: list[Iteration] = []
        self._warned = False
        self._metrics: files.Lines | None = None

    # ---- one iteration --------------------------------------------------------------------------

    def step(self) -> Iteration:
        """Write, judge, update.

        Raises:
            InputError: the reward is unusable. TrainingError: a gradient is not finite.
        """
        started, config = time.perf_counter(), self.config
        places = rollouts.contexts(
            self.store, "train", config.batch // config.group, config.prompt, 1,
            seed=config.seed * 1_000_003 + self.iterations,
        )  # fmt: skip
        prompts = rollouts.repeat_each([place.prompt for place in places], config.group)
        made = rollouts.rollout(
            self.model, prompts, config.length, end=self.tokenizer.end, seed=config.seed,
            step=self.iterations * config.length, temperature=config.temperature, gradient=True,
        )  # fmt: skip
        texts = made.texts(self.tokenizer)
        before = [self.tokenizer.decode(prompt) for prompt in prompts.tolist()]
        rewards = judged(self.reward, before, texts)
        advantages = advantages_of(config, rewards)
        if not bool(advantages.any()) and not self._warned:
            self._warned = True
            equal = f"all {len(rewards)} rewards are {float(rewards[0]):g}"
            if bool((rewards != rewards[0]).any()):
                equal = "the texts of each prompt have equal rewards"
            warnings.warn(f"{equal}: nothing to learn from them", stacklevel=2)
        then = made.logprobs.detach()
        with torch.no_grad():
            reference = rollouts.logprobs_of(
                self.reference, prompts, made.tokens, config.temperature
            )
        norm = 0.0
        for update in range(config.updates):
            now = (
                made.logprobs
                if update == 0
                else rollouts.logprobs_of(self.model, prompts, made.tokens, config.temperature)
            )
            norm = self._update(now, then, reference, made.mask, advantages)
        self.iterations += 1
        tokens = made.mask.sum()
        return Iteration(
            self.iterations,
            float(rewards.mean()),
            float(rewards.std(correction=0)),
            float(((then - reference) * made.mask).sum(1).mean()),
            float(-(then * made.mask).sum() / tokens),
            metrics.distinct(texts),
            norm,
            time.perf_counter() - started,
        )

    def _update(
        self, now: Tensor, then: Tensor, reference: Tensor, mask: Tensor, advantages: Tensor
    ) -> float:
        config = self.config
        loss = fastlm.policy_loss(
            now,
            advantages,
            old_logprobs=then if config.algorithm in ("ppo", "grpo") else None,
            ref_logprobs=reference,
            mask=mask,
            loss_type=config.algorithm,
            clip_eps_low=config.clip_eps,
            kl_coef=config.kl_coef,
        )
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"the gradient is not finite in iteration {self.iterations + 1}; lower --lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # ---- the loop -------------------------------------------------------------------------------

    def _stop(self, done: Iteration) -> str | None:
        config = self.config
        if config.largest_kl is not None and done.kl > config.largest_kl:
            return "kl"
        if config.until is not None and done.reward >= config.until:
            return "reward"
        return None

    def fit(self) -> PolicyResult:
        """Iterate until the budget is used, a stop rule holds, or a signal asks to stop."""
        if self.out is not None:
            checkpoint.require()
            files.make_folder(self.out)
            files.remove_leftovers(self.out)
            files.remove_leftovers(checkpoint.folder(self.out))
            self._metrics = files.Lines(self.out / "metrics.jsonl")
        # a run that died between its last save and its end has nothing left to do
        stopped = self._stop(self.history[-1]) if self.history else None
        saved_at = time.perf_counter()
        try:
            with Interrupt() as interrupt:
                while stopped is None and self.budget.share(self.iterations, self.seconds) < 1.0:
                    done = self.step()
                    self.seconds += done.seconds
                    self.history.append(done)
                    self._show(done)
                    asked = interrupt.requested or self.reporter.closed
                    stopped = self._stop(done) or ("interrupted" if asked else None)
                    if stopped is not None:
                        break
                    if self.out is not None and time.perf_counter() - saved_at >= self.save_every:
                        self.save()
                        saved_at = time.perf_counter()
                if self.out is not None:
                    self.save()
                    interrupt.saved = stopped == "interrupted"
        finally:
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None
        return PolicyResult(stopped or "budget", self.iterations, self.seconds, self.history)

    def _show(self, done: Iteration) -> None:
        if self._metrics is not None:
            self._metrics.write(files.dumps({"event": "iteration", **asdict(done)}))
        self.reporter.line(str(done))
        if self.on_iteration is not None:
            self.on_iteration(done)

    # ---- state on disk --------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        return {
            "model": {"kind": type(self.model).__name__, **self.model.config_dict()},
            "policy": asdict(self.config),
            "data": {"tokenizer": self.tokenizer.sha256, "tokens": self.store.sha256},
        }

    def save(self) -> Path:
        """A checkpoint of this iteration; the starting model is part of it."""
        assert self.out is not None
        tensors = checkpoint.optimizer_tensors(self.optimizer)
        tensors |= {f"reference.{n}": t for n, t in self.reference.state_dict().items()}
        found = {
            "config": self.described(),
            "settings": self.settings,
            "iterations": self.iterations,
            "seconds": self.seconds,
            "history": [asdict(done) for done in self.history],
        }
        return checkpoint.write_step(
            self.out, self.iterations, self.model.state_dict(), tensors, found, self.tokenizer
        )

    def resume(self, saved: checkpoint.Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
        """Continue to the bit from what `save` wrote.

        Raises:
            UsageError: the configuration differs; the message lists the differences.
        """
        with saved.understood():
            self._restore(saved, allow)

    def _restore(self, saved: checkpoint.Checkpoint, allow: tuple[str, ...]) -> None:
        checkpoint.require_same(saved, self.described(), allow)
        tensors = checkpoint.load_training(saved, self.model, self.optimizer)
        mark = "reference."
        self.reference.load_state_dict(
            {n.removeprefix(mark): t for n, t in tensors.items() if n.startswith(mark)}
        )
        self.iterations, self.seconds = saved.state["iterations"], saved.state["seconds"]
        self.history = [Iteration(**entry) for entry in saved.state["history"]]
        checkpoint.set_aside(self.out, saved)
