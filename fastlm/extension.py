"""Loads what is compiled, and keeps the reason when it cannot.

The library `fastlm/_C.so` registers `torch.ops.fastlm_C.*`: raw kernels that write into tensors
they are given and check nothing. Only the backends in `ops/*/op.py` call them, after the public
function has checked.
The module `fastlm._tokens` works on numpy arrays, for data loaders.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

_REMEDY = "pip install --no-build-isolation ."


def _not_built(name: str, note: str) -> str:
    path = Path(__file__).parent / note
    cause = f" ({path.read_text().strip()})" if path.exists() else ""
    return f"fastlm/{name} was not built{cause}"


def _load() -> str | None:
    path = Path(__file__).parent / "_C.so"
    if not path.exists():
        return _not_built("_C.so", "_build_failure.txt")
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


def _load_tokens() -> tuple[Any, str | None]:
    # beside this file, and not wherever else an importer would find one
    folder = Path(__file__).parent
    if not any((folder / f"_tokens{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None, _not_built("_tokens", "_tokens_build_failure.txt")
    try:
        return importlib.import_module(f"{__package__}._tokens"), None
    except ImportError as error:
        return None, f"fastlm/_tokens does not load: {str(error).splitlines()[0]}"


#: the module for data loaders or None, and then why; `_C` does the same on tensors
tokens, tokens_unavailable = _load_tokens()


@functools.cache
def raw(name: str) -> Any:
    """The raw kernel `torch.ops.fastlm_C.<name>`."""
    try:
        return getattr(torch.ops.fastlm_C, name).default
    except AttributeError:
        raise RuntimeError(
            f"fastlm: fastlm/_C.so has no {name}, so it is older than the package; {_REMEDY}"
        ) from None


def cpu_isa() -> str:
    """What the compiled CPU kernels use here: base, avx2, avx512 or avx512_bf16."""
    return "none" if unavailable else raw("cpu_isa")()


def build_info() -> str:
    """Compiler and target of the compiled library, in one line."""
    return unavailable or raw("build_info")()
