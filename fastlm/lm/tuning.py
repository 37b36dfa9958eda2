"""The last phases of the demo: policy gradient on a reward model, and what judges say of it that
it never saw."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, evaluation, learning, metrics, policy, rollouts
from .phases import HELD, PROMPT_TOKENS, REWARD, Interrupted, show_texts, texts_of
from .story import Story

CLEARLY = 0.1  # of the way from the starting model to the author, beyond the author


def _contexts(story: Story, seed: int = 11) -> list[rollouts.Context]:
    """Places in the held-out novel, the same ones every time."""
    plan = story.plan
    return rollouts.contexts(
        story.prepared.tokens, HELD, plan.judged, PROMPT_TOKENS, plan.policy_tokens, seed=seed
    )


def _outcome(story: Story) -> dict[str, Any]:
    """What the model writes in the held-out novel, as everybody judges it."""
    prompts = torch.stack([place.prompt for place in _contexts(story)])
    tokenizer = story.prepared.tokenizer
    with torch.no_grad():
        made = rollouts.rollout(
            story.model, prompts, story.plan.policy_tokens, end=tokenizer.end, seed=11
        )
    return _described(story, made.texts(tokenizer))


def _described(story: Story, texts: list[str]) -> dict[str, Any]:
    decode = story.prepared.tokenizer.decode
    before = [decode(place.prompt.tolist()) for place in _contexts(story)]
    scores = {n: policy.judged(j, before, texts).tolist() for n, j in story.judges.items()}
    return {
        "rewards": {name: sum(found) / len(found) for name, found in scores.items()},
        "scores": {name: [round(v, 4) for v in found] for name, found in scores.items()},
        "distinct_2": metrics.distinct(texts),
        "repeated_4": metrics.repetition(texts),
    }


def _author(story: Story) -> dict[str, Any]:
    decode = story.prepared.tokenizer.decode
    return _described(story, [decode(p.following.tolist()) for p in _contexts(story)])


def _enough(story: Story) -> float:
    """The reward of the author's own text, elsewhere in the held-out novel than where all is
    judged: what tells the author from the model has nothing to say beyond it."""
    decode, places = story.prepared.tokenizer.decode, _contexts(story, seed=12)
    before = [decode(place.prompt.tolist()) for place in places]
    texts = [decode(place.following.tolist()) for place in places]
    return float(policy.judged(story.judges[REWARD], before, texts).mean())


def _record_judged(story: Story, iteration: int, found: dict[str, Any]) -> None:
    kept = {name: found[name] for name in ("rewards", "distinct_2")}
    story.record("judged", iteration=iteration, **kept)


def _watch(story: Story, run: policy.PolicyGradient, done: policy.Iteration) -> None:
    """After an iteration: metrics, and now and then what the judges say of held-out contexts."""
    story.record("iteration", **asdict(done))
    if done.iteration % story.plan.judge_every:
        return
    found = _outcome(story)
    _record_judged(story, done.iteration, found)
    others = ", ".join(f"{j.name} {found['rewards'][j.name]:+.2f}" for j in story.plan.judges)
    story.reporter.line(f"{done}; {others}")


def flags(before: dict[str, Any], after: dict[str, Any], author: dict[str, Any]) -> list[str]:
    """Signs that the reward is being deceived rather than earned, in words."""
    found = []
    for name, ended in after["rewards"].items():
        asked = [
            {"reward": outcome["rewards"][REWARD], "judge": outcome["rewards"][name]}
            for outcome in (before, after)
        ]
        if learning.over_optimised(*asked):
            found.append(f"the reward rose and the {name} sees a loss")
        started, own = before["rewards"][name], author["rewards"][name]
        if ended > own + CLEARLY * abs(own - started):
            found.append(
                f"the {name} puts the model's text above the author's own, "
                f"{ended:+.2f} to {own:+.2f}"
            )
    if after["distinct_2"] < 0.9 * before["distinct_2"]:
        found.append(
            f"less variety: {after['distinct_2']:.2f} of the runs of two words are distinct, "
            f"{before['distinct_2']:.2f} before"
        )
    if after["repeated_4"] > 2 * before["repeated_4"] + 0.005:
        found.append(
            f"repetition: {after['repeated_4']:.1%} of the runs of four words repeat within a "
            f"text, {before['repeated_4']:.1%} before"
        )
    return found


def _fit_policy(story: Story) -> tuple[policy.PolicyResult, policy.PolicyConfig]:
    plan = story.plan
    config = policy.PolicyConfig(
        budget=plan.policy_budget,
        lr=plan.policy_lr,
        prompt=PROMPT_TOKENS,
        length=plan.policy_tokens,
        until=_enough(story),
        largest_kl=plan.largest_kl,
    )
    run: policy.PolicyGradient
    run = policy.PolicyGradient(
        story.model,
        story.prepared.tokenizer,
        story.prepared.tokens,
        story.judges[REWARD],
        config,
        on_iteration=lambda done: _watch(story, run, done),
    )
    return run.fit(), config


def _save_policy(story: Story, folder: Path) -> None:
    kept = {"config": story.run.described(), "settings": story.run.settings}
    checkpoint.write(folder, story.model.state_dict(), {}, kept, story.prepared.tokenizer)


def policy_gradient(story: Story) -> None:
    """REINFORCE on the reward model, from contexts of the training novels, until the budget is
    used, the reward is the author's, or the model has moved far enough from where it started."""
    tokens, tokenizer = story.prepared.tokens, story.prepared.tokenizer
    author, before = _author(story), _outcome(story)
    _record_judged(story, 0, before)
    result, config = _fit_policy(story)
    _save_policy(story, story.out / "preferred")
    kept = story.report["policy"] = {
        "stopped": result.stopped,
        "iterations": result.iterations,
        "seconds": result.seconds,
        "config": asdict(config),
        "contexts": story.plan.judged,
    }
    if result.stopped == "interrupted":
        raise Interrupted
    after = _outcome(story)
    if result.iterations % story.plan.judge_every:
        _record_judged(story, result.iterations, after)
    gains = {
        name: metrics.mean_interval(
            [b - a for a, b in zip(before["scores"][name], values, strict=True)]
        ).to_json()
        for name, values in after["scores"].items()
    }
    found = flags(before, after, author)
    kept |= {
        "before": before,
        "after": after,
        "author": author,
        "gains": gains,
        "held_out": evaluation.evaluate(story.model, tokens, tokenizer).to_json(),
        "flags": found,
        "over_optimised": bool(found),
    }
    story.reporter.line(
        f"stopped by {result.stopped} after {result.iterations} iterations; "
        f"{kept['held_out']['bits_per_byte']:.3f} bits/byte held out"
    )
    for name, gain in gains.items():
        story.reporter.line(
            f"{name}: {before['rewards'][name]:+.2f} before, {after['rewards'][name]:+.2f} after, "
            f"the author's text {author['rewards'][name]:+.2f}; gain "
            f"{metrics.Interval(**gain)}"
        )
    for flag in found:
        story.reporter.line(f"OVER-OPTIMISED? {flag}")


def generate_again(story: Story) -> None:
    story.report["samples"]["preferred"] = texts_of(story)
    show_texts(story, story.report["samples"]["preferred"])
