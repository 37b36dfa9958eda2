"""The loop that takes statistics of a linear layer's logits without holding them all.

Rows are taken in chunks. The logits of a chunk are computed into one buffer, their statistics and
then their gradient, in place, by the kernels of `row_statistics`; the gradient goes into the
gradients of input, weight and bias by two further products. All products accumulate in float32 (or
float64); for half-precision inputs slices of the weight are widened one at a time.

On a CPU rows without use are left out where that pays: ignored rows everywhere, rows whose gradient
is zero in the products of the gradient. A GPU would have to wait for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dispatch, matmul
from ..row_statistics.op import Upstream, Wanted, coefficients, result_dtype
from . import rounding

# rows of a chunk on a CPU: products of fewer than 64 rows run at half the rate, more than 512 gain
# nothing; in between 1/9 of the rows, which keeps a chunk below 5% of what three tensors of logits
# take. Small chunks are not worth the memory they save.
_CPU_BYTES = 10 << 20
_CPU_LEAST, _CPU_MOST, _CPU_SHARE = 64, 512, 9
# on a GPU so many bytes, or this part of its memory: float32 logits, and their gradient again in
# half precision. Each chunk costs one more pass over the sum of the weight's gradient.
_GPU_BYTES, _GPU_SHARE = 256 << 20, 64
_SLICE_BYTES = 2 << 20

# a budget of fewer rows than these, at once, is kept by tiles of `slices.py`: on a CPU products of
# fewer rows run at half the rate; on a GPU summing up the weight's gradient costs more than
# computing the logits again (4 * FLOP/s / bytes/s = 651 rows for an H200, 933 for an H100)
_SENSIBLE_ROWS = {"cpu": 64}
_SENSIBLE_ROWS_GPU = 768
# what is held per row for all rows at once: statistics, coefficients and their parts
_NUMBERS_PER_ROW = 12

# a row is worth leaving out of a chunk when it saves more than moving the others costs: a moved
# logit costs about as much as 16 multiply-adds of the products
_MOVE_COST = 16
_FEW_DEAD = 16  # one dead row of so many is not worth a gather of the input
_MOVED_PARTS = 32  # rows move through a buffer of this part of a chunk

# consecutive rows, or the numbers of those that are left
Span = slice | Tensor


class Matmul(NamedTuple):
    """Matrix products: `matmul.plain_into` or one like it; whether it takes operands like the input
    in half precision; and whether both must be, so that the gradient of the logits is rounded here
    (`matmul.into_rounded` does it as it packs)."""

    into: Callable[..., Tensor]
    takes_mixed: Callable[[Tensor], bool]
    rounds: bool


LIBRARY = Matmul(matmul.library_into, matmul.library_takes_mixed, True)
FASTEST = Matmul(matmul.into_rounded, matmul.takes_mixed, False)


class RowKernels(NamedTuple):
    """Implementation of the row statistics: forward, and a backward that may reuse the logits; and
    of the products around them."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Tensor]
    matmul: Matmul = LIBRARY


class Layer(NamedTuple):
    input: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]


class Needs(NamedTuple):
    """The gradients that are asked for."""

    input: bool = False
    weight: bool = False
    bias: bool = False


NO_NEEDS = Needs()


class Compared(NamedTuple):
    """What the rows are compared with, and how the logits become scores."""

    target: Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    scale: float
    softcap: float

    def rows(self, span: Span) -> Compared:
        target = None if self.target is None else self.target.reshape(-1)[span]
        weight = self.class_weight
        if weight is not None and weight.dim() == 2:
            weight = weight[span]
        return self._replace(target=target, class_weight=weight)

    def live(self, factors: Sequence[Tensor | None] = ()) -> Tensor | None:
        """Numbers of the rows that are not ignored and have a factor; None: not to be known."""
        if self.target is None or self.target.device.type != "cpu":
            return None
        used = self.target.reshape(-1) != self.ignore_index
        if factors:
            used &= torch.stack([f != 0 for f in factors if f is not None]).any(0)
        return used.nonzero()[:, 0]


# from a chunk's rows and statistics to the gradient of the loss with respect to these
UpstreamOfRows = Callable[[Span, tuple[Tensor, ...]], Upstream]


def gpu_bytes(device: torch.device) -> int:
    """Of a chunk, by our own choice."""
    if device.type != "cuda":
        return _GPU_BYTES
    return max(_GPU_BYTES, torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE)


def chunk_rows(rows: int, classes: int, itemsize: int, max_bytes: int, device: torch.device) -> int:
    """Rows per chunk, equal for all chunks but for rounding; `max_bytes` 0 is our own choice."""
    row_bytes = classes * itemsize
    if max_bytes > 0:
        most = max_bytes // row_bytes
    elif device.type == "cpu":
        most = max(_CPU_BYTES // row_bytes, _CPU_LEAST, min(rows // _CPU_SHARE, _CPU_MOST))
    else:
        most = gpu_bytes(device) // row_bytes
    chunks = -(-rows // max(1, most))
    return -(-rows // max(1, chunks))


class Chunk(NamedTuple):
    """What exists at a time."""

    rows: int
    slice_bytes: int = _SLICE_BYTES  # of the weight, for half-precision inputs
    tile_bytes: int = 0  # not 0: no whole rows, but tiles of this size
    classes: int = 0  # of a slice of the weight in a product; 0: all


def chunk_of(layer: Layer, max_bytes: int, needs: Needs = NO_NEEDS) -> Chunk:
    """For a budget in bytes; 0: our own choice; negative: minus the number of rows."""
    (rows, features), classes = layer.input.shape, layer.weight.shape[0]
    dtype, device = result_dtype(layer.input), layer.input.device
    item, widens = dtype.itemsize, layer.input.dtype != dtype
    if max_bytes == 0 and needs.weight and device.type == "cpu" and _at_once(layer):
        return Chunk(rows)
    if max_bytes == 0:
        return Chunk(chunk_rows(rows, classes, item, 0, device))
    if max_bytes < 0:
        return Chunk(chunk_rows(rows, classes, item, -max_bytes * classes * item, device))
    slice_bytes = min(_SLICE_BYTES, max_bytes // 8) if widens else 0
    room = max(1, max_bytes - _NUMBERS_PER_ROW * item * rows)
    # rows that are left out need a copy of those that are not, and of their gradient
    width = classes + features * (3 if widens else 2)
    if widens and device.type == "cuda":  # the gradient of the logits in half precision
        width += classes // 2
    least = _SENSIBLE_ROWS.get(device.type, _SENSIBLE_ROWS_GPU)
    if max(0, room - slice_bytes) // (width * item) < min(rows, least):
        return Chunk(0, tile_bytes=room)
    return Chunk(chunk_rows(rows, width, item, room - slice_bytes, device), slice_bytes)


def _at_once(layer: Layer) -> bool:
    """A bfloat16 layer whose logits in float32, and their gradient in bfloat16, are less than the
    float32 sum of the weight's gradient, which several chunks would need and pass over each."""
    rows, features = layer.input.shape
    return layer.input.dtype == torch.bfloat16 and 3 * rows <= 2 * features


class Products:
    """The three products of the layer with one chunk, in the accumulator's dtype."""

    def __init__(self, layer: Layer, chunk: Chunk, matmul: Matmul = LIBRARY) -> None:
        self.layer, self.into = layer, matmul.into
        self.dtype = result_dtype(layer.input)
        self.classes, self.features = layer.weight.shape
        self.logits_buffer = self.new(chunk.rows, self.classes)
        self.bias = None if layer.bias is None else layer.bias.to(self.dtype)
        self.rounds = layer.input.dtype != self.dtype
        self.widens = self.rounds and not matmul.takes_mixed(layer.input)
        self.rounds_logits = matmul.rounds and self.rounds and not self.widens
        self.step = max(1, min(self.classes, chunk.classes or self.classes))
        if self.rounds:
            self.input_buffer = self.new(chunk.rows, self.features)
        if self.widens:
            row_bytes = max(1, self.features) * self.dtype.itemsize
            self.step = min(self.step, max(64, chunk.slice_bytes // row_bytes))
            self.slice_buffer = self.new(self.step, self.features)

    def new(self, *shape: int) -> Tensor:
        return self.layer.input.new_empty(shape, dtype=self.dtype)

    def rows(self, span: Span) -> Tensor:
        rows = self.layer.input[span]
        return self.input_buffer[: len(rows)].copy_(rows) if self.widens else rows

    def weights(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, self.classes, self.step):
            part = slice(begin, min(begin + self.step, self.classes))
            weight = self.layer.weight[part]
            if self.widens:
                weight = self.slice_buffer[: weight.shape[0]].copy_(weight)
            yield part, weight

    def logits(self, span: Span) -> Tensor:
        rows = self.rows(span)
        out = self.logits_buffer[: len(rows)]
        for part, weight in self.weights():
            bias = None if self.bias is None else self.bias[part]
            self.into(out[:, part], rows, weight.t(), bias)
        return out

    def pays(self, rows: int, live: Tensor | None) -> bool:
        """Whether to leave the other rows of a chunk out of the products of the gradient."""
        if live is None:
            return False
        return (rows - len(live)) * (self.features + _MOVE_COST) > rows * _MOVE_COST

    def compact(self, logits: Tensor, live: Tensor) -> Tensor:
        """The rows `live`, ascending, moved to the front of the buffer."""
        for begin in range(0, len(live), step := max(1, len(logits) // _MOVED_PARTS)):
            part = live[begin : begin + step]
            logits[begin : begin + len(part)] = logits[part]
        return logits[: len(live)]


def held_dtype(input: Tensor) -> torch.dtype:
    """Of gradients that wait for the upstream gradient. float16 has neither the range of a mean's
    gradients before they are scaled up (a scaled loss), nor of a sum's before they are divided."""
    return torch.float32 if input.dtype == torch.float16 else input.dtype


class Gradients:
    """Sums of the gradients over the chunks; None where one is not needed."""

    def __init__(
        self,
        products: Products,
        needs: Needs,
        into: Tensor | None = None,
        dtype: torch.dtype | None = None,
        rows: int | None = None,
    ) -> None:
        """dtype: of the results, the layer's by default; rows: so many will be added, if known."""
        layer = products.layer
        self.products = products
        self.dtype = layer.input.dtype if dtype is None else dtype
        self.started = False
        self.into = into if needs.weight else None
        like = layer.input
        self.dinput = like.new_empty(like.shape, dtype=self.dtype) if needs.input else None
        new = needs.weight and into is None
        # of one chunk there is no sum to hold: its product is rounded slice by slice
        self.once = rows is not None and rows <= len(products.logits_buffer)
        self.once &= self.dtype != products.dtype and like.device.type == "cpu"
        # its operands and results are bfloat16: PyTorch's own products, unless ours are asked for
        self.by_the_library = self.once and products.rounds and not products.widens
        self.by_the_library &= dispatch.forced() is None and matmul.multiplies_pairs()
        self.by_the_library &= into is None
        held = self.dtype if self.once else products.dtype
        self.dweight = like.new_empty(layer.weight.shape, dtype=held) if new else None
        self.dbias = products.new(products.classes) if needs.bias else None

    def clear(self, span: Span) -> None:
        """No gradient for these rows but what is added later."""
        if self.dinput is not None:
            self.dinput[span] = 0

    def add(self, dlogits: Tensor, span: Span) -> None:
        if self.dbias is not None:
            part = dlogits.sum(0)
            self.dbias = self.dbias.add_(part) if self.started else part
        if self.by_the_library:
            rounding.by_the_library(
                dlogits.to(self.dtype), span, *self.products.layer[:2], self.dinput, self.dweight
            )
            self.started = True
            return
        if self.products.rounds_logits:
            dlogits = dlogits.to(self.products.layer.input.dtype)
        total = self.dweight if self.into is None else self.into
        if total is not None:
            more = self.started or self.into is not None
            rows = self.products.rows(span)
            if self.once and self.dweight is not None:
                rounding.in_slices(self.products.into, self.dweight, dlogits, rows)
            else:
                self.products.into(total, dlogits.t(), rows, accumulate=more)
        if self.dinput is not None:
            self._add_dinput(self.dinput, span, dlogits)
        self.started = True

    def _add_dinput(self, dinput: Tensor, span: Span, dlogits: Tensor) -> None:
        # the input's rows are not needed any more
        if self.products.rounds:
            out = self.products.input_buffer[: len(dlogits)]
        elif isinstance(span, slice):
            out = dinput[span]
        else:
            out = self.products.new(len(dlogits), self.products.features)
        for part, weight in self.products.weights():
            self.products.into(out, dlogits[:, part], weight, accumulate=part.start > 0)
        if self.products.rounds or not isinstance(span, slice):
            dinput[span] = out.to(dinput.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """dinput, dweight, dbias; no elements where not needed."""
        found = (self.dinput, self.dweight, self.dbias)
        if not self.started:  # no rows
            for value in found:
                if value is not None:
                    value.zero_()
        none = self.products.layer.input.new_empty(0, dtype=self.dtype)
        dinput, dweight, dbias = (none.clone() if g is None else g.to(self.dtype) for g in found)
        return dinput, dweight, dbias


def spans(rows: int, chunk: int, live: Tensor | None) -> Iterator[Span]:
    """Chunks of equal size, but for rounding, of all rows or of those in `live`."""
    count = rows if live is None else len(live)
    chunks = -(-count // max(1, chunk))
    step = -(-count // max(1, chunks))
    for begin in range(0, count, max(1, step)):
        part = slice(begin, min(begin + step, count))
        yield part if live is None else live[part]


def few(rows: int, live: Tensor | None) -> Tensor | None:
    """`live`, or None for all rows when hardly any is dead."""
    if live is None or (rows - len(live)) * _FEW_DEAD < rows:
        return None
    return live


def forward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    wanted: Wanted,
    chunk: Chunk,
    out: tuple[Tensor, ...],
    upstream: UpstreamOfRows | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `schedule.py`."""
    rows = len(layer.input)
    products = Products(layer, chunk, kernels.matmul)
    live = few(rows, compared.live())
    count = rows if live is None else len(live)
    gradients = Gradients(products, needs, dtype=held_dtype(layer.input), rows=count)
    if live is not None:
        clear_statistics(out)
        gradients.clear(slice(None))
    for span in spans(rows, chunk.rows, live):
        logits = products.logits(span)
        here = compared.rows(span)
        found = kernels.forward(logits, *here, *wanted, "")
        for whole, part in zip(out, found, strict=True):
            if part.numel():
                whole[span] = part
        if upstream is None:
            continue
        douts = upstream(span, found)
        if any(needs):
            factors = coefficients(douts, found[2], found[3], found[8])
            _add_chunk(kernels, gradients, logits, span, here, found[6], found[7], factors)
    return gradients.results()


def clear_statistics(out: tuple[Tensor, ...]) -> None:
    """What an ignored row has."""
    for value in out:
        value.fill_(0 if value.is_floating_point() else -1)


def _add_chunk(
    kernels: RowKernels,
    gradients: Gradients,
    logits: Tensor,
    span: Span,
    compared: Compared,
    row_max: Tensor,
    log_sum: Tensor,
    factors: tuple[Tensor | None, ...],
) -> None:
    live = compared.live(factors)
    if live is not None and gradients.products.pays(len(logits), live):
        gradients.clear(span)
        if not len(live):
            return
        logits = gradients.products.compact(logits, live)
        compared, row_max, log_sum = compared.rows(live), row_max[live], log_sum[live]
        factors = tuple(None if f is None else f[live] for f in factors)
        span = live + (span.start or 0) if isinstance(span, slice) else span[live]
    gradients.add(kernels.backward(logits, compared, row_max, log_sum, factors), span)


def backward(
    kernels: RowKernels,
    layer: Layer,
    compared: Compared,
    row_max: Tensor,
    log_sum: Tensor,
    factors: tuple[Tensor | None, ...],
    chunk: Chunk,
    needs: Needs,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `schedule.py`."""
    rows = len(layer.input)
    products = Products(layer, chunk, kernels.matmul)
    live = few(rows, compared.live(factors))
    gradients = Gradients(products, needs, into, rows=rows if live is None else len(live))
    if live is not None:
        gradients.clear(slice(None))
    for span in spans(rows, chunk.rows, live):
        logits = products.logits(span)
        part = tuple(None if f is None else f[span] for f in factors)
        here = compared.rows(span)
        dlogits = kernels.backward(logits, here, row_max[span], log_sum[span], part)
        gradients.add(dlogits, span)
    return gradients.results()
