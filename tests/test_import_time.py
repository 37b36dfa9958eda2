"""`import fastlm` brings in torch and numpy, and nothing heavy beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEVER = ("transformers", "tokenizers", "matplotlib", "rich", "triton", "safetensors", "pandas")

SCRIPT = f"""
import json, sys, torch
before = set(sys.modules)
import fastlm
new = sorted(set(sys.modules) - before)
print(json.dumps({{"heavy": [m for m in {NEVER} if m in sys.modules], "new": new}}))
"""


def test_import_brings_in_nothing_heavy() -> None:
    run = [sys.executable, "-c", SCRIPT]
    answer = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    loaded = json.loads(answer)
    assert not loaded["heavy"]
    assert not [m for m in loaded["new"] if m.startswith(("fastlm.lm", "fastlm.bench", "torch._"))]
