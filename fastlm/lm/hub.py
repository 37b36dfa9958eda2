"""Published collections as records, by the package `datasets`: hf:NAME[:CONFIG][@SPLIT].

NAME is what `datasets.load_dataset` takes, a folder of one's own included; SPLIT is "train" unless
said otherwise. Rows are streamed, so the size of a collection does not matter.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError, MissingExtra

PREFIX = "hf:"


def names(path: str | Path) -> bool:
    """Whether this is no file but a collection."""
    return str(path).startswith(PREFIX)


def records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by number, from 1.

    Raises:
        InputError: it cannot be had. MissingExtra: the package is not installed.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise MissingExtra(f"reading {path}", "datasets", "hub") from None
    rest, _, split = str(path).removeprefix(PREFIX).partition("@")
    name, _, config = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from enumerate(map(dict, rows), 1)
    except (OSError, ValueError) as error:  # not found, no network, no such split
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: cannot be read by datasets ({reason})") from None
