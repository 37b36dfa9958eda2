"""`fastlm prefs`, `fastlm reward`, `fastlm rl`: from preferences to a model that is preferred."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import (
    checkpoint,
    errors,
    files,
    generation,
    judging,
    labelling,
    policy,
    preferences,
    reward,
    rollouts,
    synthetic,
)
from .judging import Reward
from .kinds import LanguageModel
from .preparation import DataConfig, Prepared, held_out_of, prepare
from .progress import Reporter
from .tokenizer import Tokenizer

PrintJSON = Callable[[Any], None]
JUDGED = 200  # texts before and after


def _label(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    questions = labelling.read_questions(args.questions)
    answers = labelling.Answers(args.out)
    with labelling.keyboard() as key:
        count = labelling.label(
            questions,
            answers,
            annotator=args.annotator,
            seed=args.seed,
            key=key,
            out=sys.stderr if args.json else sys.stdout,
        )
    if args.json:
        print_json({"answered": count, "answers": len(answers.records)})
    return errors.OK


def _check(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    found = preferences.load(args.paths, args.format, args.provenance)
    if args.out is not None:
        preferences.save(args.out, found)
    return _counted(args, found, reporter, print_json)


def _counted(
    args: argparse.Namespace,
    found: list[preferences.Preference],
    reporter: Reporter,
    print_json: PrintJSON,
) -> int:
    by = preferences.origins(found)
    told = ", ".join(f"{count:,} {kind}" for kind, count in by.items())
    reporter.line(f"{len(found):,} preferences: {told}")
    if args.json:
        print_json({"preferences": len(found), "by": by})
    return errors.OK


def open_model(
    path: Path,
    data: list[str] | None,
    holdout: str | None,
    remedy: str = "give --data and --holdout as in its training",
) -> tuple[LanguageModel, Tokenizer, Prepared]:
    """A model, and the text it was trained on, split as it was then. `remedy`: what the command
    offers where that is another text by now."""
    saved = checkpoint.find(path)
    checkpoint.say_skipped(saved)
    model, tokenizer = generation.load_checkpoint(saved)
    settings = saved.settings
    if settings.get("pairs") is not None and data is None:
        raise errors.UsageError(f"{path} was trained on pairs; give a text: --data FILE")
    with saved.understood():
        paths = settings.get("data") if data is None else data
        config = DataConfig(
            None if paths is None else tuple(map(str, paths)),
            held_out_of(settings.get("holdout") if holdout is None else holdout),
            tokenizer.kind,
            int(settings.get("vocab", 2048)),
        )
    # a model that started from another one may be asked about any text
    own = settings.get("init") is not None or settings.get("pairs") is not None
    prepared = prepare(config, given=tokenizer if own else None)
    if prepared.tokenizer.sha256 != tokenizer.sha256:
        raise errors.InputError(f"{path}: the model's tokenizer is not that of this text; {remedy}")
    return model, tokenizer, prepared


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("count", "prompt_tokens", "tokens"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise errors.UsageError(f"--{option} must be at least 1, got {getattr(args, name)}")
    return {
        "split": args.split,
        "count": args.count,
        "prompt": args.prompt_tokens,
        "length": args.tokens,
        "temperature": args.temperature,
        "seed": args.seed,
    }


def _from_model(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    for name in ("count", "prompt_tokens", "tokens"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise errors.UsageError(f"--{option} must be at least 1, got {getattr(args, name)}")
    model, tokenizer, prepared = open_model(args.model, args.data, args.holdout)
    files.require_place(args.out)
    found = rollouts.human_over_model(model, tokenizer, prepared.tokens, **_sampling(args))
    preferences.save(args.out, found)
    return _counted(args, found, reporter, print_json)


def _sample(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    model, tokenizer, prepared = open_model(args.model, args.data, args.holdout)
    found = rollouts.two_each(model, tokenizer, prepared.tokens, **_sampling(args))
    labelling.save_questions(args.out, [labelling.Question(*texts) for texts in found])
    reporter.line(f"{len(found):,} questions; to answer: fastlm prefs label {args.out} --out FILE")
    if args.json:
        print_json({"questions": len(found), "out": str(args.out)})
    return errors.OK


def _synthetic(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    questions = labelling.read_questions(args.questions)
    found = synthetic.prefer(questions, args.rule)
    if not found:
        raise errors.InputError(f"{args.questions}: {args.rule} prefers no text to its other one")
    preferences.save(args.out, found)
    reporter.line(f"{len(questions) - len(found):,} of {len(questions):,} questions left out: ties")
    return _counted(args, found, reporter, print_json)


PREFS = {
    "label": _label,
    "sample": _sample,
    "check": _check,
    "from-model": _from_model,
    "synthetic": _synthetic,
}


def reward_command(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    checkpoint.require_free(args.out)
    files.make_folder(args.out.parent)
    _, tokenizer = generation.load(args.model)
    train = preferences.load(args.preferences, args.format, args.provenance)
    test = preferences.load(args.test, args.format, args.provenance) if args.test else None
    config = reward.RewardConfig(
        args.kind, args.budget, args.hidden, batch=args.batch, lr=args.lr, seed=args.seed
    )
    model = reward.fit(train, tokenizer, config, reporter=reporter)
    report = None if test is None else reward.evaluate(model, test, tokenizer)
    reward.save(args.out, model, tokenizer, report)
    if report is None:
        reporter.line("not evaluated: --test FILE gives preferences to judge it by")
    else:
        for line in report.lines():
            reporter.line(line)
    reporter.line(f"written to {args.out}")
    if args.json:
        print_json({"report": None if report is None else report.to_json(), "out": str(args.out)})
    return errors.OK


def _reward_of(name: str) -> Reward:
    if Path(name).is_dir():
        return reward.load(Path(name))
    return judging.reward_function(name)


def compare(
    model: LanguageModel, tokenizer: Tokenizer, prepared: Prepared, judges: dict[str, Reward]
) -> dict[str, float]:
    """Mean reward of each judge for continuations of held-out contexts, always the same ones."""
    places = rollouts.contexts(prepared.tokens, "held", JUDGED, 24, 1, seed=11)
    prompts = torch.stack([place.prompt for place in places])
    made = rollouts.rollout(model, prompts, 40, end=tokenizer.end, seed=11)
    texts, before = made.texts(tokenizer), [tokenizer.decode(p.tolist()) for p in prompts]
    return {name: float(judging.judged(j, before, texts).mean()) for name, j in judges.items()}


def over_optimised(before: dict[str, float], after: dict[str, float]) -> bool:
    """The reward rose, and whoever was not optimised sees a loss."""
    return after["reward"] > before["reward"] and after.get("judge", 0.0) < before.get("judge", 0.0)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Of the training of the model that is improved: its text is known to what comes after."""
    own = checkpoint.find(args.model).settings
    if own or args.data is None:
        return own
    return {"data": [str(Path(path).resolve()) for path in args.data], "holdout": args.holdout}


def policy_command(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    model, tokenizer, prepared = open_model(args.model, args.data, args.holdout)
    judges: dict[str, Reward] = {"reward": _reward_of(args.reward)}
    if args.judge is not None:
        judges["judge"] = reward.load(args.judge)
    names = policy.PolicyConfig.__dataclass_fields__
    config = policy.PolicyConfig(**{k: v for k, v in vars(args).items() if k in names})
    run = policy.PolicyGradient(
        model,
        tokenizer,
        prepared.tokens,
        judges["reward"],
        config,
        out=args.out,
        reporter=reporter,
        save_every=args.save_every,
        settings=settings_of(args),
    )
    saved = checkpoint.newest(args.out)
    if saved is not None:
        if args.resume == "never":
            raise errors.UsageError(f"{args.out}: has checkpoints; choose another --out")
        checkpoint.say_skipped(saved)
        run.resume(saved, allow=("budget",))
        reporter.line(f"resumed from {saved.path}")
    reporter.line(policy.passes_of(model))
    before = compare(run.reference, tokenizer, prepared, judges)
    result = run.fit()
    if result.stopped == "interrupted":
        print("interrupted and saved; resume with the same command", file=sys.stderr)
        return errors.INTERRUPTED
    after = compare(model, tokenizer, prepared, judges)
    alarm = over_optimised(before, after)
    for name in judges:
        reporter.line(f"{name}: {before[name]:+.3f} before, {after[name]:+.3f} after")
    if alarm:
        reporter.line("OVER-OPTIMISED: the reward rose, the judge that was not optimised fell")
    described = {name: run.described()[name] for name in ("model", "data")}
    state = {"config": described, "settings": run.settings}
    checkpoint.write(args.out / "model", model.state_dict(), {}, state, tokenizer)
    reporter.line(f"stopped by {result.stopped}; model: {args.out / 'model'}")
    if args.json:
        print_json(
            {
                "stopped": result.stopped,
                "before": before,
                "after": after,
                "over_optimised": alarm,
                "history": [asdict(done) for done in result.history],
            }
        )
    return errors.OK
