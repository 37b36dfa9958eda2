"""Sizes of tiles by GPU, head size and what is asked: a table, so that nothing is tuned at run time.

Each entry compiles without spilling a register (tests/triton_compile.py, with --all the whole
table). The order of a sum follows from the number of keys in a tile, so an entry depends neither on
the batch nor on whether it is packed.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    rows: int  # query rows of a tile
    keys: int
    warps: int
    stages: int  # tiles in flight


# head size padded to a power of two: forward, dk and dv, dq
Entry = tuple[Tiles, Tiles, Tiles]

_HOPPER: dict[int, Entry] = {
    64: (Tiles(128, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(128, 64, 8, 2)),
    128: (Tiles(128, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2)),
    256: (Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 8, 2)),
}
_INTERPRETED = Tiles(32, 32, 1, 1)


def tiles(capability: int, size: int, itemsize: int, plain: bool) -> Entry:
    """`capability` 0: the interpreter. `plain`: no softcap, ALiBi, bias, dropout or intervals."""
    if capability == 0:
        return (_INTERPRETED,) * 3
    return _HOPPER[max(64, size)]
