"""Cleaning text piece by piece; every step counts what it changed."""

from __future__ import annotations

import importlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, MissingExtra, UsageError

# how much text is cleaned at once; a document shorter than this is cleaned whole
PIECE = 1 << 20

_LINE_ENDING = re.compile("\r\n?|[\x85\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_SPACES = re.compile("[ \t\u00a0]+")
_TRAILING = re.compile("[ \t\u00a0]+(?=\n|$)")
_BLANK_LINES = re.compile("\n{3,}")
_WORD = re.compile(r"\b[\w'\u2019]+\b")
# a line end before something visible: no step of the cleaning reaches across
_SEAM = re.compile(r"\n(?=[!-~])")


@dataclass(frozen=True)
class Cleaning:
    """What `clean` changes. The last three change what is said, so they are off by default."""

    line_endings: bool = True
    control: bool = True
    nfc: bool = True
    spaces: bool = True
    blank_lines: bool = True
    mojibake: bool = False
    punctuation: bool = False
    stop_words: tuple[str, ...] = ()

    @classmethod
    def off(cls) -> Cleaning:
        return cls(False, False, False, False, False)

    def notes(self) -> list[str]:
        """What a user should know about the steps that were asked for."""
        notes = []
        if self.punctuation:
            notes.append(
                "punctuation is removed: right for classification and retrieval, but a language "
                "model trained on it cannot write a sentence"
            )
        if self.stop_words:
            notes.append(
                "stop words are removed: right for classification and retrieval, but a language "
                "model trained on it cannot write a sentence"
            )
        return notes


STEPS = ("line-endings", "control", "nfc", "spaces", "blank-lines")


def kept(names: str | None) -> dict[str, bool]:
    """The arguments of `Cleaning` that leave out these of its steps, given as "spaces,nfc".

    Raises:
        UsageError: one is no step.
    """
    found = {}
    for name in (names or "").split(",") if names else ():
        if name not in STEPS:
            raise UsageError(f"a step of cleaning is one of {', '.join(STEPS)}, got {name!r}")
        found[name.replace("-", "_")] = False
    return found


def stop_words(source: str) -> tuple[str, ...]:
    """From a file with a word a line, or "english": the list of scikit-learn.

    Raises:
        InputError: the file cannot be read. MissingExtra: scikit-learn is not installed.
    """
    if source == "english":
        try:
            module: Any = importlib.import_module("sklearn.feature_extraction.text")
        except ImportError:
            raise MissingExtra("the English stop words", "scikit-learn", "eval") from None
        return tuple(sorted(module.ENGLISH_STOP_WORDS))
    try:
        words = Path(source).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: no list of stop words ({error})") from None
    if not words:
        raise InputError(f"{source}: no stop word in it")
    return tuple(sorted({word.lower() for word in words}))


def _fixer() -> Callable[[str], str]:
    try:
        ftfy: Any = importlib.import_module("ftfy")
    except ImportError:
        raise MissingExtra("repairing wrongly decoded text", "ftfy") from None
    return lambda text: ftfy.fix_encoding(text)


def _punctuation() -> dict[int, None]:
    return {
        code: None
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)).startswith("P")
    }


def _lines_changed(name: str, change: Callable[[str], str]) -> Callable[[str, Counter[str]], str]:
    def step(text: str, counts: Counter[str]) -> str:
        lines = text.split("\n")
        changed = [change(line) for line in lines]
        counts[name] += sum(a != b for a, b in zip(lines, changed, strict=True))
        return "\n".join(changed)

    return step


def _replaced(name: str, pattern: re.Pattern[str], by: str) -> Callable[[str, Counter[str]], str]:
    def step(text: str, counts: Counter[str]) -> str:
        text, hits = pattern.subn(by, text)
        counts[name] += hits
        return text

    return step


def _shrunk(name: str, change: Callable[[str], str]) -> Callable[[str, Counter[str]], str]:
    """Counts characters that are gone."""

    def step(text: str, counts: Counter[str]) -> str:
        before = len(text)
        text = change(text)
        counts[name] += before - len(text)
        return text

    return step


def _compose(text: str, counts: Counter[str]) -> str:
    if unicodedata.is_normalized("NFC", text):
        return text
    compose = _lines_changed(
        "lines composed to NFC", lambda line: unicodedata.normalize("NFC", line)
    )
    return compose(text, counts)


class Cleaner:
    """The steps of one `Cleaning`, prepared once for many documents."""

    def __init__(self, options: Cleaning | None = None) -> None:
        self.options = options = options or Cleaning()
        self.counts: Counter[str] = Counter()
        steps: list[Callable[[str, Counter[str]], str]] = []
        if options.mojibake:
            steps.append(_lines_changed("lines wrongly decoded", _fixer()))
        if options.line_endings:
            steps.append(_replaced("line endings", _LINE_ENDING, "\n"))
        if options.control:
            steps.append(_replaced("control characters", _CONTROL, ""))
        if options.nfc:
            steps.append(_compose)
        if options.stop_words:
            words = frozenset(options.stop_words)
            steps.append(self._without_words(words))
        if options.punctuation:
            table = _punctuation()
            steps.append(_shrunk("punctuation marks", lambda text: text.translate(table)))
        if options.spaces:
            steps.append(_shrunk("spaces", lambda text: _TRAILING.sub("", text)))
            steps.append(_shrunk("spaces", lambda text: _SPACES.sub(" ", text)))
        if options.blank_lines:
            steps.append(_shrunk("blank lines", lambda text: _BLANK_LINES.sub("\n\n", text)))
        self._steps = steps

    @staticmethod
    def _without_words(words: frozenset[str]) -> Callable[[str, Counter[str]], str]:
        def step(text: str, counts: Counter[str]) -> str:
            def keep(match: re.Match[str]) -> str:
                if match[0].lower() not in words:
                    return match[0]
                counts["stop words"] += 1
                return ""

            return _WORD.sub(keep, text)

        return step

    def clean(self, text: str) -> str:
        for step in self._steps:
            text = step(text, self.counts)
        return text

    def pieces(self, pieces: Iterator[str]) -> Iterator[str]:
        """The cleaned document, joined the same as cleaned whole; its size does not matter."""
        for piece in seams(pieces):
            if text := self.clean(piece):
                yield text


def seams(pieces: Iterator[str]) -> Iterator[str]:
    """The text in pieces of about `PIECE`, cut where cleaning does not look across.

    Without a line end in that much text the cut is made anyway, not inside a pair of line ends.
    """
    held = ""
    for piece in pieces:
        held += piece
        while len(held) >= 2 * PIECE:
            found = _SEAM.search(held, PIECE, 2 * PIECE)
            cut = found.end() if found else 2 * PIECE - (held[2 * PIECE - 1] == "\r")
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def clean(text: str, options: Cleaning | None = None) -> tuple[str, Counter[str]]:
    """Clean one text; the counts say what was changed, in the units that their names give."""
    cleaner = Cleaner(options)
    return cleaner.clean(text), cleaner.counts
