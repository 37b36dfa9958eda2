"""One page that shows a run: report.json and metrics.jsonl in, a file that needs nothing else out.

No script, no font, no address: it opens anywhere, and its policy forbids the browser to ask for
more.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import errors, files, plot, sources
from .progress import Reporter, clock

TEMPLATES = Path(__file__).parent / "assets"
PAGE = "report.html"
EXTRA = {"jinja2": "jinja2", "matplotlib": "matplotlib"}


def missing() -> str:
    """Why no page can be made, or nothing."""
    absent = [package for module, package in EXTRA.items() if not importlib.util.find_spec(module)]
    return str(errors.MissingExtra("a page", " and ".join(absent), "report")) if absent else ""


# {event: the number that says where in its run it is}
_REPEATED = {"step": "step", "eval": "step", "iteration": "iteration"}


def read_events(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without those that are damaged and without the steps that a resumed
    run did again."""
    found: list[dict[str, Any]] = []
    last = dict.fromkeys(("step", "iteration"), -1)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            event = sources.parsed(line)
        except ValueError:
            continue
        if not isinstance(event, dict) or "event" not in event:
            continue
        if (kind := event["event"]) in last:
            if (now := event[kind]) <= last[kind]:
                again = {k: v for k, v in _REPEATED.items() if v == kind}
                found = [e for e in found if e["event"] not in again or e[kind] < now]
            last[kind] = now
        if kind in _REPEATED:  # of numbers, where null is what was not finite
            event = {name: math.nan if v is None else v for name, v in event.items()}
        found.append(event)
    return found


def read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report of a run and its metrics; a run of `fastlm train` has metrics alone.

    Raises:
        InputError: neither is there, or the report is not JSON.
    """
    events, path = read_events(run / "metrics.jsonl"), run / "report.json"
    if path.exists():
        try:
            return sources.parsed(path.read_text(encoding="utf-8")), events
        except ValueError as error:
            raise errors.InputError(f"{path}: not JSON ({error})") from None
    if not events:
        raise errors.InputError(f"{run}: neither report.json nor metrics.jsonl in it")
    kinds = ((_iterations, "rl"), (_preferring, "dpo"))
    title = next((name for chosen, name in kinds if chosen(events)), "train")
    found: dict[str, Any] = {"title": f"fastlm {title}", "out": str(run)}
    scored, ended = _kept(events, "held-out"), _kept(events, "end")
    if scored or ended:
        score = scored[-1] if scored else {}
        found["training"] = {
            "steps": (ended or scored)[-1]["step"],
            "verdict": ended[-1].get("verdict") if ended else None,
            "held_out": {k: v for k, v in score.items() if k not in ("event", "step")} or None,
        }
    return found, events


# ---- pictures ------------------------------------------------------------------------------------


def _kept(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def _curve(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of training on text or pairs."""
    return [event for event in _kept(events, "step") if "bits_per_byte" in event]


def _preferring(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps of `fastlm dpo`."""
    return [event for event in _kept(events, "step") if "margin" in event]


def _iterations(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of `fastlm rl`; the demo has its own picture of them, with judges."""
    return [] if _kept(events, "judged") else _kept(events, "iteration")


def _course(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    """What a run without bits per byte writes down."""
    if steps := _iterations(events):
        names = {"reward": "reward", "kl": "divergence, nats a text", "distinct_2": "distinct-2"}
        return plot.course(steps, [], "iteration", names), (
            f"Three panels over {len(steps)} iterations: reward from {steps[0]['reward']:.2f} to "
            f"{steps[-1]['reward']:.2f}, divergence from the start, distinct runs of two words"
        )
    steps, names = _preferring(events), {"loss": "loss", "margin": "margin", "accuracy": "accuracy"}
    held = [event for event in _kept(events, "eval") if "margin" in event]
    return plot.course(steps, held, "step", names), (
        f"Three panels over {len(steps)} steps, held-out preferences as dots: loss, margin of the "
        "preferred text, share of pairs where it is ahead"
    )


def _comparison(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    steps = _kept(events, "compared")
    plain = [event["plain_seconds"] for event in steps]
    fast = [event["fastlm_seconds"] for event in steps]
    ratio = found["side_by_side"]["ratio"]
    alt = f"Milliseconds of each training step: plain PyTorch takes {ratio:.2f} times as long"
    return plot.comparison(plain, fast), alt


def _learning(found: dict[str, Any], events: list[dict[str, Any]]) -> tuple[str, str]:
    training = found.get("training", {})
    held = [event for event in _kept(events, "eval") if "bits_per_byte" in event]
    alt = "Bits per byte falling over the training steps"
    if held:
        first, last = held[0]["bits_per_byte"], held[-1]["bits_per_byte"]
        alt += f"; on held-out text from {first:.2f} to {last:.2f}"
    return plot.learning_curve(_curve(events), held, training.get("bound")), alt


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
    "learning": (_learning, lambda found, events: bool(_curve(events))),
    "course": (
        _course,
        lambda found, events: bool(_iterations(events) or _preferring(events)),
    ),
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
    """The page of a run, beside what it is made of.

    Raises:
        InputError: what is there is of something else.
    """
    from jinja2 import UndefinedError

    try:
        made = page(*read(run))
    except (KeyError, TypeError, AttributeError, IndexError, UndefinedError) as error:
        what = f"missing or of another type: {error}"
        raise errors.InputError(f"{run}: not the report of a run ({what})") from None
    files.write_text(run / PAGE, made)
    return run / PAGE


def command(args: argparse.Namespace, reporter: Reporter, print_json: Callable[[Any], None]) -> int:
    if absent := missing():
        raise errors.UsageError(absent)
    path = write(args.run)
    reporter.line(f"{path}: {path.stat().st_size >> 10} KiB, needs nothing else")
    if args.json:
        print_json({"page": str(path), "bytes": path.stat().st_size})
    return errors.OK
