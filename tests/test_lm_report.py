"""The report in a real browser: its pictures are drawn, its text is there, it asks for nothing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Seen, browser, visit
from numpy.typing import NDArray

from fastlm.lm import cli, errors, report

LARGEST = 500_000  # bytes of a page
CHARTS = ("comparison", "learning", "roc", "calibration", "policy", "distributions")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `fastlm demo --quick`, whose criteria must hold."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert cli.main(["demo", "--quick", "--quiet", "--out", str(out)]) == errors.OK
    return out


@pytest.fixture(scope="module")
def seen(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    browser()
    return visit(run / "report.html", tmp_path_factory.mktemp("browser") / "visit")


def pixels(path: Path) -> NDArray[Any]:
    """[height, width, 3] in 0 to 1."""
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def blank(area: NDArray[Any]) -> str:
    """Why an area is no picture, or nothing: it needs ink on a background, and a color in it."""
    flat = area.reshape(-1, 3)
    colors, counts = np.unique((flat * 31).round().astype(int), axis=0, return_counts=True)
    background = colors[counts.argmax()] / 31
    ink = float((np.abs(flat - background).max(1) > 0.1).mean())
    colored = int((flat.max(1) - flat.min(1) > 0.3).sum())
    if not 0.005 < ink < 0.6:
        return f"ink on {ink:.1%} of it"
    if len(colors) < 8 or colored < 50:
        return f"{len(colors)} colors, {colored} colored pixels"
    return ""


def test_page_is_one_small_file(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert len(page.encode()) < LARGEST
    addresses = re.findall(r"(?:src|href|url|action)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
    # places in the page itself, names of formats, and nothing else
    assert {a for a in addresses if not a.startswith(("#", "data:"))} == set()
    assert "<script" not in page
    identities = re.findall(r' id="([^"]+)"', page)
    assert len(identities) == len(set(identities))


def test_pictures_are_drawn(seen: Seen) -> None:
    pictures = seen.found["pictures"]
    assert len(pictures) == len(CHARTS)
    for picture in pictures:
        assert picture["width"] > 200 and picture["height"] > 100, picture
        assert min(picture["natural"]) > 100, picture
        assert picture["marks"] > 10 and len(picture["label"]) > 20, picture
    assert seen.screenshot is not None
    shot = pixels(seen.screenshot)
    assert seen.found["size"][0] <= shot.shape[1], "the page is wider than its window"
    for picture in pictures:
        x, y = round(picture["x"]), round(picture["y"])
        area = shot[y : y + round(picture["height"]), x : x + round(picture["width"])]
        assert area.shape[0] > 100, f"below the screenshot: {picture['label']}"
        assert blank(area) == "", f"{picture['label']}: {blank(area)}"


def test_asks_for_nothing_and_complains_of_nothing(seen: Seen) -> None:
    assert seen.found["asked"] == [] and seen.found["failed"] == [] and seen.console == []


def test_text_is_there(run: Path, seen: Seen) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", "", seen.dom))
    text = " ".join(text.split())
    found = json.loads((run / "report.json").read_text())
    assert f"passed: {len(found['criteria'])} of {len(found['criteria'])} criteria" in text
    for name, result in found["criteria"].items():
        assert name in text and result["detail"] in text
    for samples in (found["samples"][key] for key in ("untrained", "trained", "preferred")):
        for sample in samples:
            assert " ".join(sample.split()) in text
    for phase in found["phases"]:
        assert phase["name"] in text
    flags = found["policy"]["flags"]
    assert ("Over-optimised?" in text) == bool(flags) and all(flag in text for flag in flags)
    tables = re.findall(r"<table>.*?</table>", seen.dom, re.DOTALL)
    assert len(tables) >= 6
    assert all("<caption>" in table and 'scope="col"' in table for table in tables)


def test_a_bad_page_is_noticed(tmp_path: Path) -> None:
    """The tests above can fail: a missing picture, an empty one, a request, a complaint."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><html><head></head><body><img src='http://127.0.0.1:9/none.png' alt='none'>"
        "<svg width='300' height='200'></svg><script>console.error('oh')</script></body></html>"
    )
    seen = visit(page, tmp_path / "visit", height=600)
    image, svg = seen.found["pictures"]
    assert image["natural"] == [0, 0] and svg["natural"] == [0, 0] and svg["marks"] == 0
    assert seen.found["asked"] == ["http://127.0.0.1:9/none.png"]
    assert seen.found["failed"] and any("oh" in line for line in seen.console)
    assert seen.screenshot is not None
    x, y = round(svg["x"]), round(svg["y"])
    assert blank(pixels(seen.screenshot)[y : y + 200, x : x + 300]) == "ink on 0.0% of it"


# ---- without a browser ---------------------------------------------------------------------------


def test_report_makes_the_same_page_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run / "report.html"
    before = page.read_text()
    page.unlink()
    assert cli.main(["report", str(run), "--json"]) == errors.OK
    assert json.loads(capsys.readouterr().out) == {"page": str(page), "bytes": len(before.encode())}
    assert page.read_text() == before


def test_a_training_run_has_a_page_too(tmp_path: Path) -> None:
    step = {"event": "step", "loss": 3.0, "loss_ema": 3.0, "bits_per_byte": 2.0}
    score = {"bits_per_byte": 1.9, "nats_per_token": 3.1, "perplexity": 22.2}
    lines: list[dict[str, Any]] = [{**step, "step": number} for number in (1, 2, 3)]
    lines[1]["loss"] = None  # it was not finite
    lines += [{"event": "eval", "step": 3, **score}, {"event": "held-out", "step": 3, **score}]
    lines += [{"event": "end", "step": 3, "verdict": "levelled off"}]
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"event": "cut sho')
    assert cli.main(["report", str(tmp_path)]) == errors.OK
    page = (tmp_path / "report.html").read_text()
    assert "levelled off" in page and "1.900" in page and page.count("<svg") == 1


def test_damage_and_what_was_done_again(tmp_path: Path) -> None:
    """A run that was killed, resumed two steps back and given more: the last word counts."""
    step = {"event": "step", "loss": 3.0, "loss_ema": 3.0, "bits_per_byte": 2.0}
    score = {"nats_per_token": 3.1, "perplexity": 22.2}
    first = [{**step, "step": n} for n in (1, 2, 3, 4)]
    first += [{"event": "eval", "step": 4, "bits_per_byte": 1.8, **score}]
    then = [{"event": "resume", "step": 2}, *({**step, "step": n} for n in (3, 4, 5))]
    for n in (5, 6):
        then += [{**step, "step": n}, {"event": "held-out", "step": n, "bits_per_byte": n, **score}]
        then += [{"event": "end", "step": n, "verdict": f"verdict {n}"}]
    lines = [*map(json.dumps, first), '{"event": "st', "\x00\x00", "3", *map(json.dumps, then)]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    events = report.read_events(tmp_path / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert not [e for e in events if e["event"] == "eval"]
    found, _ = report.read(tmp_path)
    assert found["training"]["held_out"]["bits_per_byte"] == 6
    assert found["training"]["verdict"] == "verdict 6"
    assert cli.main(["report", str(tmp_path)]) == errors.OK


@pytest.mark.parametrize("kind", ["rl", "dpo"])
def test_other_runs_have_their_curves(kind: str, tmp_path: Path) -> None:
    if kind == "rl":
        own = {"event": "iteration", "reward": -0.5, "kl": 0.1, "distinct_2": 0.9}
        lines: list[dict[str, Any]] = [{**own, "iteration": n} for n in (1, 2, 3)]
    else:
        judged = {"loss": 0.7, "margin": 0.1, "accuracy": 0.5}
        lines = [{"event": "eval", "step": 0, **judged, "accuracy": {"value": 0.5}}]
        lines += [{"event": "step", "step": n, **judged} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert cli.main(["report", str(tmp_path)]) == errors.OK
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and f"fastlm {kind}" in page and "Three panels over 3" in page


def test_nothing_to_show_is_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == errors.BAD_INPUT
    assert "neither report.json nor metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("{")
    assert cli.main(["report", str(tmp_path)]) == errors.BAD_INPUT
    assert "not JSON" in capsys.readouterr().err


def test_text_cannot_become_markup() -> None:
    samples = {"prompts": ["<b>"], "untrained": ["<script>alert(1)</script>"]}
    page = report.page({"title": "x", "out": "<i>", "samples": samples}, [])
    assert "<script" not in page and "<i>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
