"""A real browser without a window: what a page looks like, and what it asks for."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# nothing but the page: no first-run window, no update, no service that calls home, and no name
# that could be found
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage "
    "--disable-extensions --mute-audio --hide-scrollbars --force-device-scale-factor=1 "
    "--virtual-time-budget=5000 --enable-logging=stderr"
).split() + ["--host-resolver-rules=MAP * ~NOTFOUND"]

# what the page knows of its pictures and requests, written where --dump-dom shows it
PROBE = """
<script>
const failed = [];
addEventListener("error", e => failed.push(e.message || e.target.outerHTML.slice(0, 200)), true);
addEventListener("load", () => {
  const pictures = [...document.querySelectorAll("img, svg")].map(e => {
    const at = e.getBoundingClientRect(), svg = e.tagName.toLowerCase() === "svg";
    const inside = svg ? e.getBBox() : {width: e.naturalWidth, height: e.naturalHeight};
    return {
      tag: e.tagName.toLowerCase(), label: e.getAttribute("aria-label") || e.getAttribute("alt"),
      x: at.x, y: at.y + scrollY, width: at.width, height: at.height,
      natural: [inside.width, inside.height],
      marks: svg ? e.querySelectorAll("path, use, rect").length : 0,
    };
  });
  const asked = performance.getEntriesByType("resource").map(e => e.name);
  const size = [document.documentElement.scrollWidth, document.documentElement.scrollHeight];
  const found = document.createElement("pre");
  found.id = "probe";
  found.textContent = JSON.stringify({pictures, asked, failed, size});
  document.body.append(found);
});
</script>
"""


@dataclass
class Seen:
    """The page as text, what it said on the console, what the probe found, its screenshot."""

    dom: str
    console: list[str]
    found: dict[str, Any]
    screenshot: Path | None


def browser() -> str:
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser here: none of {', '.join(NAMES)}")


def _run(page: Path, scratch: Path, *more: str) -> tuple[str, list[str]]:
    scratch.mkdir()
    command = [browser(), *OPTIONS, f"--user-data-dir={scratch}", *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


def visit(page: Path, scratch: Path, *, width: int = 1000, height: int = 7000) -> Seen:
    """Look at the page as it is, then at a copy with the probe in it."""
    picture = scratch / "page.png"
    scratch.mkdir()
    size = f"--window-size={width},{height}"
    dom, said = _run(page, scratch / "a", size, "--dump-dom", f"--screenshot={picture}")
    copy = scratch / page.name
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page.read_text())
    copy.write_text(text.replace("<head>", "<head>" + PROBE, 1))
    probed, more = _run(copy, scratch / "b", size, "--dump-dom")
    match = re.search(r'<pre id="probe">(.*?)</pre>', probed, re.DOTALL)
    assert match is not None, probed[-2000:]
    found = json.loads(html.unescape(match[1]))
    return Seen(dom, said + more, found, picture if picture.exists() else None)
