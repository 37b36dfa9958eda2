"""What the Triton kernels of both passes of attention share.

Every mask is an interval of keys per row, and a tile of rows takes from the least and largest ends
of its intervals which tiles of keys it reads, and which of them need no mask. Scores are in base 2:
the factor log2(e) is folded into the scale.

A packed batch is found in the device's own numbers. Sequence n owns the tiles ("slots") from
starts[n] // SIZE + n on, which is never fewer than it has, so the launch follows from shapes alone;
tiles start at the first row of their sequence, and rows behind the last sequence are one without
keys. Keys count from `origin`, the first key of the sequence; with dropout from the multiple of 4
below, because one draw serves 4 keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_statistics.triton_kernels import tanh
from .reference import Options
from .triton_config import ALL, BAND, CAUSAL, SCORES, Entry, Tiles, tiles

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1 << 30)  # beyond any key
ALIGNED = 16  # elements; what Triton notices of a stride
SEARCH = 256  # sequences looked at at once
L2_BYTES = 32 << 20  # of keys and values that heads in flight may share
# numbers that vary from batch to batch: no kernel of its own for the multiples of 16
VARYING = ("rows", "keys", "sequences", "slots", "width", "left", "right", "limit")


class By(NamedTuple):
    """Elements from one to the next, contiguous along the last dimension."""

    batch: int
    row: int
    head: int


class Mask(NamedTuple):
    lo: Tensor | None  # int32 [B|1, H|1, Sq]
    hi: Tensor | None
    starts_q: Tensor | None  # int32 [sequences + 1]
    starts_k: Tensor | None


class Extra(NamedTuple):
    slopes: Tensor | None  # float32 [B|1, H]
    sink: Tensor | None  # float32 [H]
    bias: Tensor | None  # [B|1, H|1, Sq|1, Sk|1]
    seed: Tensor | None  # int64 []


class Per(NamedTuple):
    """Strides of a Mask and an Extra; 0 where it is the same for all."""

    lo_batch: int
    lo_head: int
    slope_batch: int
    bias_batch: int
    bias_head: int
    bias_row: int
    bias_key: int


@triton.jit
def schedule(slots, heads, width):
    """Slot, in the order of launch, and head of this program. `width` heads at a time go through
    all of their slots, so that their keys and values stay in the L2 cache."""
    program = tl.program_id(0)
    span = slots * width
    first = (program // span) * width
    rest = program % span
    count = tl.minimum(width, heads - first)
    return rest // count, first + rest % count


@triton.jit
def find(starts, sequences, slot, SIZE: tl.constexpr, SEARCH: tl.constexpr):
    """The sequence that a slot belongs to, and the number of the tile in it."""
    count = 0
    for begin in range(0, sequences + 1, SEARCH):
        n = begin + tl.arange(0, SEARCH)
        first = tl.load(starts + n, mask=n <= sequences, other=0) // SIZE + n
        count += tl.sum(((n <= sequences) & (first <= slot)).to(tl.int32), 0)
    found = tl.maximum(count - 1, 0)
    return found, slot - (tl.load(starts + found) // SIZE + found)


@triton.jit
def extent(starts, n, sequences, total):
    """First row and number of rows of a sequence, inside the tensor whatever `starts` holds."""
    begin = tl.load(starts + n)
    end = tl.load(starts + n + 1, mask=n < sequences, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.where(n < sequences, tl.minimum(tl.maximum(end, begin), total), total)
    return begin, end - begin


@triton.jit
def locate(
    mask,
    sequences,
    slot,
    rows,
    keys,
    seed,
    BY_KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Tile of a slot; first row and rows of its sequence; origin of its keys and, counted from
    there, its first key and the end of its keys."""
    if mask.starts_q is None:
        zero = slot * 0
        tile, row0, count, origin, first, stop = slot, zero, zero + rows, zero, zero, zero + keys
    else:
        if BY_KEYS:
            n, tile = find(mask.starts_k, sequences, slot, SIZE, SEARCH)
        else:
            n, tile = find(mask.starts_q, sequences, slot, SIZE, SEARCH)
        row0, count = extent(mask.starts_q, n, sequences, rows)
        origin, stop = extent(mask.starts_k, n, sequences, keys)
        # what is behind the last sequence meets nothing
        if BY_KEYS:
            count = tl.where(n < sequences, count, 0)
        else:
            stop = tl.where(n < sequences, stop, 0)
        first = n * 0
        if seed is not None:
            first = origin % 4
            origin -= first
            stop += first
    return tile, row0, count, origin, first, stop


@triton.jit
def intervals(row, rows, mask, at, span, band, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Keys [low, high) of rows of a sequence. `at`: its first row in the mask; `span`: origin,
    first key and end of its keys; `band`: keys that a row attends to on its left and right."""
    origin, first, stop = span
    # the last row is aligned with the last key
    diagonal = row + (stop - rows)
    low = tl.zeros_like(row) + first
    high = tl.zeros_like(row) + stop
    if HAS_LEFT:
        low = tl.maximum(low, diagonal - band[0])
    if HAS_RIGHT:
        high = tl.minimum(high, diagonal + band[1] + 1)
    if mask.lo is not None:
        inside = row < rows
        lo = tl.load(mask.lo + at + row, mask=inside, other=0)
        hi = tl.load(mask.hi + at + row, mask=inside, other=0)
        low = tl.maximum(low, tl.maximum(lo, 0) - origin)
        high = tl.minimum(high, tl.maximum(hi, 0) - origin)
    return low, tl.where(row < rows, high, 0)


@triton.jit
def key_tiles(row, rows, low, high, KEYS: tl.constexpr):
    """Tiles of keys [begin, end) that some row attends to, all of [inner, outer) by every row."""
    some, valid = low < high, row < rows
    begin = tl.min(tl.where(some, low, FAR), 0) // KEYS
    end = tl.cdiv(tl.max(tl.where(some, high, 0), 0), KEYS)
    inner = tl.cdiv(tl.max(tl.where(valid, low, 0), 0), KEYS)
    outer = tl.min(tl.where(valid, high, FAR), 0) // KEYS
    inner = tl.minimum(tl.maximum(inner, begin), end)
    return begin, inner, tl.maximum(tl.minimum(outer, end), inner), end


@triton.jit
def load(at, row, first, stop, SIZE: tl.constexpr, PADDED: tl.constexpr, GUARD: tl.constexpr):
    """[rows, PADDED], 0 where there is nothing: a product with what is behind it would be NaN."""
    if GUARD:
        inside = ((row >= first) & (row < stop))[:, None]
        if SIZE != PADDED:
            inside = inside & (tl.arange(0, PADDED)[None, :] < SIZE)
        value = tl.load(at, mask=inside, other=0.0)
    elif SIZE != PADDED:
        value = tl.load(at, mask=tl.arange(0, PADDED)[None, :] < SIZE, other=0.0)
    else:
        value = tl.load(at)
    return value


@triton.jit
def bias_of(extra, per, b, h, row0, origin):
    """From the first row of a sequence and the origin of its keys on."""
    bias = extra.bias + b * per.bias_batch + h * per.bias_head
    return bias + row0.to(tl.int64) * per.bias_row + origin.to(tl.int64) * per.bias_key


@triton.jit
def score(
    product, where, inside, added, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr
):
    """Scores in base 2, and tanh(x / softcap) with a softcap. `where`: row, key, low, high, to be
    broadcast, and the key a row is aligned with; `added`: slope and bias, which `inside` guards."""
    row, key, low, high, diagonal = where
    slope, bias, bias_row, bias_key = added
    squashed = product
    if CAPPED:
        squashed = tanh(product * (scale / softcap))
        s = squashed * (softcap * LOG2E)
    else:
        s = product * (scale * LOG2E)
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(diagonal - key).to(tl.float32)
    if bias is not None:
        at = bias + row.to(tl.int64) * bias_row + key.to(tl.int64) * bias_key
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        s = tl.where((key >= low) & (key < high), s, float("-inf"))
    return s, squashed


@triton.jit
def kept(seed, counter, key, limit, KEYS: tl.constexpr):
    """Dropout's mask [rows, KEYS] from key `key`, a multiple of 4, on: word > limit."""
    row = counter[:, None]
    quad = (key // 4 + tl.arange(0, KEYS // 4))[None, :].to(tl.uint32)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), low, high, quad, tl.zeros_like(low))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (counter.shape[0], KEYS)) > limit.to(tl.uint32)


class Call(NamedTuple):
    """What the kernels of both passes are launched with."""

    mask: Mask
    extra: Extra
    per: Per
    numbers: dict[str, Any]  # what kernels take by name
    entry: Entry


def aligned(x: Tensor) -> Tensor:
    """[B, S, H, D] whose rows start at multiples of 16 elements, as a copy where they do not, with
    0 behind rows of another length: read element by element, a tile does not fit the registers."""
    if missing := -x.shape[3] % ALIGNED:
        return torch.nn.functional.pad(x, (0, missing))
    steps = (x.stride(n) for n in range(3) if x.shape[n] > 1)
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and not any(s % ALIGNED for s in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def first_columns(x: Tensor, size: int) -> Tensor:
    """Without what `aligned` put behind the rows."""
    return x if x.shape[3] == size else x[..., :size].contiguous()


def by(x: Tensor) -> By:
    return By(x.stride(0), x.stride(1), x.stride(2))


def capability(x: Tensor) -> int:
    """10 * major + minor; 0 in the interpreter."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def precision(x: Tensor) -> str:
    """How float32 is multiplied: as PyTorch's own products are."""
    settings = torch.backends.cuda.matmul
    # the older name raises where the newer one was set
    if hasattr(settings, "fp32_precision"):
        allowed = settings.fp32_precision == "tf32"
    else:
        allowed = settings.allow_tf32
    return "tf32" if x.is_cuda and allowed else "ieee"


def _spread(stride: int, size: int) -> int:
    return 0 if size == 1 else stride


def prepare(q: Tensor, k: Tensor, v: Tensor, given: Options) -> Call:
    lo = None if given.lo is None else given.lo.contiguous()
    hi = None if given.hi is None else given.hi.contiguous()
    slopes, sink, bias = given.alibi_slopes, given.sink, given.bias
    if slopes is not None:
        slopes = slopes.float().contiguous().view(-1, q.shape[2])
    per = Per(
        0 if lo is None else _spread(lo.stride(0), lo.shape[0]),
        0 if lo is None else _spread(lo.stride(1), lo.shape[1]),
        0 if slopes is None else _spread(q.shape[2], slopes.shape[0]),
        *((0,) * 4 if bias is None else map(_spread, bias.stride(), bias.shape)),
    )
    seed = given.seed if given.dropout_p > 0 else None
    starts_q, starts_k = given.cu_seqlens_q, given.cu_seqlens_k
    if starts_q is not None and starts_k is not None:
        starts_q, starts_k = starts_q.contiguous(), starts_k.contiguous()
    extra = Extra(slopes, None if sink is None else sink.float().contiguous(), bias, seed)
    kind = CAUSAL if given.left < 0 else BAND
    if given.softcap > 0 or lo is not None or slopes is not None:
        kind = SCORES
    if bias is not None or seed is not None:
        kind = ALL
    size, size_v = q.shape[3], v.shape[3]
    pads = [max(16, triton.next_power_of_2(n)) for n in (size, size_v)]
    numbers = {
        "rows": q.shape[1],
        "keys": k.shape[1],
        "sequences": 0 if starts_q is None else starts_q.shape[0] - 1,
        "heads": q.shape[2],
        "group": q.shape[2] // k.shape[2],
        "scale": given.scale,
        "softcap": given.softcap,
        # beyond any row and key, and far from an overflow
        "left": min(given.left, 1 << 29),
        "right": min(given.right, 1 << 29),
        "limit": math.ceil(given.dropout_p * 2.0**32) - 1,
        "keep_scale": 0.0 if given.dropout_p == 1 else 1 / (1 - given.dropout_p),
        "D": size,
        "DV": size_v,
        "PAD_D": pads[0],
        "PAD_DV": pads[1],
        "HAS_LEFT": given.left >= 0,
        "HAS_RIGHT": given.right >= 0,
        "CAPPED": given.softcap > 0,
        "PRECISION": precision(q),
        "SEARCH": SEARCH,
    }
    entry = tiles(capability(q), max(pads), q.element_size(), kind)
    return Call(Mask(lo, hi, starts_q, starts_k), extra, per, numbers, entry)


def launch(
    call: Call,
    kernel: Any,
    shape: Tiles,
    along: tuple[int, int],
    heads: tuple[int, int],
    args: tuple[Any, ...],
) -> None:
    """A program per tile of one sequence and head. `along`: rows (or keys) in all, and of a tile;
    `heads`: how many in all, and the bytes that the tiles of one share."""
    total, size = along
    sequences = call.numbers["sequences"]
    slots = total // size + sequences + 1 if sequences else triton.cdiv(total, size)
    kernel[(slots * heads[0],)](
        *args,
        slots=slots,
        width=max(1, min(heads[0], L2_BYTES // max(1, heads[1]))),
        batch_heads=heads[0],
        ROWS=shape.rows,
        KEYS=shape.keys,
        STAGES=shape.stages,
        num_warps=shape.warps,
        num_stages=shape.stages,
        maxnreg=shape.registers,
        **call.numbers,
    )
