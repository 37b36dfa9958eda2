"""Preferences between two texts, and where each comes from: a record without that is refused.

Provenance is one of
    human:NAME         a person chose, with `fastlm prefs label` or elsewhere
    human-over-model   the text of a person preferred to a model's; nobody judged the pair
    synthetic:RULE     a program chose
    dataset:NAME       taken from a published collection, whose card says who chose
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from . import files, sources
from .errors import InputError, UsageError

KINDS = ("human", "human-over-model", "synthetic", "dataset")
FORMATS = ("auto", "fastlm", "hh", "messages", "ultrafeedback")


@dataclass(frozen=True)
class Preference:
    """`chosen` was preferred to `rejected` as a continuation of `prompt`."""

    prompt: str
    chosen: str
    rejected: str
    provenance: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def check_provenance(value: Any, where: str) -> str:
    """One of the forms above.

    Raises:
        InputError: it is missing or of no known kind; `where` names the record.
    """
    if not isinstance(value, str) or not value:
        raise InputError(
            f"{where}: no provenance; every preference says who chose: "
            "human:NAME, human-over-model, synthetic:RULE or dataset:NAME"
        )
    kind, _, detail = value.partition(":")
    if kind not in KINDS or (detail == "") != (kind == "human-over-model"):
        raise InputError(
            f"{where}: provenance must be human:NAME, human-over-model, synthetic:RULE or "
            f"dataset:NAME, got {value!r}"
        )
    return value


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        there = ", ".join(map(repr, record)) or "nothing"
        raise InputError(f"{where}: no text in {key!r}; there are {there}")
    return value


def _own(record: dict[str, Any], where: str) -> tuple[str, str, str] | None:
    if "choice" in record:  # as `fastlm prefs label` writes it
        a, b = _text(record, "a", where), _text(record, "b", where)
        if record["choice"] not in ("a", "b", "tie", "skip"):
            raise InputError(f"{where}: choice must be a, b, tie or skip, got {record['choice']!r}")
        if record["choice"] in ("tie", "skip"):
            return None
        chosen, rejected = (a, b) if record["choice"] == "a" else (b, a)
        return _text(record, "prompt", where), chosen, rejected
    prompt, chosen = _text(record, "prompt", where), _text(record, "chosen", where)
    return prompt, chosen, _text(record, "rejected", where)


def _hh(record: dict[str, Any], where: str) -> tuple[str, str, str]:
    """Two whole dialogues that differ in an answer, nearly always the last (Anthropic HH-RLHF)."""
    chosen, rejected = _text(record, "chosen", where), _text(record, "rejected", where)
    mark = "\n\nAssistant:"
    found = commonprefix([chosen, rejected]).rfind(mark)
    if found < 0:
        raise InputError(f"{where}: the dialogues share no beginning up to {mark.strip()!r}")
    cut = found + len(mark)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _ultrafeedback(record: dict[str, Any], where: str) -> tuple[str, str, str] | None:
    """An instruction and rated answers (UltraFeedback as published): the best over the worst."""
    prompt, answers = _text(record, "instruction", where), record.get("completions")
    if not isinstance(answers, list) or not all(isinstance(a, dict) for a in answers):
        raise InputError(f"{where}: no list of answers in 'completions'")
    rated = []
    for answer in answers:
        try:
            rated.append((float(answer["overall_score"]), _text(answer, "response", where)))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{where}: an answer has no overall_score") from None
    if len(rated) < 2:
        return None
    best, worst = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
    return None if best[0] == worst[0] else (prompt, best[1], worst[1])


def _messages(record: dict[str, Any], where: str) -> tuple[str, str, str] | None:
    """Lists of {role, content}, the prompt in them or beside them (UltraFeedback in pairs, TRL)."""
    score = record.get("score_chosen")
    if score is not None and score == record.get("score_rejected"):
        return None

    def said(key: str) -> list[tuple[str, str]]:
        turns = record.get(key)
        if not isinstance(turns, list) or not turns:
            raise InputError(f"{where}: no list of messages in {key!r}")
        try:
            return [(str(turn["role"]), str(turn["content"])) for turn in turns]
        except (TypeError, KeyError):
            raise InputError(f"{where}: a message in {key!r} has no role and content") from None

    def written(turns: Iterable[tuple[str, str]]) -> str:
        return "".join(f"{role}: {content}\n" for role, content in turns)

    *before, (_, chosen) = said("chosen")
    *other, (_, rejected) = said("rejected")
    if before != other:
        raise InputError(f"{where}: the conversations differ before the last message")
    prompt = record.get("prompt", "")
    if isinstance(prompt, list):
        prompt = written(said("prompt"))
    return written(before) or str(prompt), chosen, rejected


_READERS: dict[str, Callable[[dict[str, Any], str], tuple[str, str, str] | None]] = {
    "fastlm": _own,
    "hh": _hh,
    "messages": _messages,
    "ultrafeedback": _ultrafeedback,
}


def _format_of(record: dict[str, Any]) -> str:
    if isinstance(record.get("chosen"), list):
        return "messages"
    if "completions" in record:
        return "ultrafeedback"
    own = "choice" in record or "prompt" in record or "provenance" in record
    return "fastlm" if own else "hh"


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    tally = sources.Tally()
    what = "record" if sources.hub.names(path) else "line"
    for number, record in sources.objects(path, sources.Reading("jsonl"), tally):
        yield f"{path}: {what} {number}", record
    for kind, example in tally.examples.items():  # half a file is not what was asked for
        raise InputError(f"{example} ({kind})")


def load(
    paths: Sequence[str | Path], format: str = "auto", provenance: str | None = None
) -> list[Preference]:
    """Preferences from JSON-lines files, also gzipped, and collections named hf:NAME.

    Ties, skipped ones and equal texts are left out. `provenance` is for files of others, which do
    not have it: it never overrules a record's own.

    Raises:
        InputError: a record has no provenance, misses a column, or none is usable.
    """
    found: list[Preference] = []
    for path in map(Path, paths):
        found += of_records(_records(path), format, provenance)
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no preference in it")
    return found


def of_records(
    records: Iterable[tuple[str, dict[str, Any]]],
    format: str = "auto",
    provenance: str | None = None,
) -> list[Preference]:
    """The same of records that are there already, each with a name for error messages."""
    if format not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if provenance is not None:
        check_provenance(provenance, "--provenance")
    found = []
    for where, record in records:
        origin = check_provenance(record.get("provenance", provenance), where)
        read = _READERS[_format_of(record) if format == "auto" else format](record, where)
        if read is not None and read[1] != read[2]:
            found.append(Preference(*read, origin))
    return found


def save(path: Path, preferences: Iterable[Preference]) -> None:
    lines = [json.dumps(p.to_json(), ensure_ascii=False) for p in preferences]
    files.write_text(path, "\n".join(lines) + "\n")


def origins(preferences: Iterable[Preference]) -> dict[str, int]:
    """How many of each kind, for reports."""
    return dict(Counter(p.provenance.partition(":")[0] for p in preferences))
