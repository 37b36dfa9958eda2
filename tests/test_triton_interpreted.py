"""Triton kernels on the CPU: the ops' tests in a process of its own under Triton's interpreter.

Triton decides at its first import whether kernels are interpreted, so this process cannot do it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
no_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

# of what every backend passes, the triton parameter; then what is Triton's own
TESTS_TO_RUN = (
    "test_row_statistics.py",
    "test_cross_entropy.py::test_confident_targets",
    "test_cross_entropy.py::test_auxiliary_results",
    "test_token_logprobs.py::test_what_is_returned",
    "test_token_logprobs.py::test_linear_chunks_do_not_change_the_results",
    "test_linear_cross_entropy.py::test_any_forward_with_any_backward",
    "test_linear_cross_entropy.py::test_every_element_is_written",
    "test_linear_kl_div.py",
    "test_embedding_gru.py::test_gru_matches_plain",
    "test_embedding_gru.py::test_options_do_not_change_the_result",
    "test_embedding_gru.py::test_any_forward_with_any_backward",
    "test_attention.py::test_matches_pytorch",
    "test_attention.py::test_layouts_and_strides",
    "test_attention.py::test_opcheck_and_compile",
    "test_triton_attention.py",
    "test_triton_decode.py",
    "test_triton_embedding_gru.py",
    "test_triton_row_statistics.py",
    "test_triton_interpreter.py",
)
SELECT = "triton or target_outside"


@no_triton
def test_under_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    kept = {k: v for k, v in os.environ.items() if k != "FASTLM_BACKEND"}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), kept.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "triton_interpreter", "-k", SELECT]
        # numpy warns of the NaN that kernels mask, where a GPU says nothing
        + ["-W", "ignore::RuntimeWarning:triton", *(str(TESTS / name) for name in TESTS_TO_RUN)],
        cwd=TESTS.parent,
        env={**kept, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and "skipped" not in result.stdout.splitlines()[-1]
    with capsys.disabled():
        print(f" [{passed[1]} tests ran under the interpreter]", end="", flush=True)
