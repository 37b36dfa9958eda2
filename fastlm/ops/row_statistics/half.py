"""float16 logits on a CPU, by the compiled kernels of float32: some rows at a time in a copy that
stays in the caches. Every float16 is a float32, so the statistics are those of the logits; the
gradient is rounded once, as it is copied back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# of a piece
_ELEMENTS = 1 << 18


def _pieces(logits: Tensor) -> Iterator[slice]:
    rows, classes = logits.shape
    step = max(1, _ELEMENTS // max(1, classes))
    for begin in range(0, max(1, rows), step):
        yield slice(begin, min(begin + step, rows))


def _wide(logits: Tensor, piece: slice) -> Tensor:
    return logits[piece].to(torch.float32, memory_format=torch.contiguous_format)


def _compared(
    target: Tensor | None, class_weight: Tensor | None, piece: slice
) -> tuple[Tensor | None, Tensor | None]:
    each = class_weight is not None and class_weight.dim() == 2
    weight = class_weight[piece] if each and class_weight is not None else class_weight
    return None if target is None else target.reshape(-1)[piece], weight


def forward(
    run: Callable[..., tuple[Tensor, ...]],
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """run: the forward of float32."""
    parts = [
        run(_wide(logits, piece), *_compared(target, class_weight, piece), *rest)
        for piece in _pieces(logits)
    ]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def backward_into(
    run: Callable[..., None],
    dlogits: Tensor,
    logits: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    coefficients: tuple[Tensor | None, ...],
    *rest: Any,
) -> None:
    """run: that of float32, which writes over its logits."""
    for piece in _pieces(logits):
        wide = _wide(logits, piece)
        scale = row_max[piece], log_sum[piece]
        factors = tuple(None if c is None else c[piece] for c in coefficients)
        run(wide, wide, *_compared(target, class_weight, piece), *scale, factors, *rest)
        dlogits[piece] = wide
