"""The main job in one command: data, side by side, training, text before and after, a report."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import checkpoint, compare, doctor, files, generation, machine, plot, preparation
from .errors import UsageError
from .evaluation import Score, evaluate
from .kinds import LanguageModel
from .model import parameter_count
from .progress import Reporter
from .recipe import Recipe
from .tokenizer import Tokenizer
from .trainer import Result, Trainer

MARK = ".fastlm-demo"  # a folder that the demo made and may empty
PROMPTS = ("It is a truth", "Captain Wentworth", '"I do not know,"')
LOSS_TOLERANCE = 1e-5  # relative, between two summation orders of the same float32 mathematics

# held-out bits per byte to reach after so many training steps of 32 x 64 tokens
BOUNDS = {"bpe": {450: 1.95, 60: 2.5}, "bytes": {450: 2.3, 60: 2.9}}


@dataclass(frozen=True)
class Plan:
    """Step budgets, so that the criteria do not depend on how busy the machine is."""

    recipe: Recipe
    compared_steps: int
    new_tokens: int


FULL = Plan(Recipe(budget="450steps", lr=8e-3), 20, 60)
QUICK = Plan(Recipe(budget="60steps", lr=8e-3, evals=4, eval_tokens=8192), 8, 30)


def bound(kind: str, steps: int, untrained: float) -> float:
    """What a run of `steps` must reach; a shorter one than any here must beat its own start."""
    reached = [bits for least, bits in BOUNDS[kind].items() if steps >= least]
    return min(reached, default=untrained)


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


def _reloads(out: Path, run: Trainer) -> tuple[bool, str]:
    """The saved model, read back from disk, scores the same to the last bit."""
    limit = run.config.eval_tokens
    model, tokenizer = generation.load_checkpoint(checkpoint.read(out / "model"))
    saved = evaluate(model, run.store, tokenizer, limit=limit).nats_per_token
    kept = evaluate(run.model, run.store, run.tokenizer, limit=limit).nats_per_token
    return saved == kept, f"{saved:.6f} nats/token from disk, {kept:.6f} in memory"


def _pictures(out: Path, compared: compare.Comparison, reporter: Reporter) -> list[str]:
    if not plot.available():
        reporter.line("no pictures: matplotlib is missing; pip install 'fastlm[plot]'")
        return []
    plot.learning_curve(
        out / "metrics.jsonl", out / "loss.png", title="GRU language model on five Austen novels"
    )
    title = f"one training step, median ratio {compared.ratio:.2f}x"
    plot.comparison(compared, out / "comparison.png", title=title)
    return ["loss.png", "comparison.png"]


def _trainer(recipe: Recipe, data: preparation.Prepared, out: Path, reporter: Reporter) -> Trainer:
    model = recipe.make_model(data.tokens)
    reporter.line(
        f"\ntraining: {parameter_count(model):,} parameters, batch {recipe.batch} x "
        f"{recipe.seq} tokens, {recipe.budget}"
    )
    return Trainer(
        model,
        data.tokens,
        data.tokenizer,
        recipe.train_config(),
        out=out,
        reporter=reporter,
        settings=recipe.to_json(),
    )


def _judge(
    criteria: Criteria,
    compared: compare.Comparison,
    run: Trainer,
    result: Result,
    untrained: Score,
    texts: tuple[list[str], list[str], list[str]],
) -> None:
    """`texts`: before training, after it, and after it again."""
    assert result.score is not None and run.out is not None
    before, after, again = texts
    apart = compared.loss_difference
    criteria.check(
        "equal losses", apart <= LOSS_TOLERANCE, f"{apart:.1e} relative, at most {LOSS_TOLERANCE:g}"
    )
    bits = result.score.bits_per_byte
    least = bound(run.tokenizer.kind, result.steps, untrained.bits_per_byte)
    criteria.check(
        "learned",
        bits <= least,
        f"{bits:.3f} bits/byte held out, at most {least:.3g} after {result.steps} steps "
        f"(token frequencies alone: {untrained.bits_per_byte:.3f})",
    )
    criteria.check("text changed", before != after, f"{len(PROMPTS)} prompts, before and after")
    criteria.check("text reproducible", after == again, "same seeds, same text")
    criteria.check("model reloads", *_reloads(run.out, run))


def run(
    *, quick: bool, budget: str | None, out: Path, reporter: Reporter
) -> tuple[bool, dict[str, Any]]:
    """(whether every criterion holds, the report). An interrupted run has no criteria."""
    started = time.perf_counter()
    plan = QUICK if quick else FULL
    recipe = plan.recipe if budget is None else replace(plan.recipe, budget=budget)
    checkpoint.require()
    _own_folder(out)
    environment = doctor.collect()
    for line in doctor.short(environment):
        reporter.line(line)
    data = preparation.prepare(recipe.data_config())
    reporter.line("\ndata: six novels by Jane Austen")
    for line in preparation.describe(data):
        reporter.line(f"  {line}")

    reporter.line("\nside by side: plain PyTorch and fastlm, alternating steps")
    compared = compare.side_by_side(data.tokens, recipe, steps=plan.compared_steps)
    reporter.line(str(compared))

    trainer = _trainer(recipe, data, out, reporter)
    untrained = evaluate(trainer.model, data.tokens, data.tokenizer, limit=recipe.eval_tokens)

    def samples() -> list[str]:
        return _samples(trainer.model, data.tokenizer, plan.new_tokens)

    before = samples()
    result = trainer.fit()
    if result.stopped == "interrupted":
        return False, {"interrupted": True}
    assert result.score is not None
    after, again = samples(), samples()
    _show_samples(reporter, "text before training", before)
    _show_samples(reporter, "text after training, same prompts and seeds", after)
    reporter.line(f"\nheld out (Persuasion): {result.score}\n{result.verdict}\n\ncriteria")
    criteria = Criteria(reporter)
    _judge(criteria, compared, trainer, result, untrained, (before, after, again))
    report = {
        "environment": environment,
        "data": preparation.summary(data),
        "side_by_side": compared.to_json(),
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
