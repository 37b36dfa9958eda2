"""Text in: read files, folders or the shipped novels, clean them, and count what was removed."""

from __future__ import annotations

import gzip
import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InputError

AUSTEN = Path(__file__).parent / "assets" / "austen"
SUFFIXES = (".txt", ".md", ".txt.gz")

# above this share of undecodable bytes a file is not text in the encoding we read
MAX_BAD_BYTES = 0.01

_LINE_ENDING = re.compile("\r\n?|[\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_SPACES = re.compile("[ \t\u00a0]+")
_TRAILING = re.compile("[ \t\u00a0]+(?=\n|$)")
_BLANK_LINES = re.compile("\n{3,}")


@dataclass(frozen=True)
class Cleaning:
    """What `clean` changes; every step counts."""

    line_endings: bool = True
    control: bool = True
    nfc: bool = True
    spaces: bool = True
    blank_lines: bool = True

    @classmethod
    def off(cls) -> Cleaning:
        return cls(False, False, False, False, False)


@dataclass
class Document:
    name: str
    text: str


@dataclass
class Corpus:
    documents: list[Document]
    counts: Counter[str] = field(default_factory=Counter)
    sha256: str = ""  # of the raw bytes and names

    def names(self) -> list[str]:
        return [document.name for document in self.documents]


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(path: Path, raw: bytes, counts: Counter[str]) -> str:
    encoding = "utf-8"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    try:
        text = raw.decode(encoding)
        bad = 0
    except UnicodeDecodeError:
        bad = len(raw) - len(raw.decode(encoding, "ignore").encode(encoding))
        text = raw.decode(encoding, "replace")
    nul = text.count("\0")
    if bad + nul > MAX_BAD_BYTES * len(raw):
        what = "NUL bytes" if nul > bad else f"bytes that are not {encoding.upper()}"
        raise InputError(
            f"{path}: not text, {bad + nul:,} of {len(raw):,} bytes are {what}; "
            "convert it first, for example with iconv -t utf-8"
        )
    counts["undecodable bytes"] += bad
    return text


def _expand(paths: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
            if not found:
                raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            files += found
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _name(path: Path, taken: set[str]) -> str:
    stem = path.name.removesuffix(".gz").removesuffix(".txt").removesuffix(".md")
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


def load(paths: Sequence[str | Path] | str | Path | None = None) -> Corpus:
    """Read text files, folders of them, or (None) the six novels shipped with fastlm.

    Raises:
        InputError: a file is missing, empty, damaged or not text; the message names it.
    """
    if paths is None:
        files = sorted(AUSTEN.glob("*.txt.gz"))
    else:
        files = _expand([paths] if isinstance(paths, str | Path) else paths)
    corpus, hasher, taken = Corpus([]), hashlib.sha256(), set[str]()
    for path in files:
        raw = _read_bytes(path)
        text = _decode(path, raw, corpus.counts)
        if not text.strip():
            raise InputError(f"{path}: empty, no text in it")
        name = _name(path, taken)
        hasher.update(f"{name}\0{len(raw)}\0".encode() + raw)
        corpus.documents.append(Document(name, text))
    if not corpus.documents:
        raise InputError("no text file given")
    corpus.sha256 = hasher.hexdigest()
    return corpus


def _nfc(text: str, counts: Counter[str]) -> str:
    if unicodedata.is_normalized("NFC", text):
        return text
    lines = text.split("\n")
    composed = [unicodedata.normalize("NFC", line) for line in lines]
    counts["lines composed to NFC"] += sum(a != b for a, b in zip(lines, composed, strict=True))
    return "\n".join(composed)


def clean(text: str, options: Cleaning | None = None) -> tuple[str, Counter[str]]:
    """Clean one text; the counts say what was changed, in the units that their names give."""
    options = options or Cleaning()
    counts: Counter[str] = Counter()

    def replace(name: str, pattern: re.Pattern[str], by: str) -> None:
        nonlocal text
        text, hits = pattern.subn(by, text)
        counts[name] += hits

    def shrink(name: str, pattern: re.Pattern[str], by: str) -> None:
        nonlocal text
        before = len(text)
        text = pattern.sub(by, text)
        counts[name] += before - len(text)

    if options.line_endings:
        replace("line endings", _LINE_ENDING, "\n")
    if options.control:
        replace("control characters", _CONTROL, "")
    if options.nfc:
        text = _nfc(text, counts)
    if options.spaces:
        shrink("spaces", _TRAILING, "")
        shrink("spaces", _SPACES, " ")
    if options.blank_lines:
        shrink("blank lines", _BLANK_LINES, "\n\n")
    return text, counts


def clean_corpus(corpus: Corpus, options: Cleaning | None = None) -> Corpus:
    """Clean every document and drop those that repeat another or have nothing left."""
    counts, seen, kept = Counter(corpus.counts), set[str](), list[Document]()
    for document in corpus.documents:
        text, removed = clean(document.text, options)
        counts.update(removed)
        if not text.strip():
            raise InputError(f"{document.name}: empty after cleaning")
        if text in seen:
            counts["repeated documents"] += 1
            continue
        seen.add(text)
        kept.append(Document(document.name, text))
    return Corpus(kept, counts, corpus.sha256)


def hold_out(corpus: Corpus, which: str | float) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out): one document by name, or the last share of every document.

    A share cuts at a line, so that no text is on both sides.
    """
    if isinstance(which, str):
        held = [d for d in corpus.documents if d.name == which]
        train = [d for d in corpus.documents if d.name != which]
        if not held:
            names = ", ".join(corpus.names())
            raise InputError(f"no document named {which!r} to hold out; there are {names}")
        if not train:
            raise InputError(f"{which!r} is the only document; hold out a share such as 0.1")
        return train, held
    if not 0.0 < which < 1.0:
        raise InputError(f"held-out share must be between 0 and 1, got {which}")
    train, held = [], []
    for document in corpus.documents:
        at = int(len(document.text) * (1.0 - which))
        at = document.text.rfind("\n", 0, at) + 1 or at
        if 0 < at < len(document.text):
            train.append(Document(document.name, document.text[:at]))
            held.append(Document(f"{document.name} (end)", document.text[at:]))
        else:
            train.append(document)
    if not held:
        raise InputError("the text is too short to hold a part of it out")
    return train, held
