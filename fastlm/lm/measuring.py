"""`fastlm eval`: how good a model is."""

from __future__ import annotations

import argparse
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import (
    checkpoint,
    errors,
    folds,
    generation,
    learning,
    metrics,
    pairscommand,
    preferences,
    reward,
    rollouts,
    texts,
)
from . import store as stores
from .evaluation import Score, by_document
from .kinds import LanguageModel
from .progress import Reporter
from .tokenizer import Tokenizer

PrintJSON = Callable[[Any], None]
TEXT = 40  # tokens of a sample
LISTED = 50  # documents in a table


@contextmanager
def _store_of(paths: list[str], tokenizer: Tokenizer) -> Iterator[stores.TokenStore]:
    """These texts as tokens of this tokenizer, all held out."""
    with tempfile.TemporaryDirectory(prefix="fastlm.") as folder:
        cleaned = texts.build(Path(folder), paths, keep=texts.Filter(near=None))
        stores.write(Path(folder), tokenizer, {"held": cleaned.documents})
        yield stores.TokenStore(Path(folder))


def table(scores: dict[str, Score]) -> list[str]:
    """Documents below each other, then all of them."""
    shown = list(scores)[:LISTED]
    width = max(len("document"), *map(len, shown))

    def row(name: str, score: Score) -> str:
        return (
            f"{name:<{width}}  {score.bits_per_byte:9.3f}  {score.perplexity:10.1f}  "
            f"{score.nats_per_token:10.3f}  {score.tokens:10,}"
        )

    lines = [f"{'document':<{width}}  bits/byte  perplexity  nats/token      tokens"]
    lines += [row(name, scores[name]) for name in shown]
    if len(shown) < len(scores):
        lines.append(f"and {len(scores) - len(shown):,} more, all of them in --json")
    if len(scores) > 1:
        lines.append(row("all", total(scores)))
    return lines


def total(scores: dict[str, Score]) -> Score:
    """All documents as one: every token and every byte counts the same."""
    tokens = sum(s.tokens for s in scores.values())
    size = sum(s.bytes for s in scores.values())
    nats = sum(s.nats_per_token * s.tokens for s in scores.values())
    return Score(nats / tokens, nats / math.log(2) / max(1, size), tokens, size)


def quality(
    model: LanguageModel, tokenizer: Tokenizer, store: stores.TokenStore, count: int, seed: int
) -> dict[str, Any]:
    """Repetition of continuations of held-out contexts, beside that of what follows there, and how
    well the model's own likelihood tells the two apart."""
    places = rollouts.contexts(store, "held", count, 24, TEXT, seed)
    prompts = torch.stack([place.prompt for place in places])
    made = rollouts.rollout(model, prompts, TEXT, end=tokenizer.end, seed=seed)
    following = torch.stack([place.following for place in places])
    texts_of = {
        "": made.texts(tokenizer),
        "_of_the_text": [tokenizer.decode(row) for row in following.tolist()],
    }
    found: dict[str, Any] = {}
    for whose, written in texts_of.items():
        found |= {f"distinct_{n}{whose}": metrics.distinct(written, n) for n in (1, 2, 3)}
        found[f"repetition_4{whose}"] = metrics.repetition(written)
    with torch.no_grad():
        human = rollouts.logprobs_of(model, prompts, following).mean(1).tolist()
    own = (made.logprobs.sum(1) / made.mask.sum(1)).tolist()
    found["auc_own"] = metrics.auc_interval(own, human, seed=seed).to_json()
    return found


def sample_lines(count: int, numbers: dict[str, Any]) -> list[str]:
    def both(name: str, form: str) -> str:
        return f"{numbers[name]:{form}} ({numbers[f'{name}_of_the_text']:{form}})"

    distinct = ", ".join(f"distinct-{n} {both(f'distinct_{n}', '.2f')}" for n in (1, 2, 3))
    return [
        f"{count} texts of {TEXT} tokens, and what the author wrote there: {distinct}, repeated "
        f"4-grams {both('repetition_4', '.1%')}",
        "likelier to the model than the author's: AUC-ROC "
        f"{metrics.Interval(**numbers['auc_own'])}; 0.5 says they cannot be told apart by it",
    ]


def _report(
    args: argparse.Namespace,
    model: LanguageModel,
    tokenizer: Tokenizer,
    store: stores.TokenStore,
    reporter: Reporter,
    print_json: PrintJSON,
) -> int:
    scores = by_document(model, store, tokenizer)
    for line in table(scores):
        reporter.line(line)
    found: dict[str, Any] = {name: score.to_json() for name, score in scores.items()}
    result: dict[str, Any] = {"documents": found, "all": total(scores).to_json()}
    if args.samples:
        try:
            numbers = quality(model, tokenizer, store, args.samples, args.seed)
        except (errors.InputError, errors.MissingExtra) as error:
            reporter.line(f"no samples: {error}")
        else:
            result["samples"] = numbers
            for line in sample_lines(args.samples, numbers):
                reporter.line(line)
    if args.json:
        print_json(result)
    return errors.OK


def _eval_reward(
    saved: checkpoint.Checkpoint,
    args: argparse.Namespace,
    reporter: Reporter,
    print_json: PrintJSON,
) -> int:
    if not args.paths:
        raise errors.UsageError(f"{args.model} is a reward model: name files of preferences")
    judge = reward.load(saved.path)
    found = preferences.load(args.paths)
    report = reward.evaluate(judge.model, found, judge.tokenizer, seed=args.seed)
    for line in report.lines():
        reporter.line(line)
    if args.json:
        print_json(report.to_json())
    return errors.OK


def _eval(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    if args.samples < 0:
        raise errors.UsageError(f"--samples must not be negative, got {args.samples}")
    saved = checkpoint.find(args.model)
    if reward.is_reward(saved):
        return _eval_reward(saved, args, reporter, print_json)
    if not args.paths and pairscommand.trained_on_pairs(args.model):
        return pairscommand.eval_command(args, reporter, print_json)
    if not args.paths:
        remedy = (
            f"it has changed since; name a text: fastlm eval {shlex.quote(str(args.model))} PATH"
        )
        model, tokenizer, prepared = learning.open_model(args.model, None, None, remedy)
        return _report(args, model, tokenizer, prepared.tokens, reporter, print_json)
    checkpoint.say_skipped(saved)
    model, tokenizer = generation.load_checkpoint(saved)
    with _store_of(args.paths, tokenizer) as store:
        return _report(args, model, tokenizer, store, reporter, print_json)


COMMANDS = {"eval": _eval, "cv": folds.command, "summarize": pairscommand.summarize_command}
