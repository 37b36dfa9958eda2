"""The weights of a GRU language model as decoding reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import extension, matmul
from ...extension import raw
from .autograd import Kept, MadeLogprobs
from .reference import Cell, Weights

# packing pays after so many steps that pack panel by panel and keep nothing: between 4 (V=10000
# H=512) and 14 (V=50000), AMD EPYC with AVX-512, 2026-11
PACK_STEPS = 10


def _wide(x: Tensor | None) -> Any:
    """In the dtype of the computation, contiguous, without gradient."""
    if x is None:
        return None
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _matrix(x: Tensor | None, narrow: bool) -> Any:
    return _wide(x) if x is None or not narrow else x.detach().contiguous()


def _mark(x: Tensor) -> tuple[int, int]:
    """Changes when the tensor is written to, or its storage replaced."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


class DecoderWeights:
    """An embedding, GRU layers and a linear head, for the CPU kernel where it takes them.

    Once that pays it holds a packed copy of all matrices, and the input projection of the whole
    vocabulary, [V, 3H]; results are the same to the bit with them and without. It is of the weights
    as they were: used after one has been changed in place, it raises.
    """

    def __init__(
        self,
        embedding: Tensor,
        cells: Sequence[Cell],
        head_weight: Tensor | None = None,
        head_bias: Tensor | None = None,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
    ) -> None:
        self.padding_idx = padding_idx
        self.vocabulary, self.hidden, self.layers = (
            embedding.shape[0],
            cells[0][1].shape[1],
            len(cells),
        )
        self.classes = 0 if head_weight is None else head_weight.shape[0]
        self.dtype = embedding.dtype
        #: embedding, the cells one after the other, head, in the order of gradients
        self.parameters = (embedding, *(w for cell in cells for w in cell), head_weight, head_bias)
        self._marks = [None if p is None else _mark(p) for p in self.parameters]
        rows = _wide(embedding)
        #: what the embedding stands for in products, where that is not the parameter itself
        self.rows: Tensor | None = None
        if max_norm is not None:
            # the rows that a lookup would leave behind
            rows = torch.renorm(rows, norm_type, 0, max_norm)
            self.rows = rows.to(embedding.dtype)
        self._packs = not extension.unavailable and rows.dtype == torch.float32
        self._packs &= rows.device.type == "cpu"
        # the kernel reads matrices in bfloat16, half the bytes, where all of them are
        matrices = [head_weight, *(w for cell in cells for w in cell[:2])]
        narrow = self._packs and all(m is None or m.dtype == torch.bfloat16 for m in matrices)
        self._narrow = narrow
        #: the dtype of the computation; matrices may be in bfloat16
        self.wide = Weights(
            rows,
            [(_matrix(a, narrow), _matrix(b, narrow), _wide(c), _wide(d)) for a, b, c, d in cells],
            _matrix(head_weight, narrow),
            _wide(head_bias),
        )
        self._packed: Tensor | None = None
        self._table: Tensor | None = None
        self._steps = self._tokens = 0

    def _pack(self) -> Tensor:
        rows, cells, head_weight, head_bias = self.wide
        sizes = (rows.shape[1], self.hidden, self.layers, self.classes)
        size = raw("generation_packed_size")(*sizes, self._narrow)
        packed, offset = rows.new_empty(size), 0
        pack = raw("generation_pack")
        for w_ih, w_hh, b_ih, b_hh in cells:
            # the kernel expects W_ih, W_hh of layer 0, then W_ih, W_hh of each following one
            offset = pack(w_ih, b_ih, True, offset, packed)
            offset = pack(w_hh, b_hh, True, offset, packed)
        if head_weight is not None:
            pack(head_weight, head_bias, False, offset, packed)
        return packed

    def check_fresh(self, op: str) -> None:
        now = [None if p is None else _mark(p) for p in self.parameters]
        if now != self._marks:
            raise RuntimeError(
                f"fastlm.{op}: the weights have changed since the decoder was made; make another"
            )

    def with_gradient(self, kept: Kept, temperature: float) -> Tensor:
        """The log-probs of a decoding, in the graph of the parameters."""
        how = (temperature, self.padding_idx, self.rows)
        return MadeLogprobs.apply(kept, *how, *self.parameters)

    def arguments(self, batch: int, steps: int) -> tuple[Any, ...]:
        """embedding, cells, head_weight, head_bias, packed, table of the torch ops, for reading
        `steps` more tokens of each of `batch` rows."""
        rows, cells, head_weight, head_bias = self.wide
        self._steps += steps
        self._tokens += batch * steps
        if self._packs and self._packed is None and self._steps >= PACK_STEPS:
            self._packed = self._pack()
        if self._packed is not None and self._table is None and 2 * self._tokens >= rows.shape[0]:
            w_ih, _, b_ih, _ = cells[0]
            self._table = rows.new_empty(rows.shape[0], 3 * self.hidden)
            matmul.own_into(self._table, rows, w_ih.t(), b_ih)
        flat = [w for cell in cells for w in cell]
        return rows, flat, head_weight, head_bias, self._packed, self._table
