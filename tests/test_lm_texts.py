"""Cleaned text on disk: what is left out and why, holding out, statistics, `fastlm data`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from fastlm.lm import cli, data, duplicates, preparation, texts
from fastlm.lm.errors import InputError, UsageError


def build(folder: Path, documents: dict[str, str], **options: object) -> texts.TextStore:
    inputs = folder / "in"
    inputs.mkdir()
    for name, text in documents.items():
        (inputs / f"{name}.txt").write_text(text)
    (folder / "out").mkdir()
    return texts.build(folder / "out", [inputs], **options)  # type: ignore[arg-type]


def words(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(5000)}" for _ in range(count)]


def test_equal_near_and_short_documents_are_left_out(tmp_path: Path) -> None:
    base = words(400)
    near, far = list(base), list(base)
    near[200] = "changed"
    far[::9] = words(len(far[::9]), 1)
    store = build(
        tmp_path,
        {
            "a": " ".join(base),
            "b": "  ".join(base),  # equal after cleaning
            "c": " ".join(near),
            "d": " ".join(far),
            "e": " ".join(words(400, 2)),
            "f": "tiny",
        },
        keep=texts.Filter(near=0.8, least=10),
    )
    assert store.names() == ["a", "d", "e"]
    assert store.report.reasons == {
        "repeated documents": 1,
        "near duplicates": 1,
        "short documents": 1,
    }
    why = {entry["name"]: entry["reason"] for entry in store.report.removed}
    assert why["b"] == "repeats a" and why["c"].startswith("resembles a (9")
    assert store.report.read == 6 and store.report.kept == 3
    assert [d.text for d in store.documents][0] == " ".join(base)


def test_near_duplicates_can_be_kept(tmp_path: Path) -> None:
    base = words(300)
    store = build(
        tmp_path, {"a": " ".join(base), "b": " ".join(base[:-1])}, keep=texts.Filter(near=None)
    )
    assert store.names() == ["a", "b"]


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_resemblance_is_estimated(share: float) -> None:
    """Against the share of common runs of words, counted; 128 hashes have a spread of 4%."""
    base = words(3000, 3)
    other = base[: int(3000 * share)] + words(3000 - int(3000 * share), 4)
    runs = [set(zip(*(w[i:] for i in range(5)), strict=False)) for w in (base, other)]
    exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    minima = []
    for text in (" ".join(base), " ".join(other)):
        signature = duplicates.Signature()
        for start in range(0, len(text), 777):  # words across the pieces
            signature.add(text[start : start + 777])
        found = signature.finish()[1]
        assert found is not None
        minima.append(found)
    assert abs(float(np.mean(minima[0] == minima[1])) - exact) < 4 * 0.045


@pytest.mark.parametrize(
    "text",
    [
        " ".join(words(500)) + " \u00e9t\u00e9 end",
        "\u0391\u03a3 \u0391\u03a3\u0391 one two \u0391\u03a3",  # a sigma that may end a word
    ],
)
def test_pieces_make_no_difference_to_the_signature(text: str) -> None:
    whole, parts = duplicates.Signature(), duplicates.Signature()
    whole.add(text)
    for character in text:
        parts.add(character)
    (a, b), (c, d) = whole.finish(), parts.finish()
    assert a == c and b is not None and d is not None and np.array_equal(b, d)


def test_threshold_is_checked() -> None:
    with pytest.raises(UsageError, match="in \\[0.5, 1\\]"):
        duplicates.Seen(0.2)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable text.*5 characters, at least 10"):
        build(tmp_path, {"a": "short"}, keep=texts.Filter(least=10))


def test_hold_out_by_name_and_by_share(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    store = build(tmp_path, {"a": text, "b": text[:400]}, keep=texts.Filter(near=None))
    train, held = texts.hold_out(store, "b")
    assert [d.name for d in train] == ["a"] and [d.name for d in held] == ["b"]
    train, held = texts.hold_out(store, 0.1)
    assert [a.text + b.text for a, b in zip(train, held, strict=True)] == [text, text[:400]]
    assert all(d.text.startswith("line") for d in held)
    for which, reason in (("c", "no document named 'c'"), (1.5, "between 0 and 1")):
        with pytest.raises(InputError, match=reason):
            texts.hold_out(store, which)


def test_a_share_never_cuts_a_character(tmp_path: Path) -> None:
    store = build(tmp_path, {"a": "\u00e9\u20ac\U0001f600" * 30})
    for share in (0.1, 0.2, 0.33, 0.5, 0.9):
        (train,), (held,) = texts.hold_out(store, share)
        assert train.text + held.text == store.documents[0].text


def test_tokens_are_those_of_the_text_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces on the way to the store do not move the places where the tokenizer cuts."""
    text = data.load().documents[0].text[:200_000]
    (tmp_path / "a.txt").write_text(text)
    config = preparation.DataConfig((str(tmp_path / "a.txt"),), 0.1, vocab_size=300)
    first = preparation.prepare(config, tmp_path / "one")
    monkeypatch.setattr(texts, "BLOCK", 999)
    monkeypatch.setattr("fastlm.lm.sources.BLOCK", 777)
    monkeypatch.setattr("fastlm.lm.cleaning.PIECE", 5000)
    second = preparation.prepare(config, tmp_path / "two")
    assert first.tokens.sha256 == second.tokens.sha256
    cleaned = data.clean(text)[0]
    entry = first.tokens.split("train")[0]
    ids = first.tokens.ids[entry.start : entry.stop - 1]
    assert first.tokenizer.decode(ids) == cleaned[: entry.characters]
    assert np.array_equal(ids, first.tokenizer.encode(cleaned[: entry.characters]))


def run(*arguments: str) -> int:
    return cli.main(["data", *arguments])


def test_clean_writes_text_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("x  y\r\n" * 9)
    (tmp_path / "b.txt").write_text("x y\n" * 9)
    out = tmp_path / "out"
    assert run("clean", str(tmp_path), "--out", str(out)) == 0
    assert (out / "a.txt").read_text() == "x y\n" * 9 and not (out / "b.txt").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["reasons"] == {"repeated documents": 1} and report["counts"]["spaces"] == 9
    assert "left out: 1 of 2 documents" in capsys.readouterr().out
    assert run("clean", str(tmp_path / "a.txt"), "--out", str(out)) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_records_stay_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one <b>"}\n{"body": "two"}\n')
    arguments = ["clean", str(path), "--column", "body", "--out", str(tmp_path / "out")]
    assert run(*arguments) == 0
    lines = (tmp_path / "out" / "documents.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["one <b>", "two"]


def test_stats_and_card(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("The cat. The dog\u2019s cat!\nEnd")
    assert run("stats", str(tmp_path / "a.txt"), "--json") == 0
    numbers = json.loads(capsys.readouterr().out)["statistics"]
    assert (numbers["words"], numbers["distinct_words"], numbers["lines"]) == (6, 4, 1)
    assert numbers["common_words"][:2] == [["the", 2], ["cat", 2]]
    card = tmp_path / "card.md"
    arguments = ["card", str(tmp_path / "a.txt"), "--out", str(card), "--license", "CC0"]
    assert run(*arguments, "--drop-punctuation", "--title", "Cats") == 0
    text = card.read_text()
    assert "# Data card: Cats" in text and "CC0" in text and "cannot write a sentence" in text
    assert "## What was not examined" in text and "| a | " in text


def test_tokenize_then_train_on_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(data.load().documents[0].text[5000:25000])
    out = tmp_path / "tokens"
    arguments = ["tokenize", str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes"]
    assert run(*arguments) == 0
    found = preparation.prepare(preparation.DataConfig((str(out),)))
    assert found.tokens.path == out and found.tokenizer.kind == "bytes"
    capsys.readouterr()
    tokens = out / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(InputError, match="truncated"):
        preparation.prepare(preparation.DataConfig((str(out),)))


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["stats", "missing.txt"], 3, "no such file"),
        (["stats", "--near-duplicates", "much"], 2, "must be a share or off"),
        (["stats", "--stop-words", "missing.txt"], 3, "no list of stop words"),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(*arguments) == code
    assert message in capsys.readouterr().err


def test_unusable_files_are_left_out_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("good text")
    (tmp_path / "b.txt").write_bytes(bytes(range(256)))
    (tmp_path / "c.jsonl").write_text('{"text": "a record"}\n{"body": "x"}\n{"text": "never read"}')
    (tmp_path / "d.csv").write_text("body\nx\n")
    (tmp_path / "e.txt").write_text("last")
    assert run("stats", str(tmp_path)) == 3
    assert "b.txt: not text" in capsys.readouterr().err
    assert run("stats", str(tmp_path), "--skip-unusable", "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["read"], report["kept"], report["reasons"]) == (6, 3, {"unusable files": 3})
    reasons = {entry["name"]: entry["reason"] for entry in report["removed"]}
    assert "not text" in reasons["b"] and "line 2 has no column" in reasons["c"]
    assert "there are 'body'" in reasons["d"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "b.txt").write_bytes(bytes(range(256)))
    assert run("stats", str(tmp_path / "only"), "--skip-unusable") == 3
    assert "no usable text (b: " in capsys.readouterr().err


def test_single_steps_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("def f():\r\n    return  1 \n\n\n\nx\n")
    assert run("clean", str(path), "--out", str(out), "--keep", "spaces,blank-lines") == 0
    assert (out / "a.txt").read_text() == "def f():\n    return  1 \n\n\n\nx\n"
    assert run("stats", str(path), "--keep", "tabs") == 2
    assert "line-endings, control, nfc, spaces, blank-lines, got 'tabs'" in capsys.readouterr().err
    assert run("stats", str(path), "--keep", "nfc", "--no-clean") == 2


def test_texts_keep_their_names_beside_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "<i>two</i>"}')
    assert run("clean", str(tmp_path), "--strip-html", "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "a.txt").read_text() == "one"
    (line,) = (tmp_path / "out" / "documents.jsonl").read_text().splitlines()
    assert json.loads(line) == {"name": "b:1", "text": "two"}


def test_several_documents_are_held_out(tmp_path: Path) -> None:
    store = build(tmp_path, {name: f"text of {name}\n" for name in "abcd"})
    train, held = texts.hold_out(store, ("b", "d"))
    assert [d.name for d in train] == ["a", "c"] and [d.name for d in held] == ["b", "d"]
    with pytest.raises(InputError, match="no document named 'e' to hold out; there are a, b, c, d"):
        texts.hold_out(store, ("b", "e"))
    with pytest.raises(InputError, match="all there is"):
        texts.hold_out(store, tuple("abcd"))


def test_tokenizing_says_what_hurts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("The cat, the dog.\n" * 30)
    arguments = ["tokenize", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--drop-punctuation"]
    assert run(*arguments, "--out", str(tmp_path / "out")) == 0
    assert "note: punctuation is removed" in capsys.readouterr().out
