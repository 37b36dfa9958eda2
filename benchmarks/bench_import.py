"""What `import fastlm` costs after `import torch`, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlm.bench import measure

SCRIPT = """
import time
a = time.perf_counter(); import torch; b = time.perf_counter(); import fastlm
print(b - a, time.perf_counter() - b)
"""


def test_import(benchmark: Any, record: Callable[[str, dict[str, Any]], None]) -> None:
    seconds: dict[str, list[float]] = {"ours": [], "import torch": []}

    def once() -> None:
        root = Path(__file__).parent.parent
        run = [sys.executable, "-c", SCRIPT]
        # an installed package is compiled once, also where the environment forbids to write it
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        answer = subprocess.run(
            run, cwd=root, env=env, check=True, capture_output=True, text=True
        ).stdout
        torch_time, ours = map(float, answer.split())
        seconds["ours"].append(ours)
        seconds["import torch"].append(torch_time)

    benchmark.pedantic(once, rounds=7, warmup_rounds=1)
    if benchmark.disabled:
        return
    measured = {name: vars(measure.spread(values[1:])) for name, values in seconds.items()}
    row = {
        "rounds": 7,
        "calls_per_round": 1,
        "seconds": measured,
        "times": {},
        "reach": "<= 150 ms",
        "group": "",
    }
    benchmark.extra_info.update(row)
    record("import/over-torch", row)
