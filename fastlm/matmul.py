"""Matrix products with float32 sums: PyTorch's, or our own where PyTorch's are slow.

On a GPU half-precision operands go to PyTorch's products as they are and come out in float32, where
this PyTorch has them (`library_into`); elsewhere the caller widens them.

PyTorch multiplies float32 by MKL, which on a processor that is not Intel's uses vectors of 256
bits. AMD's from Zen 5 on work on 512 at full rate, so the compiled product is about twice as fast
there (benchmarks/LOG.md, 2026-11-26). It also takes bfloat16 operands as they are, and every
element of its result depends on its row and its column alone: not on threads, nor on other rows.
So under `use_backend("cpu")` it computes every product that could be its own, whatever is faster:
the results of a training forward are then, to the bit, those of the decoding kernel, which sums in
the same order.

Where the processor multiplies pairs of bfloat16 (AVX512_BF16), operands that both are bfloat16, or
are to be rounded to it, are multiplied at twice the rate of float32, and sums are float32 all the
same. Those instructions take numbers below 2**-126 for 0, as PyTorch's own products there do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch, extension


@functools.lru_cache
def own_is_faster() -> bool:
    """Whether the compiled product is the faster one on this machine."""
    if extension.unavailable or not torch.backends.mkl.is_available():
        return False
    return extension.raw("mkl_is_slow")()


def _forced() -> bool:
    return dispatch.forced() == "cpu" and not extension.unavailable


def own_runs() -> bool:
    """Whether the compiled product runs at all: it is faster here, or `use_backend` asks for it."""
    return _forced() or own_is_faster()


@functools.lru_cache
def multiplies_pairs() -> bool:
    """Whether operands in bfloat16, or rounded to it, are multiplied faster than in float32."""
    return own_is_faster() and extension.cpu_isa() == "avx512_bf16"


# smaller results leave most of a tile empty; a shorter sum is not worth packing for
_LEAST_ROWS, _LEAST_COLUMNS, _LEAST_DEPTH = 8, 24, 16


def plain_into(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, accumulate: bool = False
) -> Tensor:
    """out [M, N] = a [M, K] @ b [K, N] + bias [N], or out += a @ b; all of one dtype."""
    if accumulate:
        return out.addmm_(a, b)
    if bias is not None:
        return torch.addmm(bias, a, b, out=out)
    return torch.mm(a, b, out=out)


def own_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: bool = False,
    round: bool = False,
) -> Tensor:
    """As `plain_into`, compiled: out and bias float32, a and b float32 or bfloat16, any strides.

    CPU tensors; the columns of out contiguous; K at least 1; bias not with accumulate. With `round`
    float32 operands count as the nearest bfloat16."""
    bias = None if bias is None else bias.contiguous()  # the kernel reads it element by element
    extension.raw("matmul")(a, b, bias, accumulate, out, round)
    return out


def takes_mixed(operand: Tensor) -> bool:
    """Whether `into` takes operands like this one, in half precision, for a float32 result."""
    return own_runs() and operand.dtype == torch.bfloat16 and operand.device.type == "cpu"


def _suits_own(out: Tensor, depth: int) -> bool:
    rows, columns = out.shape
    large = rows >= _LEAST_ROWS and columns >= _LEAST_COLUMNS and depth >= _LEAST_DEPTH
    return large or _forced()


def into(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, accumulate: bool = False
) -> Tensor:
    """As `plain_into`, by the faster of the two; operands as `takes_mixed` says."""
    depth = a.shape[1]
    own = own_runs() and out.dtype == torch.float32 and out.device.type == "cpu"
    if own and out.stride(1) == 1 and depth > 0:
        if a.dtype != out.dtype or b.dtype != out.dtype or _suits_own(out, depth):
            return own_into(out, a, b, bias, accumulate=accumulate)
    a, b = a.to(out.dtype), b.to(out.dtype)  # mixed where the product is empty
    return plain_into(out, a, b, bias, accumulate=accumulate)


def into_rounded(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, accumulate: bool = False
) -> Tensor:
    """As `into`; where that is faster, a float32 operand beside one in bfloat16 is rounded."""
    if a.dtype != b.dtype and multiplies_pairs() and takes_mixed(a if b.dtype == out.dtype else b):
        if out.dtype == torch.float32 and out.stride(1) == 1 and a.shape[1] > 0:
            return own_into(out, a, b, bias, accumulate=accumulate, round=True)
    return into(out, a, b, bias, accumulate=accumulate)


def plain(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias."""
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _result(a: Tensor, b: Tensor) -> Tensor:
    """For sums in float32, or float64 of float64."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def fastest(a: Tensor, b: Tensor, bias: Tensor | None = None, *, round: bool = False) -> Tensor:
    """As `plain`, by the faster of the two; with `round`, for which `multiplies_pairs` must hold,
    of float32 operands rounded to bfloat16."""
    out = _result(a, b)
    if round and a.shape[1] > 0:
        return own_into(out, a, b, bias, round=True)
    return into(out, a, b, bias)


def plain_each_row(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `plain`; a row of the result does not depend on the rows around it.

    MKL computes the last one to three of a few rows by another kernel, which rounds differently."""
    count = a.shape[0]
    if a.device.type == "cpu" and count < 64 and count % 4:
        a = torch.nn.functional.pad(a, (0, 0, 0, -count % 4))
    return plain(a, b, bias)[:count]


def each_row(a: Tensor, b: Tensor, bias: Tensor | None = None, *, round: bool = False) -> Tensor:
    """As `plain_each_row`, by one of the two for all numbers of rows; `round` as `fastest`."""
    out = _result(a, b)
    own = own_runs() and out.dtype == torch.float32 and a.device.type == "cpu"
    if own and a.shape[1] > 0:
        return own_into(out, a, b, bias, round=round)
    return plain_each_row(a.to(out.dtype), b.to(out.dtype), bias)


def _wide_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _wide_addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)


@functools.lru_cache
def _has(product: Callable[..., None], dtype: torch.dtype, device: torch.device) -> bool:
    """Tried once: which dtypes these products take depends on the version of PyTorch."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    a, out = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        product(out, a, a)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def library_takes_mixed(operand: Tensor) -> bool:
    """Whether `library_into` takes operands like this one for a float32 result."""
    return _has(_wide_mm, operand.dtype, operand.device)


def library_into(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, accumulate: bool = False
) -> Tensor:
    """As `plain_into`, by PyTorch; a and b of one dtype, that of out or as
    `library_takes_mixed` says."""
    if a.dtype == out.dtype:
        return plain_into(out, a, b, bias, accumulate=accumulate)
    if not accumulate:
        _wide_mm(out, a, b)
        return out if bias is None else out.add_(bias)
    if _has(_wide_addmm, a.dtype, a.device):
        _wide_addmm(out, a, b)
        return out
    part = torch.empty_like(out)
    _wide_mm(part, a, b)
    return out.add_(part)
