"""Reading, cleaning and splitting text."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import pytest

from fastlm.lm import data
from fastlm.lm.errors import InputError


def test_cleaning_counts_what_it_changes() -> None:
    text = "a\r\nb\rc\u2028d\x00\x07\ufeff  e \t f   \n\n\n\ncafe\u0301\n"
    cleaned, counts = data.clean(text)
    assert cleaned == "a\nb\nc\nd e f\n\ncaf\u00e9\n"
    assert counts == {
        "line endings": 3,
        "control characters": 3,
        "lines composed to NFC": 1,
        "spaces": 1 + 2 + 3,
        "blank lines": 2,
    }


def test_cleaning_again_changes_nothing() -> None:
    once, _ = data.clean("  x \t\n \n \n\n y\r\n\r\n\r\n z ")
    twice, counts = data.clean(once)
    assert twice == once and not any(counts.values())


def test_cleaning_can_be_off() -> None:
    text = "a\r\n\x00  b \n\n\n\n"
    assert data.clean(text, data.Cleaning.off()) == (text, {})


def test_shipped_corpus_is_what_its_sources_say() -> None:
    corpus = data.load()
    sources = (data.AUSTEN / "SOURCES.md").read_text()
    table = dict(re.findall(r"\| (\w+)\.txt\.gz .*\| ([0-9a-f]{64}) \|", sources))
    found = {d.name: hashlib.sha256(d.text.encode()).hexdigest() for d in corpus.documents}
    assert found == table and len(table) == 6
    assert "Julia Silge" in (data.AUSTEN / "LICENSE-janeaustenr").read_text()


def test_load_reads_folders_gzip_and_utf16(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "in" / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "in" / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.txt").write_bytes("drei \u00e4".encode("utf-16"))
    corpus = data.load([tmp_path / "in", tmp_path / "a.txt"])
    assert corpus.names() == ["a", "b", "a-2"]
    assert [data.clean(d.text)[0] for d in corpus.documents] == ["one", "two", "drei \u00e4"]


def test_a_few_bad_bytes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"plain text " * 50 + b"\xff\xfe\x80")
    corpus = data.load(path)
    assert corpus.counts["undecodable bytes"] == 3
    assert corpus.documents[0].text.endswith("\ufffd")


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file"),
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        ("\u00e9t\u00e9 d\u00e9j\u00e0 ".encode("latin-1") * 9, "not UTF-8"),
        (b"\x00\x01\x02" * 100, "NUL bytes"),
    ],
)
def test_unusable_file_is_named_with_the_reason(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: .*{reason}") as caught:
        data.load(path)
    assert "\n" not in str(caught.value)


def test_damaged_gzip_and_empty_folder(tmp_path: Path) -> None:
    whole = gzip.compress(b"text " * 1000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.txt.gz: damaged gzip"):
        data.load(tmp_path)
    (tmp_path / "cut.txt.gz").unlink()
    with pytest.raises(InputError, match="no file in this folder ends in .txt"):
        data.load(tmp_path)
