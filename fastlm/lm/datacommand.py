"""`fastlm data`: from files to cleaned text, statistics, a data card, or a token store."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import card, cleaning, data, errors, files, preparation, sources, store, texts
from .progress import Reporter

# more texts than this become one file of JSON lines instead of a file each
FILES = 1000
DOCUMENTS = "documents.jsonl"


def _config(args: argparse.Namespace) -> preparation.DataConfig:
    """What all steps read, and how."""
    near = None
    if args.near_duplicates != "off":
        try:
            near = float(args.near_duplicates)
        except ValueError:
            raise errors.UsageError(
                f"--near-duplicates must be a share or off, got {args.near_duplicates!r}"
            ) from None
    if args.no_clean:
        changes = cleaning.Cleaning.off()
        if args.keep:
            raise errors.UsageError("--keep is for cleaning, not for --no-clean")
    else:
        words = cleaning.stop_words(args.stop_words) if args.stop_words else ()
        changes = cleaning.Cleaning(
            mojibake=args.fix_encoding,
            punctuation=args.drop_punctuation,
            stop_words=words,
            **cleaning.kept(args.keep),
        )
    reading = sources.Reading(
        args.format or "auto", args.column or "text", args.encoding or "utf-8", args.strip_html
    )
    return preparation.DataConfig(
        tuple(args.paths) or None,
        preparation.held_out_of(getattr(args, "holdout", None)),
        getattr(args, "tokenizer", "auto"),
        getattr(args, "vocab", 2048),
        changes,
        reading,
        texts.Filter(near, args.min_characters, args.skip_unusable),
    )


@contextmanager
def _cleaned(config: preparation.DataConfig, beside: Path | None) -> Iterator[texts.TextStore]:
    with tempfile.TemporaryDirectory(dir=beside, prefix=".texts.") as folder:
        yield texts.build(
            Path(folder),
            data.paths_of(config.paths),
            reading=config.reading,
            cleaning=config.cleaning,
            keep=config.keep,
        )


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise errors.UsageError(f"{out}: is there already; choose another --out")
    return out.parent


def _write_documents(folder: Path, cleaned: texts.TextStore) -> None:
    """A text file for each document; one of JSON lines for records, and when there are many."""
    documents = cleaned.documents
    if sum(":" not in document.name for document in documents) <= FILES:
        for document in documents:
            if ":" not in document.name:
                with (folder / f"{document.name}.txt").open("w", encoding="utf-8") as file:
                    for piece in document.pieces():
                        file.write(piece)
        documents = [document for document in documents if ":" in document.name]
    if not documents:
        return
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as file:
        for document in documents:
            record = {"name": document.name, "text": document.text}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _clean(args: argparse.Namespace, reporter: Reporter) -> dict[str, Any]:
    config, parent = _config(args), _parent(args.out)
    with _cleaned(config, parent) as cleaned:
        numbers = texts.statistics(cleaned)
        report = {**vars(cleaned.report), "statistics": numbers, "notes": config.cleaning.notes()}

        def fill(folder: Path) -> None:
            _write_documents(folder, cleaned)
            files.write_json(folder / "report.json", report)

        files.write_folder(args.out, fill)
        for line in [*cleaned.report.lines(), *card.summary(numbers)]:
            reporter.line(line)
    reporter.line(f"written to {args.out}")
    return report


def _stats(args: argparse.Namespace, reporter: Reporter) -> dict[str, Any]:
    config = _config(args)
    with _cleaned(config, None) as cleaned:
        numbers = texts.statistics(cleaned)
        for line in [*cleaned.report.lines(), *card.summary(numbers)]:
            reporter.line(line)
        return {**vars(cleaned.report), "statistics": numbers, "notes": config.cleaning.notes()}


def _card(args: argparse.Namespace, reporter: Reporter) -> dict[str, Any]:
    config = _config(args)
    with _cleaned(config, None) as cleaned:
        numbers = texts.statistics(cleaned)
        text = card.text(cleaned, numbers, config, title=args.title, terms=args.license)
    if args.out is None:
        if not args.json:
            print(text, end="")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
        reporter.line(f"written to {args.out}")
    return {"card": text, "statistics": numbers}


def _tokenize(args: argparse.Namespace, reporter: Reporter) -> dict[str, Any]:
    config, parent = _config(args), _parent(args.out)
    with _cleaned(config, parent) as cleaned:
        for line in cleaned.report.lines():
            reporter.line(line)

        def fill(folder: Path) -> None:
            preparation.encode(folder, cleaned, config)

        files.write_folder(args.out, fill)
    found = preparation.open_folder(args.out)
    for line in preparation.describe(found)[1:]:
        reporter.line(line)
    reporter.line(f"written to {args.out}: {store.TOKENS}, {store.INDEX}, tokenizer.json")
    return {**preparation.summary(found), "notes": config.cleaning.notes()}


_STEPS: dict[str, Callable[[argparse.Namespace, Reporter], dict[str, Any]]] = {
    "clean": _clean,
    "stats": _stats,
    "card": _card,
    "tokenize": _tokenize,
}


def run(args: argparse.Namespace, reporter: Reporter, print_json: Callable[[Any], None]) -> int:
    result = _STEPS[args.step](args, reporter)
    for note in result.get("notes", ()):
        reporter.line(f"note: {note}")
    if args.json:
        print_json(result)
    return errors.OK
