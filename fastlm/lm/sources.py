"""Text in: files, folders, gzip, JSON lines, CSV, HTML, standard input and collections of the
package `datasets`, read once, in pieces.

A document reaches the caller as an iterator of pieces, so that its size does not matter: one line
of a gigabyte is read in constant memory. Only a record of JSON or CSV stands in memory whole.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from . import hub
from .errors import InputError, UsageError
from .markup import without_tags
from .paths import KINDS, STDIN, expand, names, suffix_of

FORMATS = ("auto", "text", "html", "jsonl", "csv")
BLOCK = 1 << 20
# a record is parsed whole: beyond this the file is hardly what its name says
LARGEST_RECORD = 1 << 26
# above this share of undecodable bytes a file is not text in the encoding we read
MAX_BAD_BYTES = 0.01

Pieces = Iterator[str]
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Reading:
    """How files become text. `column`: the field of records that holds it; `html`: it, and files of
    text, are HTML."""

    format: str = "auto"
    column: str = "text"
    encoding: str = "utf-8"
    html: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        try:
            "".encode(self.encoding)  # which refuses codecs from bytes to bytes, such as zip
        except (LookupError, ValueError):
            raise UsageError(f"unknown encoding {self.encoding!r}") from None


@dataclass
class Tally:
    """What reading met: counts by kind, and the first example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, example: str) -> None:
        self.counts[what] += 1
        self.examples.setdefault(what, example)


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked; what the system refuses becomes an InputError naming it."""
    try:
        with _opened(path) as file:
            while block := file.read(BLOCK):
                yield block
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL in its name
        raise InputError(f"{path}: cannot be read ({error})") from None


def _opened(path: Path) -> AbstractContextManager[IO[bytes]]:
    if str(path) == STDIN:
        return nullcontext(sys.stdin.buffer)
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


class _BadBytes:
    """An error handler of codecs that replaces and counts."""

    NAME = "fastlm.count"

    def __init__(self) -> None:
        self.count = 0
        codecs.register_error(self.NAME, self)

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        self.count += error.end - error.start
        return "\ufffd" * (error.end - error.start), error.end


def _decoded(path: Path, encoding: str, counts: Counter[str]) -> Pieces:
    """Text of a file; raises at its end when too much of it was no text."""
    blocks = _blocks(path)
    first = next(blocks, b"")
    while len(first) < 2 and (block := next(blocks, b"")):
        first += block
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    bad = _BadBytes()
    decoder = codecs.getincrementaldecoder(encoding)(bad.NAME)
    size, nul, blank = 0, 0, True

    def decode(block: bytes, final: bool = False) -> str:
        # each reader has its own counter, and another one may have registered since
        codecs.register_error(bad.NAME, bad)
        try:
            return decoder.decode(block, final)
        except UnicodeError as error:
            raise InputError(f"{path}: not {encoding.upper()} ({error})") from None

    def look(text: str) -> str:
        nonlocal nul, blank
        nul += text.count("\0")
        blank = blank and not text.strip()
        return text

    block = first
    while block:
        size += len(block)
        if text := look(decode(block)):
            yield text
        block = next(blocks, b"")
    if text := look(decode(b"", True)):
        yield text
    if bad.count + nul > MAX_BAD_BYTES * size:
        what = "NUL bytes" if nul > bad.count else f"bytes that are not {encoding.upper()}"
        raise InputError(
            f"{path}: not text, {bad.count + nul:,} of {size:,} bytes are {what}; "
            "convert it first, with iconv -t utf-8 or fastlm data clean --encoding NAME"
        )
    if blank:
        raise InputError(f"{path}: empty, no text in it")
    counts["undecodable bytes"] += bad.count


def _lines(path: Path, pieces: Pieces) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, without their ends."""
    number, rest = 0, ""
    for piece in pieces:
        # splitlines would also cut at the separators that stand inside a JSON string
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            number += 1
            yield number, line.rstrip("\r")
        if len(rest) > LARGEST_RECORD:
            raise InputError(
                f"{path}: line {number + 1} is longer than {LARGEST_RECORD >> 20} MiB; "
                "as plain text fastlm data clean --format text reads it"
            )
    if rest:
        yield number + 1, rest.rstrip("\r")


def _no_column(
    path: Path, line: int, column: str, there: Iterable[object], option: str
) -> InputError:
    listed = ", ".join(map(repr, there)) or "none"
    return InputError(
        f"{path}: line {line} has no column {column!r}; there are {listed} ({option})"
    )


def parsed(line: str) -> Any:
    """A line of JSON.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(line.lstrip("\ufeff"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(record: dict[str, Any], line: str, counts: Counter[str]) -> dict[str, Any]:
    """Without halves of pairs of surrogates, which no encoding can write: each is U+FFFD."""
    if "\\ud" not in line.lower():
        return record
    text, halves = _HALF.subn("\ufffd", json.dumps(record, ensure_ascii=False))
    counts["halves of characters"] += halves
    return json.loads(text) if halves else record


def json_records(path: Path, pieces: Pieces, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects by line number. A line that is no object is counted and left out."""
    for number, line in _lines(path, pieces):
        if not line.strip():
            continue
        try:
            record = parsed(line)
        except ValueError as error:
            tally.add("lines that are not JSON", f"{path}: line {number}: {error}")
            continue
        if isinstance(record, dict):
            yield number, _whole(record, line, tally.counts)
        else:
            tally.add("lines that are not JSON objects", f"{path}: line {number}")


def csv_records(path: Path, pieces: Pieces, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of CSV (or of tabs) by line number; the first row names the columns."""
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    before = csv.field_size_limit(LARGEST_RECORD)
    try:
        lines = (line.lstrip("\ufeff") + "\n" for _, line in _lines(path, pieces))
        reader = csv.DictReader(lines, delimiter=delimiter)
        for row in reader:
            extra = row.pop(None, None)  # type: ignore[call-overload]
            if extra is not None or None in row.values():
                tally.add("rows of another length", f"{path}: line {reader.line_num}")
                continue
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(before)


RECORDS: dict[str, Callable[[Path, Pieces, Tally], Iterator[tuple[int, dict[str, Any]]]]] = {
    "jsonl": json_records,
    "csv": csv_records,
}


def kind_of(path: Path, reading: Reading) -> str:
    kind = KINDS.get(suffix_of(path), "text") if reading.format == "auto" else reading.format
    return "html" if reading.html and kind == "text" else kind


def has_records(path: Path, reading: Reading) -> bool:
    return hub.names(path) or kind_of(path, reading) in RECORDS


def objects(path: Path, reading: Reading, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of one file or collection by line or row number, whatever is in them.

    Raises:
        InputError: it is no file of records, or unusable.
    """
    if hub.names(path):
        return hub.records(path)
    kind = kind_of(path, reading)
    if kind not in RECORDS:
        raise InputError(f"{path}: records are in files named .jsonl or .csv")
    return RECORDS[kind](path, _decoded(path, reading.encoding, tally.counts), tally)


def records(
    path: Path, reading: Reading, tally: Tally, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Records of one JSON-lines or CSV file or collection that have these columns as text.

    Raises:
        InputError: a column is missing, or no line could be used; the message names the first.
    """
    count = 0
    option = "fastlm data clean --column NAME" if len(columns) == 1 else "--format, --group"
    for number, record in objects(path, reading, tally):
        for column in columns:
            if column not in record:
                raise _no_column(path, number, column, record, option)
        if not all(isinstance(record[column], str) for column in columns):
            tally.add("records whose column is no text", f"{path}: line {number}")
            continue
        count += 1
        yield number, {column: record[column] for column in columns}
    if not count:
        kind, example = next(iter(tally.examples.items()), ("no record in it", ""))
        raise InputError(f"{path}: no usable record ({kind}{': ' * bool(example)}{example})")


def _documents(
    path: Path, name: str, reading: Reading, tally: Tally
) -> Iterator[tuple[str, Pieces]]:
    if not has_records(path, reading):
        pieces = _decoded(path, reading.encoding, tally.counts)
        html = kind_of(path, reading) == "html"
        yield name, without_tags(pieces, tally.counts) if html else pieces
        return
    for number, record in records(path, reading, tally, [reading.column]):
        pieces = iter((record[reading.column],))
        html = reading.html
        yield f"{name}:{number}", without_tags(pieces, tally.counts) if html else pieces


def read(
    paths: Sequence[str | Path],
    reading: Reading | None = None,
    tally: Tally | None = None,
    unusable: Callable[[str, InputError], None] | None = None,
) -> Iterator[tuple[str, Pieces]]:
    """(name, pieces of text) of every document, in order; take all pieces of one before the next.

    A file is a document; of records each is one, named FILE:LINE. "-" is standard input, hf:NAME a
    collection of the package `datasets`.

    Raises:
        InputError: a file is missing, damaged, empty or not text; the message names it. For a file
            of records with `unusable` this is called instead, and the next file is read; the pieces
            of any other file raise in the caller's hands, who may go on.
    """
    reading, tally = reading or Reading(), tally or Tally()
    files = expand(paths)
    if not files:
        raise InputError("no text file given")
    for path, name in zip(files, names(files), strict=True):
        try:
            yield from _documents(path, name, reading, tally)
        except InputError as error:
            if unusable is None:
                raise
            unusable(name, error)


def fingerprint(paths: Sequence[str | Path]) -> str:
    """sha256 of names and bytes of the files, unpacked.

    Raises:
        InputError: as `read`. UsageError: standard input can be read only once.
    """
    files = expand(paths)
    if any(str(path) == STDIN for path in files):
        raise UsageError("standard input can be read once only: save it with fastlm data clean")
    for path in filter(hub.names, files):
        raise UsageError(
            f"{path} may change from one reading to the next: save it with fastlm data clean"
        )
    hasher = hashlib.sha256()
    for path, name in zip(files, names(files), strict=True):
        inner, size = hashlib.sha256(), 0
        for block in _blocks(path):
            inner.update(block)
            size += len(block)
        hasher.update(f"{name}\0{size}\0".encode() + inner.digest())
    return hasher.hexdigest()


def text_of(pieces: Pieces) -> str:
    out = io.StringIO()
    for piece in pieces:
        out.write(piece)
    return out.getvalue()
