"""One line of progress: live on a terminal that has `rich`, else a plain line every few seconds."""

from __future__ import annotations

import importlib
import math
import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass
class Progress:
    """What the training loop knows after a step. `steps`: in all, None where time decides."""

    step: int
    steps: int | None
    share: float
    loss: float
    loss_ema: float
    bits_per_byte: float
    learning_rate: float
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    seconds_left: float

    def __str__(self) -> str:
        of = f"/{self.steps}" if self.steps is not None else f" ({min(self.share, 1.0):.0%})"
        return (
            f"step {self.step}{of} | loss {self.loss:.3f} (ema {self.loss_ema:.3f}) | "
            f"{self.bits_per_byte:.3f} bits/byte | lr {self.learning_rate:.1e} | "
            f"{self.tokens_per_second:,.0f} tok/s | mfu {self.mfu:.0%} | "
            f"peak {self.peak_bytes >> 20} MiB | eta {clock(self.seconds_left)}"
        )


def clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Reporter:
    """Plain lines; `update` prints at most one every `interval` seconds, of a `Progress` or what
    else says itself in one. `closed`: nobody reads any more (`fastlm train | head`), which ends no
    work; what goes on for long saves and stops."""

    closed = False

    def __init__(self, stream: TextIO | None = None, interval: float = 5.0) -> None:
        self.stream = stream or sys.stdout
        self._interval, self._printed = interval, float("-inf")
        self._last: tuple[object, bool] | None = None

    def line(self, text: str = "") -> None:
        if not self.closed:
            try:
                print(text, file=self.stream, flush=True)
            except BrokenPipeError:
                self.closed = True

    def update(self, progress: object) -> None:
        due = time.monotonic() - self._printed >= self._interval
        if due:
            self.line(str(progress))
            self._printed = time.monotonic()
        self._last = (progress, due)

    def close(self) -> None:
        """End of a phase: the last step is always shown."""
        if self._last is not None and not self._last[1]:
            self.line(str(self._last[0]))
        self._last, self._printed = None, float("-inf")


class Quiet(Reporter):
    """Nothing at all; errors go to stderr elsewhere."""

    def line(self, text: str = "") -> None:
        pass


class Live(Reporter):
    """A line that is rewritten in place. `rich` honours NO_COLOR and dumb terminals by itself."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._console: Any = importlib.import_module("rich.console").Console(
            file=stream, highlight=False
        )
        self._text: Any = importlib.import_module("rich.text").Text
        self._status: Any = None

    def line(self, text: str = "") -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def update(self, progress: object) -> None:
        text = self._text(str(progress), no_wrap=True, overflow="ellipsis")
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)
        self._last = (progress, False)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        super().close()


def reporter(
    *, quiet: bool = False, stream: TextIO | None = None, interval: float = 5.0
) -> Reporter:
    """The best one for this stream; `interval` is that of `Reporter`."""
    stream = stream or sys.stdout
    if quiet:
        return Quiet(stream)
    if stream.isatty():
        try:
            return Live(stream)
        except ImportError:
            pass
    return Reporter(stream, interval)
