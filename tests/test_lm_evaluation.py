"""Perplexity and bits per byte by hand, and the detector of a model's own texts."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.lm import evaluation, measuring, metrics, preparation, rollouts, store
from fastlm.lm.data import Document
from fastlm.lm.model import GRULM, PlainGRULM
from fastlm.lm.tokenizer import ByteTokenizer

TEXTS = {"one": "It was a d\u00e9j\u00e0 vu.", "two": "Nothing more happened that day."}


@pytest.fixture
def tokens(tmp_path: Path) -> store.TokenStore:
    documents = [Document(name, text) for name, text in TEXTS.items()]
    store.write(tmp_path, ByteTokenizer(), {"held": documents})
    return store.TokenStore(tmp_path)


def chances(model: PlainGRULM, ids: list[int]) -> list[float]:
    """Of each token after the first, from the softmax of what stood before it alone."""
    found = []
    for at in range(1, len(ids)):
        logits = model(torch.tensor([ids[:at]]))[0][0, -1].double()
        found.append(float(logits.exp()[ids[at]] / logits.exp().sum()))
    return found


def test_perplexity_is_the_inverse_geometric_mean_of_the_chances(tokens: store.TokenStore) -> None:
    torch.manual_seed(0)
    model = GRULM(tokens.vocab_size, 16)
    plain = PlainGRULM(tokens.vocab_size, 16)
    plain.load_state_dict(model.state_dict())
    scores = evaluation.by_document(model, tokens, ByteTokenizer())
    product, count, size = 1.0, 0, 0
    for name, text in TEXTS.items():
        ids = ByteTokenizer().encode(text).tolist() + [ByteTokenizer().end]
        with torch.no_grad():
            found = chances(plain, ids)
        want = math.prod(found) ** (-1 / len(found))
        assert scores[name].perplexity == pytest.approx(want, rel=1e-5)
        # the first byte is read and not predicted
        read = len(text.encode()) - 1
        assert (scores[name].tokens, scores[name].bytes) == (len(found), read)
        bits = -sum(map(math.log2, found)) / read
        assert scores[name].bits_per_byte == pytest.approx(bits, rel=1e-5)
        product, count, size = product * math.prod(found), count + len(found), size + read
    both = measuring.total(scores)
    assert both.perplexity == pytest.approx(product ** (-1 / count), rel=1e-5)
    assert both.bits_per_byte == pytest.approx(-math.log2(product) / size, rel=1e-5)
    # of one token, whose end alone is predicted: no byte, and bits all the same
    short = evaluation.Score(math.log(8), 3.0, 1, 0)
    more = measuring.total({**scores, "short": short})
    assert more.bits_per_byte == pytest.approx((3 - math.log2(product)) / size, rel=1e-5)


def test_a_model_knows_its_own_texts_by_their_likelihood(tmp_path: Path) -> None:
    """It writes one letter; the author writes four."""
    store.write(tmp_path, ByteTokenizer(), {"held": [Document("x", "abcd" * 100)]})
    held, model = store.TokenStore(tmp_path), GRULM(257, 16)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[ord("a")] = 9.0
    found = measuring.quality(model, ByteTokenizer(), held, 20, 0)
    assert found["auc_own"]["value"] == 1.0
    places = rollouts.contexts(held, "held", 20, 24, measuring.TEXT, 0)
    real = [ByteTokenizer().decode(place.following.tolist()) for place in places]
    assert found["distinct_2_of_the_text"] == metrics.distinct(real, 2)
    made = rollouts.two_each(model, ByteTokenizer(), held, split="held", count=3, length=8, seed=1)
    assert all(a != b and prompt in "abcd" * 100 for prompt, a, b in made)


def test_a_store_larger_than_memory_is_read(tmp_path: Path) -> None:
    """The file has holes, so that it takes no disk either."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count, path = memory, tmp_path / "tokens.bin"  # two bytes each
    with path.open("wb") as file:
        file.truncate(2 * count)
        file.seek(2 * (count // 2))
        file.write(np.arange(1, 31, dtype=np.uint16).tobytes())
    ids = np.memmap(path, dtype=np.uint16, mode="r")
    lanes = store.Lanes(ids, [(count // 2, count)], batch=2, length=9)
    lanes._turn_of = lambda epoch: 0  # type: ignore[method-assign]
    assert lanes.at(0, 0)[0][0].tolist() == list(range(1, 10))
    assert lanes.at(0, 2)[1][0].tolist() == list(range(20, 29))
    loaded = store.LoadedLanes(store.Lanes(ids, [(0, count)], batch=2, length=9), 2)
    for _ in range(3):
        assert loaded.next()[0].shape == (2, 9)


def test_many_documents_take_few_lines(tmp_path: Path) -> None:
    scores = {f"d{i}": evaluation.Score(2 * math.log(2), 1.5, 3, 4) for i in range(60)}
    lines = measuring.table(scores)
    assert len(lines) == 1 + 50 + 2 and lines[51] == "and 10 more, all of them in --json"
    assert lines[52].split() == ["all", "1.500", "4.0", "1.386", "180"]
    assert len(measuring.table({"d": scores["d0"]})) == 2
    store.write(tmp_path, ByteTokenizer(), {"train": [Document(n, "text") for n in scores]})
    prepared = preparation.Prepared(store.TokenStore(tmp_path), ByteTokenizer(), False)
    assert "(d0, d1, d2, d3, d4, d5, d6, d7 and 52 more)" in preparation.describe(prepared)[1]
