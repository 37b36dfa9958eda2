"""The token store, its cache, and the lanes that training reads."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.lm import preparation, store
from fastlm.lm.data import Document
from fastlm.lm.errors import InputError
from fastlm.lm.tokenizer import ByteTokenizer


def make_store(folder: Path) -> store.TokenStore:
    documents = {
        "train": [Document("a", "abc" * 40), Document("c", "xyz" * 30)],
        "held": [Document("b", "h\u00e9ld")],
    }
    store.write(folder, ByteTokenizer(), documents, {"spaces": 3})
    return store.TokenStore(folder)


def test_store_keeps_documents_and_counts(tmp_path: Path) -> None:
    tokens = make_store(tmp_path)
    assert tokens.ids.dtype == np.uint16
    entry = tokens.split("held")[0]
    ids = tokens.ids[entry.start : entry.stop]
    assert ByteTokenizer().decode(ids) == "h\u00e9ld" and ids[-1] == ByteTokenizer().end
    assert tokens.totals("held") == {"documents": 1, "tokens": 6, "bytes": 5, "characters": 4}
    assert tokens.counts == {"spaces": 3}


def test_damaged_store_is_named(tmp_path: Path) -> None:
    make_store(tmp_path)
    path = tmp_path / store.TOKENS
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="tokens.bin: 217 tokens"):
        store.TokenStore(tmp_path)
    (tmp_path / store.INDEX).write_text("{")
    with pytest.raises(InputError, match="not a token store"):
        store.TokenStore(tmp_path)


def ring(batch: int = 3, length: int = 7) -> store.Lanes:
    """100 tokens in two spans; between them 50 that must never be read."""
    ids = np.concatenate([np.arange(60), np.full(50, 999), np.arange(60, 100)]).astype(np.uint16)
    return store.Lanes(ids, [(0, 60), (110, 150)], batch=batch, length=length, seed=1)


def test_rows_are_contiguous_lanes_and_targets_are_next_tokens() -> None:
    lanes = ring()
    assert lanes.steps_per_epoch == 33 // 7
    batches = [lanes.next() for _ in range(lanes.steps_per_epoch)]
    assert [fresh for _, _, fresh in batches] == [True, False, False, False]
    tokens = torch.cat([t for t, _, _ in batches], 1)
    targets = torch.cat([t for _, t, _ in batches], 1)
    assert torch.equal((tokens + 1) % 100, targets)
    assert torch.equal((tokens[:, :-1] + 1) % 100, tokens[:, 1:])
    assert len(tokens.unique()) == tokens.numel()


def test_epochs_start_elsewhere_with_a_fresh_state() -> None:
    lanes = ring()
    first = lanes.next()[0]
    for _ in range(lanes.steps_per_epoch - 1):
        lanes.next()
    second, _, fresh = lanes.next()
    assert fresh and lanes.state() == {"epoch": 1, "step": 1}
    assert not torch.equal(first, second)


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 11])
def test_cursor_restores_exactly(steps: int) -> None:
    lanes, other = ring(), ring()
    for _ in range(steps):
        lanes.next()
    other.restore(lanes.state())
    for _ in range(9):
        a, b = lanes.next(), other.next()
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [0, 3, 6])
def test_workers_read_the_same_batches(tmp_path: Path, workers: int, steps: int) -> None:
    """From a memory map that each worker opens, and from any place of the cursor."""
    path = tmp_path / "ids.bin"
    np.arange(150).astype(np.uint16).tofile(path)
    ids = np.memmap(path, dtype=np.uint16, mode="r")

    def lanes() -> store.Lanes:
        return store.Lanes(ids, [(0, 60), (110, 150)], batch=3, length=7, seed=1)

    plain, random_state = lanes(), torch.get_rng_state()
    for _ in range(steps):
        plain.next()
    loaded = store.LoadedLanes(lanes(), workers)
    loaded.restore(plain.state())
    for _ in range(7):
        a, b = plain.next(), loaded.next()
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
        assert plain.state() == loaded.state()
    assert torch.equal(torch.get_rng_state(), random_state)


def test_lanes_pickle_without_their_tokens(tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    np.zeros(1 << 20, np.uint16).tofile(path)
    lanes = store.Lanes(
        np.memmap(path, dtype=np.uint16, mode="r"), [(0, 1 << 20)], batch=2, length=9
    )
    data = pickle.dumps(lanes)
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data).next()[0], lanes.next()[0])


def test_too_little_text() -> None:
    with pytest.raises(InputError, match="100 tokens are too few for 3 rows of 40"):
        ring(length=40)


def test_preparation_is_cached_by_content(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"It was the {i}th of May.\n" for i in range(300)))
    config = preparation.DataConfig((str(path),), vocab_size=300)
    first = preparation.prepare(config, tmp_path / "cache")
    second = preparation.prepare(config, tmp_path / "cache")
    assert (first.cached, second.cached) == (False, True)
    assert first.tokens.sha256 == second.tokens.sha256
    assert first.tokenizer.sha256 == second.tokenizer.sha256
    assert any("held out" in line for line in preparation.describe(second))

    # a damaged entry is made again, not trusted
    tokens = second.tokens.path / store.TOKENS
    tokens.write_bytes(bytes(len(tokens.read_bytes())))
    third = preparation.prepare(config, tmp_path / "cache")
    assert not third.cached and third.tokens.sha256 == first.tokens.sha256

    path.write_text(path.read_text() + "One more line.\n")
    assert not preparation.prepare(config, tmp_path / "cache").cached


def test_tokenizer_never_sees_the_held_out_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat. " * 200)
    (tmp_path / "b.txt").write_text("quixotic zephyr. " * 200)
    config = preparation.DataConfig((str(tmp_path),), holdout="b", vocab_size=300)
    found = preparation.prepare(config, tmp_path / "cache").tokenizer
    assert b" cat" in found.table and b" zephyr" not in found.table
