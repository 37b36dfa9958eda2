"""Training: schedule, exact resume, interruption, and steps that are not finite."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.lm import checkpoint, compare, config, data, machine, preparation, trainer
from fastlm.lm.budget import Budget, learning_rate
from fastlm.lm.diagnosis import verdict
from fastlm.lm.errors import OutOfSpace, TrainingError, UsageError
from fastlm.lm.evaluation import evaluate
from fastlm.lm.model import GRULM, PlainGRULM
from fastlm.lm.optimizer import make_optimizer
from fastlm.lm.pairs import IGNORED
from fastlm.lm.progress import Reporter
from fastlm.lm.recipe import Recipe
from fastlm.lm.transformer import PlainTransformerLM, TransformerLM

SMALL = config.TrainConfig(budget="12steps", batch=4, seq=16, evals=3, eval_tokens=500, lr=1e-2)
MODELS = [GRULM, PlainGRULM]
TRANSFORMERS = [TransformerLM, PlainTransformerLM]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> preparation.Prepared:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(data.load().documents[0].text[5000:30000])
    choice = preparation.DataConfig((str(folder),), tokenizer="bytes")
    return preparation.prepare(choice, folder / "cache")


def make(
    prepared: preparation.Prepared,
    settings: config.TrainConfig = SMALL,
    *,
    kind: Any = PlainGRULM,
    stop_at: int = 0,
    **options: Any,
) -> trainer.Trainer:
    """A small model with dropout; `stop_at` sends this process the signal of Ctrl-C."""

    def on_step(step: int) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(3)
    size: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "dropout": 0.3}
    if kind in TRANSFORMERS:
        end = prepared.tokenizer.end
        size |= {"num_heads": 2, "context": settings.seq, "z_loss": 1e-3, "end": end}
    model = kind(prepared.tokens.vocab_size, **size)
    return trainer.Trainer(
        model, prepared.tokens, prepared.tokenizer, settings, on_step=on_step, **options
    )


class Lines(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


def parameters(run: trainer.Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


# ---- exact resume -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, stop_at",
    [*((kind, stop_at) for kind in MODELS for stop_at in (1, 5, 11)), (TransformerLM, 5)],
)
def test_resume_is_bitwise(
    prepared: preparation.Prepared, tmp_path: Path, kind: Any, stop_at: int
) -> None:
    # 6 rows of 41 steps would be one epoch; short ones, so that the cursor wraps
    settings = replace(SMALL, batch=64, seq=40)
    whole = make(prepared, settings, kind=kind)
    assert whole.lanes.steps_per_epoch < 12
    assert whole.fit().stopped == "budget"

    part = make(prepared, settings, kind=kind, stop_at=stop_at, out=tmp_path)
    result = part.fit()
    assert (result.stopped, result.steps) == ("interrupted", stop_at)
    torch.rand(7)  # whoever resumes has another random state
    machine.gemm_rate.cache_clear()  # and measures the machine again, being another process
    rest = make(prepared, settings, kind=kind, out=tmp_path)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    rest.resume(saved)
    assert rest.fit().steps == 12
    for a, b in zip(parameters(whole), parameters(rest), strict=True):
        assert torch.equal(a, b)
    assert whole.scores == rest.scores
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 13))


def test_resume_keeps_what_early_stopping_knows(
    prepared: preparation.Prepared, tmp_path: Path
) -> None:
    settings = replace(SMALL, patience=1, lr=0.5, clip=0.0, evals=12, budget="24steps")
    whole = make(prepared, settings)
    first = whole.fit()
    assert first.stopped == "patience" and first.score is not None
    part = make(prepared, settings, stop_at=3, out=tmp_path)
    part.fit()
    rest = make(prepared, settings, out=tmp_path)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    rest.resume(saved)
    second = rest.fit()
    assert second.stopped == "patience" and second.score == first.score
    # the model that is left is the best one
    assert first.score.bits_per_byte == pytest.approx(whole.counters.best, rel=0.05)


def test_changed_configuration_is_refused_with_the_difference(
    prepared: preparation.Prepared, tmp_path: Path
) -> None:
    make(prepared, stop_at=2, out=tmp_path).fit()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    other = make(prepared, replace(SMALL, lr=0.5, budget="20steps"), out=tmp_path)
    with pytest.raises(UsageError, match="train.budget: 12steps -> 20steps; train.lr"):
        other.resume(saved)
    with pytest.raises(UsageError, match=r"configuration: train.lr"):
        other.resume(saved, allow=("budget",))
    other.resume(saved, allow=("budget", "lr"))
    assert other.fit().steps == 20


@pytest.mark.parametrize(
    "kind, change",
    [
        (PlainGRULM, {"batch": 2}),
        (PlainGRULM, {"seq": 40}),
        (PlainGRULM, {"seed": 5}),
        (TransformerLM, {"batch": 64}),
    ],
)
def test_other_rows_than_the_checkpoints_begin_an_epoch(
    prepared: preparation.Prepared, tmp_path: Path, kind: Any, change: dict[str, Any]
) -> None:
    """Neither the cursor nor the carried state mean anything there."""
    settings = replace(SMALL, batch=32, seq=20, budget="40steps", evals=1)
    part = make(prepared, settings, kind=kind, stop_at=30, out=tmp_path)
    part.fit()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.state["cursor"] == {"epoch": 0, "step": 30}
    rest = make(prepared, replace(settings, **change), kind=kind, out=tmp_path)
    rest.resume(saved, allow=tuple(change))
    seen: list[torch.Tensor] = []
    lanes, real = rest.lanes, rest.lanes.next

    def read() -> Any:
        seen.append(real()[0])
        return lanes.at(lanes.epoch, lanes.step - 1)

    rest.lanes.next = read  # type: ignore[method-assign]
    assert rest.fit().steps == 40
    places = divmod(9, lanes.steps_per_epoch)
    assert lanes.state() == {"epoch": 1 + places[0], "step": 1 + places[1]}
    assert torch.equal(seen[0], lanes.at(1, 0)[0])


def test_a_finished_run_that_goes_on_changes_nothing(
    prepared: preparation.Prepared, tmp_path: Path
) -> None:
    """As after a death between the last save and the end."""
    for name, settings in {
        "budget": SMALL,
        "patience": replace(SMALL, patience=1, lr=0.5, clip=0.0, evals=12, budget="24steps"),
    }.items():
        first = make(prepared, settings, out=tmp_path / name)
        result = first.fit()
        assert result.stopped == name
        again = make(prepared, settings, out=tmp_path / name)
        saved = checkpoint.newest(tmp_path / name)
        assert saved is not None
        again.resume(saved)
        assert replace(again.fit(), seconds=result.seconds) == result
        assert again.scores == first.scores
        for a, b in zip(parameters(first), parameters(again), strict=True):
            assert torch.equal(a, b)


def test_resuming_costs_less_than_two_seconds(
    prepared: preparation.Prepared, tmp_path: Path
) -> None:
    """Verify, load and restore a model of the default size with its training state."""
    big = replace(SMALL, budget="1steps", evals=1)
    kind = lambda vocab, **_: GRULM(2048, 256)  # noqa: E731
    make(prepared, big, kind=kind, out=tmp_path).fit()
    again = make(prepared, big, kind=kind, out=tmp_path)
    started = time.perf_counter()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    again.resume(saved)
    assert time.perf_counter() - started < 2.0


# ---- interruption -------------------------------------------------------------------------------


def test_second_signal_stops_at_once(prepared: preparation.Prepared, tmp_path: Path) -> None:
    run = make(prepared, out=tmp_path, save_every=0.0)

    def twice(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    run.on_step = twice
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert signal.getsignal(signal.SIGINT) is before
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.state["counters"]["steps"] == 2


def test_a_full_disk_stops_or_is_said(
    prepared: preparation.Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, full = checkpoint.write, True

    def write(path: Path, *args: Any) -> None:
        if full and path.parent.name == "checkpoints" and path.name != checkpoint.name(2):
            raise OutOfSpace(f"{path}: disk full")
        real(path, *args)

    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(OutOfSpace, match="step-00000001"):
        make(prepared, out=tmp_path, save_every=0.0).fit()
    run = make(prepared, out=tmp_path, save_every=0.0, on_save_error="warn")
    with pytest.raises(OutOfSpace, match="step-00000012"):  # but the last one must be saved
        run.fit()
    assert capsys.readouterr().err.count("warning: not saved: ") == 11
    saved, full = checkpoint.newest(tmp_path), False
    assert saved is not None and saved.state["counters"]["steps"] == 2
    again = make(prepared, out=tmp_path)
    again.resume(saved)
    assert again.fit().steps == 12
    for a, b in zip(parameters(run), parameters(again), strict=True):
        assert torch.equal(a, b)


def test_old_checkpoints_are_pruned(prepared: preparation.Prepared, tmp_path: Path) -> None:
    make(prepared, out=tmp_path, save_every=0.0).fit()
    names = [path.name for path in checkpoint.all_in(tmp_path)]
    assert names == ["step-00000012", "step-00000011"]


# ---- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_bad_step_is_skipped(
    prepared: preparation.Prepared, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(prepared, out=tmp_path)
    real, calls = run.model.loss, 0

    def loss(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        value, state = real(*args)
        if calls == 2:
            if where == "loss":
                return value * math.nan, state * math.nan
            value.register_hook(lambda g: g * math.inf)
        return value, state

    monkeypatch.setattr(run.model, "loss", loss)
    run.step()
    kept, hidden = parameters(run), run.hidden
    run.step()
    assert run.counters.skipped == 1 and run.hidden is hidden
    assert all(torch.equal(a, b) for a, b in zip(kept, parameters(run), strict=True))
    assert all(p.grad is None for p in run.model.parameters())
    run.step()
    assert math.isfinite(run.counters.loss_ema)
    assert not any(torch.equal(a, b) for a, b in zip(kept, parameters(run), strict=True))


def test_three_bad_steps_in_a_row_end_training(
    prepared: preparation.Prepared, tmp_path: Path
) -> None:
    run = make(prepared, out=tmp_path)
    with torch.no_grad():
        run.model.head.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row"):
        run.fit()
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [e["event"] for e in events].count("skipped") == 3
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("kind, parts", [(PlainGRULM, 1), (GRULM, 2), (TransformerLM, 1)])
def test_a_batch_without_targets_has_loss_zero(
    prepared: preparation.Prepared, kind: Any, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Lines()
    run = make(prepared, replace(SMALL, accumulate=parts), kind=kind, reporter=said)
    other = make(prepared, replace(SMALL, accumulate=parts), kind=kind, on_empty="nan")
    for each in (run, other):
        tokens, targets, _ = each.lanes.next()
        empty = tokens, torch.full_like(targets, IGNORED), False
        monkeypatch.setattr(each.lanes, "next", lambda empty=empty: empty)
    kept, real, seen = parameters(run), run.optimizer.step, []

    def step() -> None:
        seen.extend(p.grad for p in run.model.parameters())
        real()

    monkeypatch.setattr(run.optimizer, "step", step)
    assert run.step() == 0.0 and run.counters.loss_ema == 0.0 and run.counters.skipped == 0
    assert len(seen) == len(kept) and not any(bool(gradient.any()) for gradient in seen)
    assert said.lines == ["step 1: 0 valid tokens, its loss is 0"]
    assert math.isnan(other.step()) and other.counters.skipped == 1
    with pytest.raises(UsageError, match="on_empty must be zero or nan, got 'none'"):
        make(prepared, on_empty="none")


@pytest.mark.parametrize("kind", [GRULM, TransformerLM])
def test_fit_is_the_trainers(prepared: preparation.Prepared, kind: Any) -> None:
    settings = replace(SMALL, budget="2steps")
    run = make(prepared, settings, kind=kind)
    twin = make(prepared, settings, kind=kind).model
    options = {"budget": "2steps", "batch": 4, "evals": 3, "eval_tokens": 500, "lr": 1e-2}
    if kind is GRULM:  # a Transformer's rows are as long as its context
        options["seq"] = 16
    assert twin.fit(prepared.tokens, prepared.tokenizer, **options).score == run.fit().score
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), parameters(run), strict=True))
    with pytest.raises(UsageError, match="unknown setting budgte; did you mean budget"):
        twin.fit(prepared.tokens, prepared.tokenizer, budgte="2steps")
    with pytest.raises(UsageError, match="hidden: decided by the model"):
        twin.fit(prepared.tokens, prepared.tokenizer, hidden=3)


# ---- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, amount, unit",
    [
        ("90s", 90, "seconds"),
        ("1.5m", 90, "seconds"),
        ("2h", 7200, "seconds"),
        ("500steps", 500, "steps"),
        ("1 step", 1, "steps"),
        ("2epochs", 2, "epochs"),
    ],
)
def test_budget(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize("text", ["", "90", "0s", "-1steps", "five steps", "1day"])
def test_budget_rejects(text: str) -> None:
    with pytest.raises(UsageError, match="budget must be like 90s"):
        Budget.parse(text)


def test_epochs_become_steps() -> None:
    assert Budget.parse("2epochs").resolve(33) == Budget(66, "steps")
    assert Budget.parse("0.001epochs").resolve(33) == Budget(1, "steps")


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(1.0, i / 100, 0.1, 0.05) for i in range(101)]
    assert rates[0] == 0.02 and rates[10] == 1.0 and rates[-1] == pytest.approx(0.05)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_decay_spares_vectors() -> None:
    model = PlainGRULM(33, 16)
    decayed, spared = make_optimizer(model, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_a_transformer_is_scored_with_half_a_context_before_it(
    prepared: preparation.Prepared,
) -> None:
    model = TransformerLM(prepared.tokens.vocab_size, hidden_size=16, num_layers=2, context=12)
    score = evaluate(model, prepared.tokens, prepared.tokenizer, limit=16 * 18 + 1)
    start, _ = prepared.tokens.spans("held")[0]
    ids = torch.tensor(prepared.tokens.ids[start : start + 16 * 18 + 1].astype(int))
    lanes = ids.unfold(0, 19, 18)  # read in three pieces of 6
    with torch.no_grad():
        first, last = model(lanes[:, :12])[0], model(lanes[:, 6:18])[0][:, 6:]
    logits = torch.cat([first, last], 1).transpose(1, 2)
    want = torch.nn.functional.cross_entropy(logits, lanes[:, 1:])
    assert score.tokens == 16 * 18
    assert score.nats_per_token == pytest.approx(float(want), rel=1e-5)


def test_evaluation_is_the_plain_cross_entropy(prepared: preparation.Prepared) -> None:
    model = PlainGRULM(prepared.tokens.vocab_size, 16, dropout=0.5)
    score = evaluate(model, prepared.tokens, prepared.tokenizer, limit=120)
    start, stop = prepared.tokens.spans("held")[0]
    ids = torch.tensor(prepared.tokens.ids[start : start + 120].astype(int))[None]
    logits = model.eval()(ids[:, :-1])[0]
    want = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).detach()
    assert score.nats_per_token == pytest.approx(float(want), rel=1e-5)
    assert (score.tokens, score.bytes) == (119, 119)
    assert score.bits_per_byte == pytest.approx(float(want) / math.log(2), rel=1e-5)
    model.train()
    evaluate(model, prepared.tokens, prepared.tokenizer, limit=120)
    assert model.training


@pytest.mark.parametrize(
    "held, word",
    [
        ([5.0, 4.5, 4.2, 4.0], "underfitting"),
        ([5.0, 4.0, 4.3, 4.5], "overfitting"),
        ([5.0, 4.0, 4.0, 4.0, 4.0, 4.0], "levelled off"),
        ([5.0], "too few evaluations"),
    ],
)
def test_verdict(held: list[float], word: str) -> None:
    assert verdict([4.0] * len(held), held).startswith(word)


@pytest.mark.parametrize("kinds", [MODELS, TRANSFORMERS])
def test_fused_and_plain_learn_alike(prepared: preparation.Prepared, kinds: list[Any]) -> None:
    losses = []
    for kind in kinds:
        run = make(prepared, kind=kind)
        if kind in MODELS:
            run.model.dropout.p = run.model.body.gru.dropout = 0.0
        else:
            run.model.eval()  # which is without dropout
        losses.append([run.step() for _ in range(12)])
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_side_by_side_of_each_kind(prepared: preparation.Prepared, kind: str) -> None:
    chosen = Recipe.of({}, {"model": kind, "hidden": 16, "batch": 4, "seq": 16})
    compared = compare.side_by_side(prepared.tokens, chosen, steps=3)
    assert compared.tokens_per_step == 64 and len(compared.losses) == 5
    plain, ours = (torch.tensor(side) for side in zip(*compared.losses, strict=True))
    torch.testing.assert_close(ours, plain)
    assert plain[-1] < plain[0]
