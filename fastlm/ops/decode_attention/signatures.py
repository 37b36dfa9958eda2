"""Keyword arguments of the overloads of `decode_attention`, all but `return_lse`.

For type checkers alone; imported by none that runs.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Options(TypedDict, total=False):
    block_table: Tensor | None
    k_new: Tensor | None
    v_new: Tensor | None
    causal: bool
    window: tuple[int | None, int | None] | None
    softcap: float
    sink: Tensor | None
    alibi_slopes: Tensor | None
    scale: float | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    num_splits: int | None
