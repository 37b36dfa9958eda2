"""Keyword arguments of the overloads of `attention`, all but `return_lse`.

For type checkers alone; imported by none that runs.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from .mask import AttnMask


class Options(TypedDict, total=False):
    mask: str | AttnMask | None
    scale: float | None
    window: tuple[int | None, int | None] | None
    softcap: float
    alibi_slopes: Tensor | None
    sink: Tensor | None
    bias: Tensor | None
    dropout_p: float
    seed: int | Tensor | None
    layout: str
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
