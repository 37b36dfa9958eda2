"""`fastlm summarize`, and `fastlm eval` of what was trained on pairs of prompt and target."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import abstractive, checkpoint, data, errors, generation, metrics, pairdata, sources
from . import summarize as extracts
from .evaluation import evaluate
from .kinds import LanguageModel
from .progress import Reporter
from .recipe import Recipe
from .tokenizer import Tokenizer

PrintJSON = Callable[[Any], None]
SENTENCES = 3
SHOWN = 5  # summaries beside what a person wrote


def _settings(path: Path) -> dict[str, Any]:
    """What the options of its training were."""
    return checkpoint.find(path).settings


def trained_on_pairs(path: Path) -> bool:
    return _settings(path).get("pairs") is not None


def eval_command(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    """The targets that were held out in training."""
    model, tokenizer = generation.load(args.model)
    config = Recipe.of(_settings(args.model), {}).pair_config()
    store = pairdata.prepare_pairs(config, tokenizer).tokens
    found, count = evaluate(model, store, tokenizer), len(store.rows("held"))
    reporter.line(f"{count:,} held-out pairs: {found}")
    if args.json:
        print_json({"pairs": count, **found.to_json()})
    return errors.OK


def summarize_command(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    if (args.path is None) == (args.pairs is None):
        raise errors.UsageError("a text to summarise, or --pairs FILE to be compared with: one")
    if args.pairs is not None:
        return _summarize_pairs(args, reporter, print_json)
    model, tokenizer = generation.load(args.model)
    if Path(args.path).is_dir():
        raise errors.InputError(f"{args.path}: a folder, one text is expected")
    ((_, pieces),) = sources.read([args.path], sources.Reading("text"))
    text = data.clean(sources.text_of(pieces))[0]
    (summary,) = _summaries(args, model, tokenizer, [text], SENTENCES)
    count = SENTENCES if args.sentences is None else args.sentences
    result: dict[str, Any] = {"summary": summary, "lead": extracts.lead(text, count)}
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


def _summaries(
    args: argparse.Namespace,
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: list[str],
    sentences: int,
) -> list[str]:
    """Of `sentences` sentences where the options do not say how many."""
    if not args.abstractive:
        count = sentences if args.sentences is None else args.sentences
        return [extracts.summarize(model, tokenizer, text, count) for text in texts]
    return abstractive.summaries(
        model,
        tokenizer,
        texts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        longest=_settings(args.model).get("longest", abstractive.LONGEST),
    )


def _summarize_pairs(args: argparse.Namespace, reporter: Reporter, print_json: PrintJSON) -> int:
    """ROUGE on the pairs that a model of these files was not trained on."""
    if args.count is not None and args.count < 1:
        raise errors.UsageError(f"--count must be at least 1, got {args.count}")
    settings, values = _settings(args.model), {"pairs": args.pairs, "format": "summary"}
    if settings.get("pairs") is None:
        reporter.line("note: this model was not trained on pairs")
    for name in ("group", "holdout"):
        own = settings.get(name) if settings.get("pairs") is not None else None
        values[name] = getattr(args, name) or own
    found = pairdata.held_out(Recipe.of({}, values).pair_config(), args.split)[: args.count]
    model, tokenizer = generation.load(args.model)
    texts = [abstractive.text_of(pair) for pair in found]
    made = _summaries(args, model, tokenizer, texts, 1)
    compared = abstractive.rouge_beside_lead(made, texts, [pair.target for pair in found])
    for pair, summary in list(zip(found, made, strict=True))[:SHOWN]:
        reporter.line(f"wanted: {pair.target}\n  made: {summary}")
    for line in compared.lines("abstractive" if args.abstractive else "extractive"):
        reporter.line(line)
    if args.json:
        examples = [
            {"text": text, "reference": pair.target, "summary": summary}
            for text, pair, summary in zip(texts, found, made, strict=True)
        ]
        print_json({**compared.to_json(), "summaries": examples})
    return errors.OK
