"""The mended interpreter computes what a GPU would; test_triton_interpreted.py runs this file."""

from __future__ import annotations

import pytest
import torch

from fastlm import triton_backend

if triton_backend.unavailable or not triton_backend.interpreted:
    pytest.skip("not under Triton's interpreter", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def _round(x, out, n, BLOCK: tl.constexpr):
    for begin in range(0, tl.load(n), BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        value = tl.load(x + lanes)
        tl.store(out + lanes, value.to(tl.bfloat16))


def test_bfloat16_is_rounded_to_nearest_even_and_loops_take_loaded_bounds() -> None:
    x = torch.randn(64)
    x[:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1 + 2**-8, 3.4e38])
    out = torch.zeros(64, dtype=torch.bfloat16)
    _round[(1,)](x, out, torch.tensor([64]), BLOCK=16)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _product(a, b, out, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    at = i * BLOCK + j
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_product_of_bfloat16() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.zeros(16, 16)
    _product[(1,)](a, b, out, BLOCK=16)
    torch.testing.assert_close(out, a.float() @ b.float())
