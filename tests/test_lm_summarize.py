"""Sentences, their likelihood after a text, extractive summaries; the shipped pairs."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.lm import data, metrics, pairs, summarize
from fastlm.lm.errors import InputError, UsageError
from fastlm.lm.model import GRULM
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.transformer import TransformerLM

TOKENIZER = ByteTokenizer()
DOCSTRINGS = data.AUSTEN.parent / "docstrings"


def gru() -> GRULM:
    torch.manual_seed(0)
    return GRULM(TOKENIZER.vocab_size, 16)


def transformer() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(
        TOKENIZER.vocab_size, hidden_size=16, num_layers=1, num_heads=2, context=64, end=256
    )


MODELS = [gru, transformer]


@pytest.mark.parametrize(
    "text, found",
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Mr. Elton came.  He sat\ndown.", ["Mr. Elton came.", "He sat down."]),
        ('He said, "No." "Yes," said I.', ['He said, "No."', '"Yes," said I.']),
        ("CHAPTER I\n\nIt was late. ", ["CHAPTER I", "It was late."]),
        ("It is 3.5 of them, e.g. Pi is.", ["It is 3.5 of them, e.g. Pi is."]),
        ("no end", ["no end"]),
        (" \n ", []),
    ],
)
def test_sentences(text: str, found: list[str]) -> None:
    assert summarize.sentences(text) == found


@pytest.mark.parametrize("make", MODELS)
def test_likelihood_is_that_of_the_whole_read_at_once(make: Any) -> None:
    model = make().eval()
    before = torch.tensor([256, *b"a text that goes before"])
    rows = [torch.tensor(list(text)) for text in (b"one", b"another", b"x")]
    found = summarize.log_likelihoods(model, before, rows)
    for row, value in zip(rows, found, strict=True):
        both = torch.cat([before, row])
        logits = model(both[None, :-1])[0].detach()[0, len(before) - 1 :]
        want = logits.log_softmax(-1).gather(-1, row[:, None]).sum()
        assert value == pytest.approx(float(want), abs=1e-4)


def test_a_transformer_sees_the_end_of_a_long_text() -> None:
    model = transformer().eval()
    start, end = torch.full((500,), 97), torch.tensor(list(b"the end of it"))
    rows = [torch.tensor(list(b"and more"))]
    found = summarize.log_likelihoods(model, torch.cat([start, end]), rows)
    short = summarize.log_likelihoods(model, torch.cat([start[:50], end]), rows)
    assert found == short
    with pytest.raises(InputError, match="64"):
        summarize.log_likelihoods(model, end, [torch.zeros(64, dtype=torch.int64)])


@pytest.mark.parametrize("make", MODELS)
def test_a_summary_keeps_the_order_of_the_text(make: Any) -> None:
    text = "It rained on us. No! The cat sat on the mat. A dog ran after it. We saw the sea."
    found = summarize.sentences(text)
    summary = summarize.summarize(make(), TOKENIZER, text, 3)
    chosen = [s for s in found if s in summary]
    assert len(chosen) == 3 and " ".join(chosen) == summary and "No!" not in chosen
    assert summarize.summarize(make(), TOKENIZER, "Short. Tiny.", 5) == "Short. Tiny."
    with pytest.raises(InputError, match="no sentence"):
        summarize.summarize(make(), TOKENIZER, " \n", 1)
    with pytest.raises(UsageError, match="at least 1"):
        summarize.summarize(make(), TOKENIZER, text, 0)


def test_shipped_pairs_are_what_their_sources_say(tmp_path: Path) -> None:
    sources = (DOCSTRINGS / "SOURCES.md").read_text()
    raw = gzip.decompress((DOCSTRINGS / "pairs.jsonl.gz").read_bytes())
    found = re.search(r"pairs.jsonl.gz \| (\d+) \| ([0-9a-f]{64})", sources)
    assert found is not None and found[2] == hashlib.sha256(raw).hexdigest()
    records = [json.loads(line) for line in raw.splitlines()]
    assert len(records) == int(found[1])
    assert len(pairs.read([DOCSTRINGS / "pairs.jsonl.gz"], "summary")) == len(records)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (DOCSTRINGS / "LICENSE-PSF").read_text()
    texts, references = [r["text"] for r in records[:50]], [r["summary"] for r in records[:50]]
    baseline = metrics.rouge([summarize.lead(t) for t in texts], references)
    assert 0.05 < baseline["rouge1"] < 0.6
