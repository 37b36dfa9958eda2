"""Documents that repeat others: equal ones by sha256, near ones by MinHash with banding.

Source: Broder 1997, "On the resemblance and containment of documents"; banding as in Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

SHINGLE = 5  # words
HASHES, ROWS = 128, 4  # 32 bands of 4: a pair of resemblance 0.7 is missed once in 5,000 times
BLOCK = 1 << 13
LONGEST_WORD = 1 << 12

_WORD = re.compile(r"\w+")
Words = NDArray[np.uint64]


def _odd(count: int, seed: int) -> Words:
    draw = np.random.default_rng(seed).integers(0, 1 << 63, count, dtype=np.uint64)
    return draw * np.uint64(2) + np.uint64(1)


_FACTORS, _SHIFTS = _odd(HASHES, 1), _odd(HASHES, 2)
_PLACES = _odd(SHINGLE, 3)


def _mixed(values: Words) -> Words:
    """Every bit of the result depends on every bit of a value (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


class Signature:
    """sha256 and, with `near`, MinHash of the runs of `SHINGLE` words of one document, built from
    its pieces."""

    def __init__(self, near: bool = True) -> None:
        self._near = near
        self._least = np.full(HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
        self._tail = np.empty(0, dtype=np.uint64)
        self._cut = ""
        self._digest = hashlib.sha256()
        self.words = 0

    def add(self, piece: str) -> None:
        self._digest.update(piece.encode("utf-8", "surrogatepass"))
        if not self._near:
            return
        # not lower(), which asks what stands beside a Greek sigma
        text = self._cut + piece.casefold()
        # the last word may go on in the next piece
        end = len(text)
        while end and (text[end - 1].isalnum() or text[end - 1] == "_"):
            end -= 1
            if len(text) - end > LONGEST_WORD:  # no word of any language
                end = len(text)
                break
        self._cut = text[end:]
        self._add_words(text[:end])

    def _add_words(self, text: str) -> None:
        found = _WORD.findall(text)
        self.words += len(found)
        codes = np.fromiter(
            (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found),
            np.uint64,
            len(found),
        )
        codes = np.concatenate([self._tail, codes])
        count = len(codes) - SHINGLE + 1
        self._tail = codes[max(0, count) :] if count > 0 else codes
        if count <= 0:
            return
        runs = sum(codes[i : i + count] * _PLACES[i] for i in range(SHINGLE))
        runs = _mixed(np.unique(runs))
        for start in range(0, len(runs), BLOCK):
            block = runs[start : start + BLOCK, None]
            self._least = np.minimum(self._least, _mixed(block * _FACTORS + _SHIFTS).min(0))

    def finish(self) -> tuple[bytes, Words | None]:
        """(sha256, the minima), or None for a document of fewer words than a shingle."""
        self._add_words(self._cut)
        self._cut = ""
        return self._digest.digest(), self._least if self.words >= SHINGLE else None


@dataclass(frozen=True)
class Repeat:
    """`resemblance`: estimated share of common shingles, 1 for equal text."""

    of: str
    resemblance: float


class Seen:
    """The documents kept so far. Keeps about 5 KB for each, not its text."""

    def __init__(self, threshold: float | None) -> None:
        if threshold is not None and not 0.5 <= threshold <= 1.0:
            raise UsageError(f"near-duplicate threshold must be in [0.5, 1], got {threshold}")
        self.threshold = threshold
        self._equal: dict[bytes, str] = {}
        self._near: list[tuple[str, Words]] = []
        self._bands: dict[bytes, list[int]] = {}

    def _keys(self, least: Words) -> Iterator[bytes]:
        for band in range(HASHES // ROWS):
            rows = least[band * ROWS : (band + 1) * ROWS]
            yield (
                band.to_bytes(1, "little") + hashlib.blake2b(rows.tobytes(), digest_size=7).digest()
            )

    def repeat(self, name: str, digest: bytes, least: Words | None) -> Repeat | None:
        """What this document repeats; None, and from now on it counts as seen."""
        if digest in self._equal:
            return Repeat(self._equal[digest], 1.0)
        keys = list(self._keys(least)) if self.threshold is not None and least is not None else []
        candidates = sorted({i for key in keys for i in self._bands.get(key, ())})
        best = Repeat("", 0.0)
        for index in candidates:
            other, minima = self._near[index]
            alike = float(np.mean(minima == least))
            if alike > best.resemblance:
                best = Repeat(other, alike)
        if self.threshold is not None and best.of and best.resemblance >= self.threshold:
            return best
        self._equal[digest] = name
        if keys and least is not None:
            for key in keys:
                self._bands.setdefault(key, []).append(len(self._near))
            self._near.append((name, least))
        return None
