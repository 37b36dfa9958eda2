"""Commands that the pages show, and whether what a command printed is what its page says."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORY = (ROOT / "docs" / "system.md", ROOT / "README.md")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (?=(?:fastlm [a-z]|make |pip |python |torchrun ))(.*)$", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
# written to suit the size of what they say: a process that did much before takes GiB, not MiB
_CLOCK = re.compile(r"\b\d+(?::\d\d)+\b")
_BYTES = re.compile(r"\b[KMGT]iB\b")
_CUT = "..."


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it, without its comment; `output` None: the page shows none."""

    page: str
    command: str
    output: str | None = None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


def _command(line: str) -> str:
    return re.sub(r"\s+#.*$", "", line).strip()


def _in_bash(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if command := " ".join(_command(line).split()):
            yield command


def _in_console(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        first, _, output = part.replace("\\\n", " ").partition("\n")
        yield " ".join(_command(first).split()), output


def shown(text: str, page: str) -> list[Shown]:
    """In the order of the page: blocks of bash, console sessions, indented commands."""
    found: list[tuple[int, Shown]] = []
    for block in _FENCE.finditer(text):
        if block[1] == "bash":
            found += [(block.start(), Shown(page, c)) for c in _in_bash(block[2])]
        if block[1] == "console":
            found += [(block.start(), Shown(page, *c)) for c in _in_console(block[2])]
    for line in _INDENTED.finditer(_FENCE.sub(lambda b: " " * len(b[0]), text)):
        found.append((line.start(), Shown(page, " ".join(_command(line[1]).split()))))
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]


@cache
def story() -> tuple[Shown, ...]:
    return tuple(c for path in STORY for c in shown(path.read_text("utf-8"), path.name))


def matches(expected: str, printed: str) -> bool:
    """The same lines, whatever the numbers, the units of bytes and the space between words; "..."
    is any text, on a line of its own any lines."""
    expected, printed = (_BYTES.sub("MiB", _CLOCK.sub("0", text)) for text in (expected, printed))
    pattern = ""
    for line in expected.strip("\n").split("\n"):
        if line.strip() == _CUT:
            pattern += r"(?:.*\n)*?"
            continue
        parts = []
        for word in line.split():
            pieces = [
                ".*?".join(map(re.escape, piece.split(_CUT))) for piece in _NUMBER.split(word)
            ]
            parts.append(r"[-+]?[\d,.]+(?:e[-+]?\d+)?".join(pieces))
        pattern += r"[ ]*" + r"[ ]+".join(parts) + r"[ ]*\n"
    return re.fullmatch(pattern, printed.strip("\n") + "\n") is not None


@cache
def functions_of(path: Path) -> frozenset[str]:
    """Top-level functions of a Python file; none where there is no file."""
    if not path.is_file():
        return frozenset()
    body = ast.parse(path.read_text("utf-8")).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def is_test(reference: str) -> bool:
    path, _, name = reference.partition("::")
    return name in functions_of(ROOT / path)
