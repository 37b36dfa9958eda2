"""Cleaned text on disk: what every later step reads, in pieces, whatever its size."""

from __future__ import annotations

import codecs
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from . import duplicates, files, sources
from .cleaning import Cleaner, Cleaning
from .errors import InputError, UsageError

TEXT = "text.bin"
INDEX = "texts.json"
BLOCK = 1 << 20
# removed documents that the report names; the others are counted
NAMED = 100
MARKS = "\"'.,;:!?()-_"
LONGEST_WORD = 1 << 12


@dataclass(frozen=True)
class Filter:
    """Which documents are left out. `near`: resemblance from which one repeats another; None: only
    equal ones. `least`: characters that a document must have. `unusable`: files that are no text
    are left out too, instead of an error."""

    near: float | None = 0.8
    least: int = 1
    unusable: bool = False

    def __post_init__(self) -> None:
        if self.least < 0:
            raise UsageError(f"min_characters must not be negative, got {self.least}")


@dataclass(frozen=True)
class Document:
    """A part of the store, from byte `start` to `stop`."""

    name: str
    path: Path
    start: int
    stop: int

    def pieces(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left:
                block = file.read(min(BLOCK, left))
                if not block:
                    raise InputError(f"{self.path}: shorter than its index says")
                left -= len(block)
                if text := decoder.decode(block, not left):
                    yield text

    @property
    def text(self) -> str:
        return "".join(self.pieces())

    @property
    def bytes(self) -> int:
        return self.stop - self.start


@dataclass
class Report:
    """What was changed and what was left out, and why."""

    read: int = 0
    kept: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    removed: list[dict[str, str]] = field(default_factory=list)

    def remove(self, name: str, reason: str, detail: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.removed) < NAMED:
            self.removed.append({"name": name, "reason": detail})

    def lines(self) -> list[str]:
        changed = ", ".join(f"{n:,} {what}" for what, n in self.counts.items() if n)
        lines = [f"cleaned: {changed or 'nothing to change'}"]
        lines += [f"  first of these: {example}" for example in self.examples.values()]
        if self.reasons:
            why = ", ".join(f"{n:,} {what}" for what, n in self.reasons.items())
            lines.append(f"left out: {self.read - self.kept:,} of {self.read:,} documents ({why})")
            lines += [f"  {entry['name']}: {entry['reason']}" for entry in self.removed[:5]]
        return lines


class TextStore:
    """Documents in one file of UTF-8, with an index of names."""

    def __init__(self, folder: Path) -> None:
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.report = Report(**index["report"])
            self.documents = [
                Document(name, folder / TEXT, *at) for name, *at in index["documents"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: no cleaned text ({error})") from None

    def names(self) -> list[str]:
        return [document.name for document in self.documents]


def build(
    folder: Path,
    paths: Sequence[str | Path],
    *,
    reading: sources.Reading | None = None,
    cleaning: Cleaning | None = None,
    keep: Filter | None = None,
) -> TextStore:
    """Read, clean and filter into an existing folder; a document is never in memory whole.

    Raises:
        InputError: a file is unusable, or nothing is left.
    """
    tally, cleaner, keep = sources.Tally(), Cleaner(cleaning), keep or Filter()
    seen, report = duplicates.Seen(keep.near), Report()

    def leave_out(name: str, error: InputError) -> None:
        report.read += 1
        report.remove(name, "unusable files", str(error))

    unusable = leave_out if keep.unusable else None
    documents: list[tuple[str, int, int]] = []
    with files.room_for(folder / TEXT), (folder / TEXT).open("wb") as file:
        for name, pieces in sources.read(paths, reading, tally, unusable):
            report.read += 1
            start = file.tell()
            try:
                reason = _write(file, name, cleaner.pieces(pieces), seen, keep)
            except InputError as error:
                if unusable is None:
                    raise
                reason = "unusable files", str(error)
            if reason is None:
                documents.append((name, start, file.tell()))
            else:
                report.remove(name, *reason)
                file.seek(start)
                file.truncate()
    report.kept = len(documents)
    report.counts = {k: n for k, n in (cleaner.counts + tally.counts).items() if n}
    report.examples = tally.examples
    if not documents:
        why = "; ".join(f"{e['name']}: {e['reason']}" for e in report.removed[:3])
        raise InputError(f"no usable text ({why or 'no document'})")
    index = {"format": "fastlm.texts", "documents": documents, "report": asdict(report)}
    files.write_json(folder / INDEX, index)
    return TextStore(folder)


def _write(
    file: IO[bytes], name: str, pieces: Iterator[str], seen: duplicates.Seen, keep: Filter
) -> tuple[str, str] | None:
    """Write one document; why it is to be left out, if it is."""
    characters, visible = 0, False
    signature = duplicates.Signature(keep.near is not None)
    for piece in pieces:
        file.write(piece.encode("utf-8", "replace"))
        signature.add(piece)
        characters += len(piece)
        visible = visible or bool(piece.strip())
    if reason := _reason(characters, visible, keep):
        return reason
    repeat = seen.repeat(name, *signature.finish())
    if repeat is None:
        return None
    if repeat.resemblance == 1.0:
        return "repeated documents", f"repeats {repeat.of}"
    alike = f"{repeat.resemblance:.0%} of runs of 5 words"
    return "near duplicates", f"resembles {repeat.of} ({alike})"


def _reason(characters: int, visible: bool, keep: Filter) -> tuple[str, str] | None:
    if not visible:
        return "empty documents", "nothing left after cleaning"
    if characters < keep.least:
        return "short documents", f"{characters} characters, at least {keep.least} wanted"
    return None


def hold_out(
    store: TextStore, which: str | float | Sequence[str]
) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out): documents by name, or the last share of every document.

    A share cuts at a line, so that no text is on both sides.
    """
    documents = store.documents
    if not isinstance(which, int | float):
        chosen = {which} if isinstance(which, str) else set(which)
        held = [d for d in documents if d.name in chosen]
        train = [d for d in documents if d.name not in chosen]
        if len(held) < len(chosen):
            which = min(chosen - set(store.names()))
            few = store.names()[:20]
            more = f" and {len(documents) - 20} more" if len(documents) > 20 else ""
            raise InputError(
                f"no document named {which!r} to hold out; there are {', '.join(few)}{more}"
            )
        if not train:
            raise InputError(f"{which!r} is all there is; hold out a share such as 0.1")
        return train, held
    if not 0.0 < which < 1.0:
        raise InputError(f"held-out share must be between 0 and 1, got {which}")
    train, held = [], []
    for document in documents:
        at = _line_before(document, int(document.bytes * (1.0 - which)))
        if document.start < at < document.stop:
            train.append(Document(document.name, document.path, document.start, at))
            held.append(Document(f"{document.name} (end)", document.path, at, document.stop))
        else:
            train.append(document)
    if not held:
        raise InputError("the text is too short to hold a part of it out")
    return train, held


def _line_before(document: Document, offset: int) -> int:
    """The byte after the last line end in the first `offset` bytes; a character's start without."""
    position = document.start + offset
    with document.path.open("rb") as file:
        stop = position
        while stop > document.start:
            start = max(document.start, stop - BLOCK)
            file.seek(start)
            block = file.read(stop - start)
            found = block.rfind(b"\n")
            if found >= 0:
                return start + found + 1
            stop = start
        file.seek(position)
        following = file.read(4)
    # 10xxxxxx continues a character of UTF-8
    return position + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def statistics(store: TextStore) -> dict[str, Any]:
    """Sizes and the commonest words; one pass."""
    characters = lines = words = 0
    vocabulary: Counter[str] = Counter()
    alphabet: Counter[str] = Counter()
    sizes: list[tuple[int, str]] = []
    for document in store.documents:
        sizes.append((document.bytes, document.name))
        rest = ""
        # a last line end completes the last word
        for piece in itertools.chain(document.pieces(), ("\n",)):
            characters += len(piece)
            lines += piece.count("\n")
            alphabet.update(piece)
            text = rest + piece
            # the last word may go on in the next piece; what is longer than this is no word
            cut = max(text.rfind(" "), text.rfind("\n")) + 1
            cut = cut if len(text) - cut < LONGEST_WORD else len(text)
            rest = text[cut:]
            found = text[:cut].lower().split()
            words += len(found)
            vocabulary.update(word.strip(MARKS)[:LONGEST_WORD] for word in found)
    vocabulary.pop("", None)
    added = len(sizes)
    characters, lines, alphabet["\n"] = characters - added, lines - added, alphabet["\n"] - added
    alphabet = +alphabet
    largest = max(sizes)
    return {
        "documents": len(sizes),
        "bytes": sum(size for size, _ in sizes),
        "characters": characters,
        "lines": lines,
        "words": words,
        "distinct_words": len(vocabulary),
        "distinct_characters": len(alphabet),
        "non_ascii_characters": sum(n for c, n in alphabet.items() if ord(c) > 127),
        "largest_document": {"name": largest[1], "bytes": largest[0]},
        "common_words": [[word, n] for word, n in vocabulary.most_common(20)],
    }
