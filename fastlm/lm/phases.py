"""The phases of the demo, in their order. Each reads and extends a `Story`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import (
    checkpoint,
    compare,
    doctor,
    evaluation,
    generation,
    machine,
    metrics,
    preferences,
    preparation,
    reward,
    rollouts,
)
from .model import parameter_count
from .preferences import Preference
from .story import JudgePlan, Story
from .trainer import Trainer

PROMPTS = ("It is a truth", "Captain Wentworth", '"I do not know,"')
PROMPT_TOKENS = 24  # of a context, before what is judged
CHUNK = 512  # pairs made between two looks at the clock
CURVE_POINTS = 200  # of a ROC curve in the report
SHOWN_PAIRS = 2
REWARD = "reward model"
HELD, TRAIN, OTHERS = "held", "train", "judges"


class Interrupted(KeyboardInterrupt):
    """A loop that finishes its step and saves was asked to stop."""


# ---- doctor, data, side by side ------------------------------------------------------------------


def environment(story: Story) -> None:
    found = doctor.collect()
    story.report["environment"] = found
    for line in doctor.short(found):
        story.reporter.line(line)


def data(story: Story) -> None:
    story.data = preparation.prepare(story.plan.recipe.data_config())
    story.report["data"] = preparation.summary(story.data)
    story.reporter.line("six novels by Jane Austen, Persuasion held out")
    for line in preparation.describe(story.data):
        story.reporter.line(line)


def side_by_side(story: Story) -> None:
    compared = compare.side_by_side(
        story.prepared.tokens, story.plan.recipe, steps=story.plan.compared_steps
    )
    story.report["side_by_side"] = compared.to_json()
    for plain, fast in zip(compared.plain_seconds, compared.fast_seconds, strict=True):
        story.record("compared", plain_seconds=plain, fastlm_seconds=fast)
    story.reporter.line("plain PyTorch and fastlm, equal parameters and batches, alternating steps")
    story.reporter.line(str(compared))


# ---- training and text ---------------------------------------------------------------------------


def texts_of(story: Story) -> list[str]:
    """What the model writes after each prompt; the same seeds every time."""
    found = []
    for seed, prompt in enumerate(PROMPTS):
        pieces = generation.generate(
            story.model,
            story.prepared.tokenizer,
            prompt,
            max_new_tokens=story.plan.new_tokens,
            temperature=0.8,
            top_p=0.95,
            seed=seed,
        )
        found.append("".join(pieces))
    return found


def show_texts(story: Story, texts: Sequence[str]) -> None:
    for prompt, text in zip(PROMPTS, texts, strict=True):
        story.reporter.line("| " + f"{prompt}{text}".strip().replace("\n", "\n| "))


def train(story: Story) -> None:
    recipe, prepared = story.plan.recipe, story.prepared
    story.trainer = run = Trainer(
        recipe.make_model(prepared.tokens),
        prepared.tokens,
        prepared.tokenizer,
        recipe.train_config(),
        out=story.out,
        reporter=story.reporter,
        settings=recipe.to_json(),
    )
    parameters = parameter_count(run.model)
    story.reporter.line(
        f"{parameters:,} parameters, batch {recipe.batch} x {recipe.seq} tokens, {recipe.budget}"
    )
    untrained = evaluation.evaluate(
        run.model, prepared.tokens, prepared.tokenizer, limit=recipe.eval_tokens
    )
    story.report["samples"] = {"prompts": PROMPTS, "untrained": texts_of(story)}
    story.report["training"] = kept = {
        "parameters": parameters,
        "budget": recipe.budget,
        "bound": story.plan.bounds.bits.get(prepared.tokenizer.kind, untrained.bits_per_byte),
        "untrained": untrained.to_json(),
    }
    result = run.fit()
    kept |= {"steps": result.steps, "seconds": result.seconds, "stopped": result.stopped}
    if result.stopped == "interrupted":
        raise Interrupted
    assert result.score is not None
    kept |= {
        "skipped_steps": result.skipped_steps,
        "held_out": result.score.to_json(),
        "verdict": result.verdict,
        "peak_memory_bytes": machine.peak_memory(),
    }
    story.reporter.line(f"held out: {result.score}\n{result.verdict}")


def generate(story: Story) -> None:
    samples = story.report["samples"]
    samples["trained"], samples["again"] = texts_of(story), texts_of(story)
    show_texts(story, samples["trained"])
    # here, since the policy gradient changes the model in memory
    story.report["reloads"] = _reloads(story)


def _reloads(story: Story) -> dict[str, float]:
    """Nats per token of the saved model, read back from disk, and of the one in memory."""
    limit, tokens = story.plan.recipe.eval_tokens, story.prepared.tokens
    model, tokenizer = generation.load_checkpoint(checkpoint.read(story.out / "model"))
    saved = evaluation.evaluate(model, tokens, tokenizer, limit=limit)
    kept = evaluation.evaluate(story.model, tokens, story.prepared.tokenizer, limit=limit)
    return {"from_disk": saved.nats_per_token, "in_memory": kept.nats_per_token}


# ---- preferences ---------------------------------------------------------------------------------


def _make_pairs(story: Story, split: str, count: int, seed: int) -> list[Preference]:
    """`count` of them, or as many as the plan's seconds allow, for the training split."""
    limit = story.plan.pair_seconds if split == TRAIN else None
    least = count if limit is None else max(1, count // 8)
    found: list[Preference] = []
    started = time.perf_counter()

    def more() -> int:
        if limit is None or len(found) < least:
            return min(CHUNK, least - len(found))
        return CHUNK if time.perf_counter() - started < limit else 0

    while size := more():
        found += rollouts.human_over_model(
            story.model,
            story.prepared.tokenizer,
            story.prepared.tokens,
            split=split,
            count=size,
            prompt=PROMPT_TOKENS,
            length=story.plan.pair_tokens,
            seed=1000 * seed + len(found) // CHUNK,
        )
    return found


def pairs(story: Story) -> None:
    """The author's text over the model's, after the same context: for the reward model, for its
    judges, and of the held-out novel."""
    plan = story.plan
    story.pairs = {
        TRAIN: _make_pairs(story, TRAIN, plan.pairs, 1),
        OTHERS: _make_pairs(story, TRAIN, plan.pairs, 2),
        HELD: _make_pairs(story, HELD, plan.held_pairs, 3),
    }
    for name, made in story.pairs.items():
        preferences.save(story.out / "preferences" / f"{name}.jsonl", made)
    counts = {name: len(made) for name, made in story.pairs.items()}
    story.report["preferences"] = {
        "provenance": preferences.origins(story.pairs[HELD]),
        "counts": counts,
        "prompt_tokens": PROMPT_TOKENS,
        "tokens": plan.pair_tokens,
        "examples": [pair.to_json() for pair in story.pairs[HELD][:SHOWN_PAIRS]],
    }
    story.reporter.line(
        f"{counts[TRAIN]:,} pairs to learn from, {counts[OTHERS]:,} others for the judges, "
        f"{counts[HELD]:,} of the held-out novel; each {plan.pair_tokens} tokens by the author "
        "preferred to as many by the model (human-over-model: nobody judged them)"
    )


def _thinned(values: Any) -> list[float]:
    step = max(1, len(values) // CURVE_POINTS)
    return [round(float(value), 4) for value in (*values[:-1:step], values[-1])]


def _fit_judge(story: Story, plan: JudgePlan, seed: int) -> None:
    """Train a reward model, judge it on the held-out novel, keep it on disk."""
    tokenizer, optimised = story.prepared.tokenizer, plan.name == REWARD
    made, held = story.pairs[TRAIN if optimised else OTHERS], story.pairs[HELD]
    config = reward.RewardConfig(plan.kind, plan.budget, plan.hidden, lr=plan.lr, seed=seed)
    started = time.perf_counter()
    model = reward.fit(made, tokenizer, config, record=story.recorder("reward", model=plan.name))
    seconds = time.perf_counter() - started
    found = reward.evaluate(model, held, tokenizer)
    judge = reward.Judge(model, tokenizer)
    story.judges[plan.name] = judge
    scores = [
        value
        for texts in ([p.chosen for p in held], [p.rejected for p in held])
        for value in judge([p.prompt for p in held], texts)
    ]
    false, true = metrics.roc_curve(scores, [True] * len(held) + [False] * len(held))
    reward.save(story.out / "rewards" / plan.name.replace(" ", "-"), model, tokenizer, found)
    story.report.setdefault("reward_models", []).append(
        {
            **asdict(plan),
            "optimised": optimised,
            "seed": seed,
            "trained_on": len(made),
            "seconds": seconds,
            "held_out": found.to_json(),
            "roc": [_thinned(false), _thinned(true)],
        }
    )
    story.reporter.line(
        f"{plan.name} ({plan.kind}, {seconds:.0f} s, {len(made):,} pairs): {found.lines()[0]}"
    )


def rewards(story: Story) -> None:
    """The reward model, and judges that the policy gradient never sees."""
    _fit_judge(story, JudgePlan(REWARD, "ngrams", story.plan.reward_budget), 0)
    for seed, judge in enumerate(story.plan.judges, 1):
        _fit_judge(story, judge, 7 * seed)
