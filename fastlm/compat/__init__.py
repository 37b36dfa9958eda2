"""The calls of other libraries on fastlm's kernels; each part is imported when it is asked for.

sdpa: torch.nn.functional.scaled_dot_product_attention. flash_attn: the functions of that package.
hf: an attention implementation for transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = ("flash_attn", "hf")


def __getattr__(name: str) -> Any:
    if name == "sdpa":
        return importlib.import_module("fastlm.nn.functional").scaled_dot_product_attention
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["sdpa", *_MODULES]
