"""Attention over a cache in Triton, against the reference: dense and paged, every option.

On a GPU where there is one, else in Triton's interpreter, which test_triton_interpreted.py starts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch
from fastlm.ops.decode_attention.reference import Options as Given
from fastlm.testing import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if "triton" not in dispatch.ready("decode_attention", DEVICE):
    why = fastlm.backends()["decode_attention"]["triton"]
    pytest.skip(f"{why}; test_triton_interpreted.py runs this file", allow_module_level=True)

from fastlm.ops.decode_attention import triton_kernels  # noqa: E402

pytestmark = pytest.mark.gpu
HEADS, KEY_HEADS, SIZES = 6, 2, (24, 40)
LENGTHS = [0, 300, 37, 64]
Options = dict[str, Any]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def tensors(queries: int, dtype: torch.dtype, slots: tuple[int, int] = (4, 320)) -> list[Tensor]:
    """q and both caches; slots behind the lengths are NaN, in a paged cache those of no row."""
    q = torch.randn(len(LENGTHS), queries, HEADS, SIZES[0])
    caches = [torch.randn(*slots, KEY_HEADS, size) for size in SIZES]
    if slots[0] == len(LENGTHS):
        for cache in caches:
            for row, length in enumerate(LENGTHS):
                cache[row, length:] = torch.nan
    return [x.to(DEVICE, dtype) for x in (q, *caches)]


def against_reference(args: list[Tensor], options: Options) -> None:
    """Errors against float64, at most twice those of the reference in the same dtype."""

    def call(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with fastlm.use_backend(backend), torch.no_grad():
            given = [x.to(dtype) for x in args]
            out, lse = fastlm.decode_attention(*given, ints(*LENGTHS), return_lse=True, **options)
            return out.double(), lse.double()

    dtype = args[0].dtype
    results = [call("reference", torch.float64), call("reference", dtype), call("triton", dtype)]
    for truth, theirs, ours in zip(*results, strict=True):
        assert torch.equal(truth.isfinite(), ours.isfinite())
        floor = 8 * torch.finfo(dtype).eps * float(truth[truth.isfinite()].abs().max())
        assert error(ours, truth) <= 2 * error(theirs, truth) + floor


MASKS: dict[str, Options] = {
    "causal": {},
    "window": {"window": (40, 0)},
    "not-causal": {"causal": False},
    "scores": {"softcap": 1.5, "scale": 0.6},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 3])
def test_dense(mask: str, queries: int, poisoned: None) -> None:
    """A row without keys, and one with fewer keys than others; NaN behind their ends."""
    against_reference(tensors(queries, torch.float32), MASKS[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, poisoned: None) -> None:
    against_reference(tensors(2, dtype), {})


def test_every_option(poisoned: None) -> None:
    extra = {"sink": torch.randn(HEADS), "alibi_slopes": torch.rand(4, HEADS)}
    options = {name: value.to(DEVICE) for name, value in extra.items()} | {"softcap": 2.0}
    args = tensors(2, torch.float32)
    against_reference(args, options | {"cache_leftpad": ints(0, 3, 0, 70), "window": (90, 0)})
    moved = [args[0], *(x.flip(0) for x in args[1:])]
    against_reference(moved, {"cache_batch_idx": ints(3, 2, 1, 0)})


@pytest.mark.parametrize("block_size", [16, 5])
def test_paged(block_size: int, poisoned: None) -> None:
    """Blocks in any order; what is behind a row's last block is not looked at."""
    args = tensors(1, torch.float32, (4 * 320 // block_size, block_size))
    order = torch.randperm(4 * 320 // block_size).view(4, -1).int()
    for row, length in enumerate(LENGTHS):
        order[row, -(-length // block_size) :] = -7
    for options in ({}, {"window": (33, 0)}):
        against_reference(args, options | {"block_table": order.to(DEVICE)})


def test_append_and_parts() -> None:
    """New keys take part and are written; no number of parts changes more than the rounding."""
    new = [torch.randn(4, 2, KEY_HEADS, size).to(DEVICE) for size in SIZES]
    found = []
    for backend, parts in (("reference", None), ("triton", None), ("triton", 1), ("triton", 7)):
        torch.manual_seed(5)
        args = tensors(2, torch.float32)
        with fastlm.use_backend(backend), torch.no_grad():
            options = {"k_new": new[0], "v_new": new[1], "num_splits": parts}
            out = fastlm.decode_attention(*args, ints(*LENGTHS), **options)
        found.append((out, args[1][1, :302], args[2][1, :302]))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b)


def test_a_row_has_the_same_bits_alone() -> None:
    args = tensors(1, torch.float32)
    with fastlm.use_backend("triton"), torch.no_grad():
        whole = fastlm.decode_attention(*args, ints(*LENGTHS))
        alone = fastlm.decode_attention(*(x[1:2] for x in args), ints(300))
    assert torch.equal(whole[1:2], alone)


def test_parts_follow_from_the_capacity() -> None:
    assert triton_kernels.parts_of(0, 0) == (1, 256)
    assert triton_kernels.parts_of(4096, 0) == (16, 256)
    assert triton_kernels.parts_of(131072, 0) == (64, 2048)
    assert triton_kernels.parts_of(100, 3) == (3, 34)
    assert triton_kernels.parts_of(3, 8) == (3, 1)


def test_rows_that_the_cache_has_not_are_nan() -> None:
    """Beneath the op, which raises on the CPU."""
    q, k, v = tensors(1, torch.float32)
    none = (None, None, None, None, None)
    for options, lengths in (
        (Given(*none, 0.3, -1, 0, 0.0, 0), ints(0, 321, 37, -1)),
        (Given(None, ints(0, 4, 2, -1), *none[:3], 0.3, -1, 0, 0.0, 0), ints(*LENGTHS)),
    ):
        out, lse = triton_kernels.forward(q, k, v, lengths, options)
        bad = torch.tensor([False, True, False, True], device=DEVICE)
        assert torch.equal(out.isnan().flatten(1).all(1), bad)
        assert torch.equal(lse.isnan().flatten(1).any(1), bad)
