"""The recall task: what it asks, and that attention answers it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlm.lm import cli, recall
from fastlm.lm.budget import Budget

SMALL = recall.Task(pairs=2, keys=6, values=6, noise=3, distance=12, batch=16)


def test_each_question_has_its_answer_far_before_it() -> None:
    task = recall.Task(pairs=5, distance=40, batch=7)
    tokens, targets = task.draw(torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (7, task.length - 1)
    first = task.length - 2 * task.pairs
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(told) == 5 and all(16 <= value < 32 for value in told.values())
        assert all(32 <= token < 48 for token in row[10:50])
        asked = [at for at, target in enumerate(wanted) if target != recall.IGNORED]
        assert asked == list(range(first, task.length, 2))
        assert {row[at]: wanted[at] for at in asked} == told
        # the answer stands behind its question, for the loss of the next ones
        assert [row[at + 1] for at in asked[:-1]] == [wanted[at] for at in asked[:-1]]


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
    # choosing among the values that were told gives three quarters
    assert recall.accuracy(contestant.model, SMALL) > 0.95


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "result.json"
    command = ["bench", "recall", "--budget", "2steps", "--distance", "8", "--batch", "2"]
    assert cli.main([*command, "--save", str(saved)]) == 0
    assert "recall of 8 pairs over 8 tokens, 2 steps" in capsys.readouterr().out
    result = json.loads(saved.read_text())
    assert result["models"].keys() == {"transformer", "gru"}
    for row in result["models"].values():
        assert row["steps"] == 2 and 0 <= row["accuracy"] <= 1
