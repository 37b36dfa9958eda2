"""The main job in one command: data, side by side, training, text before and after, a report."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, compare, doctor, files, generation, machine, plot, preparation
from .errors import UsageError
from .evaluation import Score, evaluate
from .model import GRULM, LanguageModel, parameter_count
from .progress import Reporter
from .recipe import Recipe
from .tokenizer import Tokenizer
from .trainer import Result, Trainer

MARK = ".fastlm-demo"  # a folder that the demo made and may empty
PROMPTS = ("It is a truth", "Captain Wentworth", '"I do not know,"')
LOSS_TOLERANCE = 1e-5  # relative, between two summation orders of the same float32 mathematics
# held-out bits per byte with BPE by training steps; a byte-level run sees a quarter of the text
BOUND_FULL, BOUND_QUICK = 2.1, 2.9


@dataclass(frozen=True)
class Plan:
    """Step budgets, so that the criteria do not depend on how busy the machine is."""

    recipe: Recipe
    compared_steps: int
    bound: float
    new_tokens: int


FULL = Plan(Recipe(budget="450steps"), 20, BOUND_FULL, 60)
QUICK = Plan(Recipe(budget="50steps", hidden=128, evals=4, eval_tokens=8192), 6, BOUND_QUICK, 30)


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
        return all(result["passed"] for result in self.results.values())


def _own_folder(out: Path) -> None:
    """Make `out` an empty folder of the demo; never empty a folder that something else made."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UsageError(f"{out}: not a folder of a former demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _samples(model: LanguageModel, tokenizer: Tokenizer, new_tokens: int) -> list[str]:
    return [
        prompt
        + "".join(
            generation.generate(
                model,
                tokenizer,
                prompt,
                max_new_tokens=new_tokens,
                temperature=0.8,
                top_p=0.95,
                seed=seed,
            )
        )
        for seed, prompt in enumerate(PROMPTS)
    ]


def _show_samples(reporter: Reporter, title: str, samples: list[str]) -> None:
    reporter.line(f"\n{title}")
    for sample in samples:
        reporter.line("  | " + sample.strip().replace("\n", "\n  | "))


def _reloads(out: Path, store: preparation.Prepared, score: Score) -> tuple[bool, str]:
    """The saved model, read back from disk, scores the same."""
    model, tokenizer = generation.load_checkpoint(checkpoint.read(out / "model"))
    again = evaluate(model, store.tokens, tokenizer)
    saved, kept = again.nats_per_token, score.nats_per_token
    return saved == kept, f"{saved:.6f} nats/token from disk, {kept:.6f} in memory"


def _pictures(out: Path, compared: compare.Comparison, reporter: Reporter) -> list[str]:
    if not plot.available():
        reporter.line("no pictures: matplotlib is missing; pip install 'fastlm[plot]'")
        return []
    plot.learning_curve(
        out / "metrics.jsonl", out / "loss.png", title="GRU language model on five Austen novels"
    )
    plot.comparison(
        compared, out / "comparison.png", title=f"one training step: {compared.ratio:.2f}x"
    )
    return ["loss.png", "comparison.png"]


def _train(
    plan: Plan, data: preparation.Prepared, out: Path, reporter: Reporter
) -> tuple[GRULM, Result, list[str]]:
    """(trained model, result, samples before training)."""
    recipe = plan.recipe
    torch.manual_seed(recipe.seed)
    model = recipe.model(data.tokens.vocab_size)
    before = _samples(model, data.tokenizer, plan.new_tokens)
    reporter.line(
        f"\ntraining: {parameter_count(model):,} parameters, batch {recipe.batch} x "
        f"{recipe.seq} tokens, {recipe.budget}"
    )
    trainer = Trainer(
        model,
        data.tokens,
        data.tokenizer,
        recipe.train_config(),
        out=out,
        reporter=reporter,
        settings=recipe.to_json(),
    )
    return model, trainer.fit(), before


def run(
    *, quick: bool, budget: str | None, out: Path, reporter: Reporter
) -> tuple[bool, dict[str, Any]]:
    """(whether every criterion holds, the report). An interrupted run has no criteria."""
    started = time.perf_counter()
    plan = QUICK if quick else FULL
    if budget is not None:
        plan = replace(plan, recipe=replace(plan.recipe, budget=budget))
    checkpoint.require()
    _own_folder(out)
    environment = doctor.collect()
    for line in doctor.short(environment):
        reporter.line(line)
    data = preparation.prepare(plan.recipe.data_config())
    reporter.line("\ndata: six novels by Jane Austen")
    for line in preparation.describe(data):
        reporter.line(f"  {line}")
    report: dict[str, Any] = {"environment": environment, "data": preparation.summary(data)}

    reporter.line("\nside by side: plain PyTorch and fastlm, alternating steps")
    compared = compare.side_by_side(data.tokens, plan.recipe, steps=plan.compared_steps)
    reporter.line(str(compared))
    report["side_by_side"] = compared.to_json()

    model, result, before = _train(plan, data, out, reporter)
    if result.stopped == "interrupted":
        return False, {**report, "interrupted": True}
    assert result.score is not None
    after = _samples(model, data.tokenizer, plan.new_tokens)
    again = _samples(model, data.tokenizer, plan.new_tokens)
    _show_samples(reporter, "text before training", before)
    _show_samples(reporter, "text after training, same prompts and seeds", after)
    reporter.line(f"\nheld out (Persuasion): {result.score}\n{result.verdict}")

    reporter.line("\ncriteria")
    criteria = Criteria(reporter)
    apart = compared.loss_difference
    criteria.check(
        "equal losses", apart <= LOSS_TOLERANCE, f"{apart:.1e} relative, at most {LOSS_TOLERANCE:g}"
    )
    bits = result.score.bits_per_byte
    criteria.check(
        "learned", bits <= plan.bound, f"{bits:.3f} bits/byte held out, at most {plan.bound}"
    )
    criteria.check("text changed", before != after, f"{len(PROMPTS)} prompts, before and after")
    criteria.check("text reproducible", after == again, "same seeds, same text")
    criteria.check("model reloads", *_reloads(out, data, result.score))

    report |= {
        "training": {
            "steps": result.steps,
            "seconds": result.seconds,
            "skipped_steps": result.skipped_steps,
            "held_out": result.score.to_json(),
            "verdict": result.verdict,
            "peak_memory_bytes": machine.peak_memory(),
        },
        "samples": {"prompts": PROMPTS, "before": before, "after": after},
        "criteria": criteria.results,
        "passed": criteria.passed,
        "pictures": _pictures(out, compared, reporter),
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    files.write_json(out / "report.json", report)
    reporter.line(f"\n{report['seconds']:.0f} s in all; {out}/report.json, {out}/model")
    reporter.line("passed" if criteria.passed else "FAILED")
    return criteria.passed, report
