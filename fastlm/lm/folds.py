"""`fastlm cv`: cross-validation by whole documents, of one model or several at equal budgets."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import data, errors, files, preparation, texts
from .kinds import KINDS
from .progress import Reporter
from .recipe import Recipe
from .trainer import Trainer

# what a model may have of its own; the rest is the same for all, or the comparison means nothing
OWN = (
    "hidden embedding layers heads kv_heads ffn context dropout tied z_loss recompute "
    "lr batch seq warmup floor weight_decay clip"
).split()


def variant(text: str) -> dict[str, Any]:
    """Settings of "gru", or of "transformer:hidden=256:layers=4".

    Raises:
        UsageError: no such kind, no such setting, or a value of another type.
    """
    kind, *given = text.split(":")
    if kind not in KINDS:
        raise errors.UsageError(f"model must be one of {', '.join(KINDS)}, got {kind!r}")
    settings: dict[str, Any] = {"model": kind}
    for part in given:
        name, _, value = part.partition("=")
        name = name.replace("-", "_")
        if name not in OWN:
            raise errors.UsageError(f"{text}: a setting is one of {', '.join(OWN)}, got {name!r}")
        settings[name] = _value(name, value, text)
    return settings


def _value(name: str, text: str, where: str) -> Any:
    wanted = str(Recipe.__dataclass_fields__[name].type)
    kinds = tuple(kind for kind in (int, float, bool) if kind.__name__ in wanted)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds:
        told = " or ".join("true or false" if kind is bool else kind.__name__ for kind in kinds)
        raise errors.UsageError(f"{where}: {name} must be {told}, got {text!r}")
    return value


def partition(documents: Sequence[texts.Document], folds: int | None, seed: int) -> dict[str, list]:
    """{fold: names of documents}: each for itself, or dealt out by size into so many folds.

    Raises:
        InputError: there are fewer documents than folds, or only one.
    """
    names = [document.name for document in documents]
    if len(names) < max(2, folds or 2):
        raise errors.InputError(
            f"cross-validation needs at least {max(2, folds or 2)} documents, got {len(names)}"
        )
    if folds is None or folds == len(names):
        return {name: [name] for name in names}
    if folds < 2:
        raise errors.UsageError(f"--folds must be at least 2, got {folds}")
    shuffled = random.Random(f"folds/{seed}").sample(list(documents), len(documents))
    sizes, dealt = [0] * folds, [list[str]() for _ in range(folds)]
    for document in sorted(shuffled, key=lambda d: -d.bytes):
        smallest = sizes.index(min(sizes))
        sizes[smallest] += document.bytes
        dealt[smallest].append(document.name)
    return {
        f"fold {i + 1}": [name for name in names if name in set(part)]
        for i, part in enumerate(dealt)
    }


def kept_documents(config: preparation.DataConfig) -> list[texts.Document]:
    """Those that cleaning does not leave out: one that repeats another is no document to hold."""
    with tempfile.TemporaryDirectory(prefix="fastlm.") as folder:
        return texts.build(
            Path(folder),
            data.paths_of(config.paths),
            reading=config.reading,
            cleaning=config.cleaning,
            keep=config.keep,
        ).documents


def train_one(recipe: Recipe, held: Sequence[str]) -> dict[str, Any]:
    """Train without these documents, the tokenizer too, and score them."""
    which = held[0] if len(held) == 1 else tuple(held)  # one name is the cache key of training too
    prepared = preparation.prepare(replace(recipe.data_config(), holdout=which))
    run = Trainer(
        recipe.make_model(prepared.tokens),
        prepared.tokens,
        prepared.tokenizer,
        replace(recipe.train_config(), evals=1),
    )
    result = run.fit()
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    assert result.score is not None
    return {
        **result.score.to_json(),
        "steps": result.steps,
        "seconds": result.seconds,
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }


def cross_validate(
    recipe: Recipe,
    variants: Sequence[str],
    *,
    folds: int | None = None,
    first: int | None = None,
    finished: Callable[[str, str, dict[str, Any]], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {fold: score}}: every document is held out once; `finished` hears of each score."""
    own = {text: variant(text) for text in variants}
    shared = {k: v for k, v in asdict(recipe).items() if k not in (*OWN, "model", "holdout")}
    parts = partition(kept_documents(recipe.data_config()), folds, recipe.seed)
    found: dict[str, dict[str, dict[str, Any]]] = {text: {} for text in variants}
    for fold, names in list(parts.items())[:first]:
        for text, settings in own.items():
            found[text][fold] = train_one(Recipe.of({}, {**shared, **settings}), names)
            if finished is not None:
                finished(fold, text, found[text][fold])
    return found


def summary(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each model: mean and deviation over folds, and in how many it is the best one."""
    result = {}
    for text, scores in found.items():
        bits = [score["bits_per_byte"] for score in scores.values()]
        best = [min(f[fold]["bits_per_byte"] for f in found.values()) for fold in scores]
        result[text] = {
            "mean": statistics.mean(bits),
            "deviation": statistics.stdev(bits) if len(bits) > 1 else 0.0,
            "best_in": sum(a == b for a, b in zip(bits, best, strict=True)),
        }
    return result


def table(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Folds below each other, models beside each other, in bits per byte."""
    widths = {text: max(11, len(text)) for text in found}
    folds = list(next(iter(found.values())))
    left = max(len("held out"), len("deviation"), *map(len, folds))

    def row(name: str, cells: Iterable[str]) -> str:
        placed = zip(cells, widths.values(), strict=True)
        return f"{name:<{left}}" + "".join(f"  {cell:>{width}}" for cell, width in placed)

    numbers = summary(found).values()
    lines = [row("held out", found)]
    for fold in folds:
        lines.append(row(fold, (f"{s[fold]['bits_per_byte']:.3f}" for s in found.values())))
    lines.append(row("mean", (f"{n['mean']:.3f}" for n in numbers)))
    lines.append(row("deviation", (f"{n['deviation']:.3f}" for n in numbers)))
    if len(found) > 1:
        lines.append(row("best in", (f"{n['best_in']} of {len(folds)}" for n in numbers)))
    return lines


def command(args: argparse.Namespace, reporter: Reporter, print_json: Callable[[Any], None]) -> int:
    if args.first is not None and args.first < 1:
        raise errors.UsageError(f"--first must be at least 1, got {args.first}")
    variants = list(dict.fromkeys(args.compare.split(",")))
    if args.out is not None:
        files.require_place(args.out)
    values = {"budget": args.budget, "vocab": args.vocab, "seed": args.seed, "data": args.data}
    runs: dict[str, dict[str, dict[str, Any]]] = {text: {} for text in variants}

    def result() -> dict[str, Any]:
        done = {text: scores for text, scores in runs.items() if scores}
        bits = {t: {f: s["bits_per_byte"] for f, s in done[t].items()} for t in done}
        return {"bits_per_byte": bits, "summary": summary(done), "runs": done, **values}

    def finished(fold: str, text: str, score: dict[str, Any]) -> None:
        runs[text][fold] = score
        reporter.line(
            f"held out {fold}, {text}: {score['bits_per_byte']:.3f} bits/byte, perplexity "
            f"{score['perplexity']:.1f}, {score['steps']} steps in {score['seconds']:.0f} s, "
            f"{score['parameters']:,} parameters"
        )
        if args.out is not None and text == variants[-1]:
            files.write_json(args.out, result())
        if reporter.closed:
            raise KeyboardInterrupt

    cross_validate(
        Recipe.of({}, values), variants, folds=args.folds, first=args.first, finished=finished
    )
    reporter.line(f"bits per byte, {args.budget} of training each:")
    for line in table(runs):
        reporter.line(line)
    if args.json:
        print_json(result())
    return errors.OK
