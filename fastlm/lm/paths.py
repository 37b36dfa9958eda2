"""The files that the arguments of a command name, and a short name for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import InputError

STDIN = "-"
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}


def suffix_of(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that is too long, for one
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _is_run(folder: Path) -> bool:
    """Whether a run of fastlm wrote here: `train --data . --out runs/a` must not read itself."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            return file.read(9) == b'{"event":'
    except OSError:
        return False


def _in_folder(top: Path) -> list[Path]:
    """Its files of text, in folders below too, but for what a run wrote."""
    runs: dict[Path, bool] = {}

    def own(file: Path) -> bool:
        for folder in file.relative_to(top).parents:
            if (place := top / folder) not in runs:
                runs[place] = _is_run(place)
            if runs[place] and place != top:
                return True
        return runs[top] and file.parent == top and file.name in ("metrics.jsonl", "report.html")

    found = (p for p in top.rglob("*") if p.is_file() and suffix_of(p) in KINDS)
    return sorted(file for file in found if not own(file))


def expand(paths: Iterable[str | Path]) -> list[Path]:
    files: list[Path] = []
    for given in paths:
        if given == "":  # as Path it would be the current folder
            raise InputError("a name of a file or folder is empty")
        path = Path(given)
        if _is_folder(path):
            found = _in_folder(path)
            if not found:
                known = ", ".join(KINDS)
                raise InputError(f"{path}: no file in this folder ends in {known} (or .gz)")
            files += found
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in KINDS else name


def names(paths: Sequence[Path]) -> list[str]:
    """One name for each file, unlike each other."""
    taken, found = set[str](), []
    for path in paths:
        stem = "stdin" if str(path) == STDIN else _stem(path)
        stem = stem.encode("utf-8", "replace").decode()  # bytes that are no text
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        found.append(name)
    return found
