"""A small `make torture`: what strikes a run changes no bit of its final weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

COUNTS = {"kills": 20, "disks": 6, "damages": 6, "signals": 4}


def test_twenty_kills_and_some_more() -> None:
    # a process of its own, since it forks: this one may have threads
    script = str(Path(__file__).with_name("torture.py"))
    options = [f"--{kind}={count}" for kind, count in COUNTS.items()]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    landed = {kind: int(n) for n, kind in re.findall(r"^ *(\d+) (\w+)  ", done.stdout, re.M)}
    assert landed.keys() == COUNTS.keys()
    assert all(landed[kind] >= count for kind, count in COUNTS.items())
    runs, of = re.findall(r"(\d+) of (\d+) runs end with the weights", done.stdout)[0]
    assert int(runs) == int(of) > 20
