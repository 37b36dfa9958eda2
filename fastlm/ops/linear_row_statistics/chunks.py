"""The loop that takes statistics of a linear layer's logits without holding them all.

Rows are taken in chunks. The logits of a chunk are computed into one buffer, their statistics and
then their gradient, in place, by the kernels of `row_statistics`; the gradient goes into the
gradients of input, weight and bias by two further products. All products accumulate in float32 (or
float64); for half-precision inputs slices of the weight are widened one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..row_statistics.op import Upstream, Wanted, coefficients, result_dtype

# rows of a chunk on a CPU: products of fewer than 64 rows run at half the rate, more than 512 gain
# nothing; in between 1/8 of the rows, which keeps a chunk below 5% of what three tensors of logits
# take. Small chunks are not worth the memory they save.
_CPU_BYTES = 10 << 20
_CPU_LEAST, _CPU_MOST, _CPU_SHARE = 64, 512, 8
_GPU_BYTES = 256 << 20
_SLICE_BYTES = 2 << 20


class RowKernels(NamedTuple):
    """Implementation of the row statistics: forward, and a backward that may reuse the logits."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Tensor]


class Layer(NamedTuple):
    input: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class Needs(NamedTuple):
    """The gradients that are asked for."""

    input: bool = False
    weight: bool = False
    bias: bool = False


_NONE = Needs()


class Compared(NamedTuple):
    """What the rows are compared with, and how the logits become scores."""

    target: Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    scale: float
    softcap: float

    def rows(self, begin: int, end: int) -> Compared:
        target = None if self.target is None else self.target.reshape(-1)[begin:end]
        weight = self.class_weight
        if weight is not None and weight.dim() == 2:
            weight = weight[begin:end]
        return self._replace(target=target, class_weight=weight)


def chunk_rows(rows: int, classes: int, itemsize: int, max_bytes: int, device: str) -> int:
    """Rows per chunk, equal for all chunks but for rounding; `max_bytes` 0 is our own choice."""
    row_bytes = classes * itemsize
    if max_bytes > 0:
        most = max_bytes // row_bytes
    elif device == "cpu":
        most = max(_CPU_BYTES // row_bytes, _CPU_LEAST, min(rows // _CPU_SHARE, _CPU_MOST))
    else:
        most = _GPU_BYTES // row_bytes
    chunks = -(-rows // max(1, most))
    return -(-rows // max(1, chunks))


class _Products:
    """The three products of the layer with one chunk, in the accumulator's dtype."""

    def __init__(self, layer: Layer, chunk: int) -> None:
        self.layer = layer
        self.dtype = result_dtype(layer.input)
        self.classes, self.features = layer.weight.shape
        self.logits_buffer = self.new(chunk, self.classes)
        self.bias = None if layer.bias is None else layer.bias.to(self.dtype)
        self.widens = layer.input.dtype != self.dtype
        self.step = max(1, self.classes)
        if self.widens:
            row_bytes = max(1, self.features) * self.dtype.itemsize
            self.step = min(self.step, max(64, _SLICE_BYTES // row_bytes))
            self.slice_buffer = self.new(self.step, self.features)
            self.input_buffer = self.new(chunk, self.features)

    def new(self, *shape: int) -> Tensor:
        return self.layer.input.new_empty(shape, dtype=self.dtype)

    def rows(self, begin: int, end: int) -> Tensor:
        rows = self.layer.input[begin:end]
        return self.input_buffer[: end - begin].copy_(rows) if self.widens else rows

    def weights(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, self.classes, self.step):
            part = slice(begin, min(begin + self.step, self.classes))
            weight = self.layer.weight[part]
            if self.widens:
                weight = self.slice_buffer[: weight.shape[0]].copy_(weight)
            yield part, weight

    def logits(self, begin: int, end: int) -> Tensor:
        out = self.logits_buffer[: end - begin]
        rows = self.rows(begin, end)
        for part, weight in self.weights():
            if self.bias is None:
                torch.mm(rows, weight.t(), out=out[:, part])
            else:
                torch.addmm(self.bias[part], rows, weight.t(), out=out[:, part])
        return out


class _Gradients:
    """Sums of the gradients over the chunks; None where one is not needed."""

    def __init__(self, products: _Products, needs: Needs) -> None:
        layer = products.layer
        self.products = products
        self.started = False
        self.dinput = layer.input.new_empty(layer.input.shape) if needs.input else None
        self.dweight = products.new(*layer.weight.shape) if needs.weight else None
        self.dbias = products.new(products.classes) if needs.bias else None

    def add(self, dlogits: Tensor, begin: int, end: int) -> None:
        if self.dbias is not None:
            part = dlogits.sum(0)
            self.dbias = self.dbias.add_(part) if self.started else part
        if self.dweight is not None:
            rows = self.products.rows(begin, end)
            if self.started:
                self.dweight.addmm_(dlogits.t(), rows)
            else:
                torch.mm(dlogits.t(), rows, out=self.dweight)
        if self.dinput is not None:
            self._add_dinput(self.dinput[begin:end], dlogits)
        self.started = True

    def _add_dinput(self, dinput: Tensor, dlogits: Tensor) -> None:
        # the input's rows are not needed any more
        widens = self.products.widens
        out = self.products.input_buffer[: len(dinput)] if widens else dinput
        for part, weight in self.products.weights():
            if part.start == 0:
                torch.mm(dlogits[:, part], weight, out=out)
            else:
                out.addmm_(dlogits[:, part], weight)
        if widens:
            dinput.copy_(out)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """dinput, dweight, dbias in the layer's dtype; no elements where not needed."""
        dtype = self.products.layer.input.dtype
        found = (self.dinput, self.dweight, self.dbias)
        if not self.started:  # no rows
            for value in found:
                if value is not None:
                    value.zero_()
        none = self.products.layer.input.new_empty(0)
        dinput, dweight, dbias = (none.clone() if g is None else g.to(dtype) for g in found)
        return dinput, dweight, dbias


def _spans(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, rows, max(1, chunk)):
        yield begin, min(begin + chunk, rows)


def forward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    wanted: Wanted,
    chunk: int,
    out: tuple[Tensor, ...],
    per_row: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
    needs: Needs = _NONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the statistics into `out`, and return the gradients of

        sum over rows of  per_row[0] * logprob + per_row[1] * weighted_sum + per_row[2] * lse^2

    that `needs` names, for input, weight and bias.
    """
    with torch.autocast(layer.input.device.type, enabled=False):
        products = _Products(layer, chunk)
        gradients = _Gradients(products, needs)
        for begin, end in _spans(len(layer.input), chunk):
            logits = products.logits(begin, end)
            rows = compared.rows(begin, end)
            found = kernels.forward(logits, *rows, *wanted, "")
            for whole, part in zip(out, found, strict=True):
                if part.numel():
                    whole[begin:end] = part
            if per_row is None or not any(needs):
                continue
            on_logprob, on_weighted_sum, on_lse_square = (
                None if p is None else p[begin:end] for p in per_row
            )
            on_lse = None if on_lse_square is None else 2 * on_lse_square * found[1]
            upstream = Upstream(on_logprob, on_lse, None, None, on_weighted_sum)
            factors = coefficients(upstream, found[2], found[3], found[8])
            dlogits = kernels.backward(logits, rows, found[6], found[7], factors)
            gradients.add(dlogits, begin, end)
        return gradients.results()


def backward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    row_max: Tensor,
    log_sum: Tensor,
    factors: tuple[Tensor | None, ...],
    chunk: int,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that `needs` names, for the coefficients of each row; computes the logits again."""
    with torch.autocast(layer.input.device.type, enabled=False):
        products = _Products(layer, chunk)
        gradients = _Gradients(products, needs)
        for begin, end in _spans(len(layer.input), chunk):
            logits = products.logits(begin, end)
            part = tuple(None if f is None else f[begin:end] for f in factors)
            rows = compared.rows(begin, end)
            dlogits = kernels.backward(logits, rows, row_max[begin:end], log_sum[begin:end], part)
            gradients.add(dlogits, begin, end)
        return gradients.results()
