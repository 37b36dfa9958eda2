"""Folders that appear complete or not at all, and can prove later that they still are."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace one file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Replace one JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def require_space(folder: Path, need: int) -> None:
    """Fail before writing rather than in the middle."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * need:
        text = f"needs {need >> 20} MiB, {free >> 20} MiB free"
        raise OSError(errno.ENOSPC, text, str(folder))


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write files into a temporary folder beside `path`, then rename it to `path`.

    The manifest is written last, and everything is on disk before the rename: after a crash there
    is the old folder or the new one. A folder already at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        names = sorted(p.name for p in temporary.iterdir())
        for name in names:
            _sync(temporary / name)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
            for name in names
        }
        write_json(temporary / MANIFEST, {"files": files})
        _sync(temporary)
        _swap_in(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _swap_in(temporary: Path, path: Path) -> None:
    # a folder cannot be renamed over a full one; `present` finds the old one in between
    shutil.rmtree(_old(path), ignore_errors=True)
    if path.exists():
        os.rename(path, _old(path))
    os.rename(temporary, path)
    shutil.rmtree(_old(path), ignore_errors=True)


def present(path: Path) -> Path:
    """`path`, or the previous version when a crash struck between the two renames."""
    return _old(path) if not path.exists() and _old(path).exists() else path


def remove_leftovers(folder: Path) -> None:
    """Delete temporary folders of processes that died while writing here."""
    for path in folder.glob(".*.tmp"):
        pid = path.name.rsplit(".", 2)[-2]
        if not (pid.isdigit() and Path("/proc", pid).exists()):
            shutil.rmtree(path, ignore_errors=True)


def damage(path: Path) -> str | None:
    """Why this folder cannot be trusted, naming the file; None when every byte is as written."""
    manifest = path / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{file}: missing"
            size = file.stat().st_size
            if size != expected["bytes"]:
                return (
                    f"{file}: truncated, {size} of {expected['bytes']} bytes"
                    if (size < expected["bytes"])
                    else f"{file}: {size} bytes, the manifest says {expected['bytes']}"
                )
            if sha256(file) != expected["sha256"]:
                return f"{file}: content differs from its sha256 in the manifest"
    except FileNotFoundError:
        return f"{manifest}: missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest}: unreadable ({error})"
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time, among those that want to make what is at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fastlm`, else `~/.cache/fastlm`; a temporary folder where neither works."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(base, "fastlm")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
    except OSError:
        pass
    path = Path(tempfile.gettempdir(), f"fastlm-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    return path
