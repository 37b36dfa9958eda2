"""What a plan says against what training then needs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlm.lm import cli, data, errors, plan
from fastlm.lm.errors import UsageError
from fastlm.lm.kinds import KINDS
from fastlm.lm.options import build_parser
from fastlm.lm.recipe import Recipe

RATE = 100e9
TENSORS, PEAK = 0.1, 0.25  # how far a plan may be off
# glibc then gives back what is freed, so that the process holds its tensors and no more
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
SIZES = [
    {"model": "gru", "hidden": 640, "layers": 2},
    {"model": "transformer", "hidden": 256, "layers": 4, "batch": 32, "accumulate": 2},
]

STEPS = """
import sys, json, torch
from fastlm.lm import gradients, machine
from fastlm.lm.recipe import Recipe
from fastlm.lm.kinds import KINDS
from fastlm.lm.optimizer import make_optimizer
recipe, vocab = Recipe.of({}, json.loads(sys.argv[1])), int(sys.argv[2])
tokens = torch.randint(0, vocab - 1, (recipe.batch, recipe.seq))

def train(recipe, steps):
    model = KINDS[recipe.model][0](**recipe.model_arguments(vocab))
    optimizer, state = make_optimizer(model, 1e-3, 0.1), None
    for _ in range(steps):
        _, state = gradients.backward(model, tokens, tokens, state, recipe.train_config())
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in model.parameters())

# threads, code and buffers that stay are the process's; a small model brings them
train(Recipe.of({}, {**json.loads(sys.argv[1]), "hidden": 32}), 1)
before = machine.resident_memory()
machine.forget_peak()
count = train(recipe, 2)
print(json.dumps([before, machine.peak_memory(), count]))
"""


@pytest.mark.parametrize("settings, exact", [(SIZES[0], False), (SIZES[1], True)])
def test_planned_memory_is_what_training_takes(settings: dict[str, Any], exact: bool) -> None:
    vocab = 2048
    command = [sys.executable, "-c", STEPS, json.dumps(settings), str(vocab)]
    environment = {**os.environ, **(EXACT if exact else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, peak, count = json.loads(done.stdout)
    made = plan.estimate(Recipe.of({}, settings), vocab, 1 << 20, rate=RATE, process=before)
    assert made.parameters == count
    if exact:
        assert made.memory.tensors == pytest.approx(peak - before, rel=TENSORS)
    else:
        assert made.memory.peak - before == pytest.approx(peak - before, rel=PEAK)


@pytest.mark.parametrize("kind", ["gru", "transformer"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_without_memory(kind: str, tied: bool) -> None:
    recipe = Recipe.of({}, {"model": kind, "hidden": 48, "layers": 2, "tied": tied, "heads": 4})
    made = plan.estimate(recipe, 331, 10_000, rate=RATE)
    model = KINDS[kind][0](**recipe.model_arguments(331))
    assert made.parameters == sum(p.numel() for p in model.parameters())
    assert made.memory.weights == 4 * made.parameters
    assert made.memory.optimizer == 8 * made.parameters
    assert all(p.device.type == "meta" for p in plan.blank(recipe, 331).parameters())


def test_time_and_budget() -> None:
    recipe = Recipe(hidden=64)
    made = {
        budget: plan.estimate(Recipe(hidden=64, budget=budget), 500, 20480, rate=RATE)
        for budget in ("100steps", "2epochs", "10s", "20s")
    }
    flops = KINDS["gru"][0](**recipe.model_arguments(500)).config.flops_per_token()
    speed = made["10s"].tokens_per_second
    assert speed == pytest.approx(RATE * plan.REACHED["gru"]["float32"][64] / flops)
    between = plan.speed(Recipe(hidden=96), flops, RATE) * flops / RATE
    assert 0.36 < between < 0.51 and plan.speed(Recipe(hidden=8), flops, RATE) == speed
    assert made["100steps"].flops_per_step == flops * 2048
    assert made["100steps"].steps == 100 and made["2epochs"].steps == 20
    assert made["100steps"].seconds == pytest.approx(100 * 2048 / speed)
    assert made["2epochs"].epochs == pytest.approx(2.0)
    assert made["20s"].seconds == 20 and made["20s"].steps >= 2 * made["10s"].steps > 0


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_less_for_the_backward_is_planned_as_less(kind: str) -> None:
    def planned(**changes: Any) -> int:
        settings = {"model": kind, "hidden": 256, "layers": 4, "batch": 32, **changes}
        return plan.estimate(Recipe.of({}, settings), 2048, 1 << 20, rate=RATE).memory.activations

    assert planned(accumulate=4) < planned(accumulate=2) < planned() < planned(dropout=0.1)
    assert planned() < planned(seq=512) and planned() < planned(layers=6)
    if kind == "transformer":
        assert planned(recompute=True) < planned() / 2 and planned(precision="bf16") < planned()


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_choice_grows_with_memory_and_budget(kind: str) -> None:
    def chosen(budget: str, limit: str, tokens: int = 10**9) -> plan.Plan:
        recipe = Recipe.of({}, {"model": kind, "budget": budget})
        return plan.choose(recipe, 2048, tokens, limit=plan.bytes_of(limit), rate=RATE)

    large, short, small = chosen("48h", "8GiB"), chosen("1m", "8GiB"), chosen("48h", "128MiB")
    assert short.parameters < large.parameters and small.parameters < large.parameters
    assert small.memory.peak <= 128 << 20 and large.memory.peak <= 8 << 30
    # a text that would be read too often gets a smaller model
    assert chosen("48h", "8GiB", 10**6).parameters < large.parameters
    with pytest.raises(UsageError, match="1 MiB is too little: the smallest model needs"):
        chosen("1m", "1MiB")


@pytest.mark.parametrize(
    "text, value", [("8GiB", 8 << 30), ("1.5G", 3 << 29), ("500 MB", 500 << 20), ("4096", 4096)]
)
def test_sizes_of_memory(text: str, value: int) -> None:
    assert plan.bytes_of(text) == value


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text(data.load().documents[0].text[5000:25000])
    command = ["plan", "--data", str(tmp_path / "book.txt"), "--tokenizer", "bytes"]
    command += ["--batch", "8", "--seq", "32", "--budget", "2h"]
    assert cli.main([*command, "--memory", "4GiB"]) == errors.OK
    shown = capsys.readouterr().out
    assert "memory: " in shown and "the largest that fits into 4GiB and 2h" in shown
    words = shlex.split(shown.splitlines()[-1])
    made = build_parser().parse_args(words[1:])  # the command that it prints parses
    assert made.budget == "2h" and made.hidden >= 64 and made.batch == 8

    assert cli.main([*command, "--hidden", "32", "--measure", "--json"]) == errors.OK
    report = json.loads(capsys.readouterr().out)
    assert report["measured"]["tokens_per_second"] > 0
    # small, so that most of it is the process: within a quarter all the same
    measured = report["measured"]["peak_memory"]
    assert report["memory"]["peak"] == pytest.approx(measured, rel=PEAK)
    assert report["settings"]["hidden"] == 32

    tight = ["--hidden", "1024", "--memory", "300MiB"]
    assert cli.main([*command, *tight]) == errors.CRITERION_FAILED
    assert "without --hidden a size is chosen" in capsys.readouterr().err
    assert cli.main([*command, "--memory", "much"]) == errors.USAGE
    assert "memory must be like 8GiB" in capsys.readouterr().err
