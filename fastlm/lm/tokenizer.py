"""Text to token ids and back: byte-level BPE, or plain bytes where `tokenizers` is missing.

Both round-trip every text. Both have one id more than their alphabet, `end`, which stands between
documents, is never produced by `encode`, and decodes to nothing.
"""

from __future__ import annotations

import codecs
import importlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files
from .errors import CheckpointError, InputError, MissingExtra, UsageError

Ids = NDArray[np.int64]

# texts longer than this are encoded in pieces cut at a line, which bounds the memory
PIECE = 1 << 16
LARGEST_VOCAB = 1 << 20  # memory for so many is taken before any text is read
BATCH = 64


class DecodeStream:
    """Ids in, text out, at once; the first bytes of an incomplete character wait for the rest."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token: int) -> str:
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        """What is left: a replacement character if a character stayed incomplete."""
        return self._decoder.decode(b"", final=True)


class Tokenizer(ABC):
    """`table[i]` is the bytes of token i; the last id is `end`."""

    kind: str
    table: list[bytes]

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    @property
    def end(self) -> int:
        return len(self.table) - 1

    def encode(self, text: str) -> Ids:
        return np.concatenate(list(self.encode_pieces([text])))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[Ids]:
        """Ids of a text that arrives in pieces, in memory a few megabytes at a time."""
        parts = chunks(pieces)
        while batch := list(itertools.islice(parts, BATCH)):
            yield from self._encode_batch(batch)

    @abstractmethod
    def _encode_batch(self, texts: list[str]) -> list[Ids]: ...

    @abstractmethod
    def _payload(self) -> Any: ...

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.table[int(i)] for i in ids).decode("utf-8", "replace")

    def stream(self) -> DecodeStream:
        return DecodeStream(self.table)

    def byte_lengths(self) -> NDArray[np.int64]:
        """Bytes of text per token id, for bits per byte."""
        return np.array([len(token) for token in self.table], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        return {"format": "fastlm.tokenizer", "kind": self.kind, "model": self._payload()}

    @property
    def sha256(self) -> str:
        return files.digest(self.to_json())

    def save(self, path: Path) -> None:
        files.write_json(path, self.to_json())


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text cannot be written as UTF-8: {error}") from None


class ByteTokenizer(Tokenizer):
    """One token per byte: no training, no dependency, about 4 times the tokens of BPE."""

    kind = "bytes"

    def __init__(self) -> None:
        self.table = [bytes([i]) for i in range(256)] + [b""]

    def _encode_batch(self, texts: list[str]) -> list[Ids]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int64) for text in texts]

    def _payload(self) -> Any:
        return None


def _printable_bytes() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (the table of GPT-2)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError:
        raise MissingExtra("a BPE tokenizer", "tokenizers") from None


def have_bpe() -> bool:
    try:
        _library()
    except MissingExtra:
        return False
    return True


def chunks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in chunks of at most `PIECE`, cut at a line end where there is one; how the
    text arrives makes no difference."""
    held = ""
    for piece in pieces:
        held += piece
        start = 0
        while len(held) - start > PIECE:
            cut = held.rfind("\n", start, start + PIECE) + 1
            cut = cut if cut > start else start + PIECE
            yield held[start:cut]
            start = cut
        held = held[start:]
    yield held


class BPETokenizer(Tokenizer):
    """Byte-level BPE through the package `tokenizers`."""

    kind = "bpe"

    def __init__(self, model_json: str) -> None:
        self._model = _library().Tokenizer.from_str(model_json)
        bytes_of = _printable_bytes()
        size = self._model.get_vocab_size()
        names = [self._model.id_to_token(i) for i in range(size)]
        self.table = [bytes(bytes_of[c] for c in name) for name in names] + [b""]

    @classmethod
    def train(cls, texts: Iterable[str | Iterable[str]], vocab_size: int = 2048) -> BPETokenizer:
        """Learn merges from texts, each whole or in pieces.

        Short text may give fewer than `vocab_size` ids (at least 257).
        """
        if vocab_size < 257:
            raise UsageError(f"vocabulary size must be at least 257, got {vocab_size}")
        if vocab_size > LARGEST_VOCAB:
            raise UsageError(f"vocabulary size must be at most {LARGEST_VOCAB:,}, got {vocab_size}")
        library = _library()
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,  # one id is left for `end`
            show_progress=False,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        )
        model.train_from_iterator(
            (
                chunk
                for text in texts
                for chunk in chunks([text] if isinstance(text, str) else text)
            ),
            trainer,
        )
        return cls(model.to_str())

    def _encode_batch(self, texts: list[str]) -> list[Ids]:
        for text in texts:
            _utf8(text)  # the library would fail without naming the reason
        encoded = self._model.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(e.ids, dtype=np.int64) for e in encoded]

    def _payload(self) -> Any:
        return json.loads(self._model.to_str())


def load(path: Path) -> Tokenizer:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["kind"] == "bytes":
            return ByteTokenizer()
        if value["kind"] != "bpe":
            raise ValueError(f"unknown kind {value['kind']!r}")
        return BPETokenizer(json.dumps(value["model"]))
    except MissingExtra:
        raise
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        raise CheckpointError(f"{path}: not a tokenizer of fastlm ({error})") from None
