"""Cross-validation: which documents stand in which fold, what is compared, and the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlm.lm import folds
from fastlm.lm.errors import InputError, UsageError
from fastlm.lm.texts import Document


def documents(*sizes: int) -> list[Document]:
    return [Document(f"d{i}", Path(), 0, size) for i, size in enumerate(sizes)]


def test_each_document_is_held_out_once() -> None:
    assert folds.partition(documents(5, 6, 7), None, 0) == {n: [n] for n in ("d0", "d1", "d2")}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3, 7])
def test_folds_are_a_partition_of_about_equal_sizes(count: int, seed: int) -> None:
    sizes = [100, 1, 50, 50, 30, 70, 20, 90, 5, 40, 60]
    parts = folds.partition(documents(*sizes), count, seed)
    assert len(parts) == count
    assert sorted(n for part in parts.values() for n in part) == sorted(
        f"d{i}" for i in range(len(sizes))
    )
    held = [sum(sizes[int(n[1:])] for n in part) for part in parts.values()]
    assert max(held) - min(held) <= max(sizes)
    assert parts == folds.partition(documents(*sizes), count, seed)


def test_too_few_documents() -> None:
    with pytest.raises(InputError, match="at least 2 documents, got 1"):
        folds.partition(documents(5), None, 0)
    with pytest.raises(InputError, match="at least 4 documents, got 3"):
        folds.partition(documents(5, 6, 7), 4, 0)
    with pytest.raises(UsageError, match="at least 2, got 1"):
        folds.partition(documents(5, 6, 7), 1, 0)


def test_variants() -> None:
    assert folds.variant("gru") == {"model": "gru"}
    found = folds.variant("transformer:kv-heads=2:lr=1:tied=true:dropout=0.1")
    want = {"model": "transformer", "kv_heads": 2, "lr": 1.0, "tied": True, "dropout": 0.1}
    assert found == want and type(found["lr"]) is float


@pytest.mark.parametrize(
    "text, message",
    [
        ("lstm", "model must be one of gru, transformer, got 'lstm'"),
        ("gru:width=3", "a setting is one of hidden, .*, got 'width'"),
        ("gru:budget=3", "got 'budget'"),  # all have the same
        ("gru:hidden=1.5", "hidden must be int, got '1.5'"),
        ("gru:hidden=true", "hidden must be int, got 'true'"),
        ("gru:tied=1", "tied must be true or false, got '1'"),
        ("gru:lr", "lr must be float, got ''"),
    ],
)
def test_variants_are_checked(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        folds.variant(text)


def test_summary_and_table_by_hand() -> None:
    found = {
        "gru": {"a": {"bits_per_byte": 2.0}, "b": {"bits_per_byte": 3.0}},
        "transformer": {"a": {"bits_per_byte": 2.5}, "b": {"bits_per_byte": 1.5}},
    }
    numbers = folds.summary(found)
    assert numbers["gru"] == {"mean": 2.5, "deviation": 0.5**0.5, "best_in": 1}
    assert numbers["transformer"]["best_in"] == 1
    lines = folds.table(found)
    assert [line.split() for line in lines] == [
        ["held", "out", "gru", "transformer"],
        ["a", "2.000", "2.500"],
        ["b", "3.000", "1.500"],
        ["mean", "2.500", "2.000"],
        ["deviation", "0.707", "0.707"],
        ["best", "in", "1", "of", "2", "1", "of", "2"],
    ]
    assert len({len(line) for line in lines}) == 1
