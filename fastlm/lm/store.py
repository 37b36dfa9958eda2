"""Token ids on disk, read through a memory map, and the lanes that training reads from it."""

from __future__ import annotations

import bisect
import itertools
import json
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import files
from .errors import InputError, UsageError
from .tokenizer import Tokenizer

TOKENS = "tokens.bin"
INDEX = "index.json"
BLOCK = 1 << 22  # ids in memory at once
MOST_WORKERS = 64  # processes of half a gigabyte each


class Document(Protocol):
    """A text that can be read in pieces; `data` and `texts` have their own."""

    @property
    def name(self) -> str: ...

    def pieces(self) -> Iterator[str]: ...


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

    def document_at(self, index: int) -> Entry:
        """The document that the token at `index` belongs to."""
        stops = [entry.stop for entry in self.documents]
        return self.documents[bisect.bisect_right(stops, index)]

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

    def first(self, split: str, limit: int | None = None) -> NDArray[Any]:
        """The first `limit` ids of a split, in memory."""
        parts: list[NDArray[Any]] = []
        for start, stop in self.spans(split):
            if limit is not None:
                stop = min(stop, start + limit)
                limit -= stop - start
            parts.append(self.ids[start:stop])
        return np.concatenate(parts) if parts else self.ids[:0]

    def token_counts(self, split: str) -> Tensor:
        """How often each id occurs in a split, [V]."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start, stop in self.spans(split):
            for at in range(start, stop, BLOCK):
                part = self.ids[at : min(stop, at + BLOCK)]
                counts += np.bincount(part, minlength=self.vocab_size)
        return torch.from_numpy(counts)

    def batches(self, *, batch: int, length: int, seed: int) -> Lanes:
        """What a Trainer reads."""
        return Lanes(self.ids, self.spans("train"), batch=batch, length=length, seed=seed)


class Batches(Protocol):
    """Batches with a cursor: `Lanes`, or `PairBatches` of pairs."""

    steps_per_epoch: int
    tokens_per_step: float
    learned_share: float  # of the tokens: the head's products for the others are left out

    def next(self) -> tuple[Tensor, Tensor, bool]:
        """(tokens [B, T], targets [B, T], whether the state starts from zero)."""
        ...

    def state(self) -> dict[str, int]: ...

    def restore(self, state: dict[str, int]) -> None: ...


class _Counted:
    """Passes pieces on and counts them."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.bytes = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self.bytes += len(piece.encode())
            self.characters += len(piece)
            yield piece


def write(
    folder: Path,
    tokenizer: Tokenizer,
    splits: dict[str, Sequence[Document]],
    counts: dict[str, int] | None = None,
) -> None:
    """Write the two files of a store into an existing folder, a few megabytes in memory."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    entries: list[Entry] = []
    start = 0
    with (folder / TOKENS).open("wb") as file:
        for split, documents in splits.items():
            for document in documents:
                stop, counted = start, _Counted(document.pieces())
                for ids in tokenizer.encode_pieces(counted):
                    file.write(ids.astype(dtype).tobytes())
                    stop += len(ids)
                file.write(np.array([tokenizer.end], dtype).tobytes())
                stop += 1
                size, characters = counted.bytes, counted.characters
                entries.append(Entry(document.name, split, start, stop, size, characters))
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
        self.tokens_per_step, self.learned_share = float(batch * length), 1.0
        self.lane = self.size // batch
        self.steps_per_epoch = self.lane // length
        if self.steps_per_epoch < 1:
            need = batch * length
            raise InputError(
                f"{self.size:,} tokens are too few for {batch} rows of {length} (at least "
                f"{need:,}); use more text, a smaller --batch or a smaller --seq"
            )
        self.epoch = self.step = 0

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

    def at(self, epoch: int, step: int) -> tuple[Tensor, Tensor, bool]:
        """(tokens [B, T], targets [B, T], whether the state starts from zero) of one step."""
        offset = self._turn_of(epoch) + step * self.length
        rows = np.stack(
            [self._read(offset + b * self.lane, self.length + 1) for b in range(self.batch)]
        )
        window = torch.from_numpy(rows.astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous(), step == 0

    def next(self) -> tuple[Tensor, Tensor, bool]:
        """`at` of the cursor, which moves on."""
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        self.step += 1
        return self.at(self.epoch, self.step - 1)

    def places(self) -> list[int]:
        """Where in the store each row of the batch that `next` gave last begins."""
        offset = self._turn_of(self.epoch) + (self.step - 1) * self.length
        found = []
        for row in range(self.batch):
            start = (offset + row * self.lane) % self.size
            span = int(np.searchsorted(self._ends, start, side="right"))
            found.append(self._spans[span][1] - (int(self._ends[span]) - start))
        return found

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]

    def __getstate__(self) -> dict[str, Any]:
        # a worker process opens the file itself: pickling a memory map would copy all of it
        state = dict(self.__dict__)
        if isinstance(self._ids, np.memmap):
            state["_ids"] = (self._ids.filename, self._ids.dtype.str)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._ids, tuple):
            path, dtype = self._ids
            self._ids = np.memmap(path, dtype=dtype, mode="r")


class _Batches(torch.utils.data.Dataset):
    """Step i of endless training, for the workers of a DataLoader."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool]:
        return self._lanes.at(*divmod(index, self._lanes.steps_per_epoch))


class _From(torch.utils.data.Sampler):
    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches the whole group of processes; the training decides what comes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class LoadedLanes:
    """`Lanes` read by worker processes: the same batches in the same order, with the same cursor,
    which counts what was taken and not what the workers have read ahead."""

    def __init__(self, lanes: Lanes, workers: int) -> None:
        self._lanes, self._workers = lanes, workers
        self._iterator: Iterator[tuple[Tensor, Tensor, bool]] | None = None
        self.batch, self.length = lanes.batch, lanes.length
        self.tokens_per_step, self.learned_share = lanes.tokens_per_step, lanes.learned_share
        self.steps_per_epoch, self.size = lanes.steps_per_epoch, lanes.size

    @property
    def epoch(self) -> int:
        return self._lanes.epoch

    def next(self) -> tuple[Tensor, Tensor, bool]:
        lanes = self._lanes
        if self._iterator is None:
            start = lanes.epoch * lanes.steps_per_epoch + lanes.step
            loader = torch.utils.data.DataLoader(
                _Batches(lanes),
                batch_size=None,
                sampler=_From(start),
                num_workers=self._workers,
                worker_init_fn=_leave_signals,
                # a generator of its own: the workers' seeds must not move the training's
                generator=torch.Generator(),
            )
            self._iterator = iter(loader)
        if lanes.step == lanes.steps_per_epoch:
            lanes.epoch, lanes.step = lanes.epoch + 1, 0
        lanes.step += 1
        return next(self._iterator)

    def places(self) -> list[int]:
        return self._lanes.places()

    def state(self) -> dict[str, int]:
        return self._lanes.state()

    def restore(self, state: dict[str, int]) -> None:
        self._lanes.restore(state)
        self._iterator = None


def loaded(batches: Any, workers: int) -> Any:
    """These batches, read by so many processes beside this one.

    Raises:
        UsageError: the number is negative, or the batches are of pairs, which are read at once.
    """
    if workers < 0:
        raise UsageError(f"workers must not be negative, got {workers}")
    if workers > MOST_WORKERS:
        raise UsageError(f"workers must be at most {MOST_WORKERS}, got {workers:,}")
    if workers == 0:
        return batches
    if not isinstance(batches, Lanes):
        raise UsageError("--workers read text; pairs need none")
    return LoadedLanes(batches, workers)
