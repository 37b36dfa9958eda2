"""`fastlm eval`, `fastlm cv`, `fastlm summarize`: how good a model is, and what it finds."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import (
    data,
    errors,
    files,
    generation,
    learning,
    metrics,
    preparation,
    rollouts,
    sources,
    texts,
)
from . import store as stores
from . import summarize as extracts
from .evaluation import Score, by_document
from .kinds import LanguageModel
from .progress import Reporter
from .recipe import DEFAULTS, Recipe
from .tokenizer import Tokenizer
from .trainer import Trainer

PrintJSON = Callable[[Any], None]
TEXT = 40  # tokens of a sample


@contextmanager
def _store_of(paths: list[str], tokenizer: Tokenizer) -> Iterator[stores.TokenStore]:
    """These texts as tokens of this tokenizer, all held out."""
    with tempfile.TemporaryDirectory(prefix="fastlm.") as folder:
        cleaned = texts.build(Path(folder), paths, keep=texts.Filter(near=None))
        stores.write(Path(folder), tokenizer, {"held": cleaned.documents})
        yield stores.TokenStore(Path(folder))


def table(scores: dict[str, Score]) -> list[str]:
    """Documents below each other, then all of them."""
    width = max(len("all"), *map(len, scores))
    lines = [f"{'document':<{width}}  bits/byte  perplexity  nats/token      tokens"]
    rows = [*scores.items()]
    if len(rows) > 1:
        rows.append(("all", total(scores)))
    for name, score in rows:
        lines.append(
            f"{name:<{width}}  {score.bits_per_byte:9.3f}  {score.perplexity:10.1f}  "
            f"{score.nats_per_token:10.3f}  {score.tokens:10,}"
        )
    return lines


def total(scores: dict[str, Score]) -> Score:
    """All documents as one: every token and every byte counts the same."""
    tokens = sum(s.tokens for s in scores.values())
    size = sum(s.bytes for s in scores.values())
    nats = sum(s.nats_per_token * s.tokens for s in scores.values())
    bits = sum(s.bits_per_byte * s.bytes for s in scores.values())
    return Score(nats / tokens, bits / max(1, size), tokens, size)


def quality(
    model: LanguageModel, tokenizer: Tokenizer, store: stores.TokenStore, count: int, seed: int
) -> dict[str, float]:
    """Repetition of continuations of held-out contexts, beside that of what follows there."""
    places = rollouts.contexts(store, "held", count, 24, TEXT, seed)
    prompts = torch.stack([place.prompt for place in places])
    made = rollouts.rollout(model, prompts, TEXT, end=tokenizer.end, seed=seed).texts(tokenizer)
    real = [tokenizer.decode(place.following.tolist()) for place in places]
    return {
        "distinct_2": metrics.distinct(made),
        "distinct_2_of_the_text": metrics.distinct(real),
        "repetition_4": metrics.repetition(made),
        "repetition_4_of_the_text": metrics.repetition(real),
    }


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
        except errors.InputError as error:
            reporter.line(f"no samples: {error}")
        else:
            result["samples"] = numbers
            reporter.line(
                f"{args.samples} texts of {TEXT} tokens: distinct-2 {numbers['distinct_2']:.2f} "
                f"(the text itself {numbers['distinct_2_of_the_text']:.2f}), repeated 4-grams "
                f"{numbers['repetition_4']:.1%} ({numbers['repetition_4_of_the_text']:.1%})"
            )
    if args.json:
        print_json(result)
    return errors.OK


def _eval(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    if args.samples < 0:
        raise errors.UsageError(f"--samples must not be negative, got {args.samples}")
    if not args.paths:
        model, tokenizer, prepared = learning.open_model(args.model, None, None)
        return _report(args, model, tokenizer, prepared.tokens, reporter, print_json)
    model, tokenizer = generation.load(args.model)
    with _store_of(args.paths, tokenizer) as store:
        return _report(args, model, tokenizer, store, reporter, print_json)


def cross_validate(
    recipe: Recipe, kinds: list[str], folds: int | None, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """{kind: {held-out document: bits per byte}}: every document is held out once, the tokenizer
    learned without it too, and every kind gets the same budget."""
    names = [name for name, _ in sources.read(data.paths_of(recipe.data))]
    if len(names) < 2:
        raise errors.InputError("cross-validation needs at least 2 documents")
    found: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for name in names[:folds]:
        for kind in kinds:
            settings = {**recipe.to_json(), "holdout": name, "model": kind}
            for option in DEFAULTS["transformer"]:
                settings.pop(option)  # each kind has its own
            chosen = Recipe.of({}, settings)
            prepared = preparation.prepare(chosen.data_config())
            run = Trainer(
                chosen.make_model(prepared.tokens),
                prepared.tokens,
                prepared.tokenizer,
                replace(chosen.train_config(), evals=1),
            )
            result = run.fit()
            if result.stopped == "interrupted":
                raise KeyboardInterrupt
            assert result.score is not None
            found[kind][name] = result.score.bits_per_byte
            reporter.line(f"held out {name}, {kind}: {result.score}, {result.steps} steps")
    return found


def _cv(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    kinds = args.model.split(",")
    if args.out is not None:
        files.require_place(args.out)
    values = {"budget": args.budget, "vocab": args.vocab, "seed": args.seed, "data": args.data}
    found = cross_validate(Recipe.of({}, values), kinds, args.folds, reporter)
    summary = {}
    for kind, scores in found.items():
        bits = list(scores.values())
        spread = statistics.stdev(bits) if len(bits) > 1 else 0.0
        summary[kind] = {"mean": statistics.mean(bits), "deviation": spread}
        reporter.line(
            f"{kind}: {statistics.mean(bits):.3f} bits/byte, deviation {spread:.3f} over "
            f"{len(bits)} documents, {args.budget} each"
        )
    result = {"bits_per_byte": found, "summary": summary, "budget": args.budget}
    if args.out is not None:
        files.write_json(args.out, result)
    if args.json:
        print_json(result)
    return errors.OK


def _summarize(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    model, tokenizer = generation.load(args.model)
    if Path(args.path).is_dir():
        raise errors.InputError(f"{args.path}: a folder, one text is expected")
    ((_, pieces),) = sources.read([args.path], sources.Reading("text"))
    text = data.clean(sources.text_of(pieces))[0]
    summary = extracts.summarize(model, tokenizer, text, args.sentences)
    result: dict[str, Any] = {"summary": summary, "lead": extracts.lead(text, args.sentences)}
    if args.reference is not None:
        try:
            reference = args.reference.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise errors.InputError(f"{args.reference}: cannot be read ({error})") from None
        result["rouge"] = metrics.rouge([summary], [reference])
        result["rouge_lead_1"] = metrics.rouge([extracts.lead(text)], [reference])
    if args.json:
        print_json(result)
        return errors.OK
    print(summary)
    for name in ("rouge", "rouge_lead_1"):
        if name in result:
            told = ", ".join(f"{k} {v:.3f}" for k, v in result[name].items())
            reporter.line(f"{name.replace('_', ' ')}: {told}")
    return errors.OK


COMMANDS = {"eval": _eval, "cv": _cv, "summarize": _summarize}
