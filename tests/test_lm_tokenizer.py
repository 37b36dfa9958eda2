"""Tokenizers: every text comes back, in one piece or streamed."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.lm import data, errors, tokenizer
from fastlm.lm.errors import CheckpointError, InputError, MissingExtra

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@functools.cache
def made(kind: str) -> tokenizer.Tokenizer:
    if kind == "bytes":
        return tokenizer.ByteTokenizer()
    return tokenizer.BPETokenizer.train([data.load().documents[2].text[:60000]], 400)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_round_trip(kind: str, text: str) -> None:
    found = made(kind)
    ids = found.encode(text)
    assert found.end not in ids and (ids < found.vocab_size).all()
    assert found.decode(ids) == text
    stream = found.stream()
    assert "".join([stream.put(int(i)) for i in ids]) + stream.finish() == text
    assert found.byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_stream_holds_back_incomplete_characters(kind: str) -> None:
    found, stream = made(kind), made(kind).stream()
    pieces = [stream.put(int(i)) for i in found.encode("\u20ac")]
    assert pieces[-1] == "\u20ac" and not any(pieces[:-1])
    stream.put(int(found.encode("\u20ac")[0]))
    assert stream.finish() == "\ufffd"


def test_bpe_shortens_and_special_names_are_plain_text() -> None:
    found = made("bpe")
    text = "it was very well said, <|endoftext|> [UNK]"
    assert len(found.encode(text)) < 0.8 * len(text)
    assert found.decode(found.encode(text)) == text
    assert found.decode([found.end]) == ""


def test_more_ids_than_memory_has_room_for() -> None:
    with pytest.raises(errors.UsageError, match="at most 1,048,576, got 1000000000"):
        tokenizer.BPETokenizer.train(["It was."], 1_000_000_000)


def test_long_text_without_a_line_break() -> None:
    text = "word " * 40000
    assert made("bpe").decode(made("bpe").encode(text)) == text


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    made(kind).save(tmp_path / "t.json")
    again = tokenizer.load(tmp_path / "t.json")
    assert again.sha256 == made(kind).sha256
    assert (again.encode("Anne \u00e9") == made(kind).encode("Anne \u00e9")).all()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"kind": "other"}', '{"kind": "bpe", "model": 1}']
)
def test_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(CheckpointError, match="t.json: not a tokenizer"):
        tokenizer.load(tmp_path / "t.json")


def test_lone_surrogate_is_refused() -> None:
    for kind in ("bytes", "bpe"):
        with pytest.raises(InputError, match="UTF-8"):
            made(kind).encode("a\udc80")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made("bpe").save(tmp_path / "t.json")
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert not tokenizer.have_bpe()
    assert made("bytes").decode(made("bytes").encode("x")) == "x"
    with pytest.raises(MissingExtra, match=r"pip install 'fastlm\[lm\]'"):
        tokenizer.load(tmp_path / "t.json")


def test_saved_file_is_json(tmp_path: Path) -> None:
    made("bytes").save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["kind"] == "bytes"
