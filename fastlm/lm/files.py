"""Folders that appear complete or not at all, and can prove later that they still are."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import OutOfSpace, UsageError, disk_full

MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def dumps(value: Any, **options: Any) -> str:
    """JSON that every reader takes: NaN and the infinities, which it has not, are null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def make_folder(path: Path) -> None:
    """With its parents, each on disk in the folder above it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_full(error):
            raise no_space(path, os.statvfs(missing[-1].parent).f_frsize) from None
        raise
    for folder in missing:
        _sync(folder.parent)


def require_place(path: Path) -> None:
    """Fail before the work rather than after it when no file can be written at `path`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    make_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace one file atomically."""
    require_place(path)
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if disk_full(error):
            raise no_space(path, len(text.encode())) from None
        raise
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace one JSON file atomically."""
    write_text(path, dumps(value, indent=1) + "\n")


class Lines:
    """A file of lines that grows. A line cut short by a crash is dropped when it is opened.

    Raises:
        UsageError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        self._file = path.open("ab+", buffering=0)
        try:
            self._claim()
            self._drop_half_a_line()
        except BaseException:
            self._file.close()
            raise

    def _claim(self) -> None:
        # of this process alone: neither its workers keep the lock, nor what comes after its death
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UsageError(
                    f"{self.path}: another process writes to it; wait for that, or choose another "
                    "--out"
                ) from None
            # a file system without locks

    def _drop_half_a_line(self) -> None:
        size = end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            end = start + found + 1
            if found >= 0:
                break
        if end < size:
            self._file.truncate(end)

    def write(self, line: str) -> None:
        """One line, on its way to the disk before the next step of the caller."""
        data, start = memoryview(f"{line}\n".encode()), self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(start)  # half a line would spoil the next one too
            if disk_full(error):
                raise no_space(self.path, len(line) + 1) from None
            raise

    def close(self) -> None:
        self._file.close()


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """A full disk while `path` grows to a size that nobody knows before."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise no_space(path, path.stat().st_size + 1) from None
        raise


def no_space(path: Path, need: int) -> OutOfSpace:
    """Says how much was needed, at least, and what there is."""
    folder = next(folder for folder in path.parents if folder.exists())
    free = shutil.disk_usage(folder).free
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limited = limit != resource.RLIM_INFINITY
    note = f", no file above {limit:,} (ulimit -f)" if limited else ""
    return OutOfSpace(f"{path}: disk full: {need:,} bytes needed, {free:,} free{note}")


def require_space(path: Path, need: int) -> None:
    """Fail before writing to `path` rather than in the middle."""
    if shutil.disk_usage(path.parent).free < 1.1 * need:
        raise no_space(path, need)


def write_folder(path: Path, fill: Callable[[Path], None], *, need: int = 0) -> None:
    """Let `fill` write files into a temporary folder beside `path`, then rename it to `path`.

    The manifest is written last, and everything is on disk before the rename: after a crash there
    is the old folder or the new one. A folder already at `path` is replaced. `need`: bytes, as far
    as the caller knows them.

    Raises:
        OutOfSpace: before or while writing; what was at `path` is still there.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    make_folder(path.parent)
    require_space(path, need)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
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
    except Exception as error:
        if not disk_full(error):
            raise
        written = sum(p.stat().st_size for p in temporary.glob("*"))
        shutil.rmtree(temporary, ignore_errors=True)
        raise no_space(path, max(need, written)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Gone at once: a crash leaves a temporary folder, never half of `path`."""
    for found in (path, _old(path)):
        if found.exists():
            temporary = _temporary(path)
            shutil.rmtree(temporary, ignore_errors=True)
            os.rename(found, temporary)
            shutil.rmtree(temporary, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _swap_in(temporary: Path, path: Path) -> None:
    # a folder cannot be renamed over a full one; `present` finds the old one in between. Where only
    # the old one is left it stays until the new one is in place
    if path.exists():
        shutil.rmtree(_old(path), ignore_errors=True)
        os.rename(path, _old(path))
    os.rename(temporary, path)
    shutil.rmtree(_old(path), ignore_errors=True)


def present(path: Path) -> Path:
    """`path`, or the previous version when a crash struck between the two renames."""
    return _old(path) if not path.exists() and _old(path).exists() else path


def _alive(pid: int) -> bool:
    # what carries our own number was left by a process before us: this one is not writing now
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        pass
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files and folders of processes that died while writing here."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or _alive(int(match[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
