"""The recall task: what it asks, and that attention answers it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlm.lm import cli, recall
from fastlm.lm.budget import Budget

SMALL = recall.Task(pairs=3, keys=6, values=6, noise=3, distance=16, batch=16)


def test_each_question_has_its_answer_far_before_it() -> None:
    task = recall.Task(pairs=5, keys=7, values=9, noise=4, distance=40, batch=6)
    tokens, targets = task.draw(torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (6, 50) and task.length == 50
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        told = {fact // 9: fact % 9 for fact in row[:5]}
        assert len(told) == 5 and max(row[:5]) < 63
        assert all(79 <= token < 83 for token in row[5:45])
        assert wanted[:45] == [recall.IGNORED] * 45
        pairs = zip(row[45:], wanted[45:], strict=True)
        assert {token - 63: target - 70 for token, target in pairs} == told
    assert int(tokens.max()) < task.vocabulary == 83


def test_a_seed_decides_the_sequences() -> None:
    draws = [SMALL.draw(torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_model_that_knows_nothing_guesses() -> None:
    models = recall.contestants(recall.Task(), 0)
    got = recall.accuracy(models["transformer"].model, recall.Task(distance=8), batches=20)
    assert got < 0.15  # chance is 1/16


def test_attention_recalls() -> None:
    contestant = recall.contestants(SMALL, 0)["transformer"]
    steps, _ = recall.train(contestant, SMALL, Budget(300, "steps"), seed=1)
    assert steps == 300
    # a guess among the values that were told gives a third
    assert recall.accuracy(contestant.model, SMALL) > 0.95


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "result.json"
    command = ["bench", "recall", "--budget", "2steps", "--distance", "8", "--batch", "2"]
    assert cli.main([*command, "--save", str(saved)]) == 0
    assert "recall of 8 facts over 8 tokens, 2 steps" in capsys.readouterr().out
    result = json.loads(saved.read_text())
    assert result["models"].keys() == {"transformer", "gru"}
    for row in result["models"].values():
        assert row["steps"] == 2 and 0 <= row["accuracy"] <= 1
