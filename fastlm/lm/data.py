"""Text in memory: the shipped novels or a few files of one's own, cleaned.

What is larger goes through `texts`, in pieces. Both read by `sources` and clean by `cleaning`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import sources
from .cleaning import Cleaner, Cleaning, clean

__all__ = ["AUSTEN", "Cleaning", "Corpus", "Document", "clean", "load", "paths_of"]

AUSTEN = Path(__file__).parent / "assets" / "austen"


@dataclass
class Document:
    name: str
    text: str

    def pieces(self) -> Iterator[str]:
        yield self.text

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


@dataclass
class Corpus:
    documents: list[Document]
    counts: Counter[str] = field(default_factory=Counter)

    def names(self) -> list[str]:
        return [document.name for document in self.documents]

    def clean(self, options: Cleaning | None = None) -> Corpus:
        """Every document cleaned; `counts` says what was changed."""
        cleaner = Cleaner(options)
        documents = [Document(d.name, cleaner.clean(d.text)) for d in self.documents]
        return Corpus(documents, self.counts + cleaner.counts)


def paths_of(paths: Sequence[str | Path] | str | Path | None) -> list[str | Path]:
    """The files that `None` stands for: the six novels."""
    if paths is None:
        return list(sorted(AUSTEN.glob("*.txt.gz")))
    return [paths] if isinstance(paths, str | Path) else list(paths)


def load(
    paths: Sequence[str | Path] | str | Path | None = None,
    reading: sources.Reading | None = None,
) -> Corpus:
    """Read text files, folders of them, or (None) the six novels shipped with fastlm.

    Raises:
        InputError: a file is missing, empty, damaged or not text; the message names it.
    """
    tally = sources.Tally()
    documents = [
        Document(name, sources.text_of(pieces))
        for name, pieces in sources.read(paths_of(paths), reading, tally)
    ]
    return Corpus(documents, tally.counts)
