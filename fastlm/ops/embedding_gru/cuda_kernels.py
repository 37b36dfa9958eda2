"""The CUDA recurrence, with the arguments of `reference`; see csrc/embedding_gru/*_cuda.h.

Weights arrive in float32, whatever they are stored in: `parts` says how many bfloat16 numbers the
kernels make of each operand of the recurrent products. Sums and the state are float32. Where the
device can, blocks exchange the state in clusters, else through global memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import checks, extension
from ...extension import raw
from .layer import Recurrence
from .reference import summed_rows

# bfloat16 weights are one bfloat16 number, float16 two; of float32 three have all 24 bits
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# the most that a precision asks for
_AT_MOST = {"auto": 3, "ieee": 3, "bf16x3": 2, "tf32": 2, "bf16": 1}
# columns that a row of the exchanged values is padded to: vectors of 16 bytes
_VECTOR = 8


def forward(
    parts: int,
    table: Tensor,
    index: Tensor | None,
    reset: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    h0: Tensor | None,
    batch: int,
    batch_first: bool,
    reverse: bool,
    round: bool = False,  # of bfloat16 operands: `parts` is 1
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, hidden = (table if index is None else index).shape[0], w_hh.shape[1]
    clusters = _objection(hidden, parts, True, table.device) is None
    exchange = table.new_empty(tokens, _width(hidden), dtype=_exchange_dtype(parts))
    gates, h_n = table.new_empty(tokens, 4 * hidden), table.new_empty(batch, hidden)
    raw("gru_forward_cuda")(
        table, index, reset, w_hh, b_hh, h0, parts, clusters, batch_first, reverse,
        exchange, h_n, gates,
    )  # fmt: skip
    return exchange[:, :hidden].contiguous(), h_n, gates


def backward(
    parts: int,
    doutput: Tensor,
    dh_n: Tensor,
    index: Tensor | None,
    rows: int,
    reset: Tensor | None,
    w_hh: Tensor,
    h0: Tensor | None,
    output: Tensor,
    gates: Tensor,
    batch: int,
    batch_first: bool,
    reverse: bool,
    round: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, hidden = output.shape
    clusters = _objection(hidden, parts, True, gates.device) is None
    exchange = gates.new_empty(tokens, 3, _width(hidden), dtype=_exchange_dtype(parts))
    dinput = gates.new_empty(tokens, 3 * hidden)
    # what blocks exchange in float32 is the result; bfloat16 is only good for the next step
    dhidden = gates.new_empty(tokens, 3 * hidden) if parts == 1 else None
    dh0 = torch.empty_like(dh_n)
    raw("gru_backward_cuda")(
        doutput, dh_n, reset, w_hh, h0, output, gates, parts, clusters, batch_first, reverse,
        exchange, dinput, dhidden, dh0,
    )  # fmt: skip
    if dhidden is None:
        dhidden = exchange[..., :hidden].reshape(tokens, 3 * hidden)
    dbias = torch.stack((dinput.sum(0), dhidden.sum(0)))
    if index is not None:
        dinput = summed_rows(dinput, index, rows)
    return dinput, dhidden, dh0, dbias


def _width(hidden: int) -> int:
    return (hidden + _VECTOR - 1) // _VECTOR * _VECTOR


def _exchange_dtype(parts: int) -> torch.dtype:
    return torch.bfloat16 if parts == 1 else torch.float32


def _token_plan(tokens: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    unique, inverse = torch.unique(tokens, sorted=True, return_inverse=True)
    return unique, inverse


_RECURRENCES = {
    parts: Recurrence(partial(forward, parts), partial(backward, parts), _token_plan)
    for parts in PARTS.values()
}


def _parts(dtype: torch.dtype, precision: str) -> int:
    return min(PARTS[dtype], _AT_MOST[precision])


def of_layer(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of layer.py with the recurrence for the dtype of its first float tensor and the
    precision, its last argument."""

    def run(*args: Any) -> Any:
        floats = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        return function(_RECURRENCES[_parts(next(floats).dtype, args[-1])], *args)

    return run


def refuses(w_hh: Tensor, precision: str, **_: Any) -> str | None:
    if w_hh.dtype not in PARTS:
        return f"dtype {checks.short(w_hh.dtype)}"
    if w_hh.shape[1] == 0:
        return "no hidden units"
    size = (w_hh.shape[1], _parts(w_hh.dtype, precision))
    if _objection(*size, True, w_hh.device) is None:
        return None
    return _objection(*size, False, w_hh.device)


@lru_cache(maxsize=1024)
def _objection(hidden: int, parts: int, clusters: bool, device: torch.device) -> str | None:
    """Why a device cannot run a layer in clusters of blocks, or in a grid that is all resident."""
    with torch.cuda.device(device):
        reason = raw("gru_cuda_objection")(hidden, parts, clusters)
    return f"hidden size {hidden}: {reason}" if reason else None


def _unavailable() -> str | None:
    if extension.unavailable:
        return extension.unavailable
    if not raw("has_cuda_kernels")():
        return "fastlm/_C.so was built without CUDA kernels"
    # device_count asks the driver's library: it starts no CUDA context and leaves fork alone
    if not (torch.backends.cuda.is_built() and torch.cuda.device_count()):
        return "no GPU"
    return None


#: why no CUDA kernel can run, or None
unavailable: str | None = _unavailable()
