"""Prompt and target: what counts in the loss, cutting, order, cursor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm.lm import pairs
from fastlm.lm.errors import InputError, UsageError
from fastlm.lm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def make(folder: Path, texts: list[tuple[str, str]], longest: int = 1024) -> pairs.PairStore:
    pairs.write(folder, TOKENIZER, [pairs.Pair(*t) for t in texts], longest)
    return pairs.PairStore(folder)


def test_formats(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"question": " Why? ", "answer": " So. "}, {"question": "x", "answer": " "}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert pairs.read([path], "qa") == [pairs.Pair("Question: Why?\nAnswer: ", "So.")]
    with pytest.raises(InputError, match="no column 'source'"):
        pairs.read([path], "translation")
    with pytest.raises(UsageError, match="format must be one of pairs, qa"):
        pairs.read([path], "poem")
    path.write_text(json.dumps(records[1]))
    with pytest.raises(InputError, match="no pair with text on both sides"):
        pairs.read([path], "qa")


def test_only_the_target_counts(tmp_path: Path) -> None:
    store = make(tmp_path, [("abc", "de"), ("f", "g")])
    tokens, targets, fresh = pairs.PairBatches(store, batch=2, seed=1).next()
    rows = sorted(zip(tokens.tolist(), targets.tolist(), strict=True))
    end, no = TOKENIZER.end, pairs.IGNORED
    a, b, c, d, e, f, g = b"abcdefg"
    assert rows == [
        ([a, b, c, d, e], [no, no, d, e, end]),
        ([f, g, end, end, end], [g, end, no, no, no]),
    ]
    assert fresh


def test_the_loss_is_that_of_the_targets(tmp_path: Path) -> None:
    store = make(tmp_path, [("abc", "de"), ("f", "g")])
    tokens, targets, _ = pairs.PairBatches(store, batch=2).next()
    torch.manual_seed(0)
    hidden, weight = torch.randn(*tokens.shape, 8), torch.randn(TOKENIZER.vocab_size, 8)
    loss = fastlm.linear_cross_entropy(hidden, weight, targets)
    logprobs = torch.log_softmax(hidden @ weight.T, -1)
    kept = targets != pairs.IGNORED
    want = -logprobs[kept].gather(-1, targets[kept][:, None]).mean()
    torch.testing.assert_close(loss, want)


def test_long_pairs_lose_the_beginning_of_the_prompt(tmp_path: Path) -> None:
    store = make(tmp_path, [("0123456789", "ab"), ("x", "0123456789")], longest=6)
    assert store.cut == 2 and len(store) == 2
    (a, b, c), (d, e, f) = store.places.tolist()
    assert bytes(store.ids[a:b].tolist()) == b"789" and c - b == 3  # "ab" and end
    assert bytes(store.ids[d:e].tolist()) == b"x" and bytes(store.ids[e:f].tolist()) == b"01234"
    with pytest.raises(UsageError, match="at least 2"):
        pairs.write(tmp_path, TOKENIZER, [pairs.Pair("a", "b")], 1)


@pytest.mark.parametrize("steps", [0, 2, 3, 7])
def test_order_and_cursor(tmp_path: Path, steps: int) -> None:
    store = make(tmp_path, [(f"p{i}", f"t{i}") for i in range(7)])
    batches, other = (pairs.PairBatches(store, batch=3, seed=5) for _ in range(2))
    epoch = [batches.next()[0] for _ in range(batches.steps_per_epoch)]
    seen = sorted(int(row[1]) for tokens in epoch for row in tokens)
    assert seen == sorted(b"0123456") and [len(t) for t in epoch] == [3, 3, 1]
    batches = pairs.PairBatches(store, batch=3, seed=5)
    for _ in range(steps):
        batches.next()
    other.restore(batches.state())
    for _ in range(5):
        assert all(map(torch.equal, batches.next()[:2], other.next()[:2]))


def test_damaged_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no store of pairs"):
        pairs.PairStore(tmp_path)
