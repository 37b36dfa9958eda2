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


def test_a_cursor_behind_the_end_of_shorter_epochs_begins_the_next() -> None:
    """Of smaller batches than those that are read from there on."""
    order, next_epoch = (pairs.Order(range(7), batch=3, seed=5) for _ in range(2))
    order.restore({"epoch": 0, "step": 5})
    next_epoch.restore({"epoch": 1, "step": 0})
    assert order.chosen() == next_epoch.chosen() and order.state() == {"epoch": 1, "step": 1}


def test_a_summary_is_of_the_beginning_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "0123456789", "summary": "ab", "at": "x"}))
    (pair,) = pairs.read([path], "summary", group="at")
    assert pair == pairs.Pair("0123456789\nTL;DR: ", "ab", "x", 8)
    prompt, target, cut = pairs.encode(TOKENIZER, pair, 16)
    assert bytes(prompt.tolist()) == b"01234\nTL;DR: " and len(target) == 3 and cut
    assert bytes(pairs.prompt_ids(TOKENIZER, pair.prompt, 8, 3).tolist()) == b"R: "
    whole, _, cut = pairs.encode(TOKENIZER, pair, 21)
    assert bytes(whole.tolist()) == pair.prompt.encode() and not cut


def test_no_group_is_on_both_sides() -> None:
    groups = [f"document {i % 50}" for i in range(400)]
    held = pairs.hold_out(groups, 0.3)
    sides = [{g for g, h in zip(groups, held, strict=True) if h == side} for side in (True, False)]
    assert not sides[0] & sides[1] and 5 < len(sides[0]) < 25
    # more data moves nothing
    more = pairs.hold_out([*groups, *(f"other {i}" for i in range(40))], 0.3)
    assert (more[:400] == held).all()
    # a small set still has both
    for share in (1e-9, 1 - 1e-9):
        assert sorted(pairs.hold_out(["a", "b"], share)) == [False, True]
    with pytest.raises(InputError, match="3 pairs of one group"):
        pairs.hold_out(["a"] * 3, 0.5)
    with pytest.raises(UsageError, match=r"in \(0, 1\), got 1.5"):
        pairs.hold_out(["a", "b"], 1.5)


def test_prompts_may_count_too(tmp_path: Path) -> None:
    make(tmp_path, [("abc", "de"), ("f", "g")])
    targets, whole = pairs.PairStore(tmp_path), pairs.PairStore(tmp_path, "all")
    tokens, counted = whole.collate([0])
    assert counted.tolist() == [[*b"bcde", TOKENIZER.end]] and tokens.tolist() == [[*b"abcde"]]
    assert targets.totals("train")["tokens"] == 5 and targets.totals("train")["bytes"] == 3
    assert whole.totals("train")["tokens"] == 9 and whole.totals("train")["bytes"] == 7
    assert targets.totals("train")["prompt_tokens"] == 4 and targets.totals("held")["pairs"] == 0
    assert targets.token_counts("train").sum() == 5 and whole.token_counts("train").sum() == 9
    assert targets.sha256 != whole.sha256
    with pytest.raises(UsageError, match="learn must be one of targets, all"):
        pairs.PairStore(tmp_path, "prompts")


def test_rows_of_a_batch_are_of_similar_length(tmp_path: Path) -> None:
    store = make(tmp_path, [("p" * (1 + 7 * i % 61), "t") for i in range(61)])
    lengths = store.places[:, 2] - store.places[:, 0]
    order = pairs.Order(range(61), batch=4, seed=2, lengths=lengths)
    first = [order.chosen() for _ in range(order.steps_per_epoch)]
    assert sorted(row for batch in first for row in batch) == list(range(61))
    assert max(int(lengths[b].max() - lengths[b].min()) for b in first) <= 8
    means = [float(lengths[b].mean()) for b in first]
    assert means != sorted(means)  # short and long ones in turn
    assert [order.chosen() for _ in range(order.steps_per_epoch)] != first


def test_damaged_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no store of pairs"):
        pairs.PairStore(tmp_path)
