"""Prompt and target: question and answer, translation, summary. Only the target counts in the loss.

A pair is a row of tokens, prompt then target then `end`; the prompt's places have the target -100,
which no loss of fastlm counts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import files, sources
from .errors import InputError, UsageError
from .tokenizer import Tokenizer

IGNORED = -100
TOKENS, PLACES, INDEX = "tokens.bin", "places.npy", "pairs.json"


@dataclass(frozen=True)
class Format:
    """Names of the two columns, and what the model reads before it writes the target."""

    prompt: str
    target: str
    template: str

    def render(self, prompt: str) -> str:
        return self.template.replace("{}", prompt.strip())


FORMATS = {
    "pairs": Format("prompt", "target", "{}"),
    "qa": Format("question", "answer", "Question: {}\nAnswer: "),
    "translation": Format("source", "target", "{}\n=> "),
    "summary": Format("text", "summary", "{}\nTL;DR: "),
}


@dataclass(frozen=True)
class Pair:
    prompt: str  # as the model reads it
    target: str


def read(
    paths: Sequence[str | Path],
    format: str = "pairs",
    reading: sources.Reading | None = None,
    tally: sources.Tally | None = None,
) -> list[Pair]:
    """Pairs from JSON-lines and CSV files.

    Raises:
        InputError: a column is missing, or no pair has text on both sides.
    """
    if format not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    chosen, tally = FORMATS[format], tally or sources.Tally()
    found = []
    for path in paths:
        columns = [chosen.prompt, chosen.target]
        for number, record in sources.records(
            Path(path), reading or sources.Reading(), tally, columns
        ):
            if not record[chosen.prompt].strip() or not record[chosen.target].strip():
                tally.add("pairs with an empty side", f"{path}: line {number}")
                continue
            prompt = chosen.render(record[chosen.prompt])
            found.append(Pair(prompt, record[chosen.target].strip()))
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no pair with text on both sides")
    return found


class PairStore:
    """Token ids of pairs on disk; `places` [pairs, 3]: start, first of the target, stop."""

    def __init__(self, folder: Path) -> None:
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.tokenizer_sha256: str = index["tokenizer_sha256"]
            self.cut: int = index["cut"]
            self.places: NDArray[np.int64] = np.load(folder / PLACES, mmap_mode="r")
            self.ids: NDArray[Any] = np.memmap(folder / TOKENS, dtype=index["dtype"], mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: no store of pairs ({error})") from None

    def __len__(self) -> int:
        return len(self.places)


def write(folder: Path, tokenizer: Tokenizer, pairs: Sequence[Pair], longest: int = 1024) -> None:
    """Encode into an existing folder. A pair above `longest` tokens loses the beginning of its
    prompt, then the end of its target; `cut` counts such pairs."""
    if longest < 2:
        raise UsageError(f"the longest pair must have at least 2 tokens, got {longest}")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    places = np.empty((len(pairs), 3), dtype=np.int64)
    start = cut = 0
    with (folder / TOKENS).open("wb") as file:
        for row, pair in enumerate(pairs):
            prompt = tokenizer.encode(pair.prompt)
            target = np.append(tokenizer.encode(pair.target), tokenizer.end)
            cut += len(prompt) + len(target) > longest
            target = target[: longest - 1]
            prompt = prompt[max(0, len(prompt) + len(target) - longest) :]
            if not len(prompt):  # the target's first token is predicted from something
                prompt = np.array([tokenizer.end])
            middle = start + len(prompt)
            places[row] = start, middle, middle + len(target)
            start = middle + len(target)
            file.write(np.concatenate([prompt, target]).astype(dtype).tobytes())
    np.save(folder / PLACES, places)
    index = {
        "format": "fastlm.pairs",
        "dtype": np.dtype(dtype).name,
        "tokenizer_sha256": tokenizer.sha256,
        "cut": cut,
    }
    files.write_json(folder / INDEX, index)


class PairBatches:
    """Batches of whole pairs in an order that (seed, epoch) decides, with a cursor as `Lanes`.

    Rows are as long as the longest of the batch; behind a pair stands its `end` with target -100.
    The state starts from zero in every batch. A last, smaller batch ends each epoch.
    """

    def __init__(
        self, store: PairStore, rows: Sequence[int] | None = None, *, batch: int, seed: int = 0
    ) -> None:
        self._store = store
        self._rows = list(range(len(store)) if rows is None else rows)
        if not self._rows:
            raise InputError("no pair to train on")
        self.batch, self.seed = batch, seed
        self.steps_per_epoch = -(-len(self._rows) // batch)
        self.epoch = self.step = 0

    def _order(self, epoch: int) -> list[int]:
        order = list(self._rows)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def at(self, epoch: int, step: int) -> tuple[Tensor, Tensor, bool]:
        """(tokens [B, T], targets [B, T], True) of one step."""
        chosen = self._order(epoch)[step * self.batch : (step + 1) * self.batch]
        places = self._store.places[chosen]
        length = int((places[:, 2] - places[:, 0]).max()) - 1
        tokens = torch.zeros(len(chosen), length, dtype=torch.int64)
        targets = torch.full((len(chosen), length), IGNORED, dtype=torch.int64)
        for row, (start, middle, stop) in enumerate(places.tolist()):
            ids = torch.from_numpy(self._store.ids[start:stop].astype(np.int64))
            tokens[row, : stop - start - 1] = ids[:-1]
            tokens[row, stop - start - 1 :] = ids[-1]
            targets[row, middle - start - 1 : stop - start - 1] = ids[middle - start :]
        return tokens, targets, True

    def next(self) -> tuple[Tensor, Tensor, bool]:
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
        self.step += 1
        return self.at(self.epoch, self.step - 1)

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
