"""Triton kernels compiled for GPUs that are not here: nothing spills, everything fits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
no_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@no_triton
def test_every_kernel_compiles_without_spills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTLM_BACKEND")}
    path = os.pathsep.join([str(TESTS.parent), kept.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(TESTS / "triton_compile.py")],
        env={**kept, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["capability"] for kernel in found} == {80, 90}
    bad = [kernel for kernel in found if kernel["objections"]]
    assert not bad, "\n".join(map(json.dumps, bad))
    types = {t for kernel in found for t in kernel["arguments"].values() if isinstance(t, str)}
    assert {"*fp32", "*bf16", "*fp16", "i32", "i64"} <= types
    most = max(kernel["registers"] for kernel in found)
    with capsys.disabled():
        print(f" [{len(found)} compiled, at most {most} registers]", end="", flush=True)
