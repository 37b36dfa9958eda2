"""Options of training: gradients in parts, precision, schedules, skipped steps, the verdict."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.lm import anomaly, checkpoint, config, data, gradients, machine, preparation, trainer
from fastlm.lm.budget import SCHEDULES, learning_rate
from fastlm.lm.diagnosis import verdict
from fastlm.lm.errors import TrainingError, UsageError
from fastlm.lm.evaluation import sample
from fastlm.lm.model import GRULM, PlainGRULM
from fastlm.lm.transformer import PlainTransformerLM, TransformerLM
from fastlm.testing import FLOOR_EPS, error

SMALL = config.TrainConfig(budget="40steps", batch=4, seq=16, evals=2, eval_tokens=300, lr=1e-2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> preparation.Prepared:
    folder = tmp_path_factory.mktemp("text")
    book = data.load().documents[0].text
    (folder / "a.txt").write_text(book[5000:15000])
    (folder / "b.txt").write_text(book[15000:25000])
    choice = preparation.DataConfig((str(folder),), tokenizer="bytes")
    return preparation.prepare(choice, folder / "cache")


def make_model(prepared: preparation.Prepared, kind: Any, dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    size: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "dropout": dropout}
    if issubclass(kind, TransformerLM):
        size |= {"num_heads": 2, "context": 16, "z_loss": 1e-3, "end": prepared.tokenizer.end}
    return kind(prepared.tokens.vocab_size, **size)


def make(
    prepared: preparation.Prepared,
    settings: config.TrainConfig = SMALL,
    *,
    kind: Any = GRULM,
    dropout: float = 0.2,
    **options: Any,
) -> trainer.Trainer:
    model = make_model(prepared, kind, dropout)
    return trainer.Trainer(model, prepared.tokens, prepared.tokenizer, settings, **options)


# ---- resume with every option -------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, changes",
    [
        (GRULM, {"accumulate": 2, "label_smoothing": 0.1, "precision": "bf16", "schedule": "wsd"}),
        (TransformerLM, {"accumulate": 4, "precision": "bf16", "schedule": "linear"}),
    ],
)
def test_forty_steps_are_17_and_23(
    prepared: preparation.Prepared, tmp_path: Path, kind: Any, changes: dict[str, Any]
) -> None:
    settings = replace(SMALL, **changes)
    whole = make(prepared, settings, kind=kind)
    result = whole.fit()
    assert (result.stopped, result.steps) == ("budget", 40)

    part = make(prepared, settings, kind=kind, out=tmp_path)
    part.on("step", lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 17 else None)
    assert part.fit().steps == 17
    torch.rand(7)
    machine.gemm_rate.cache_clear()
    rest = make(prepared, settings, kind=kind, out=tmp_path)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    rest.resume(saved)
    assert rest.fit().steps == 40
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    assert whole.scores == rest.scores and whole.train_curve == rest.train_curve
    # and it learns
    assert whole.scores[-1].bits_per_byte < whole.scores[0].bits_per_byte < 8


def test_a_checkpoint_from_before_an_option_resumes(
    prepared: preparation.Prepared, tmp_path: Path
) -> None:
    make(prepared, replace(SMALL, budget="2steps"), out=tmp_path).fit()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    for name in ("label_smoothing", "accumulate", "precision", "schedule", "decay"):
        del saved.state["config"]["train"][name]
    del saved.state["train_curve"]
    make(prepared, replace(SMALL, budget="2steps"), out=tmp_path).resume(saved)
    del saved.state["config"]["train"]["accumulate"]
    other = make(prepared, replace(SMALL, budget="2steps", accumulate=2), out=tmp_path)
    with pytest.raises(UsageError, match="train.accumulate: 1 -> 2"):
        other.resume(saved)


# ---- accumulation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GRULM, PlainGRULM, TransformerLM])
def test_parts_give_the_gradient_of_the_batch(prepared: preparation.Prepared, kind: Any) -> None:
    """Against float64 as near as the whole batch is, with a state that goes in and comes out, and
    with ignored targets that are not spread evenly."""
    lanes = make(prepared, kind=kind).lanes
    batches = [lanes.next()[:2] for _ in range(2)]
    batches[1][1][0, :13] = gradients.IGNORED
    batches[1][1][3] = gradients.IGNORED  # the last part has none left
    exact = PlainTransformerLM if kind is TransformerLM else kind
    ways = [(exact, torch.float64, 1), (kind, torch.float32, 1), (kind, torch.float32, 4)]
    found = []
    for made, dtype, parts in ways:
        model = make_model(prepared, made).to(dtype)
        settings, state, out = replace(SMALL, accumulate=parts), None, []
        for tokens, targets in batches:
            loss, state = gradients.backward(model, tokens, targets, state, settings)
            out += [loss, *([] if state is None else [state])]
        found.append([value.double() for value in (*out, *(p.grad for p in model.parameters()))])
    for truth, whole, parted in zip(*found, strict=True):
        floor = FLOOR_EPS * torch.finfo(torch.float32).eps * float(truth.abs().max())
        assert error(parted, truth) <= 2 * error(whole, truth) + floor
    assert any(not torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


def test_parts_must_divide_the_batch() -> None:
    with pytest.raises(UsageError, match=r"batch must be a multiple of accumulate \(3\), got 4"):
        replace(SMALL, accumulate=3)


# ---- smoothing, precision, schedules ------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(GRULM, PlainGRULM), (TransformerLM, PlainTransformerLM)])
def test_label_smoothing_is_pytorchs(
    prepared: preparation.Prepared, kinds: tuple[Any, Any]
) -> None:
    tokens, targets, _ = make(prepared).lanes.next()
    losses = [
        make_model(prepared, kind).loss(tokens, targets, label_smoothing=0.3)[0] for kind in kinds
    ]
    plain = make_model(prepared, kinds[1])
    logits = plain(tokens)[0].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, targets.flatten(), label_smoothing=0.3)
    if kinds[1] is PlainTransformerLM:
        want = want + 1e-3 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(losses[0], want)
    torch.testing.assert_close(losses[1], want)


def test_bf16_rounds_products_and_nothing_else(prepared: preparation.Prepared) -> None:
    tokens, targets, _ = make(prepared).lanes.next()
    found = {}
    for precision in config.PRECISIONS:
        model = make_model(prepared, GRULM)
        settings = replace(SMALL, precision=precision)
        loss, state = gradients.backward(model, tokens, targets, None, settings)
        assert state is not None and loss.dtype == state.dtype == torch.float32
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        found[precision] = model.head.weight.grad
    apart = (found["bf16"] - found["float32"]).norm() / found["float32"].norm()
    assert 1e-5 < float(apart) < 2e-2


def test_slow_bf16_is_said(prepared: preparation.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(gradients.extension, "cpu_isa", lambda: "avx2")
    note = gradients.slow_precision(cpu, "bf16")
    assert note is not None and "no time" in note
    assert gradients.slow_precision(cpu, "float32") is None
    assert gradients.slow_precision(torch.device("cuda"), "bf16") is None
    monkeypatch.setattr(gradients.extension, "cpu_isa", lambda: "avx512_bf16")
    assert gradients.slow_precision(cpu, "bf16") is None


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    rates = [learning_rate(1.0, i / 100, 0.1, 0.05, name, decay=0.3) for i in range(101)]
    assert rates[0] == 0.02 and rates[10] == 1.0 and rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == (1.0 if name == "constant" else pytest.approx(0.05))
    middle = {"cosine": 0.525, "linear": 0.525, "constant": 1.0, "wsd": 1.0}[name]
    assert rates[55] == pytest.approx(middle)
    if name == "wsd":
        assert rates[70] == 1.0 and rates[85] == pytest.approx(0.525)


def test_a_decay_longer_than_what_follows_the_warm_up_begins_at_the_peak() -> None:
    rates = [learning_rate(1.0, i / 1000, 0.5, 0.0, "wsd", decay=1.0) for i in range(1001)]
    assert rates[500] == 1.0 and rates[750] == pytest.approx(0.5) and rates[1000] == 0.0
    steps = [abs(b - a) for a, b in zip(rates, rates[1:], strict=False)]
    assert max(steps[11:]) == pytest.approx(0.002)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"precision": "fp8"}, "precision must be one of float32, bf16, got 'fp8'"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant, wsd"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0.0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        replace(SMALL, **changes)


# ---- what was not finite ------------------------------------------------------------------------


NAMES = [f"{kind} in the output of layers.1.ffn_norm (RMSNorm)" for kind in ("NaN", "Inf")]


def test_skipped_step_is_written_down(prepared: preparation.Prepared, tmp_path: Path) -> None:
    run = make(prepared, kind=TransformerLM, out=tmp_path)
    seen: list[dict[str, Any]] = []
    run.on("skipped", seen.append)
    run.step()
    layer = run.model.layers[1].ffn_norm
    handle = layer.register_forward_hook(lambda module, inputs, output: output * math.inf)
    before = torch.get_rng_state()
    run.step()
    handle.remove()
    (record,) = seen
    assert record["reason"] == "loss not finite"
    assert record["where"] in NAMES
    dumped = json.loads(Path(record["batch"]).read_text())
    assert Path(record["batch"]).name == "step-00000001.json"
    tokens, targets, _ = run.lanes.at(0, 1)
    assert dumped["tokens"] == tokens.tolist() and dumped["targets"] == targets.tolist()
    # the places are where the rows stand in the text
    for row, place in zip(dumped["tokens"], dumped["rows"], strict=True):
        entry = next(e for e in prepared.tokens.documents if e.name == place["document"])
        at = entry.start + place["token"]
        assert prepared.tokens.ids[at : at + 16].tolist() == row
        assert place["byte"] == place["token"]  # a token of this tokenizer is a byte
    # looking again drew no random number: the masks of the skipped forward alone
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    gradients.forward(run.model.loss, tokens, targets, None, run.config)
    assert torch.equal(torch.get_rng_state(), after)


def test_the_first_of_three_is_named(prepared: preparation.Prepared) -> None:
    run = make(prepared)
    with torch.no_grad():
        run.model.body.gru.weight_hh_l0[3, 5] = math.inf
    with pytest.raises(TrainingError, match="parameter body.gru.weight_hh_l0 holds Inf; lower"):
        run.fit()
    assert run.counters.skipped == 3


def test_bad_gradients_are_named_from_the_loss_back(prepared: preparation.Prepared) -> None:
    model = make_model(prepared, PlainGRULM)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.head.bias.grad[1] = math.nan
    model.body.embedding.weight.grad[0, 0] = math.inf
    found = anomaly.where(model, lambda: torch.zeros(()))
    assert found == "the gradient of head.bias, body.embedding.weight"
    assert "loss" in anomaly.where(model, lambda: torch.tensor(math.nan))


# ---- what the curves say ------------------------------------------------------------------------


def falls(start: float, end: float, n: int = 10) -> list[float]:
    return [start + (end - start) * i / (n - 1) for i in range(n)]


@pytest.mark.parametrize(
    "train, held, now, word",
    [
        (falls(6, 4.4), falls(6, 4.7), None, "underfitting"),
        (falls(6, 2.0), [*falls(6, 4.5, 5), *falls(4.55, 5.2, 5)], None, "overfitting"),
        (falls(6, 3.0), [*falls(6, 4.5, 5), *[4.5] * 5], None, "overfitting"),
        ([*falls(6, 4.4, 5), *[4.4] * 5], [*falls(6, 4.5, 5), *[4.5] * 5], None, "levelled off"),
        # with dropout the training loss stands above the held-out one; measured alike it does not
        ([*falls(6, 4.8, 5), *[4.8] * 5], [*falls(6, 4.5, 5), *[4.5] * 5], 3.2, "levelled off"),
        ([*falls(6, 4.4, 5), *falls(5, 9, 5)], [*falls(6, 4.5, 5), *falls(5, 9, 5)], None, "div"),
        (falls(6, 12), falls(6, 12), None, "diverged"),
        ([6, 5, math.nan], [6, 5, math.nan], None, "diverged"),
        ([6, 5, 4], [6, 5, 4], None, "too few"),
        # noise of half a percent is no verdict
        ([*falls(6, 4.4, 5), *[4.42, 4.39] * 3], [*falls(6, 4.5, 5), *[4.48, 4.5] * 3], None, "le"),
    ],
)  # fmt: skip
def test_verdict(train: list[float], held: list[float], now: float | None, word: str) -> None:
    told = verdict(train, held, now)
    assert told.startswith(word) and "nats/token" in told
    if now == 3.2:
        assert "train 3.20, held-out 4.50" in told and "far apart" in told


def test_training_text_is_scored_as_held_out_text_is(prepared: preparation.Prepared) -> None:
    run = make(prepared, replace(SMALL, label_smoothing=0.5, budget="4steps"), dropout=0.5)
    events: list[tuple[str, dict[str, Any]]] = []

    class Memory:
        def record(self, event: str, step: int, values: dict[str, Any]) -> None:
            events.append((event, values))

        def close(self) -> None:
            events.append(("closed", {}))

    run.sinks.append(Memory())
    result = run.fit()
    (measured,) = [values for event, values in events if event == "train"]
    assert events[-1][0] == "closed"
    assert measured["nats_per_token"] < run.counters.loss_ema
    assert f"train {measured['nats_per_token']:.2f}," in result.verdict


def test_sample_spreads_over_the_split(prepared: preparation.Prepared) -> None:
    class Counting(GRULM):
        def loss(self, tokens: Any, *rest: Any, **options: Any) -> Any:
            seen.append(tokens)
            return super().loss(tokens, *rest, **options)

    seen: list[torch.Tensor] = []
    model = make_model(prepared, Counting)
    score = sample(model, prepared.tokens, prepared.tokenizer, split="train", limit=2048)
    assert 1900 < score.tokens <= 2048
    text = bytes(prepared.tokens.first("train").astype("uint8").tobytes())
    at = sorted(text.index(bytes(row[:40].tolist())) for row in seen[0])
    assert max(b - a for a, b in zip(at, at[1:], strict=False)) < len(text) / 8


# ---- callbacks ----------------------------------------------------------------------------------


def test_callbacks(prepared: preparation.Prepared, tmp_path: Path) -> None:
    run = make(prepared, replace(SMALL, budget="3steps"), out=str(tmp_path))
    seen: list[Any] = []
    for event in ("step", "eval", "save"):
        run.on(event, seen.append)
    run.fit()
    assert seen[:2] == [1, 2] and seen[2] == run.scores[0] and seen[3] == 3
    assert seen[-1] == tmp_path / "checkpoints" / "step-00000003"
    with pytest.raises(UsageError, match="event must be one of step, eval, save, skipped, got 'x'"):
        run.on("x", print)
