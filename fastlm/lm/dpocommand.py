"""`fastlm dpo`: from preferences to a model that prefers the same, without writing in between."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from . import checkpoint, errors, generation, learning, pairdata, preferences
from .dpo import DPO
from .evaluation import Score, evaluate
from .kinds import LanguageModel
from .objectives import DPOConfig
from .pairs import PairStore
from .progress import Reporter
from .recipe import Recipe
from .store import TokenStore
from .tokenizer import Tokenizer

PrintJSON = Callable[[Any], None]
TOKENS = 32768  # of held-out text, before and after


def _held_out(
    args: argparse.Namespace, settings: dict[str, Any], tokenizer: Tokenizer, reporter: Reporter
) -> TokenStore | PairStore | None:
    """What the model was not trained on; None where its text is not there any more."""
    try:
        if args.data is None and settings.get("pairs") is not None:
            return pairdata.prepare_pairs(Recipe.of(settings, {}).pair_config(), tokenizer).tokens
        remedy = "give --data and --data-holdout as in its training"
        return learning.open_model(args.model, args.data, args.data_holdout, remedy)[2].tokens
    except errors.LMError as error:
        if args.data is not None:
            raise
        reporter.line(f"held-out text is not measured, give --data: {error}")
        return None


def _resume(args: argparse.Namespace, run: DPO, reporter: Reporter) -> None:
    saved = checkpoint.newest(args.out)
    if saved is None:
        return
    if args.resume == "never":
        raise errors.UsageError(f"{args.out}: has checkpoints; choose another --out")
    checkpoint.say_skipped(saved)
    run.resume(saved, allow=("budget",))
    reporter.line(f"resumed from {saved.path}")


def command(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    checkpoint.require()
    saved = checkpoint.find(args.model)
    checkpoint.say_skipped(saved)
    model, tokenizer = generation.load_checkpoint(saved)
    settings = saved.settings
    found = preferences.load(args.preferences, args.format, args.provenance)
    test = preferences.load(args.test, args.format, args.provenance) if args.test else None
    names = DPOConfig.__dataclass_fields__
    config = DPOConfig(**{k: v for k, v in vars(args).items() if k in names})
    by = ", ".join(f"{count:,} {kind}" for kind, count in preferences.origins(found).items())
    reporter.line(f"{len(found):,} preferences: {by}")
    run = DPO(
        model,
        tokenizer,
        found,
        config,
        test=test,
        holdout=args.holdout,
        out=args.out,
        reporter=reporter,
        save_every=args.save_every,
        settings=settings,
    )
    held = _held_out(args, settings, tokenizer, reporter)
    before = _text(model, held, tokenizer)  # the starting model is still in it
    _resume(args, run, reporter)
    result = run.fit()
    if result.stopped == "interrupted":
        where = shlex.quote(str(args.out))
        print(f"interrupted and saved in {where}; the same command goes on", file=sys.stderr)
        return errors.INTERRUPTED
    after = _text(model, held, tokenizer)
    reporter.line(f"before: {result.before}")
    reporter.line(f" after: {result.after}")
    if before is not None and after is not None:
        reporter.line(
            f"held-out text: {before.bits_per_byte:.3f} bits/byte before, "
            f"{after.bits_per_byte:.3f} after"
        )
    path = args.out / "model"
    state = {"config": run.described(), "settings": settings}
    checkpoint.write(path, model.state_dict(), {}, state, tokenizer)
    reporter.line(f"{result.steps} steps in {result.seconds:.0f} s; model: {path}")
    if args.json:
        texts = {"before": before, "after": after}
        print_json(
            {
                **asdict(result),
                "held_out_text": {k: None if v is None else v.to_json() for k, v in texts.items()},
                "model": str(path),
            }
        )
    return errors.OK


def _text(
    model: LanguageModel, held: TokenStore | PairStore | None, tokenizer: Tokenizer
) -> Score | None:
    return None if held is None else evaluate(model, held, tokenizer, limit=TOKENS)
