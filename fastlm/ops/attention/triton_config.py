"""Sizes of tiles by GPU, head size, dtype and options: a table; nothing is tuned at run time.

No entry is to spill a register, whatever else is asked for with it: `make compile`. An
entry depends neither on the batch nor on whether it is packed, so that a sequence is summed in the
same order alone and in any batch; what packing adds is what limits the causal tiles.
"""

from __future__ import annotations

from typing import NamedTuple

REGISTERS = 255


class Tiles(NamedTuple):
    rows: int  # query rows of a tile
    keys: int
    warps: int
    stages: int  # tiles in flight
    # of a thread at most. Without a limit the assembler spills a little to have two blocks where
    # one is meant; with it, a few kernels that need all registers spill
    registers: int | None = REGISTERS


class Entry(NamedTuple):
    forward: Tiles
    dkdv: Tiles
    dq: Tiles


# what is asked for, each with what stands before it: nothing but causal; a limit on the left;
# softcap, ALiBi and intervals; bias and dropout
CAUSAL, BAND, SCORES, ALL = range(4)

# head size, padded to a power of two, to entries by kind
Table = dict[int, tuple[Entry, Entry, Entry, Entry]]


def _entry(*tiles: tuple[int, int, int, int] | tuple[int, int, int, int, None]) -> Entry:
    return Entry(*(Tiles(*t) for t in tiles))


_HOPPER: Table = {
    64: (
        _entry((128, 128, 8, 3), (32, 128, 8, 2), (128, 128, 8, 2)),
        _entry((128, 128, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        _entry((128, 128, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        _entry((128, 32, 8, 3), (16, 64, 8, 2), (64, 32, 8, 2)),
    ),
    128: (
        _entry((128, 64, 8, 3), (16, 128, 8, 2), (128, 64, 8, 2)),
        _entry((128, 64, 8, 3), (32, 64, 8, 2), (128, 64, 8, 2)),
        _entry((128, 64, 8, 3), (32, 64, 8, 2), (128, 32, 8, 2)),
        _entry((128, 32, 8, 3), (64, 16, 8, 2), (64, 16, 8, 2)),
    ),
    256: (
        _entry((128, 16, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
        _entry((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        _entry((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        _entry((32, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ),
}
# every GPU with tensor cores and without Hopper's; within the 99 KiB a block has on the smallest
_AMPERE: Table = {
    64: (
        _entry((128, 128, 8, 2), (16, 128, 8, 2), (128, 32, 8, 2)),
        _entry((128, 64, 8, 2), (16, 64, 8, 2), (128, 64, 8, 2)),
        _entry((128, 64, 8, 2), (16, 64, 8, 2), (64, 64, 8, 2)),
        _entry((128, 32, 8, 2), (32, 32, 8, 2), (64, 16, 8, 2)),
    ),
    128: (
        _entry((64, 64, 8, 2), (16, 64, 8, 2), (64, 64, 8, 2)),
        _entry((64, 64, 8, 2), (16, 64, 8, 2), (64, 32, 8, 2)),
        _entry((64, 64, 8, 2), (16, 64, 8, 2), (64, 32, 8, 2)),
        _entry((64, 16, 8, 2), (16, 32, 8, 2), (32, 32, 8, 2)),
    ),
    256: (
        _entry((64, 32, 8, 2), (16, 32, 8, 2), (32, 32, 8, 2)),
        _entry((32, 32, 8, 2), (16, 32, 8, 2), (32, 16, 8, 2)),
        _entry((32, 32, 8, 2), (16, 32, 8, 2), (32, 16, 8, 2)),
        _entry((32, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ),
}
# float32 is multiplied without tensor cores, unless torch allows tf32; all below bias and dropout,
# and with them, which the op refuses above 128
_FLOAT32: dict[int, tuple[Entry, Entry]] = {
    64: (
        _entry((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        _entry((64, 16, 8, 1), (16, 16, 8, 1), (32, 16, 8, 1)),
    ),
    128: (_entry((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),) * 2,
    256: (_entry((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2)),) * 2,
}
_INTERPRETED = _entry((32, 32, 1, 1), (32, 32, 1, 1), (32, 32, 1, 1))


def tiles(capability: int, size: int, itemsize: int, kind: int) -> Entry:
    """`capability` is 0 in the interpreter, `size` the larger head size, a power of two."""
    if capability == 0:
        return _INTERPRETED
    size = max(64, size)
    if itemsize == 4:
        return _FLOAT32[size][kind == ALL]
    hopper = capability in (90, 100, 103)
    return (_HOPPER if hopper else _AMPERE)[size][kind]
