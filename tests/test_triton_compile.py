"""Triton kernels compiled for GPUs that are not here: nothing spills, everything fits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
# bytes of shared memory that a block can have, and registers of a multiprocessor
SHARED = {80: 166912, 90: 232448}
REGISTERS = 65536
# of a multiprocessor: one waits for memory while the other computes. A tile of attention fills the
# registers, and loads the next one while it computes
BLOCKS_AT_ONCE = {"attention": 1}
# rows of a product at least for the instructions of sm_90: a program that owns fewer rows or keys,
# because a head of 256 leaves no registers for more, uses those of sm_80
LEAST_ROWS = 64

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
    assert {kernel["capability"] for kernel in found} == set(SHARED)
    too_much = [
        kernel
        for kernel in found
        if kernel["stack"]
        or kernel["local"]
        or kernel["shared"] > SHARED[kernel["capability"]]
        or BLOCKS_AT_ONCE.get(kernel["op"], 2) * kernel["registers"] * kernel["threads"] > REGISTERS
    ]
    assert not too_much, "\n".join(map(json.dumps, too_much))
    slow = [kernel for kernel in found if kernel["op"] == "attention" and _without_products(kernel)]
    assert not slow, "\n".join(map(json.dumps, slow))
    types = {t for kernel in found for t in kernel["arguments"].values() if isinstance(t, str)}
    assert {"*fp32", "*bf16", "*fp16", "i32", "i64"} <= types
    most = max(kernel["registers"] for kernel in found)
    with capsys.disabled():
        print(f" [{len(found)} compiled, at most {most} registers]", end="", flush=True)


def _without_products(kernel: dict[str, Any]) -> bool:
    """Whether a kernel that takes products takes them without the tensor cores that it could."""
    counts = kernel["products"]
    if kernel["arguments"].get("q") in (None, "*fp32") or kernel["kernel"] == "bias_kernel":
        return False
    owned = kernel["tiles"][1 if kernel["kernel"] == "dkdv_kernel" else 0]
    hopper = kernel["capability"] == 90 and owned >= LEAST_ROWS
    return counts["HGMMA" if hopper else "HMMA"] == 0
