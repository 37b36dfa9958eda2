"""The whole job in one command: data, side by side, training, text, preferences, a reward model,
policy gradient, text again, one report. Its criteria decide the exit code."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from . import checkpoint, files, metrics, phases, report, tuning
from .errors import UsageError
from .interrupt import at_once
from .progress import Reporter
from .story import FULL, QUICK, Criteria, Plan, Story

MARK = ".fastlm-demo"  # a folder that the demo made and may empty
LOSS_TOLERANCE = 1e-5  # relative, between two summation orders of the same float32 mathematics

PHASES = (
    ("doctor", phases.environment),
    ("data", phases.data),
    ("side by side", phases.side_by_side),
    ("train", phases.train),
    ("generate", phases.generate),
    ("preference pairs", phases.pairs),
    ("reward models", phases.rewards),
    ("policy gradient", tuning.policy_gradient),
    ("generate again", tuning.generate_again),
)


def _own_folder(out: Path) -> None:
    """Make `out` an empty folder of the demo; never empty a folder that something else made."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UsageError(f"{out}: not a folder of a former demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _learned(criteria: Criteria, found: dict[str, Any]) -> None:
    training, apart = found["training"], found["side_by_side"]["largest_relative_loss_difference"]
    criteria.check(
        "equal losses", apart <= LOSS_TOLERANCE, f"{apart:.1e} relative, at most {LOSS_TOLERANCE:g}"
    )
    bits, start = training["held_out"]["bits_per_byte"], training["untrained"]["bits_per_byte"]
    criteria.check(
        "learned",
        bits <= training["bound"],
        f"{bits:.3f} bits/byte held out, at most {training['bound']:.3g} after "
        f"{training['steps']} steps (token frequencies alone: {start:.3f})",
    )
    disk, memory = found["reloads"]["from_disk"], found["reloads"]["in_memory"]
    criteria.check(
        "model reloads",
        disk == memory,
        f"{disk:.6f} nats/token from disk, {memory:.6f} in memory",
    )


def _written(criteria: Criteria, samples: dict[str, Any]) -> None:
    count = len(samples["prompts"])
    criteria.check(
        "text changed",
        samples["untrained"] != samples["trained"] != samples["preferred"],
        f"{count} prompts: untrained, trained, after the policy gradient",
    )
    same = samples["trained"] == samples["again"]
    criteria.check("text reproducible", same, "same seeds, same text")


def _preferred(criteria: Criteria, found: dict[str, Any], least_auc: float) -> None:
    first, *judges = found["reward_models"]
    auc = first["held_out"]["auc"]
    criteria.check(
        "reward model",
        auc["value"] >= least_auc,
        f"AUC-ROC {metrics.Interval(**auc)} on {first['held_out']['pairs']:,} pairs of the "
        f"held-out novel, at least {least_auc:g}",
    )
    done = found["policy"]
    for model in (first, *judges):
        name = model["name"]
        gain = metrics.Interval(**done["gains"][name])
        seen = "optimised" if model["optimised"] else "never optimised, trained on other pairs"
        criteria.check(
            f"{name} sees a gain",
            gain.low > 0,
            f"{gain} over {done['contexts']} held-out contexts ({model['kind']}, {seen})",
        )


def judge(criteria: Criteria, found: dict[str, Any], plan: Plan) -> None:
    """Every criterion, from what the report says."""
    _learned(criteria, found)
    _written(criteria, found["samples"])
    _preferred(criteria, found, plan.bounds.auc)


def _finish(story: Story, started: float) -> None:
    """What exists goes to disk, interrupted or not."""
    story.report["seconds"] = time.perf_counter() - started
    files.write_json(story.out / "report.json", story.report)
    missing = report.missing()
    if missing:
        story.reporter.line(f"no report.html: {missing}")
        return
    story.report["page"] = str(report.write(story.out))


def run(
    *, quick: bool, budget: str | None, out: Path, reporter: Reporter
) -> tuple[bool, dict[str, Any]]:
    """(whether every criterion holds, the report). An interrupted run has no criteria."""
    started = time.perf_counter()
    plan = QUICK if quick else FULL
    plan = plan if budget is None else plan.within(budget)
    checkpoint.require()
    metrics.require()
    _own_folder(out)
    story = Story(plan, out, reporter)
    story.report |= {"title": "fastlm demo", "plan": plan.name, "out": str(out), "passed": False}
    with at_once():
        try:
            for number, (name, phase) in enumerate(PHASES, 1):
                reporter.line(f"\n[{number}/{len(PHASES)}] {name}")
                with story.during(name):
                    phase(story)
                if reporter.closed:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            reporter.close()
            story.report["interrupted"] = story.phase
            story.record("interrupted")
            _finish(story, started)
            return False, story.report
        reporter.line("\ncriteria")
        criteria = Criteria(reporter)
        judge(criteria, story.report, plan)
        story.report |= {"criteria": criteria.results, "passed": criteria.passed}
        _finish(story, started)
    reporter.line(f"\n{story.report['seconds']:.0f} s in all; in {out}:")
    for file in ("report.html", "report.json", "metrics.jsonl", "model", "preferred", "rewards"):
        if (out / file).exists():
            reporter.line(f"  {file}")
    reporter.line("passed" if criteria.passed else "FAILED")
    return criteria.passed, story.report
