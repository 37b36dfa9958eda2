"""Philox-4x32-10 in plain PyTorch: random numbers as a function of (key, counter).

The same numbers as `csrc/common/philox.h`. Nothing is kept between draws, so a number depends
neither on the batch nor on the threads, and a backward pass can draw a mask again instead of
storing it. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit values, in halves because int64 has no 64th bit."""
    first = a * (b & 0xFFFF)
    second = a * (b >> 16) + (first >> 16)
    return second >> 16, ((second & 0xFFFF) << 16) | (first & 0xFFFF)


def philox(key: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64) for each 64-bit key and 128-bit counter; int64, broadcast."""
    key0, key1 = key & _LOW, (key >> 32) & _LOW
    c0, c1, c2, c3 = low & _LOW, (low >> 32) & _LOW, high & _LOW, (high >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLY[0], c0)
        high1, low1 = _multiply(_MULTIPLY[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(key: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """float64 in [0, 1) in steps of 2^-53, one per counter."""
    word0, word1, _, _ = philox(key, low, high)
    return ((word0 << 21) | (word1 >> 11)).to(torch.float64) * 2.0**-53


def signed(seed: int) -> int:
    """A seed in [-2^63, 2^64) as the int64 with the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed
