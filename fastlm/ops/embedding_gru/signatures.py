"""Keyword arguments of the overloads of `gru`.

For type checkers alone; imported by none that runs.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Options(TypedDict, total=False):
    num_layers: int
    bias: bool
    bidirectional: bool
    batch_first: bool
    dropout: float
    training: bool
    reset: Tensor | None
    segment_ids: Tensor | None
    cu_seqlens: Tensor | None
    lengths: Tensor | None
    precision: str
    save: str
    zoneout: float
