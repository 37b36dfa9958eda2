"""The two pictures of a report; only this module imports matplotlib."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from . import machine
from .compare import Comparison

PLAIN, FAST, HELD = "#8a8a8a", "#1f77b4", "#d62728"


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def learning_curve(metrics: Path, path: Path, *, title: str) -> None:
    """Bits per byte against training seconds: every step, its average, the held-out scores."""
    events = read_metrics(metrics)
    steps = [event for event in events if event["event"] == "step"]
    held = [event for event in events if event["event"] == "eval"]
    ratio = steps[-1]["bits_per_byte"] / steps[-1]["loss_ema"]
    figure, axes = _figure(3.6)
    seconds = [event["seconds"] for event in steps]
    axes.plot(seconds, [e["loss"] * ratio for e in steps], color=FAST, alpha=0.25, linewidth=0.8)
    axes.plot(seconds, [e["bits_per_byte"] for e in steps], color=FAST, label="train (average)")
    axes.plot(
        [e["seconds"] for e in held],
        [e["bits_per_byte"] for e in held],
        "o-",
        color=HELD,
        label="held-out novel",
    )
    axes.set(xlabel="training seconds", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def comparison(result: Comparison, path: Path, *, title: str) -> None:
    """Milliseconds of every timed step of both models, with the medians."""
    figure, axes = _figure(2.6)
    for row, (name, seconds, color) in enumerate(
        (("plain PyTorch", result.plain_seconds, PLAIN), ("fastlm", result.fast_seconds, FAST))
    ):
        times = sorted(1e3 * s for s in seconds)
        axes.plot(times, [row] * len(times), "o", color=color, alpha=0.5)
        middle = 1e3 * machine.spread(seconds)[1]
        axes.plot([middle] * 2, [row - 0.25, row + 0.25], color=color, linewidth=3)
        axes.annotate(f"{name}: {middle:.0f} ms", (middle, row + 0.3), ha="center")
    axes.set(xlabel="milliseconds per training step", ylim=(-0.6, 1.8), yticks=[], title=title)
    axes.set_xlim(0, 1.2e3 * max(result.plain_seconds + result.fast_seconds))
    figure.savefig(path, dpi=120)
