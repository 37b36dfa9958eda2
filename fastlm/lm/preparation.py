"""From text to a token store and its tokenizer, remembered by content: done once per corpus."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from . import data, files, sources, store, texts, tokenizer
from .cleaning import Cleaning
from .errors import InputError, MissingExtra

# part of the cache key: change it when the same input gives other tokens
VERSION = 2
NAMED = 8  # documents on a line


def held_out_of(text: str | None) -> str | float | None:
    """What an option says: a share, or the name of a document."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class DataConfig:
    """`paths` None: the shipped novels. `holdout`: names of documents, or a share in (0, 1)."""

    paths: tuple[str, ...] | None = None
    holdout: str | float | tuple[str, ...] | None = None
    tokenizer: str = "auto"
    vocab_size: int = 2048
    cleaning: Cleaning = Cleaning()
    reading: sources.Reading = sources.Reading()
    keep: texts.Filter = texts.Filter()

    def held_out(self) -> str | float | tuple[str, ...]:
        if self.holdout is not None:
            return self.holdout
        return "persuasion" if self.paths is None else 0.1

    def tokenizer_kind(self) -> str:
        """ "auto" is BPE where the package is installed, else bytes."""
        if self.tokenizer == "auto":
            return "bpe" if tokenizer.have_bpe() else "bytes"
        if self.tokenizer == "bpe" and not tokenizer.have_bpe():
            raise MissingExtra("a BPE tokenizer", "tokenizers")
        return self.tokenizer


@dataclass(frozen=True)
class Prepared:
    tokens: store.TokenStore
    tokenizer: tokenizer.Tokenizer
    cached: bool


def _open(path: Path) -> Prepared | None:
    """The cached result, or None when it is missing or damaged."""
    if not path.is_dir() or files.damage(path):
        return None
    try:
        found = tokenizer.load(path / "tokenizer.json")
        return Prepared(store.TokenStore(path), found, True)
    except InputError:
        return None


def open_folder(path: Path) -> Prepared:
    """A token store with its tokenizer, as `fastlm data tokenize` writes it.

    Raises:
        InputError: it is damaged; the message names the file.
    """
    if damage := files.damage(path):
        raise InputError(damage)
    return Prepared(store.TokenStore(path), tokenizer.load(path / "tokenizer.json"), False)


def prepare(
    config: DataConfig, cache: Path | None = None, given: tokenizer.Tokenizer | None = None
) -> Prepared:
    """Load, clean, split, train the tokenizer on the training part only (or take the one given),
    encode.

    A folder that `fastlm data tokenize` wrote is taken as it is.

    Raises:
        InputError: a file is unusable, the held-out document does not exist, or a folder has
            another tokenizer than the one given.
    """
    if config.paths is not None and len(config.paths) == 1:
        if (Path(config.paths[0]) / store.INDEX).is_file():
            ready = open_folder(Path(config.paths[0]))
            if given is not None and given.sha256 != ready.tokenizer.sha256:
                raise InputError(f"{config.paths[0]}: tokens of another tokenizer than the model's")
            return ready
    paths = data.paths_of(config.paths)
    kind = config.tokenizer_kind() if given is None else given.sha256
    choices = [asdict(config.cleaning), asdict(config.reading), asdict(config.keep)]
    key = files.digest(
        [VERSION, sources.fingerprint(paths), *choices, kind, config.vocab_size, config.held_out()]
    )
    path = (cache or files.cache_dir()) / "tokens" / key[:24]
    with files.locked(path):
        return _open(path) or _make(path, paths, config, given)


def _make(
    path: Path,
    paths: list[str | Path],
    config: DataConfig,
    given: tokenizer.Tokenizer | None,
) -> Prepared:
    made: list[tokenizer.Tokenizer] = []

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".texts.") as scratch:
            cleaned = texts.build(
                Path(scratch),
                paths,
                reading=config.reading,
                cleaning=config.cleaning,
                keep=config.keep,
            )
            made.append(encode(folder, cleaned, config, given))

    files.write_folder(path, fill)
    return Prepared(store.TokenStore(path), made[0], False)


def encode(
    folder: Path,
    cleaned: texts.TextStore,
    config: DataConfig,
    given: tokenizer.Tokenizer | None = None,
) -> tokenizer.Tokenizer:
    """Split, train the tokenizer on the training part only, and write the tokens."""
    train, held = texts.hold_out(cleaned, config.held_out())
    chosen = given or tokenizer.ByteTokenizer()
    if given is None and config.tokenizer_kind() == "bpe":
        parts = (document.pieces() for document in train)
        chosen = tokenizer.BPETokenizer.train(parts, config.vocab_size)
    counts = {**cleaned.report.counts, **cleaned.report.reasons}
    store.write(folder, chosen, {"train": train, "held": held}, counts)
    chosen.save(folder / "tokenizer.json")
    return chosen


def listed(names: list[str]) -> str:
    """A line's worth of them."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def describe(prepared: Prepared) -> list[str]:
    """What was removed, how many tokens, and how they are split: lines for people."""
    tokens = prepared.tokens
    removed = ", ".join(f"{count:,} {name}" for name, count in tokens.counts.items())
    lines = [f"cleaned: {removed or 'nothing to change'}"]
    for split, title in (("train", "train"), ("held", "held out")):
        totals = tokens.totals(split)
        names = listed([entry.name for entry in tokens.split(split)])
        per_token = totals["characters"] / max(1, totals["tokens"])
        lines.append(
            f"{title}: {totals['tokens']:,} tokens, {per_token:.2f} characters each ({names})"
        )
    note = ", tokens from the cache" if prepared.cached else ""
    lines.append(
        f"tokenizer: {prepared.tokenizer.kind}, {prepared.tokenizer.vocab_size:,} ids{note}"
    )
    return lines


def summary(prepared: Prepared) -> dict[str, object]:
    tokens = prepared.tokens
    return {
        "cleaned": tokens.counts,
        "train": tokens.totals("train"),
        "held_out": {**tokens.totals("held"), "names": [e.name for e in tokens.split("held")]},
        "tokenizer": {
            "kind": prepared.tokenizer.kind,
            "vocab_size": prepared.tokenizer.vocab_size,
            "sha256": prepared.tokenizer.sha256,
        },
        "cached": prepared.cached,
    }
