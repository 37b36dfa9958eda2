"""The settings of a run by name: TOML files, `--set`, and the file that repeats a run.

A key is `section.name`, as in `train.lr`: [data] says what is read, [model] what is trained and
[train] how. Every field of `Recipe` has one key.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import TrainConfig, wrong_number
from .errors import MissingExtra, UsageError
from .recipe import Recipe, foreign

_DATA = (
    "data", "pairs", "format", "group", "longest", "learn",
    "holdout", "tokenizer", "vocab", "clean",
)  # fmt: skip
# where a key is not called as its field
_NAMES = {"data": "paths", "model": "kind"}


@functools.cache
def keys() -> dict[str, str]:
    """{key: field of `Recipe`}."""
    train, found = {field.name for field in fields(TrainConfig)}, {}
    for field in fields(Recipe):
        name = field.name
        section = "data" if name in _DATA else "train" if name in train else "model"
        found[f"{section}.{_NAMES.get(name, name)}"] = name
    return found


@functools.cache
def _kind(field: str) -> tuple[str, bool]:
    """("bool", "int", "float", "str" or "list", whether the value may be missing)."""
    hint = typing.get_type_hints(Recipe)[field]
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    optional = type(None) in typing.get_args(hint)
    plain = parts[0] if optional else hint
    return getattr(plain, "__name__", "") if isinstance(plain, type) else "list", optional


_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "list": "a string or a list of strings",
}


def nearest(key: str) -> str | None:
    """The known key that was probably meant."""
    known = list(keys())
    same = [name for name in known if name.split(".")[1] == key.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(key, known, 1, 0.6)
    return next(iter(same or close), None)


def _field(key: str, source: str) -> str:
    if key in keys():
        return keys()[key]
    meant = nearest(key)
    hint = f"did you mean {meant}?" if meant else f"the keys are {', '.join(keys())}"
    raise UsageError(f"{source}: unknown key {key}; {hint}")


def _typed(key: str, field: str, value: Any, source: str) -> Any:
    kind, optional = _kind(field)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and kind in ("int", "float") and (problem := wrong_number(field, value)):
        raise UsageError(f"{source}: {key} {problem}")
    if value is None and optional:
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and number and isinstance(value, int):
        return value
    if kind == "float" and number:
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if field == "holdout" and number:  # a share, which the option has as text
        return str(value)
    if kind == "list" and isinstance(value, str):
        return (value,)
    if (
        kind == "list"
        and isinstance(value, list | tuple)
        and all(isinstance(v, str) for v in value)
    ):
        return tuple(value)
    raise UsageError(f"{source}: {key} must be {_EXPECTED[kind]}, got {value!r}")


def _toml() -> Any:
    for name in ("tomllib", "tomli"):  # in the standard library from Python 3.11 on
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtra("--config on Python 3.10", "tomli")


def load(path: Path) -> dict[str, Any]:
    """Fields of `Recipe` from a TOML file.

    Raises:
        UsageError: it cannot be read, a key is unknown (the nearest one is named) or has another
            type.
    """
    library = _toml()
    try:
        with path.open("rb") as file:
            content = library.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # TOMLDecodeError and what is not UTF-8
        raise UsageError(f"{path}: not TOML: {error}") from None
    found = {}
    for section, values in content.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {section} stands outside of [data], [model] and [train]" + (
                f"; did you mean {meant}?" if (meant := nearest(section)) else ""
            ))  # fmt: skip
        for name, value in values.items():
            key = f"{section}.{name}"
            field = _field(key, str(path))
            found[field] = _typed(key, field, value, str(path))
    return found


def _parsed(kind: str, optional: bool, text: str) -> Any:
    """What a word of the command line stands for; the word itself where it is nothing else."""
    if optional and text.lower() == "none":
        return None
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind == "list":
        return text.split(",")
    try:
        return int(text) if kind == "int" else float(text) if kind == "float" else text.strip("'\"")
    except ValueError:
        return text


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """Fields of `Recipe` from words like `train.lr=1e-3`; `none` takes a value back.

    Raises:
        UsageError: as `load`.
    """
    found = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: must be like train.lr=1e-3")
        key, source = key.strip(), f"--set {text}"
        field = _field(key, source)
        kind = _kind(field)
        found[field] = _typed(key, field, _parsed(*kind, value.strip()), source)
    return found


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Recipe` by their own names, from Python.

    Raises:
        UsageError: as `load`.
    """
    found = {}
    for field, value in options.items():
        if field not in Recipe.__dataclass_fields__:
            near = difflib.get_close_matches(field, list(Recipe.__dataclass_fields__), 1)
            hint = f"did you mean {near[0]}?" if near else "see fastlm train --help"
            raise UsageError(f"unknown setting {field}; {hint}")
        found[field] = _typed(field, field, value, "setting")
    return found


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked for: options over `--set` over `--config`."""
    found = {} if args.config is None else load(args.config)
    options = {k: v for k, v in vars(args).items() if k in Recipe.__dataclass_fields__}
    return {**found, **assigned(args.set), **options}


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def dump(recipe: Recipe) -> str:
    """TOML that `load` makes the same `Recipe` of. A key without a value is left out."""
    lines: list[str] = ["# fastlm train --config THIS repeats the run"]
    left_out = {*foreign(recipe)}
    if recipe.init is not None:  # its tokenizer comes with it
        left_out |= {"tokenizer", "vocab"}
    for section in ("data", "model", "train"):
        lines.append(f"\n[{section}]")
        for key, field in keys().items():
            value = getattr(recipe, field)
            if key.startswith(section + ".") and value is not None and field not in left_out:
                lines.append(f"{key.split('.')[1]} = {_written(value)}")
    return "\n".join(lines) + "\n"
