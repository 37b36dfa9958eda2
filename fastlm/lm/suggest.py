"""Arguments that do not exist: one line, with the nearest name that does."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .config import wrong_number


def nearest(word: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing when no name is near."""
    found = difflib.get_close_matches(word, list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _behind_options(
    parser: argparse.ArgumentParser, found: argparse.Namespace, words: list[str]
) -> bool:
    """Whether these are files that stand behind options: `eval MODEL --samples 2 FILE`, where
    argparse has given up on files at the first option."""
    last = [action for action in parser._actions if not action.option_strings][-1:]
    if not last or any(word.startswith("-") and word != "-" for word in words):
        return False
    name, many = last[0].dest, last[0].nargs in ("*", "+")
    if many:
        setattr(found, name, [*getattr(found, name), *words])
    elif last[0].nargs == "?" and getattr(found, name) is None and len(words) == 1:
        setattr(found, name, words[0])
        many = True
    return many


class Parser(argparse.ArgumentParser):
    """Prints no usage with an error: of forty options it would hide what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r} is none of {', '.join(names)}{nearest(str(value), names)}"
            )

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        value = super()._get_value(action, arg_string)
        if problem := wrong_number(action.dest, value):
            raise argparse.ArgumentError(action, problem)
        return value

    def _chosen(self, found: argparse.Namespace) -> argparse.ArgumentParser:
        """The parser of the command that was given."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                name = getattr(found, action.dest, None)
                if isinstance(name, str) and name in action.choices:
                    chosen = action.choices[name]
                    return chosen._chosen(found) if isinstance(chosen, Parser) else chosen
        return self

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        chosen = self._chosen(found)
        if unknown and not _behind_options(chosen, found, unknown):
            word = unknown[0].partition("=")[0]
            if word.startswith("-"):
                names = [n for action in chosen._actions for n in action.option_strings]
                chosen.error(f"unknown option {word}{nearest(word, names)}")
            chosen.error(f"unexpected argument {word!r}")
        return found
