"""Gradients of a half-precision layer whose rows come in one chunk: nothing is summed over chunks,
so no float32 sum is held; each product is summed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# of a slice of the weight's gradient in float32
_SLICE_BYTES = 2 << 20


def in_slices(into: Callable[..., Tensor], dweight: Tensor, dlogits: Tensor, rows: Tensor) -> None:
    """dweight = dlogits.T @ rows, by a product `into` a float32 result."""
    classes, features = dweight.shape
    step = max(64, _SLICE_BYTES // (4 * max(1, features)))
    buffer = dlogits.new_empty(min(step, classes), features, dtype=torch.float32)
    for begin in range(0, classes, step):
        part = dlogits[:, begin : begin + step]
        dweight[begin : begin + step] = into(buffer[: part.shape[1]], part.t(), rows)


def by_the_library(
    dlogits: Tensor,
    span: slice | Tensor,
    input: Tensor,
    weight: Tensor,
    dinput: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Both gradients from those of the logits in the layer's dtype; span: their rows."""
    if dweight is not None:
        torch.mm(dlogits.t(), input[span], out=dweight)
    if dinput is not None and isinstance(span, slice):
        torch.mm(dlogits, weight, out=dinput[span])
    elif dinput is not None:
        dinput[span] = dlogits @ weight
