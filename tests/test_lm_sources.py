"""Formats in, pieces out: JSON lines, CSV, HTML, encodings, standard input, sizes."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastlm.lm import cleaning, cli, machine, sources, texts
from fastlm.lm.errors import InputError, MissingExtra, UsageError


def read(path: Path | str, tally: sources.Tally | None = None, **options: str) -> dict[str, str]:
    reading = sources.Reading(**options)
    return {n: sources.text_of(p) for n, p in sources.read([path], reading, tally)}


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # a line separator inside a string is no end of the line, and a BOM no part of it
    lines = ["\ufeff" + json.dumps({"text": "one\u2028two", "id": 1}, ensure_ascii=False), ""]
    lines += [json.dumps({"text": "three"}), '{"text": 5}', "{broken", "[1]"]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    tally = sources.Tally()
    assert read(path, tally) == {"a:1": "one\u2028two", "a:3": "three"}
    assert tally.counts["records whose column is no text"] == 1
    assert tally.counts["lines that are not JSON"] == 1
    assert "line 5" in tally.examples["lines that are not JSON"]
    assert tally.counts["lines that are not JSON objects"] == 1


def test_csv_with_quotes_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,body\r\n1,"a ""b""\nc"\r\n2,d\r\n3\r\n4,e,f\r\n')
    tally = sources.Tally()
    assert list(read(path, tally, column="body").values()) == ['a "b"\nc', "d"]
    assert tally.counts["rows of another length"] == 2
    tabs = tmp_path / "b.tsv.gz"
    tabs.write_bytes(gzip.compress(b"id\ttext\n1\tx, y\n"))
    assert list(read(tabs).values()) == ["x, y"]


@pytest.mark.parametrize("name, content", [("a.jsonl", '{"body": "x"}\n'), ("a.csv", "body\nx\n")])
def test_missing_column_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"line \d has no column 'text'; there are 'body'"):
        read(tmp_path / name)


def test_no_usable_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(InputError, match="no usable record .*line 1"):
        read(tmp_path / "a.jsonl")


def test_html_keeps_what_is_visible(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(
        "<html><head><title>T</title><style>p{}</style></head><body><p>One &amp; t&eacute;n<br>"
        "two</p><script>if (a<b) {}</script><div>three</div></body></html>"
    )
    tally = sources.Tally()
    text = read(path, tally)["a"]
    assert text.split() == ["One", "&", "t\u00e9n", "two", "three"]
    assert "two\n" in text and tally.counts["HTML tags"] == 9


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_block_size_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Characters, tags, entities and records across the edge of a block."""
    monkeypatch.setattr(sources, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes("\u00e9t\u00e9 \U0001f600\r\nx".encode())
    (tmp_path / "b.html").write_text("<p>a &lt; b</p>")
    (tmp_path / "c.jsonl").write_text('{"text": "d\u00e9j\u00e0"}\n{"text": "vu"}')
    (tmp_path / "d.txt").write_bytes("utf\u20ac".encode("utf-16"))
    found = {n: sources.text_of(p) for n, p in sources.read([tmp_path])}
    assert found == {
        "a": "\u00e9t\u00e9 \U0001f600\r\nx",
        "b": "\na < b\n",
        "c:1": "d\u00e9j\u00e0",
        "c:2": "vu",
        "d": "utf\u20ac",
    }


def test_another_encoding_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\u00e9t\u00e9 ".encode("latin-1") * 50)
    with pytest.raises(InputError, match="--encoding"):
        read(path)
    assert read(path, encoding="latin-1")["a"].startswith("\u00e9t\u00e9 ")
    with pytest.raises(UsageError, match="unknown encoding 'latin-99'"):
        sources.Reading(encoding="latin-99")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"typed text")

    monkeypatch.setattr("sys.stdin", Stdin())
    assert read("-") == {"stdin": "typed text"}
    with pytest.raises(UsageError, match="read once only"):
        sources.fingerprint(["-"])


def test_fingerprint_is_of_names_and_unpacked_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "c.txt").write_bytes(b"text")
    same, packed, named = (
        sources.fingerprint([tmp_path / name]) for name in ("a.txt", "b/a.txt.gz", "c.txt")
    )
    assert same == packed != named


def test_a_record_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_RECORD", 1000)
    monkeypatch.setattr(sources, "BLOCK", 100)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 2000}))
    with pytest.raises(InputError, match="line 1 is longer than"):
        read(path)
    # as text its size does not matter
    pieces = [len(p) for _, ps in sources.read([path], sources.Reading("text")) for p in ps]
    assert sum(pieces) == path.stat().st_size and max(pieces) <= 100


TEXT = "  a\u0301 b \t\nc\x00\r\n\r\n\r\n\r\n d\u00a0\u00a0e\n\n\nf\n" * 40


@pytest.mark.parametrize("size", [16, 64, 10_000])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_cleaning_in_pieces_is_cleaning_whole(
    monkeypatch: pytest.MonkeyPatch, size: int, step: int
) -> None:
    monkeypatch.setattr(cleaning, "PIECE", size)
    whole, counts = cleaning.clean(TEXT)
    cleaner = cleaning.Cleaner()
    pieces = list(cleaner.pieces(TEXT[i : i + step] for i in range(0, len(TEXT), step)))
    assert "".join(pieces) == whole and cleaner.counts == counts
    assert size > len(TEXT) or len(pieces) > 1


def test_text_without_a_line_end_is_cut_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "PIECE", 50)
    pieces = list(cleaning.seams(iter(["x" * 70] * 30)))
    assert "".join(pieces) == "x" * 2100 and max(map(len, pieces)) <= 200


def test_punctuation_and_stop_words_come_with_a_note(tmp_path: Path) -> None:
    words = tmp_path / "stop.txt"
    words.write_text("the\nAnd\nit's\n")
    options = cleaning.Cleaning(punctuation=True, stop_words=cleaning.stop_words(str(words)))
    text, counts = cleaning.clean("The cat, and the dog; it's \u00abhere\u00bb.", options)
    assert text == " cat dog here"
    assert counts["stop words"] == 4 and counts["punctuation marks"] == 5
    assert len(options.notes()) == 2 and "cannot write a sentence" in options.notes()[0]
    assert cleaning.Cleaning().notes() == []
    (tmp_path / "none.txt").write_text(" ")
    with pytest.raises(InputError, match="no stop word in it"):
        cleaning.stop_words(str(tmp_path / "none.txt"))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ftfy", "sklearn.feature_extraction.text"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingExtra, match=r"needs the package ftfy; pip install 'fastlm\[lm\]'"):
        cleaning.Cleaner(cleaning.Cleaning(mojibake=True))
    with pytest.raises(MissingExtra, match="scikit-learn"):
        cleaning.stop_words("english")


def test_mojibake_is_repaired() -> None:
    pytest.importorskip("ftfy", reason="the package ftfy is not installed")
    wrong = "caf\u00e9 d\u00e9j\u00e0 vu".encode().decode("latin-1")
    text, counts = cleaning.clean(wrong + "\nfine", cleaning.Cleaning(mojibake=True))
    assert text == "caf\u00e9 d\u00e9j\u00e0 vu\nfine" and counts["lines wrongly decoded"] == 1


def test_records_and_text_may_hold_html(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "<p>one &amp; <b>two</b></p>"}\n{"text": "3<4"}')
    (tmp_path / "b.txt").write_text("<div>three</div>")
    tally = sources.Tally()
    reading = sources.Reading(html=True)
    found = {n: sources.text_of(p) for n, p in sources.read([tmp_path], reading, tally)}
    assert found == {"a:1": "\none & two\n", "a:2": "3<4", "b": "\nthree\n"}
    assert tally.counts["HTML tags"] == 3
    assert read(tmp_path / "b.txt") == {"b": "<div>three</div>"}


def published(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    """A package `datasets` whose only collection has these rows; the calls that it gets."""
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_published_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = published(monkeypatch, [{"text": "one", "id": 1}, {"text": "two", "id": 2}])
    assert read("hf:group/name") == {"name:1": "one", "name:2": "two"}
    assert list(read("hf:group/name:config@test").values()) == ["one", "two"]
    assert calls == [("group/name", None, "train", True), ("group/name", "config", "test", True)]
    with pytest.raises(InputError, match="line 1 has no column 'body'; there are 'text', 'id'"):
        read("hf:group/name", column="body")
    with pytest.raises(UsageError, match="save it with fastlm data clean"):
        sources.fingerprint(["hf:group/name"])


def test_a_collection_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, ValueError("Bad split: dev.\nmore"))
    with pytest.raises(
        InputError, match=r"hf:a@dev: cannot be read by datasets \(Bad split: dev.\)"
    ):
        read("hf:a@dev")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtra, match=r"needs the package datasets; pip install 'fastlm\[hub\]"
    ):
        read("hf:a")


@pytest.fixture
def peak_of() -> Callable[[str], int]:
    """Peak resident bytes of a command in a process of its own."""

    def peak(command: str) -> int:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
                assert cli.main(command.split()) == 0
                os.write(writer, str(machine.peak_memory()).encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as file:
            return int(file.read())

    return peak


def test_one_long_line_is_read_in_pieces(
    tmp_path: Path, peak_of: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory does not grow with the line; pieces of 1 MiB would hide it in a small file."""
    for module, name in ((sources, "BLOCK"), (cleaning, "PIECE"), (texts, "BLOCK")):
        monkeypatch.setattr(module, name, 1 << 16)
    sizes = {"small": 1 << 20, "large": 8 << 20}
    for name, size in sizes.items():
        words = "a line without an end goes on and on and on "
        (tmp_path / f"{name}.txt").write_text(words * (size // len(words)))
    small, large = (peak_of(f"data stats {tmp_path}/{name}.txt --quiet") for name in sizes)
    assert large - small < 2 << 20, (small, large)
