"""Summaries in a model's own words: greedy completions, ROUGE beside the first sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.lm import abstractive, cli, errors, metrics, pairs
from fastlm.lm.errors import InputError, UsageError
from fastlm.lm.model import GRULM
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.transformer import TransformerLM

TOKENIZER = ByteTokenizer()


def gru() -> GRULM:
    torch.manual_seed(1)
    return GRULM(TOKENIZER.vocab_size, 16)


def transformer() -> TransformerLM:
    torch.manual_seed(1)
    return TransformerLM(
        TOKENIZER.vocab_size, hidden_size=16, num_layers=1, num_heads=2, context=32, end=256
    )


@torch.no_grad()
def one_by_one(model: Any, ids: list[int], count: int) -> str:
    made: list[int] = []
    while len(made) < count and (not made or made[-1] != TOKENIZER.end):
        made.append(int(model(torch.tensor([ids + made]))[0][0, -1].argmax()))
    return " ".join(TOKENIZER.decode(made).split())


@pytest.mark.parametrize("make", [gru, transformer])
def test_completions_are_the_likeliest_tokens_of_each_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    with torch.no_grad():  # ends are likely somewhere
        torch.nn.init.normal_(model.head.weight)
        model.head.bias[TOKENIZER.end] += 2.0
    monkeypatch.setattr(abstractive, "ROWS", 3)
    prompts = ["a longer prompt", "b", "some", "", "what is", "x" * 60, "TL;DR: "]
    given = [pairs.Pair(prompt, "") for prompt in prompts]
    found = abstractive.completions(model, TOKENIZER, given, max_new_tokens=9, longest=20)
    assert model.training
    room = 20 if model.window is None else 32 - 9
    model.eval()
    for prompt, text in zip(prompts, found, strict=True):
        ids = [*prompt.encode()][-min(room, 20) :] or [TOKENIZER.end]
        assert text == one_by_one(model, ids, 9), prompt
    assert len(set(found)) > 3 and len({len(text) for text in found}) > 1
    drawn = [
        abstractive.completions(
            model, TOKENIZER, given, max_new_tokens=9, longest=20, temperature=1.0, seed=seed
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="32 new tokens do not fit into the model's context of 32"):
        abstractive.summaries(transformer(), TOKENIZER, ["text"], max_new_tokens=32)
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1"):
        abstractive.summaries(gru(), TOKENIZER, ["text"], max_new_tokens=0)
    assert abstractive.completions(gru(), TOKENIZER, []) == []


def test_rouge_stands_beside_the_first_sentence() -> None:
    texts = ["The cat sat. A dog ran after it.", "It rained. We all went home."]
    references = ["A dog ran after it.", "It rained."]
    found = abstractive.rouge_beside_lead(references, texts, references)
    assert found.rouge == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0} and found.pairs == 2
    lead = metrics.rouge(["The cat sat.", "It rained."], references)
    assert found.rouge_lead_1 == lead and 0.4 < lead["rouge1"] < 0.6
    assert found.difference["rouge1"].value == pytest.approx(1 - lead["rouge1"])
    lines = found.lines("abstractive")
    assert lines[0].split()[:3] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"] and "on 2 pairs" in lines[0]
    assert lines[1].split() == ["abstractive", "1.000", "1.000", "1.000"]
    assert lines[2].startswith("lead-1") and lines[3].startswith("difference")
    with pytest.raises(InputError, match="no text"):
        abstractive.rouge_beside_lead([], [], [])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, run, text = tmp_path / "pairs.jsonl", tmp_path / "run", tmp_path / "text.txt"
    records = [
        {"text": f"Object {i} is red. It has {i} sides.", "summary": "A red one.", "at": f"{i % 9}"}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    text.write_text("Object 3 is red. It has many sides.")
    train = ["train", "--pairs", str(path), "--format", "summary", "--group", "at", "--tokenizer"]
    train += ["bytes", "--hidden", "24", "--budget", "120steps", "--batch", "8", "--lr", "2e-2"]
    assert cli.main([*train, "--evals", "1", "--out", str(run), "--quiet"]) == errors.OK

    def said(*arguments: str) -> Any:
        assert cli.main(["summarize", str(run), *arguments, "--json"]) == errors.OK
        return json.loads(capsys.readouterr().out)

    # every summary is the same: that much a small model has learned
    one = said(str(text), "--abstractive")
    assert one == {"summary": "A red one.", "lead": text.read_text()}
    found = said("--pairs", str(path), "--abstractive")
    assert 0 < found["pairs"] < 40 and found["rouge"]["rougeL"] == 1.0
    assert found["rouge_lead_1"]["rougeL"] < 1.0 and found["difference"]["rouge2"]["value"] > 0
    assert {s["summary"] for s in found["summaries"]} == {"A red one."}
    everything = said("--pairs", str(path), "--abstractive", "--split", "all", "--count", "39")
    assert everything["pairs"] == 39
    extracted = said("--pairs", str(path), "--count", "3")
    assert all(s["summary"] in s["text"] for s in extracted["summaries"])
    assert cli.main(["summarize", str(run), "--pairs", str(path), "--count", "2"]) == errors.OK
    printed = capsys.readouterr().out
    assert "extractive" in printed and "lead-1" in printed and printed.count("wanted:") == 2
    for wrong in ([], [str(text), "--pairs", str(path)]):
        assert cli.main(["summarize", str(run), *wrong]) == errors.USAGE
    assert cli.main(["summarize", str(run), "--pairs", str(text)]) == errors.BAD_INPUT
    assert cli.main(["summarize", str(run), str(text), "--sentences", "0"]) == errors.USAGE
