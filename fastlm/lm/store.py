"""Token ids on disk, read through a memory map, and the lanes that training reads from it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import files
from .data import Document
from .errors import InputError
from .tokenizer import Tokenizer

TOKENS = "tokens.bin"
INDEX = "index.json"


@dataclass(frozen=True)
class Entry:
    """One document in the store; `stop` is past its `end` token."""

    name: str
    split: str
    start: int
    stop: int
    bytes: int
    characters: int


class TokenStore:
    """uint16 or uint32 token ids in one file, with an index that names the documents."""

    def __init__(self, path: Path) -> None:
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            self.documents = [Entry(**entry) for entry in index["documents"]]
            self.vocab_size: int = index["vocab_size"]
            self.tokenizer_sha256: str = index["tokenizer_sha256"]
            self.counts: dict[str, int] = index["counts"]
            self.ids: NDArray[Any] = np.memmap(path / TOKENS, dtype=index["dtype"], mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a token store ({error})") from None
        expected = self.documents[-1].stop if self.documents else 0
        if len(self.ids) != expected:
            raise InputError(
                f"{path / TOKENS}: {len(self.ids)} tokens, {path / INDEX} says {expected}"
            )
        self.path = path
        self.sha256 = files.digest([index, files.sha256(path / TOKENS)])

    def split(self, name: str) -> list[Entry]:
        return [entry for entry in self.documents if entry.split == name]

    def spans(self, split: str) -> list[tuple[int, int]]:
        return [(entry.start, entry.stop) for entry in self.split(split)]

    def totals(self, split: str) -> dict[str, int]:
        entries = self.split(split)
        return {
            "documents": len(entries),
            "tokens": sum(e.stop - e.start for e in entries),
            "bytes": sum(e.bytes for e in entries),
            "characters": sum(e.characters for e in entries),
        }

    def token_counts(self, split: str) -> Tensor:
        """How often each id occurs in a split, [V]."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start, stop in self.spans(split):
            counts += np.bincount(self.ids[start:stop], minlength=self.vocab_size)
        return torch.from_numpy(counts)


def write(
    folder: Path,
    tokenizer: Tokenizer,
    splits: dict[str, Sequence[Document]],
    counts: dict[str, int] | None = None,
) -> None:
    """Write the two files of a store into an existing folder; one document in memory at a time."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    entries: list[Entry] = []
    start = 0
    with (folder / TOKENS).open("wb") as file:
        for split, documents in splits.items():
            for document in documents:
                ids = np.append(tokenizer.encode(document.text), tokenizer.end).astype(dtype)
                file.write(ids.tobytes())
                size = len(document.text.encode())
                stop = start + len(ids)
                entries.append(Entry(document.name, split, start, stop, size, len(document.text)))
                start = stop
    index = {
        "format": "fastlm.tokens",
        "dtype": np.dtype(dtype).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "documents": [asdict(entry) for entry in entries],
        "counts": counts or {},
    }
    files.write_json(folder / INDEX, index)


class Lanes:
    """Batches for truncated backpropagation with a carried state.

    The spans form one ring of tokens. Row b of every batch continues its own contiguous lane of
    the ring, so the hidden state that a batch leaves is the one that the next batch starts from.
    Every epoch turns the ring by an amount that (seed, epoch) decides, and `next` says when the
    state must start from zero. The cursor is (epoch, step): restoring it is exact.
    """

    def __init__(
        self,
        ids: NDArray[Any],
        spans: Sequence[tuple[int, int]],
        *,
        batch: int,
        length: int,
        seed: int = 0,
    ) -> None:
        self._ids, self._spans = ids, list(spans)
        self._ends = np.cumsum([stop - start for start, stop in self._spans])
        self.size = int(self._ends[-1]) if len(self._ends) else 0
        self.batch, self.length, self.seed = batch, length, seed
        self.lane = self.size // batch
        self.steps_per_epoch = self.lane // length
        if self.steps_per_epoch < 1:
            need = batch * length
            raise InputError(
                f"{self.size:,} tokens are too few for {batch} rows of {length} (at least "
                f"{need:,}); use more text, a smaller --batch or a smaller --seq"
            )
        self.epoch = self.step = 0
        self._turn = self._turn_of(0)

    def _turn_of(self, epoch: int) -> int:
        return random.Random(f"{self.seed}/{epoch}").randrange(self.size)

    def _read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens of the ring from position `start`."""
        parts: list[NDArray[Any]] = []
        start %= self.size
        span = int(np.searchsorted(self._ends, start, side="right"))
        while count > 0:
            first, stop = self._spans[span]
            at = stop - (int(self._ends[span]) - start)
            part = self._ids[at : min(stop, at + count)]
            parts.append(part)
            count -= len(part)
            start = (start + len(part)) % self.size
            span = (span + 1) % len(self._spans)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def next(self) -> tuple[Tensor, Tensor, bool]:
        """(tokens [B, T], targets [B, T], whether the state starts from zero)."""
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
            self._turn = self._turn_of(self.epoch)
        offset = self._turn + self.step * self.length
        rows = np.stack(
            [self._read(offset + b * self.lane, self.length + 1) for b in range(self.batch)]
        )
        fresh = self.step == 0
        self.step += 1
        window = torch.from_numpy(rows.astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous(), fresh

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self._turn = self._turn_of(self.epoch)
