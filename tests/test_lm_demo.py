"""The demo's own rules: criteria and exit codes, what an interrupted run leaves, budgets, flags."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastlm.lm import cli, demo, errors, phases, progress, report, story, trainer, tuning

RECIPE = story.Recipe(budget="4steps", tokenizer="bytes", hidden=16, evals=2, eval_tokens=2000)
TINY = story.Plan(
    "tiny",
    RECIPE,
    story.Bounds({"bytes": 9.0}, 0.0),
    (story.JudgePlan("judge of another kind", "gru", "1steps", 8),),
    compared_steps=2,
    new_tokens=10,
    pairs=8,
    held_pairs=6,
    pair_tokens=8,
    reward_budget="2steps",
    policy_budget="2steps",
    policy_tokens=6,
    judged=5,
    judge_every=1,
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", TINY)


def run(out: Path, *more: str) -> int:
    return cli.main(["demo", "--quick", "--out", str(out), *more])


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    assert run(tmp_path) == errors.USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_every_phase_and_criterion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    for _ in range(2):  # a second run empties its own folder
        code = run(out, "--json")
        found = json.loads(capsys.readouterr().out)
    names = [name for name, _ in demo.PHASES]
    assert [phase["name"] for phase in found["phases"]] == names
    assert len(found["criteria"]) == 8
    # so short a run gains nothing for certain: those criteria alone may fail
    held = {name for name, result in found["criteria"].items() if result["passed"]}
    assert held >= {"equal losses", "learned", "model reloads", "text reproducible", "reward model"}
    assert code == (errors.OK if len(held) == 8 else errors.CRITERION_FAILED)
    assert found["training"]["steps"] == 4 and found["policy"]["iterations"] == 2
    assert json.loads((out / "report.json").read_text())["criteria"] == found["criteria"]
    kinds = {event["event"] for event in events(out)}
    assert {"compared", "step", "eval", "reward", "iteration", "judged", "done"} <= kinds
    for model in ("", "preferred"):
        assert cli.main(["generate", str(out / model), "--max-new-tokens", "5"]) == errors.OK
    # the reward models are what `fastlm rl` takes
    assert phases.reward.load(out / "rewards" / "reward-model")([""], ["text"])


@pytest.mark.parametrize(
    "change, failed",
    [({"bits": {"bytes": 0.1}, "auc": 0.0}, "learned"), ({"bits": {}, "auc": 1.1}, "reward model")],
)
def test_bounds_out_of_reach_fail(change: dict[str, Any], failed: str) -> None:
    found = {
        "training": {
            "bound": change["bits"].get("bytes", 9.0),
            "steps": 4,
            "held_out": {"bits_per_byte": 2.0},
            "untrained": {"bits_per_byte": 3.0},
        },
        "side_by_side": {"largest_relative_loss_difference": 1e-7},
        "reloads": {"from_disk": 1.0, "in_memory": 1.0},
        "samples": {
            "prompts": ["a"],
            "untrained": ["b"],
            "trained": ["c"],
            "again": ["c"],
            "preferred": ["d"],
        },
        "reward_models": [
            {
                "name": phases.REWARD,
                "kind": "ngrams",
                "optimised": True,
                "held_out": {"auc": {"value": 0.9, "low": 0.8, "high": 1.0}, "pairs": 5},
            }
        ],
        "policy": {
            "contexts": 3,
            "gains": {phases.REWARD: {"value": 0.5, "low": 0.1, "high": 0.9}},
        },
    }

    def failures() -> list[str]:
        criteria = story.Criteria(progress.Quiet())
        demo.judge(criteria, found, replace(TINY, bounds=story.Bounds(**change)))
        return [name for name, result in criteria.results.items() if not result["passed"]]

    assert failures() == [failed]
    # each of the others can fail too
    found["side_by_side"]["largest_relative_loss_difference"] = 1e-4
    found["reloads"]["in_memory"] = 1.1
    found["samples"] |= {"again": ["e"], "preferred": ["c"]}
    found["policy"]["gains"][phases.REWARD]["low"] = -0.1
    assert {*failures(), failed} == {
        "equal losses",
        "model reloads",
        "text changed",
        "text reproducible",
        "reward model sees a gain",
        failed,
    }


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """A signal in the middle of what `owner.name` does."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    "owner, name, number, phase, kept",
    [
        (phases.compare, "side_by_side", signal.SIGTERM, "side by side", []),
        (trainer.Trainer, "_show", signal.SIGINT, "train", ["checkpoints"]),
        (phases, "_fit_judge", signal.SIGINT, "reward models", ["model", "preferences"]),
        (tuning, "_watch", signal.SIGTERM, "policy gradient", ["model", "rewards", "preferred"]),
    ],
)
def test_a_signal_in_any_phase_keeps_what_exists(
    owner: Any,
    name: str,
    number: int,
    phase: str,
    kept: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt_at(monkeypatch, owner, name, number)
    assert run(tmp_path / "out") == errors.INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr().err
    assert f"interrupted in {phase!r}" in said
    assert ("--resume auto" in said) == (phase == "train")
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["interrupted"] == phase and not found["passed"] and "criteria" not in found
    assert f"interrupted in: {phase}" in (tmp_path / "out" / "report.html").read_text()
    assert events(tmp_path / "out")[-1]["event"] == "interrupted"
    for folder in kept:
        assert (tmp_path / "out" / folder).is_dir()


def test_a_budget_in_seconds_is_shared_out() -> None:
    plan = story.FULL.within("10m")
    assert plan.recipe.budget == "270.0s" and plan.policy_budget == "90.0s"
    shares = [plan.recipe.budget, plan.reward_budget, plan.policy_budget]
    shares += [judge.budget for judge in plan.judges]
    assert plan.pair_seconds is not None
    total = sum(float(share[:-1]) for share in shares) + 2 * plan.pair_seconds
    assert total <= 600
    only = story.FULL.within("2000steps")
    assert only == replace(
        story.FULL, name=only.name, recipe=replace(story.FULL.recipe, budget="2000steps")
    )
    # what a short run must reach is little, and said
    assert story.FULL.within("20steps").bounds == story.Bounds({}, story.FULL.bounds.auc)
    assert story.FULL.within("30s").bounds == story.Bounds({}, story.QUICK.bounds.auc)
    assert plan.bounds == story.FULL.bounds
    with pytest.raises(errors.UsageError, match="at least 10s"):
        story.FULL.within("3s")


def test_flags_of_over_optimisation() -> None:
    def outcome(reward: float, judge: float, distinct: float = 0.9, repeated: float = 0.0) -> Any:
        rewards = {phases.REWARD: reward, "other": judge}
        return {"rewards": rewards, "distinct_2": distinct, "repeated_4": repeated}

    before, author = outcome(0.0, 0.0), outcome(1.0, 1.0)
    assert tuning.flags(before, outcome(0.5, 0.4), author) == []
    assert tuning.flags(before, outcome(0.5, -0.1), author) == [
        "the reward rose and the other sees a loss"
    ]
    # both fell: a failure, but no deception
    assert tuning.flags(before, outcome(-0.5, -0.1), author) == []
    (above,) = tuning.flags(before, outcome(1.5, 0.4), author)
    assert above == "the reward model puts the model's text above the author's own, +1.50 to +1.00"
    # stopped at the author's level, within chance
    assert tuning.flags(before, outcome(1.05, 0.4), author) == []
    (variety,) = tuning.flags(before, outcome(0.5, 0.4, distinct=0.6), author)
    assert variety.startswith("less variety: 0.60")
    (repeats,) = tuning.flags(before, outcome(0.5, 0.4, repeated=0.05), author)
    assert repeats.startswith("repetition: 5.0%")


def test_without_the_extra_there_is_a_line_and_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "EXTRA", {"no_such_module": "jinja2"})
    monkeypatch.setattr(demo, "PHASES", demo.PHASES[:1])
    monkeypatch.setattr(demo, "judge", lambda criteria, *_: criteria.check("all", True, ""))
    assert run(tmp_path / "out") == errors.OK
    assert "no report.html: a page needs the package jinja2; pip install 'fastlm[report]'" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "out" / "report.html").exists()
    assert cli.main(["report", str(tmp_path / "out")]) == errors.USAGE
