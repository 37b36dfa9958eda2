"""Where the events of a run go beside metrics.jsonl: callbacks and TensorBoard."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from .errors import MissingExtra, UsageError

# and what its callbacks get: number of finished steps, Score, folder, record
EVENTS = ("step", "eval", "save", "skipped")


class Callbacks:
    """`on` for a class that tells what happens."""

    def __init__(self) -> None:
        self._calls: dict[str, list[Callable[[Any], None]]] = {name: [] for name in EVENTS}

    def on(self, event: str, call: Callable[[Any], None]) -> Callable[[Any], None]:
        """Call `call` after every "step" (with the number of finished ones), "eval" (Score), "save"
        (folder) or "skipped" step (a record of what was not finite); returns it."""
        if event not in EVENTS:
            raise UsageError(f"event must be one of {', '.join(EVENTS)}, got {event!r}")
        self._calls[event].append(call)
        return call

    def emit(self, event: str, value: Any) -> None:
        for call in self._calls[event]:
            call(value)


class Sink(Protocol):
    def record(self, event: str, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def tensorboard() -> Any:
    """The module of torch, or who is missing."""
    try:
        return importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise MissingExtra("--tensorboard", "tensorboard", "track") from None


class TensorBoard:
    """Numbers of steps and evaluations as TensorBoard's event files, `event/name` each.

    Args:
        finished: steps of the run that is continued; what an earlier process wrote of later ones
            is taken back, as those steps are done again.
    """

    def __init__(self, folder: Path, finished: int = 0) -> None:
        purge = finished + 1 if finished else None
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        self._writer = tensorboard().SummaryWriter(str(folder), purge_step=purge)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """The thread that writes hands its error on to the next call; it is told there."""
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._hook(failure)

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        """A full disk ends what is written here, not the training."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{event}/{name}", value, step)
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        self._writer = None
        reason = error.strerror or error
        print(f"fastlm: warning: TensorBoard gets no more: {reason}", file=sys.stderr)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._lost(error)
        finally:
            threading.excepthook = self._hook
