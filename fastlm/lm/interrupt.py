"""Ctrl-C and SIGTERM: the first asks the training loop to stop, a second soon after stops it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SECOND_WITHIN = 5.0  # seconds


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C: temporary folders go, and the exit code is that of an interruption."""
    before = signal.getsignal(signal.SIGTERM)
    # whoever ignores it or handles it, or runs us beside its main thread, wants that to stay
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interrupt:
    """`requested` turns true at the first signal; a second within 5 s raises KeyboardInterrupt,
    unless all is `saved`: then the command ends as it would have."""

    alone = False  # the command is all that this process does

    def __init__(self) -> None:
        self.requested = self.saved = False
        self._at = float("-inf")
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.saved:
            return
        if self.requested and now - self._at < SECOND_WITHIN:
            raise KeyboardInterrupt
        self.requested, self._at = True, now

    def __enter__(self) -> Interrupt:
        # only the main thread may set handlers; elsewhere the caller's own ones stay
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.saved and self.alone else handler)


def deaf() -> None:
    """From here on nothing ends this process but itself, for the moment that it still takes."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def at_once() -> Iterator[None]:
    """SIGTERM is Ctrl-C here, and both raise KeyboardInterrupt where no `Interrupt` is entered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
