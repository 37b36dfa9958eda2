"""What strikes a run from inside its own process, and the forked process that runs it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fastlm.lm import checkpoint, cli, files

# what runs while a checkpoint is written; the rest of these files reads
SAVING = frozenset(
    "write fill own write_folder write_text write_json make_folder _sync sha256 _swap_in prune "
    "remove_folder set_aside remove_leftovers save save_model".split()
)
SOURCES = tuple(
    str(Path(files.__file__).with_name(name))
    for name in ("files.py", "checkpoint.py", "trainer.py", "policy.py")
)


def at_lines_that_save(act: Callable[[], None]) -> None:
    """Call `act` before every line of Python that saves, from now on."""

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            act()
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        return local if code.co_name in SAVING and code.co_filename in SOURCES else None

    sys.settrace(trace)


def die_at_line(number: int) -> None:
    """SIGKILL before the n-th line that saves."""
    left = number

    def act() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            die()

    at_lines_that_save(act)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_write(number: int, share: float) -> None:
    """SIGKILL when the n-th file of tensors is written to `share`."""
    library, left = checkpoint._safetensors(), number

    class Torn:
        load_file = staticmethod(library.load_file)

        @staticmethod
        def save_file(tensors: Any, path: Path) -> None:
            nonlocal left
            library.save_file(tensors, path)
            left -= 1
            if left == 0:
                os.truncate(path, int(path.stat().st_size * share))
                die()

    checkpoint._safetensors = lambda: Torn


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def do_not_look() -> None:
    """As if the space was there at the check before writing, and gone while writing."""
    files.require_space = lambda path, need: None


class Child:
    """A forked process that runs one command line; what it prints is in `text` after `wait`."""

    def __init__(self, arguments: list[str], before: Callable[[], None] | None = None) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.close(reader)
                os.dup2(writer, 1)
                os.dup2(writer, 2)
                sys.stdout = open(1, "w", closefd=False)
                sys.stderr = open(2, "w", closefd=False, buffering=1)
                if before is not None:
                    before()
                code = cli.main(arguments)
                sys.stdout.flush()
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        os.close(writer)
        self._reader = reader

    def kill(self, number: int) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def wait(self) -> int:
        """Exit code, or minus the signal."""
        with os.fdopen(self._reader, "rb") as file:
            self.text = file.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
