"""`fastlm prefs label`: a person reads two texts and says which is better.

Keys: a, b, t (tie), s (skip), u (undo), q (quit). Every answer is on disk before the next question,
so quitting, a closed terminal and a crash lose nothing; the same command goes on.
"""

from __future__ import annotations

import getpass
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from . import files, sources
from .errors import InputError, UsageError
from .preferences import check_provenance

ANSWERS = {"a": "a", "b": "b", "t": "tie", "s": "skip"}
HELP = "a, b, t: tie, s: skip, u: undo, q: quit"


@dataclass(frozen=True)
class Question:
    """Two continuations of a prompt; `a` and `b` as in the file."""

    prompt: str
    a: str
    b: str

    @property
    def key(self) -> str:
        return files.digest([self.prompt, self.a, self.b])


def read_questions(path: Path) -> list[Question]:
    """From JSON lines with prompt, a and b.

    Raises:
        InputError: a line has not, or there is none.
    """
    columns, tally = ["prompt", "a", "b"], sources.Tally()
    found = list(sources.records(path, sources.Reading("jsonl"), tally, columns))
    for example in tally.examples.values():  # a question nobody is asked would not be noticed
        raise InputError(f"{example}: needs the texts prompt, a and b")
    return [Question(**record) for _, record in found]


def save_questions(path: Path, questions: Sequence[Question]) -> None:
    lines = [json.dumps(asdict(question), ensure_ascii=False) for question in questions]
    files.write_text(path, "\n".join(lines) + "\n")


class Answers:
    """The file of answers, one JSON line each; appended to, and rewritten only to undo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if os.path.lexists(path):
            lines = self._text().split("\n")
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = sources.parsed(line)
                except ValueError:
                    if number < len(lines):
                        raise InputError(f"{path}: line {number} is damaged") from None
                    # the last line of a session that was killed while writing
                    self._rewrite()
                    continue
                if not isinstance(record, dict) or not {"key", "choice"} <= record.keys():
                    raise InputError(
                        f"{path}: line {number} is no answer of prefs label; choose another --out"
                    )
                self.records.append(record)

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InputError(
                f"{self.path}: no answers of prefs label; choose another --out"
            ) from None

    def _rewrite(self) -> None:
        files.write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))

    def done(self) -> set[str]:
        return {record["key"] for record in self.records}

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def undo(self) -> dict[str, Any] | None:
        if not self.records:
            return None
        record = self.records.pop()
        self._rewrite()
        return record


@contextmanager
def keyboard(stream: TextIO | None = None) -> Iterator[Callable[[], str]]:
    """A function that waits for one key of a terminal, or takes the first letter of a line.

    It gives "q" at the end of the input. Keys typed ahead count.
    """
    stream = stream or sys.stdin
    if not stream.isatty():
        source = stream

        def first_letter() -> str:
            line = source.readline()
            return line.strip()[:1].lower() if line else "q"

        yield first_letter
        return
    import termios
    import tty

    number = stream.fileno()
    before = termios.tcgetattr(number)

    def one_key() -> str:
        key = os.read(number, 1).decode("utf-8", "replace")
        return "q" if key in ("", "\x04") else key.lower()

    try:
        tty.setcbreak(number, termios.TCSADRAIN)
        yield one_key
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a number without a name, as in a container
        raise UsageError("this user has no name; say who judges: --annotator NAME") from None


def _ask(question: Question, swapped: bool, number: str, out: TextIO) -> None:
    first, second = (question.b, question.a) if swapped else (question.a, question.b)
    rule = "-" * 72
    print(f"\n{rule}\n{number}   {HELP}\n{rule}\n{question.prompt}", file=out)
    print(f"\n  [a]\n{first}\n\n  [b]\n{second}\n", file=out, flush=True)


def label(
    questions: list[Question],
    answers: Answers,
    *,
    annotator: str | None = None,
    seed: int = 0,
    key: Callable[[], str],
    out: TextIO | None = None,
) -> int:
    """Ask until the questions or the patience end; returns how many were answered now.

    Which text stands first is drawn from the seed and the question, so that neither side has the
    better place; the record says what was shown.
    """
    out = out or sys.stdout
    name = annotator or _user()
    provenance = check_provenance(f"human:{name}", "--annotator")
    todo = [q for q in questions if q.key not in answers.done()]
    already, count, at = len(questions) - len(todo), 0, 0
    history: list[int] = []
    while at < len(todo):
        question = todo[at]
        swapped = random.Random(f"{seed}/{question.key}").random() < 0.5
        _ask(question, swapped, f"{already + at + 1} of {len(questions)}", out)
        pressed = key()
        while pressed not in (*ANSWERS, "u", "q"):
            print(HELP, file=out, flush=True)
            pressed = key()
        if pressed == "q":
            break
        if pressed == "u":
            if not history:
                print("nothing to undo in this session", file=out)
                continue
            at = history.pop()
            answers.undo()
            count -= 1
            continue
        choice = ANSWERS[pressed]
        if swapped and choice in ("a", "b"):
            choice = "b" if choice == "a" else "a"
        answers.add(
            {
                "key": question.key,
                "prompt": question.prompt,
                "a": question.a,
                "b": question.b,
                "choice": choice,
                "shown_first": "b" if swapped else "a",
                "provenance": provenance,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        history.append(at)
        count += 1
        at += 1
    choices = [record["choice"] for record in answers.records]
    told = ", ".join(f"{choices.count(c)} {c}" for c in ("a", "b", "tie", "skip"))
    print(f"\n{len(choices)} answers in {answers.path} ({told})", file=out)
    if at < len(todo):
        print(f"{len(todo) - at} questions left; the same command goes on", file=out)
    return count
