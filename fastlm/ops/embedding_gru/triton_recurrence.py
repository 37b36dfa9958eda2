"""When the Triton recurrence runs; `triton_kernels` is imported with its first call.

Weights arrive from `layer` in float32; those of 16 bits go to the kernels as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .layer import Recurrence


def _forward(dtype: torch.dtype, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernels

    table, index, reset, w_hh, *rest = args
    return triton_kernels.forward(table, index, reset, w_hh.to(dtype), *rest)


def _backward(dtype: torch.dtype, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import triton_kernels

    doutput, dh_n, index, rows, reset, w_hh, *rest = args
    return triton_kernels.backward(doutput, dh_n, index, rows, reset, w_hh.to(dtype), *rest)


def _token_plan(tokens: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    unique, inverse = torch.unique(tokens, sorted=True, return_inverse=True)
    return unique, inverse


_RECURRENCES = {
    dtype: Recurrence(partial(_forward, dtype), partial(_backward, dtype), _token_plan)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


def of_layer(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `layer` with the recurrence for the dtype of its first float tensor."""

    def run(*args: Any) -> Any:
        floats = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        return function(_RECURRENCES[next(floats).dtype], *args)

    return run


def refuses(
    w_hh: Tensor, weight: Tensor | None = None, precision: str = "ieee", **_: Any
) -> str | None:
    if precision == "bf16":
        return "does not round its operands"
    if w_hh.dtype not in _RECURRENCES:
        return "takes float32, bfloat16 and float16, not float64"
    hidden = w_hh.shape[1]
    rows = 0 if weight is None else weight.shape[0]
    # a column of the gates is an int32; a grid has less than 2^31 programs, the largest one for
    # each row of the embedding and 128 columns of its gradient
    if hidden == 0 or hidden >= 2**28 or rows * (1 + 3 * hidden // 128) >= 2**31:
        return f"takes 1 to 2^28 hidden units, 2^31 programs, not H = {hidden} with {rows} rows"
    return None
