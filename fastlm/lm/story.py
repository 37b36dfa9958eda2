"""What the phases of the demo share: how much to do, what is written down, what must hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import files
from .budget import Budget
from .errors import UsageError
from .kinds import LanguageModel
from .preferences import Preference
from .preparation import Prepared
from .progress import Reporter
from .recipe import Recipe
from .reward import Judge
from .trainer import Trainer

SHORT = 60.0  # seconds, of all phases, below which a budget asks for little


@dataclass(frozen=True)
class Bounds:
    """What a run must reach. `bits`: held-out bits per byte by kind of tokenizer, else those of the
    untrained model. `auc`: of the reward model on the held-out novel."""

    bits: dict[str, float]
    auc: float


@dataclass(frozen=True)
class JudgePlan:
    """A reward model that is never optimised. `hidden` is for the kind gru."""

    name: str
    kind: str
    budget: str
    hidden: int = 64
    lr: float | None = None


@dataclass(frozen=True)
class Plan:
    """Step budgets, so that the criteria do not depend on how busy the machine is.

    `pairs`: human-over-model pairs for the reward model, and as many others for its judges.
    `pair_seconds`: make them for so long instead, and at least `pairs / 8`.
    """

    name: str
    recipe: Recipe
    bounds: Bounds
    judges: tuple[JudgePlan, ...]
    compared_steps: int = 20
    new_tokens: int = 60
    pairs: int = 8000
    held_pairs: int = 600
    pair_tokens: int = 128
    pair_seconds: float | None = None
    reward_budget: str = "500steps"
    policy_budget: str = "60steps"
    policy_lr: float = 1e-3
    policy_tokens: int = 60
    largest_kl: float = 10.0  # nats a text; beyond it the text falls apart before the judges see
    judged: int = 200
    judge_every: int = 5

    def within(self, text: str) -> Plan:
        """The phases for a budget: seconds are shared out, steps and epochs are of the training
        alone. A shorter training than the plan's must beat its own start and nothing else."""
        budget = Budget.parse(text)
        if budget.unit != "seconds":
            least = {"steps": Budget.parse(self.recipe.budget).amount, "epochs": 1.0}[budget.unit]
            return replace(
                self,
                name=f"--budget {text}",
                recipe=replace(self.recipe, budget=text),
                bounds=self.bounds if budget.amount >= least else replace(self.bounds, bits={}),
            )
        if budget.amount < 10:
            raise UsageError(f"--budget must be at least 10s for all phases, got {text}")

        def part(share: float) -> str:
            return f"{share * budget.amount:.1f}s"

        return replace(
            self,
            name=f"--budget {text}",
            bounds=self.bounds if budget.amount >= SHORT else Bounds({}, QUICK.bounds.auc),
            recipe=replace(self.recipe, budget=part(0.45)),
            judges=tuple(replace(judge, budget=part(0.08)) for judge in self.judges),
            pair_seconds=0.08 * budget.amount,
            reward_budget=part(0.08),
            policy_budget=part(0.15),
        )


GRU_JUDGE = JudgePlan("judge of another kind", "gru", "150steps", lr=1e-2)
FULL = Plan(
    "full",
    Recipe(budget="450steps", lr=8e-3),
    Bounds({"bpe": 2.0, "bytes": 2.3}, 0.85),
    (JudgePlan("judge of the same kind", "ngrams", "500steps"), GRU_JUDGE),
)
# smaller in everything, and with bounds of its own
QUICK = Plan(
    "--quick",
    Recipe(budget="60steps", lr=8e-3, evals=4, eval_tokens=8192),
    Bounds({"bpe": 2.5, "bytes": 2.9}, 0.75),
    (replace(GRU_JUDGE, budget="40steps"),),
    compared_steps=8,
    new_tokens=30,
    pairs=1024,
    held_pairs=300,
    pair_tokens=64,
    reward_budget="150steps",
    policy_budget="15steps",
    policy_lr=2e-3,
    policy_tokens=40,
)


@dataclass
class Criteria:
    """Named checks; the demo passes when all of them hold."""

    reporter: Reporter
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self, name: str, passed: bool, detail: str) -> None:
        self.results[name] = {"passed": passed, "detail": detail}
        self.reporter.line(f"  {'pass' if passed else 'FAIL'}  {name}: {detail}")

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result["passed"] for result in self.results.values())


@dataclass
class Story:
    """One run of the demo. `report` grows phase by phase, so that an interrupted run has what is
    there; the models are those of the phase that made them."""

    plan: Plan
    out: Path
    reporter: Reporter
    report: dict[str, Any] = field(default_factory=dict)
    data: Prepared | None = None
    trainer: Trainer | None = None
    pairs: dict[str, list[Preference]] = field(default_factory=dict)
    judges: dict[str, Judge] = field(default_factory=dict)
    phase: str = ""

    @property
    def prepared(self) -> Prepared:
        assert self.data is not None
        return self.data

    @property
    def run(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer

    @property
    def model(self) -> LanguageModel:
        return self.run.model

    def record(self, event: str, **values: Any) -> None:
        """A line of metrics.jsonl, which all phases share; on disk when this returns."""
        line = files.dumps({"event": event, "phase": self.phase, **values})
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def recorder(self, event: str, **values: Any) -> Callable[[dict[str, Any]], None]:
        return lambda line: self.record(event, **values, **line)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        self.phase = phase
        self.record("begin")
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.report.setdefault("phases", []).append({"name": phase, "seconds": seconds})
        self.record("done", seconds=seconds)
