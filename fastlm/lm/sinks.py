"""Where the events of a run go beside metrics.jsonl: callbacks and TensorBoard."""

from __future__ import annotations

import importlib
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
        self._writer = tensorboard().SummaryWriter(str(folder), purge_step=purge)

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()
