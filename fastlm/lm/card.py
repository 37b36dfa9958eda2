"""A data card: what a corpus is made of, what was removed, and what nobody looked at."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import data
from .preparation import DataConfig
from .texts import TextStore

LISTED = 50

_LIMITS = """\
## What was not examined

- Bias: whose voices the text holds and whose are missing, stereotypes and offensive language. A
  model learns them with the rest; nothing here measures or removes them.
- Personal data: names, addresses and numbers are not searched for.
- Truth: nothing is checked against facts.
- Language: the documents are taken to be in the language in which the model is meant to write.
- Copyright: the terms above are what was stated when the card was made.
"""


def summary(numbers: dict[str, Any]) -> list[str]:
    """The statistics in two lines."""
    common = ", ".join(word[:30] for word, _ in numbers["common_words"][:10])
    return [
        f"{numbers['documents']:,} documents, {numbers['bytes']:,} bytes, "
        f"{numbers['characters']:,} characters, {numbers['lines']:,} lines, "
        f"{numbers['words']:,} words ({numbers['distinct_words']:,} distinct)",
        f"commonest words: {common}",
    ]


def _composition(store: TextStore, total: int) -> list[str]:
    lines = ["| document | bytes | share |", "|---|---:|---:|"]
    largest = sorted(store.documents, key=lambda d: -d.bytes)
    for document in largest[:LISTED]:
        share = document.bytes / max(1, total)
        lines.append(f"| {document.name} | {document.bytes:,} | {share:.1%} |")
    if rest := largest[LISTED:]:
        size = sum(d.bytes for d in rest)
        lines.append(f"| {len(rest):,} more | {size:,} | {size / max(1, total):.1%} |")
    return lines


def _origin(config: DataConfig) -> str:
    if config.paths is None:
        return (data.AUSTEN / "SOURCES.md").read_text(encoding="utf-8").split("\n", 1)[1].strip()
    return "\n".join(f"- {Path(path).name or path}" for path in config.paths)


def text(
    store: TextStore, numbers: dict[str, Any], config: DataConfig, *, title: str, terms: str
) -> str:
    """Markdown."""
    changes = {k: v for k, v in asdict(config.cleaning).items() if v}
    changes.pop("stop_words", None)
    names = ", ".join(name.replace("_", " ") for name in changes) or "none"
    if config.cleaning.stop_words:
        names += f", {len(config.cleaning.stop_words)} stop words"
    near = config.keep.near
    counted = [f"- {n:,} {what}" for what, n in store.report.counts.items()] or ["- nothing"]
    left = [f"- {n:,} {what}" for what, n in store.report.reasons.items()] or ["- none"]
    named = [f"  - {e['name']}: {e['reason']}" for e in store.report.removed[:LISTED]]
    default = "six novels by Jane Austen" if config.paths is None else "text corpus"
    parts = [
        f"# Data card: {title or default}",
        "## Where it comes from",
        _origin(config),
        "## Terms",
        terms or ("see above" if config.paths is None else "not stated"),
        "## Size",
        "\n".join(summary(numbers)),
        f"{numbers['distinct_characters']:,} distinct characters; not ASCII: "
        f"{numbers['non_ascii_characters']:,} characters.",
        "## Composition",
        "\n".join(_composition(store, numbers["bytes"])),
        "## Cleaning",
        f"Steps: {names}. What they changed:",
        "\n".join(counted),
        *[f"Note: {note}." for note in config.cleaning.notes()],
        "## Documents left out",
        f"Equal text, {'' if near is None else f'resemblance of {near:g} and more, '}fewer than "
        f"{config.keep.least} characters:",
        "\n".join(left + named),
        _LIMITS.rstrip(),
    ]
    return "\n\n".join(parts) + "\n"
