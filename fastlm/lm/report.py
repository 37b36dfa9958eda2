"""One page that shows a run: report.json and metrics.jsonl in, a file that needs nothing else out.

No script, no font, no address: it opens anywhere, and its policy forbids the browser to ask for
more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import errors, files, plot
from .progress import Reporter, clock

TEMPLATES = Path(__file__).parent / "assets"
PAGE = "report.html"
EXTRA = {"jinja2": "jinja2", "matplotlib": "matplotlib"}


def missing() -> str:
    """Why no page can be made, or nothing."""
    absent = [package for module, package in EXTRA.items() if not importlib.util.find_spec(module)]
    return str(errors.MissingExtra("a page", " and ".join(absent), "report")) if absent else ""


def read_events(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a last one that was cut short is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report of a run and its metrics; a run of `fastlm train` has metrics alone.

    Raises:
        InputError: neither is there, or the report is not JSON.
    """
    events, path = read_events(run / "metrics.jsonl"), run / "report.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8")), events
        except ValueError as error:
            raise errors.InputError(f"{path}: not JSON ({error})") from None
    if not events:
        raise errors.InputError(f"{run}: neither report.json nor metrics.jsonl in it")
    found: dict[str, Any] = {"title": "fastlm train", "out": str(run)}
    ended = [event for event in events if event["event"] in ("held-out", "end")]
    if ended:
        score = {k: v for k, v in ended[0].items() if k not in ("event", "step")}
        found["training"] = {
            "steps": ended[-1]["step"],
            "verdict": ended[-1].get("verdict"),
            "held_out": score if "bits_per_byte" in score else None,
        }
    return found, events


# ---- pictures ------------------------------------------------------------------------------------


def _kept(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def _comparison(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    steps = _kept(events, "compared")
    plain = [event["plain_seconds"] for event in steps]
    fast = [event["fastlm_seconds"] for event in steps]
    ratio = found["side_by_side"]["ratio"]
    alt = f"Milliseconds of each training step: plain PyTorch takes {ratio:.2f} times as long"
    return plot.comparison(plain, fast), alt


def _learning(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    training = found.get("training", {})
    held = _kept(events, "eval")
    alt = "Bits per byte falling over the training steps"
    if held:
        first, last = held[0]["bits_per_byte"], held[-1]["bits_per_byte"]
        alt += f"; on the held-out novel from {first:.2f} to {last:.2f}"
    return plot.learning_curve(events, training.get("bound")), alt


def _roc(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    models = found["reward_models"]
    areas = ", ".join(f"{m['name']} {m['held_out']['auc']['value']:.3f}" for m in models)
    return plot.roc(models), f"ROC curves on the held-out novel; area under the curve: {areas}"


def _calibration(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    held = found["reward_models"][0]["held_out"]
    alt = f"Observed against predicted chance; mean error {held['calibration_error']:.3f}"
    return plot.calibration(held["bins"]), alt


def _policy(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    done, names = found["policy"], [model["name"] for model in found["reward_models"]]
    svg = plot.policy(events, done["author"]["rewards"], names, done["config"]["largest_kl"])
    change = done["before"]["distinct_2"], done["after"]["distinct_2"]
    return svg, (
        "Three panels over the iterations of the policy gradient: rewards of all judges, "
        f"divergence from the starting model, and distinct runs of two words, {change[0]:.2f} "
        f"before and {change[1]:.2f} after"
    )


def _distributions(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    names = [model["name"] for model in found["reward_models"]]
    alt = "Histograms of the rewards of single texts before, after, and by the author; a panel each"
    return plot.distributions(found["policy"], names), alt


Picture = Callable[[dict[str, Any], list[dict[str, Any]]], tuple[str, str]]
PICTURES: dict[str, tuple[Picture, Callable[[dict[str, Any], list[dict[str, Any]]], bool]]] = {
    "comparison": (_comparison, lambda found, events: "side_by_side" in found),
    "learning": (_learning, lambda found, events: bool(_kept(events, "step"))),
    "roc": (_roc, lambda found, events: "reward_models" in found),
    "calibration": (_calibration, lambda found, events: "reward_models" in found),
    "policy": (_policy, lambda found, events: "after" in found.get("policy", {})),
    "distributions": (_distributions, lambda found, events: "after" in found.get("policy", {})),
}


def pictures(found: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, str]:
    """SVG elements by name, of what the run has; each says in words what it shows."""
    from markupsafe import Markup, escape

    drawn: dict[str, str] = {}
    for name, (draw, wanted) in PICTURES.items():
        if wanted(found, events):
            svg, alt = draw(found, events)
            label = f'<svg role="img" aria-label="{escape(alt)}" '
            drawn[name] = Markup(svg.replace("<svg ", label, 1))
    return drawn


# ---- the page ------------------------------------------------------------------------------------


def page(found: dict[str, Any], events: list[dict[str, Any]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "clock": clock,
        "count": lambda value: f"{value:,.0f}",
        "signed": lambda value: f"{value:+.2f}",
        "fixed": lambda value, digits: f"{value:.{digits}f}",
        "percent": lambda value: f"{value:.1%}",
        "tiny": lambda value: f"{value:.1e}",
        "unwrapped": lambda text: re.sub(r"(?<!\n)\n(?!\n)", " ", text),
    }
    template = environment.get_template(PAGE)
    return template.render(r=found, pictures=pictures(found, events))


def write(run: Path) -> Path:
    """The page of a run, beside what it is made of."""
    files.write_text(run / PAGE, page(*read(run)))
    return run / PAGE


def command(args: argparse.Namespace, reporter: Reporter, print_json: Callable[[Any], None]) -> int:
    if absent := missing():
        raise errors.UsageError(absent)
    path = write(args.run)
    reporter.line(f"{path}: {path.stat().st_size >> 10} KiB, needs nothing else")
    if args.json:
        print_json({"page": str(path), "bytes": path.stat().st_size})
    return errors.OK
