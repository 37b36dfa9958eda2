"""Prompt and target: question and answer, translation, summary. Only the target counts in the loss.

A pair is a row of tokens, prompt then target then `end`; the prompt's places have the target -100,
which no loss of fastlm counts. Which pairs are held out is a hash of their group (the prompt, or
what a column names), so that no group stands on both sides and more data moves no pair.
"""

from __future__ import annotations

import hashlib
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
TOKENS, PLACES, HELD, INDEX = "tokens.bin", "places.npy", "held.npy", "pairs.json"
LEARN = ("targets", "all")
POOL = 16  # batches whose pairs are sorted by length, so that rows of a batch need little padding


@dataclass(frozen=True)
class Format:
    """Names of the two columns, and what the model reads before it writes the target. A prompt that
    is too long loses the beginning of its text, or the end where the beginning tells more."""

    prompt: str
    target: str
    template: str
    keeps_beginning: bool = False

    def render(self, prompt: str) -> str:
        return self.template.replace("{}", prompt.strip())

    @property
    def tail(self) -> int:
        """`Pair.tail` of this format."""
        return len(self.template.partition("{}")[2]) if self.keeps_beginning else 0


FORMATS = {
    "pairs": Format("prompt", "target", "{}"),
    "qa": Format("question", "answer", "Question: {}\nAnswer: "),
    "translation": Format("source", "target", "{}\n=> "),
    "summary": Format("text", "summary", "{}\nTL;DR: ", keeps_beginning=True),
}


def format_of(name: str) -> Format:
    if name not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


@dataclass(frozen=True)
class Pair:
    """`group`: pairs of one are held out together; "" is the prompt. `tail`: characters at the end
    of the prompt that stay when the text before them is cut; 0 cuts the beginning."""

    prompt: str  # as the model reads it
    target: str
    group: str = ""
    tail: int = 0


def read(
    paths: Sequence[str | Path],
    format: str = "pairs",
    reading: sources.Reading | None = None,
    tally: sources.Tally | None = None,
    group: str | None = None,
) -> list[Pair]:
    """Pairs from JSON-lines and CSV files; the column `group` says what is held out together.

    Raises:
        InputError: a column is missing, or no pair has text on both sides.
    """
    chosen, tally = format_of(format), tally or sources.Tally()
    found = []
    for path in paths:
        columns = [chosen.prompt, chosen.target, *([] if group is None else [group])]
        for number, record in sources.records(
            Path(path), reading or sources.Reading(), tally, columns
        ):
            if not record[chosen.prompt].strip() or not record[chosen.target].strip():
                tally.add("pairs with an empty side", f"{path}: line {number}")
                continue
            prompt = chosen.render(record[chosen.prompt])
            whole = "" if group is None else record[group]
            found.append(Pair(prompt, record[chosen.target].strip(), whole, chosen.tail))
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no pair with text on both sides")
    return found


def hold_out(groups: Sequence[str], share: float) -> NDArray[np.bool_]:
    """[n]: whether each is held out, by a hash of its group; at least one group is, and one not.

    Raises:
        InputError: all are of one group.
    """
    if not 0 < share < 1:
        raise UsageError(f"the held-out share of pairs must be in (0, 1), got {share}")

    def place(group: str) -> float:
        return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2.0**64

    where = {group: place(group) for group in groups}
    if len(where) < 2:
        raise InputError(f"{len(groups)} pairs of one group: nothing can be held out")
    least, most = min(where.values()), max(where.values())
    places = [where[group] for group in groups]
    return np.array([(at < share or at == least) and at != most for at in places])


def prompt_ids(tokenizer: Tokenizer, prompt: str, tail: int, room: int) -> NDArray[np.int64]:
    """A prompt in at most `room` tokens, cut as `Pair.tail` says; never without a token."""
    ids = tokenizer.encode(prompt)
    if len(ids) > room and tail:
        end = tokenizer.encode(prompt[-tail:])
        kept = tokenizer.encode(prompt[:-tail])[: max(0, room - len(end))]
        ids = np.concatenate([kept, end])
    ids = ids[max(0, len(ids) - room) :]
    # the target's first token is predicted from something
    return ids if len(ids) else np.array([tokenizer.end])


def encode(
    tokenizer: Tokenizer, pair: Pair, longest: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """(prompt, target and `end`, whether something was cut): at most `longest` tokens, of which
    the prompt loses its own first, then the target those behind."""
    target = np.append(tokenizer.encode(pair.target), tokenizer.end)
    fitted = target[: longest - 1]
    prompt = prompt_ids(tokenizer, pair.prompt, pair.tail, longest - len(fitted))
    whole = len(tokenizer.encode(pair.prompt)) + len(target)
    return prompt, fitted, whole > longest


class PairStore:
    """Token ids of pairs on disk; `places` [pairs, 3]: start, first of the target, stop; `held`
    [pairs] says which are held out. `learn`: "targets", or "all" for a loss on prompts too."""

    def __init__(self, folder: Path, learn: str = "targets") -> None:
        if learn not in LEARN:
            raise UsageError(f"learn must be one of {', '.join(LEARN)}, got {learn!r}")
        self.learn = learn
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.tokenizer_sha256: str = index["tokenizer_sha256"]
            self.vocab_size: int = index["vocab_size"]
            self.cut: int = index["cut"]
            self._bytes: dict[str, list[int]] = index["bytes"]
            self.places: NDArray[np.int64] = np.load(folder / PLACES, mmap_mode="r")
            self.held: NDArray[np.bool_] = np.load(folder / HELD)
            self.ids: NDArray[Any] = np.memmap(folder / TOKENS, dtype=index["dtype"], mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: no store of pairs ({error})") from None
        parts = [files.sha256(folder / name) for name in (TOKENS, PLACES, HELD)]
        self.sha256 = files.digest([index, learn, *parts])

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, split: str) -> list[int]:
        """Numbers of the pairs of a split, "train" or "held"."""
        return np.flatnonzero(self.held == (split == "held")).tolist()

    def totals(self, split: str) -> dict[str, int]:
        """`tokens` and `bytes` are of what is learned, `prompt_tokens` of what stands before it."""
        places = self.places[self.rows(split)]
        prompts = int((places[:, 1] - places[:, 0]).sum())
        targets = int((places[:, 2] - places[:, 1]).sum())
        whole = self.learn == "all"
        return {
            "pairs": len(places),
            "tokens": targets + whole * prompts,
            "prompt_tokens": prompts,
            "bytes": sum(self._bytes[split][1 - whole :]),
        }

    def token_counts(self, split: str) -> Tensor:
        """How often each id occurs in what is learned of a split, [V]."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start, middle, stop in self.places[self.rows(split)].tolist():
            first = start if self.learn == "all" else middle
            counts += np.bincount(self.ids[first:stop], minlength=self.vocab_size)
        return torch.from_numpy(counts)

    def batches(self, *, batch: int, length: int, seed: int) -> PairBatches:
        """What a Trainer reads; `length` is for text, whose rows have no end of their own."""
        return PairBatches(self, self.rows("train"), batch=batch, seed=seed)

    def collate(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`padded` of these pairs."""
        places = self.places[list(rows)].tolist()
        return padded([(self.ids[a:b], self.ids[b:c]) for a, b, c in places], self.learn)


def write(
    folder: Path,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    longest: int = 1024,
    held: NDArray[np.bool_] | None = None,
) -> None:
    """Encode into an existing folder. A pair above `longest` tokens loses tokens of its prompt,
    then the end of its target; `cut` counts such pairs. `held` None: none is held out."""
    if longest < 2:
        raise UsageError(f"the longest pair must have at least 2 tokens, got {longest}")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    held = np.zeros(len(pairs), dtype=bool) if held is None else held
    places = np.empty((len(pairs), 3), dtype=np.int64)
    sizes, bytes_of = {"train": [0, 0], "held": [0, 0]}, tokenizer.byte_lengths()
    start = cut = 0
    with (folder / TOKENS).open("wb") as file:
        for row, pair in enumerate(pairs):
            prompt, target, shortened = encode(tokenizer, pair, longest)
            cut += shortened
            middle = start + len(prompt)
            places[row] = start, middle, middle + len(target)
            start = middle + len(target)
            for side, ids in enumerate((prompt, target)):
                sizes["held" if held[row] else "train"][side] += int(bytes_of[ids].sum())
            file.write(np.concatenate([prompt, target]).astype(dtype).tobytes())
    np.save(folder / PLACES, places)
    np.save(folder / HELD, held)
    index = {
        "format": "fastlm.pairs",
        "dtype": np.dtype(dtype).name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "cut": cut,
        "bytes": sizes,
    }
    files.write_json(folder / INDEX, index)


class Order:
    """Rows, `batch` at a time, in an order that (seed, epoch) decides, with a cursor as `Lanes`.

    With `lengths` of the rows a batch has rows of similar length, out of `POOL` batches drawn at
    random. A last, smaller batch ends each epoch.
    """

    def __init__(
        self, rows: Sequence[int], *, batch: int, seed: int = 0, lengths: Any = None
    ) -> None:
        self._rows, self._lengths = list(rows), lengths
        self.batch, self.seed = batch, seed
        self.steps_per_epoch = -(-len(self._rows) // batch)
        self.epoch = self.step = 0
        self._known: tuple[int, list[list[int]]] = (-1, [])

    def _epoch(self, epoch: int) -> list[list[int]]:
        if self._known[0] != epoch:
            draw, order, size = random.Random(f"{self.seed}/{epoch}"), list(self._rows), self.batch
            draw.shuffle(order)
            if self._lengths is not None:
                length_of = self._lengths.__getitem__
                pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
                order = [row for pool in pools for row in sorted(pool, key=length_of)]
            whole = len(order) // size * size
            batches = [order[i : i + size] for i in range(0, whole, size)]
            draw.shuffle(batches)
            self._known = epoch, batches + ([order[whole:]] if whole < len(order) else [])
        return self._known[1]

    def chosen(self) -> list[int]:
        """The rows of the cursor, which moves on."""
        if self.step >= self.steps_per_epoch:  # above it where a batch has more rows than before
            self.epoch, self.step = self.epoch + 1, 0
        self.step += 1
        return self._epoch(self.epoch)[self.step - 1]

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]


def padded(
    rows: Sequence[tuple[NDArray[Any], NDArray[Any]]], learn: str = "targets"
) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], targets [B, T]) of prompts and targets; behind a pair stands its last token
    with target -100. "all" counts the prompt's tokens too."""
    length = max(len(prompt) + len(target) for prompt, target in rows) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for row, (prompt, target) in enumerate(rows):
        ids = torch.from_numpy(np.concatenate([prompt, target]).astype(np.int64))
        tokens[row, : len(ids) - 1] = ids[:-1]
        tokens[row, len(ids) - 1 :] = ids[-1]
        first = 1 if learn == "all" else len(prompt)
        targets[row, first - 1 : len(ids) - 1] = ids[first:]
    return tokens, targets


class PairBatches(Order):
    """Batches of whole pairs, as long as the longest of each; the state starts from zero in every
    one."""

    def __init__(
        self, store: PairStore, rows: Sequence[int] | None = None, *, batch: int, seed: int = 0
    ) -> None:
        chosen = list(range(len(store)) if rows is None else rows)
        if not chosen:
            raise InputError("no pair to train on")
        lengths = np.asarray(store.places[:, 2] - store.places[:, 0])
        super().__init__(chosen, batch=batch, seed=seed, lengths=lengths)
        self._store = store
        targets = np.asarray(store.places[:, 2] - store.places[:, 1])
        self.learned_share = 1.0
        if store.learn == "targets":
            self.learned_share = float(targets[chosen].sum() / lengths[chosen].sum())
        self.tokens_per_step = float(lengths[chosen].mean()) * min(batch, len(chosen))

    def next(self) -> tuple[Tensor, Tensor, bool]:
        """(tokens [B, T], targets [B, T], True) of one step."""
        return *self._store.collate(self.chosen()), True
