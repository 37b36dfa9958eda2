"""What the Gluon kernels of attention share: configuration, formulas of masks, descriptors.

The formulas take scalars or tensors; a test runs them on the CPU against `mask.row_bounds`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
L2_BYTES = 32 << 20  # what the keys and values of the heads at work may take of the cache
BILLION = gl.constexpr(1 << 30)  # more rows than a packed batch has: see `value_descriptor`
ROWS = gl.constexpr(64)  # of a warpgroup: what one wgmma takes


class Layouts:
    """How the registers of a warpgroup hold its 64 rows."""

    size: int  # columns of an output: the head size
    keys: int  # columns of a tile of scores
    groups: int

    @property
    def rows(self) -> int:
        return 64 * self.groups

    # of the scores [64, keys], of O [64, size], of P as an operand, and of a store of 16 bytes
    @property
    def score_layout(self) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.keys, 16])

    @property
    def score_rows(self) -> gl.SliceLayout:
        return gl.SliceLayout(1, self.score_layout)

    @property
    def quad_layout(self) -> gl.DistributedLinearLayout:
        """The scores as [64, keys / 8, 4, 2]."""
        bits = (self.keys // 8).bit_length() - 1
        return gl.DistributedLinearLayout(
            [[0, 0, 0, 1], [8, 0, 0, 0], *([0, 1 << bit, 0, 0] for bit in range(bits))],
            [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
            [[16, 0, 0, 0], [32, 0, 0, 0]],
            [],
            [64, self.keys // 8, 4, 2],
        )

    @property
    def out_layout(self) -> gl.NVMMADistributedLayout:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, self.size, 16])

    @property
    def out_rows(self) -> gl.SliceLayout:
        return gl.SliceLayout(1, self.out_layout)

    @property
    def operand_layout(self) -> gl.DotOperandLayout:
        return gl.DotOperandLayout(0, self.out_layout, 2)

    @property
    def store_layout(self) -> gl.BlockedLayout:
        across = self.size // 8
        return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@dataclass(frozen=True)
class Config(Layouts):
    """What is compiled in: tile sizes, and which of the options a call has."""

    size: int  # of a head, of K and V alike
    keys: int  # of a tile
    stages: int
    groups: int  # consumer warpgroups
    left: bool  # whether the band is limited on this side
    right: bool
    intervals: bool
    packed: bool
    softcap: bool
    sink: bool

    @property
    def lanes(self) -> int:
        return 128 if self.groups == 2 else 256


@dataclass(frozen=True)
class BackwardConfig(Layouts):
    """`keys`: columns of a tile of scores, whether they are keys or, transposed, queries."""

    size: int
    keys: int
    stages: int
    left: bool
    right: bool
    packed: bool
    groups: int = 2
    intervals: bool = False


# -- which rows and keys: formulas on scalars and tensors -----------------------------------------


@gluon.jit
def row_limits(place, rows, keys, left, right, cfg: gl.constexpr):
    """Keys [low, high) of the row with this place in a sequence of `rows` queries, `keys` keys."""
    diagonal = place + (keys - rows)
    low = gl.maximum(diagonal * 0, 0)
    high = low + keys
    if cfg.left:
        low = gl.maximum(diagonal - left, 0)
    if cfg.right:
        high = gl.minimum(diagonal + right + 1, high)
    return low, high


@gluon.jit
def tile_range(low_min, low_max, high_min, high_max, cfg: gl.constexpr):
    """One past the last tile of keys; how many tiles there are; and, counted from the last one,
    where the tiles begin that no row masks, and where they end."""
    size: gl.constexpr = cfg.keys
    first = low_min // size
    last = (gl.maximum(high_max, 0) + (size - 1)) // size
    count = gl.maximum(last - first, 0)
    open_first = gl.minimum(gl.maximum((low_max + (size - 1)) // size, first), last)
    open_last = gl.minimum(gl.maximum(gl.maximum(high_min, 0) // size, first), last)
    head = last - open_last
    return last, count, head, gl.maximum(last - open_first, head)


@gluon.jit
def schedule(program, tiles, heads, section):
    """(tile, head of the batch): late tiles first, as causal ones are longest; `section` heads at a
    time, whose keys and values stay in the L2 cache."""
    begin = program // (section * tiles) * section
    inside = program - begin * tiles
    width = gl.minimum(section, heads - begin)
    return tiles - 1 - inside // width, begin + inside % width


@gluon.jit
def find_sequence(slot, starts, sequences, cfg: gl.constexpr):
    """The sequence that a slot of tiles belongs to. Sequence s has the slots from
    start_s // rows + s on, which are enough whatever its length; the rows behind the last sequence
    are one more."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    found = slot * 0 - 1
    for begin in range(0, sequences + 1, 128):
        index = begin + gl.arange(0, 128, layout=layout)
        start = gl.load(starts + index, mask=index <= sequences, other=0)
        is_before = (start // cfg.rows + index <= slot) & (index <= sequences)
        found += gl.sum(gl.cast(is_before, gl.int32), 0)
    return gl.minimum(gl.maximum(found, 0), sequences)


@gluon.jit
def locate(slot, own, other, owned, others, sequences, cfg: gl.constexpr):
    """Of the sequence that a slot belongs to, in what is cut into slots and in what is not: first
    row of both, number of rows of both; and the slot's first row within the sequence."""
    sequence = find_sequence(slot, own, sequences, cfg)
    beyond = gl.minimum(sequence + 1, sequences)
    first = bounded(gl.load(own + sequence), 0, owned)
    across = bounded(gl.load(other + sequence), 0, others)
    stop = bounded(gl.load(own + beyond), first, owned)
    # the rows behind the last sequence belong to nobody
    stop = gl.where(sequence == sequences, owned, stop)
    count = bounded(gl.load(other + beyond), across, others) - across
    place = (slot - (first // cfg.rows + sequence)) * cfg.rows
    return first, across, stop - first, count, place


@gluon.jit
def interval_range(
    place, valid, lows, highs, first_key, rows, keys, left, right, cfg: gl.constexpr
):
    """Least and greatest low and high over the rows of a block that have a key."""
    low, high = row_limits(place, rows, keys, left, right, cfg)
    low = gl.maximum(low, gl.load(lows + place, mask=valid, other=0) - first_key)
    high = gl.minimum(high, gl.load(highs + place, mask=valid, other=0) - first_key)
    is_empty = valid & (high <= low)
    low_min = gl.min(gl.where(valid & (high > low), low, keys), 0)
    low_max = gl.max(gl.where(is_empty, keys, gl.where(valid, low, 0)), 0)
    high_max = gl.max(gl.where(valid & (high > low), high, 0), 0)
    high_min = gl.min(gl.where(is_empty, 0, gl.where(valid, high, keys)), 0)
    return low_min, low_max, high_min, high_max


@gluon.jit
def bounded(value, least, most):
    return gl.minimum(gl.maximum(value, least), most)


# -- tensors in registers -------------------------------------------------------------------------

# A thread has columns 8 a + 2 l + b of two rows, l its place among four lanes. Compared are the
# constants 8 a + b with bound - 2 l: columns as they are would hold a register each.


@gluon.jit
def quad_columns(cfg: gl.constexpr):
    pairs: gl.constexpr = gl.SliceLayout(3, cfg.quad_layout)
    eights: gl.constexpr = gl.SliceLayout(2, pairs)
    a = gl.arange(0, cfg.keys // 8, layout=gl.SliceLayout(0, eights))
    a = gl.expand_dims(gl.expand_dims(gl.expand_dims(a, 0), 2), 3)
    first: gl.constexpr = gl.SliceLayout(0, cfg.quad_layout)
    b = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, first)))
    b = gl.expand_dims(gl.expand_dims(gl.expand_dims(b, 0), 1), 0)
    return 8 * a + b


@gluon.jit
def quad_bound(bound, cfg: gl.constexpr):
    pairs: gl.constexpr = gl.SliceLayout(3, cfg.quad_layout)
    row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, pairs))
    bound = gl.convert_layout(bound, row)
    bound = gl.expand_dims(gl.expand_dims(gl.expand_dims(bound, 1), 2), 3)
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, pairs)))
    return bound - 2 * gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 3)


@gluon.jit
def narrow(x, like, cfg: gl.constexpr):
    return gl.convert_layout(gl.cast(x, like.dtype), cfg.operand_layout)


@gluon.jit
def kept(x, low, high, LOW: gl.constexpr, HIGH: gl.constexpr, cfg: gl.constexpr):
    """0 outside the columns [low, high) of a row; the limits come from `quad_bound`."""
    quads = x.reshape((ROWS, cfg.keys // 8, 4, 2))
    quads = gl.convert_layout(quads, cfg.quad_layout, assert_trivial=True)
    place = quad_columns(cfg)
    if LOW:
        quads = gl.where(place >= low, quads, 0.0)
    if HIGH:
        quads = gl.where(place < high, quads, 0.0)
    quads = quads.reshape((ROWS, cfg.keys))
    return gl.convert_layout(quads, cfg.score_layout, assert_trivial=True)


@gluon.jit
def packed(p, dtype: gl.constexpr, cfg: gl.constexpr):
    """Two neighbours in 32 bits: 16-bit values would take a register each across the loop."""
    first, second = gl.split(p.reshape((ROWS, cfg.keys // 2, 2)))
    # the first operand goes into the upper half
    asm: gl.constexpr = (
        "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    )
    return gl.inline_asm_elementwise(
        asm, "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpacked(pairs, dtype: gl.constexpr, cfg: gl.constexpr):
    first = gl.cast(gl.cast(pairs, gl.int16), dtype, bitcast=True)
    second = gl.cast(gl.cast(pairs >> 16, gl.int16), dtype, bitcast=True)
    p = gl.join(first, second).reshape((ROWS, cfg.keys))
    return gl.convert_layout(p, cfg.operand_layout)


# -- shared memory -------------------------------------------------------------------------------


@gluon.jit
def ring(count: gl.constexpr, stages: gl.constexpr):
    """A barrier for each stage, with this many arrivals. The caller fences after the last one."""
    bars = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(bars.index(stage), count=count)
    return bars


@gluon.jit
def rows_of(batch, head, first, count, row, cfg: gl.constexpr):
    """Where a tile begins in a descriptor that ends with the sequence: see `value_descriptor`."""
    if cfg.packed:
        place = [BILLION, first + count, head, BILLION - count + row, 0]
    else:
        place = [batch, head, row, 0]
    return place


@gluon.jit
def put(x, memory, out, line, step, place, count, cfg: gl.constexpr):
    """Rows from `place` on, those below `count`, through shared memory."""
    buffer = memory.reshape((ROWS, cfg.size))
    buffer.store(gl.cast(x, buffer.dtype))
    lines = buffer.load(cfg.store_layout)
    at = place + gl.arange(0, ROWS, layout=gl.SliceLayout(1, cfg.store_layout))
    column = gl.arange(0, cfg.size, layout=gl.SliceLayout(0, cfg.store_layout))
    target = out + gl.expand_dims(line + gl.cast(at, gl.int64) * step, 1)
    gl.store(target + gl.expand_dims(column, 0), lines, mask=gl.expand_dims(at < count, 1))


# -- tensors in memory, on the host ---------------------------------------------------------------


def descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """[B, S, H, D] as [B, H, S, D], in tiles of `block` rows; what lies outside reads as 0."""
    sizes = [x.shape[d] for d in (0, 2, 1, 3)]
    # the stride of a single entry may be anything, also what TMA does not take
    strides = [x.stride(d) if x.shape[d] > 1 else x.shape[3] for d in (0, 2, 1)]
    shape = [1, 1, block, x.shape[3]]
    return TensorDescriptor(x, sizes, [*strides, 1], shape, layout_of(shape, x.dtype))


def value_descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """[1, T, H, D] such that rows behind the end of a sequence read as 0: 0 * NaN of the next
    sequence would be NaN.

    Row r of a sequence that ends at `end` and has n rows is entry (2^30, end, h, 2^30 - n + r, .)
    of [., ., H, 2^30, D] with strides (2^34 - s, s, ., s, 1): the hardware sees 2^30 - n + r leave
    its range where r reaches n, and the address wraps around 2^64.
    """
    _, _, heads, size = x.shape
    row = x.stride(1) if x.shape[1] > 1 else size
    head = x.stride(2) if heads > 1 else size
    sizes = [0x7FFF0000, 0x7FFF0000, heads, 1 << 30, size]
    strides = [(1 << 34) - row, row, head, row, 1]
    shape = [1, 1, 1, block, size]
    return TensorDescriptor(x, sizes, strides, shape, layout_of(shape, x.dtype))


def layout_of(shape: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = {
        torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32
    }[dtype]  # fmt: skip
    return gl.NVMMASharedLayout.get_default_for(shape, element)


def rows_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def steps_of(x: Tensor) -> tuple[int, int]:
    """Elements from one batch and one head to the next; 0 where there is one for all."""
    batch, head = (x.stride(d) if x.shape[d] > 1 else 0 for d in (0, 1))
    return batch, head
