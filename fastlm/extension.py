"""Loads the compiled kernels, `fastlm/_C.so`, and keeps the reason when it cannot.

The library registers `torch.ops.fastlm_C.*`: raw kernels that write into tensors they are given and
check nothing. Only the backends in `ops/*/op.py` call them, after the public function has checked.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

_REMEDY = "pip install --no-build-isolation ."


def _load() -> str | None:
    path = Path(__file__).parent / "_C.so"
    if not path.exists():
        note = path.with_name("_build_failure.txt")
        cause = f" ({note.read_text().strip()})" if note.exists() else ""
        return f"fastlm/_C.so was not built{cause}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"fastlm/_C.so does not load: {str(error).splitlines()[0]}"
    return None


#: why the compiled kernels cannot be used, or None when they are loaded
unavailable: str | None = _load()

if unavailable:
    warnings.warn(
        f"fastlm: {unavailable}; plain PyTorch runs instead, on the CPU about half as fast and "
        f"with more memory. With a C++ compiler: {_REMEDY}",
        RuntimeWarning,
        stacklevel=2,
    )


def raw(name: str) -> Any:
    """The raw kernel `torch.ops.fastlm_C.<name>`."""
    return getattr(torch.ops.fastlm_C, name).default


def cpu_isa() -> str:
    """The instruction set that the compiled CPU kernels use here: base, avx2 or avx512."""
    return "none" if unavailable else raw("cpu_isa")()


def build_info() -> str:
    """Compiler and target of the compiled library, in one line."""
    return unavailable or raw("build_info")()
