"""From files of pairs to a store and its tokenizer, remembered by content: done once per file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import files, pairs, preparation, sources, tokenizer
from .errors import InputError
from .pairs import Pair, PairStore

# part of the cache key: change it when the same input gives other tokens
VERSION = 1


@dataclass(frozen=True)
class PairConfig:
    """`format`: a name in `pairs.FORMATS`. `group`: a column whose equal values are held out
    together; None: equal prompts are. `holdout`: share of the groups. `longest`: tokens of a
    prompt and its target. `learn`: "targets", or "all" for a loss on prompts too."""

    paths: tuple[str, ...]
    format: str = "pairs"
    group: str | None = None
    holdout: float = 0.1
    tokenizer: str = "auto"
    vocab_size: int = 2048
    longest: int = 512
    learn: str = "targets"


@dataclass(frozen=True)
class PreparedPairs:
    tokens: PairStore
    tokenizer: tokenizer.Tokenizer
    cached: bool
    notes: list[str] = field(default_factory=list)


def read(config: PairConfig) -> tuple[list[Pair], NDArray[np.bool_], sources.Tally]:
    """(pairs, which are held out, what reading met)."""
    tally = sources.Tally()
    found = pairs.read(config.paths, config.format, tally=tally, group=config.group)
    held = pairs.hold_out([pair.group or pair.prompt for pair in found], config.holdout)
    return found, held, tally


def held_out(config: PairConfig, split: str = "held") -> list[Pair]:
    """The pairs of one split, as text; "all" for both."""
    found, held, _ = read(config)
    if split == "all":
        return found
    return [pair for pair, out in zip(found, held, strict=True) if out == (split == "held")]


def _make(config: PairConfig, texts: Sequence[Pair]) -> tokenizer.Tokenizer:
    """A tokenizer of the training pairs alone."""
    kind = preparation.DataConfig(tokenizer=config.tokenizer).tokenizer_kind()
    if kind == "bytes":
        return tokenizer.ByteTokenizer()
    parts = (f"{pair.prompt}{pair.target}\n" for pair in texts)
    return tokenizer.BPETokenizer.train(parts, config.vocab_size)


def _open(path: Path, learn: str) -> PreparedPairs | None:
    """The cached result, or None when it is missing or damaged."""
    if not path.is_dir() or files.damage(path):
        return None
    try:
        found = tokenizer.load(path / "tokenizer.json")
        return PreparedPairs(PairStore(path, learn), found, True)
    except InputError:
        return None


def prepare_pairs(
    config: PairConfig, given: tokenizer.Tokenizer | None = None, cache: Path | None = None
) -> PreparedPairs:
    """Read, split, train a tokenizer on the training part (or take the one given), encode.

    Raises:
        InputError: a file is unusable, misses a column, or nothing can be held out.
    """
    pairs.format_of(config.format)
    kind = preparation.DataConfig(tokenizer=config.tokenizer).tokenizer_kind()
    chosen = [kind, config.vocab_size] if given is None else [given.sha256]
    how = [config.format, config.group, config.holdout, config.longest]
    key = files.digest([VERSION, sources.fingerprint(config.paths), *how, *chosen])
    path = (cache or files.cache_dir()) / "pairs" / key[:24]
    with files.locked(path):
        return _open(path, config.learn) or _write(path, config, given)


def _write(path: Path, config: PairConfig, given: tokenizer.Tokenizer | None) -> PreparedPairs:
    texts, held, tally = read(config)
    train = [pair for pair, out in zip(texts, held, strict=True) if not out]
    made = _make(config, train) if given is None else given

    def fill(folder: Path) -> None:
        pairs.write(folder, made, texts, config.longest, held)
        made.save(folder / "tokenizer.json")

    files.write_folder(path, fill)
    notes = [f"{count:,} {what}" for what, count in tally.counts.items() if count]
    return PreparedPairs(PairStore(path, config.learn), made, False, notes)


def describe(prepared: PreparedPairs) -> list[str]:
    """How many pairs and tokens, and how they are split: lines for people."""
    store, lines = prepared.tokens, [f"left out: {note}" for note in prepared.notes]
    for split, title in (("train", "train"), ("held", "held out")):
        totals = store.totals(split)
        what = "tokens" if store.learn == "all" else "tokens of targets"
        lines.append(
            f"{title}: {totals['pairs']:,} pairs, {totals['tokens']:,} {what}, "
            f"{totals['prompt_tokens']:,} of prompts"
        )
    if store.cut:
        lines.append(f"{store.cut:,} pairs were too long and are cut (--longest)")
    note = ", tokens from the cache" if prepared.cached else ""
    lines.append(
        f"tokenizer: {prepared.tokenizer.kind}, {prepared.tokenizer.vocab_size:,} ids{note}"
    )
    return lines
