"""Attention in Triton: every option, both passes, against scores written out.

On a GPU where there is one, else in Triton's interpreter, which test_triton_interpreted.py starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import AttnMask, dispatch
from fastlm.testing import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if "triton" not in dispatch.ready("attention", DEVICE):
    why = fastlm.backends()["attention"]["triton"]
    pytest.skip(f"{why}; test_triton_interpreted.py runs this file", allow_module_level=True)

pytestmark = pytest.mark.gpu


def qkv(
    shape: tuple[int, int, int, int, int], sizes: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    batch, rows, keys, heads, key_heads = shape
    return [
        torch.randn(batch, rows, heads, sizes[0]).to(DEVICE, dtype),
        torch.randn(batch, keys, key_heads, sizes[0]).to(DEVICE, dtype),
        torch.randn(batch, keys, key_heads, sizes[1]).to(DEVICE, dtype),
    ]


def against_reference(args: list[Tensor], names: tuple[str, ...] = (), **options: Any) -> None:
    """Out and lse; `names` of the arguments behind q, k and v. The reference is tested by itself."""

    def call(backend: str, *given: Tensor) -> tuple[Tensor, ...]:
        with fastlm.use_backend(backend):
            named = dict(zip(names, given[3:], strict=True))
            out, lse = fastlm.attention(*given[:3], return_lse=True, **named, **options)
            return out, lse.masked_fill(lse == -torch.inf, 0.0)

    with torch.no_grad():
        check(lambda *a: call("triton", *a), lambda *a: call("reference", *a), args)


BANDS: list[dict[str, Any]] = [{}, {"mask": "causal"}, {"window": (20, 3)}, {"window": (40, None)}]


@pytest.mark.parametrize("options", BANDS, ids=["full", "causal", "window", "left"])
@pytest.mark.parametrize("sizes", [(70, 100), (100, 70)])
def test_bands(options: dict[str, Any], sizes: tuple[int, int]) -> None:
    against_reference(qkv((2, *sizes, 4, 2), (24, 40), torch.float32), **options)
