"""The charts of a report, as SVG that takes its colours from the page; only this module imports
matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import machine

# written by matplotlib, replaced by what the page's style sheet defines: light and dark
INK, GRID, PLAIN, FAST, HELD, THIRD = (f"#01010{digit}" for digit in range(1, 7))
THEME = {
    INK: "currentColor",
    GRID: "var(--grid)",
    PLAIN: "var(--plain)",
    FAST: "var(--fast)",
    HELD: "var(--held)",
    THIRD: "var(--third)",
}
SERIES = (FAST, HELD, THIRD, PLAIN)  # the first is what was optimised
SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
Events = Sequence[dict[str, Any]]


class Canvas:
    """One figure; `svg` is set when the drawing is done."""

    def __init__(self, figure: Any, axes: Any) -> None:
        self.figure, self.axes, self.svg = figure, axes, ""


@contextmanager
def drawing(name: str, width: float, height: float, columns: int = 1) -> Iterator[Canvas]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        canvas = Canvas(figure, figure.subplots(1, columns))
        yield canvas
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        canvas.svg = themed(written.getvalue(), name)


def themed(svg: str, name: str) -> str:
    """matplotlib's SVG file as an element of a page: no prologue, colours of the page, a size that
    follows the page, and ids that no other chart has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", svg)
    for color, variable in THEME.items():
        svg = svg.replace(color, variable)
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg {view[0]} xmlns:xlink="http://www.w3.org/1999/xlink">'
    svg = re.sub(r"<svg.*?>", head, svg, count=1, flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", svg)


def comparison(plain: Sequence[float], fast: Sequence[float]) -> str:
    """Milliseconds of every timed step of both models, with the medians."""
    with drawing("comparison", 7.6, 2.3) as canvas:
        axes = canvas.axes
        rows = ((1, "plain PyTorch", plain, PLAIN), (0, "fastlm", fast, FAST))
        for row, name, seconds, color in rows:
            times = [1e3 * s for s in seconds]
            middle = machine.spread(times)[1]
            axes.plot(times, [row] * len(times), "o", color=color, alpha=0.45, markersize=7)
            axes.plot([middle] * 2, [row - 0.28, row + 0.28], color=color, linewidth=3)
            axes.annotate(f"{name}: median {middle:.0f} ms", (middle, row + 0.34), ha="center")
        axes.set(xlabel="milliseconds per training step", ylim=(-0.5, 1.75), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.set_xlim(0, 1.15e3 * max(*plain, *fast))
    return canvas.svg


def course(steps: Events, held: Events, of: str, names: dict[str, str]) -> str:
    """A panel for each of `names`, {value: title}, over the steps or iterations `of` a run."""
    with drawing("course", 9.4, 2.9, columns=len(names)) as canvas:
        for axes, (name, title) in zip(canvas.axes, names.items(), strict=True):
            axes.plot([e[of] for e in steps], [e[name] for e in steps], color=FAST)
            if held:
                values = [e[name]["value"] if isinstance(e[name], dict) else e[name] for e in held]
                axes.plot([e[of] for e in held], values, "o-", color=HELD, markersize=3.5)
            axes.set(title=title, xlabel=of)
    return canvas.svg


def learning_curve(steps: Events, held: Events, bound: float | None) -> str:
    """Bits per byte after each step, its average, the held-out scores, and the bound."""
    ratio = next((e["bits_per_byte"] / e["loss_ema"] for e in steps[::-1] if e["loss_ema"]), 1.0)
    with drawing("learning", 7.6, 3.4) as canvas:
        axes, at = canvas.axes, [event["step"] for event in steps]
        axes.plot(at, [e["loss"] * ratio for e in steps], color=FAST, alpha=0.3, linewidth=0.8)
        axes.plot(at, [e["bits_per_byte"] for e in steps], color=FAST, label="training, average")
        scores = [e["bits_per_byte"] for e in held]
        axes.plot([e["step"] for e in held], scores, "o-", color=HELD, label="held-out text")
        if bound is not None:
            axes.axhline(bound, color=PLAIN, linestyle="--", linewidth=1.2)
            text, place = f"must be at most {bound:g}", (at[-1], bound)
            axes.annotate(text, place, xytext=(0, 3), textcoords="offset points", ha="right")
        axes.set(xlabel="training step", ylabel="bits per byte")
        axes.legend(loc="upper right")
    return canvas.svg


def roc(models: Sequence[dict[str, Any]]) -> str:
    """True against false positives of each reward model, on the held-out novel."""
    with drawing("roc", 4.6, 3.9) as canvas:
        axes = canvas.axes
        axes.plot([0, 1], [0, 1], "--", color=PLAIN, linewidth=1, label="chance: 0.500")
        for model, color in zip(models, SERIES, strict=False):
            auc = model["held_out"]["auc"]["value"]
            axes.plot(*model["roc"], color=color, label=f"{model['name']}: {auc:.3f}")
        axes.set(xlabel="model's texts put above the bar", ylabel="author's texts put above it")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.legend(loc="lower right", title="area under the curve")
    return canvas.svg


def calibration(bins: Events) -> str:
    """How often a pair was as predicted, against the chance that was predicted."""
    with drawing("calibration", 4.6, 3.9) as canvas:
        axes = canvas.axes
        axes.plot([0, 1], [0, 1], "--", color=PLAIN, linewidth=1, label="as claimed")
        most = max(each["count"] for each in bins)
        at = [each["predicted"] for each in bins]
        right = [each["observed"] for each in bins]
        axes.plot(at, right, color=FAST, linewidth=1.2)
        sizes = [15 + 110 * each["count"] / most for each in bins]
        axes.scatter(at, right, sizes, color=FAST, alpha=0.75, label="held-out pairs")
        axes.set(xlabel="predicted chance of being the author's", ylabel="how often it was")
        axes.legend(loc="upper left")
    return canvas.svg


def _share(value: float, before: float, author: float) -> float:
    return (value - before) / (author - before) if author != before else 0.0


def policy(events: Events, author: dict[str, float], names: Sequence[str], largest: float) -> str:
    """Rewards on the way from the starting model to the author; divergence; variety."""
    done = [event for event in events if event["event"] == "iteration"]
    judged = [event for event in events if event["event"] == "judged"]
    start = judged[0]["rewards"]
    with drawing("policy", 9.4, 3.2, columns=3) as canvas:
        rewards, kl, variety = canvas.axes
        at = [event["iteration"] for event in judged]
        for name, color in zip(names, SERIES, strict=False):
            line = [_share(e["rewards"][name], start[name], author[name]) for e in judged]
            style = "o-" if color == FAST else "o--"
            rewards.plot(at, line, style, color=color, markersize=3.5, label=name)
        rewards.axhline(1, color=PLAIN, linestyle="--", linewidth=1.2)
        rewards.set(title="reward: 0 before, 1 the author's text", xlabel="iteration")
        rewards.legend(fontsize=8)
        steps = [event["iteration"] for event in done]
        kl.plot(steps, [event["kl"] for event in done], color=FAST)
        kl.axhline(largest, color=PLAIN, linestyle="--", linewidth=1.2)
        kl.set(title="divergence, nats a text; dashed: stop", xlabel="iteration", ylim=(0, None))
        variety.plot(at, [event["distinct_2"] for event in judged], "o-", color=FAST, markersize=3)
        variety.set(title="distinct runs of two words", xlabel="iteration", ylim=(0, 1.02))
    return canvas.svg


def distributions(done: dict[str, Any], names: Sequence[str]) -> str:
    """Rewards of single texts: the model's before and after, and the author's."""
    kinds = (("before", "before", PLAIN), ("after", "after", FAST), ("author", "the author", HELD))
    with drawing("distributions", 9.4, 2.9, columns=len(names)) as canvas:
        panels = canvas.axes if len(names) > 1 else [canvas.axes]
        for axes, name in zip(panels, names, strict=True):
            every = [value for key, _, _ in kinds for value in done[key]["scores"][name]]
            low, high = min(every), max(every)
            edges = [low + (high - low) * i / 24 for i in range(25)] if high > low else 24
            for key, label, color in kinds:
                scores = done[key]["scores"][name]
                axes.hist(scores, edges, color=color, alpha=0.18)
                axes.hist(scores, edges, color=color, histtype="step", linewidth=1.6, label=label)
            axes.set(title=name, xlabel="reward of a text")
        panels[0].set(ylabel="texts")
        panels[0].legend(fontsize=8)
    return canvas.svg
