"""Learning from preferences: known optima, the gradient of plain PyTorch, resuming, the command."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import testing
from fastlm.lm import checkpoint, cli, data, dpo, errors, objectives, pairs, preferences
from fastlm.lm.dpo import DPO, Step
from fastlm.lm.errors import InputError, TrainingError, UsageError
from fastlm.lm.model import GRULM, PlainGRULM
from fastlm.lm.objectives import DPOConfig, Encoded
from fastlm.lm.preferences import Preference
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.transformer import PlainTransformerLM, TransformerLM

TOKENIZER = ByteTokenizer()
SIZES: dict[Any, dict[str, Any]] = {
    GRULM: {"hidden_size": 16},
    TransformerLM: {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 32, "end": 256},
}


def make(kind: Any = GRULM, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(TOKENIZER.vocab_size, **SIZES[kind], **more)


def preference(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(prompt, chosen, rejected, "synthetic:test")


def some(count: int) -> list[Preference]:
    """Digits are preferred to letters, of unequal lengths."""
    return [preference(f"p{i}:", str(i) * (1 + i % 5), "ab" * (1 + i % 3)) for i in range(count)]


# ---- tokens and log-probs ------------------------------------------------------------------------


def test_both_texts_stand_behind_the_same_tokens() -> None:
    found = Encoded([preference("0123456789", "ab", "cdef")], TOKENIZER, 8, "auto")
    ((prompt, chosen, rejected),) = found.rows
    assert bytes(prompt.tolist()) == b"789" and found.lengths.tolist() == [8]
    assert chosen.tolist() == [*b"ab", 256] and rejected.tolist() == [*b"cdef", 256]
    tokens, targets = found.batch([0])
    assert tokens[0, :5].tolist() == [*b"789ab"] and targets[0, :2].tolist() == [-100, -100]
    assert targets[0, 2:5].tolist() == [*b"ab", 256] and set(targets[0, 5:].tolist()) == {-100}
    # what is cut anywhere has no end that could be learned
    cut = Encoded([Preference("", "ab", "c", "human-over-model")], TOKENIZER, 8, "auto")
    assert [row.tolist() for row in cut.rows[0]] == [[256], [*b"ab"], [*b"c"]]
    assert Encoded([preference("p", "ab", "c")], TOKENIZER, 8, "no").rows[0][1].tolist() == [*b"ab"]
    with pytest.raises(InputError, match="without a token"):
        Encoded([preference("p", "ab", "")], TOKENIZER, 8, "no")


def plain_loss(loss: str, chosen: Tensor, rejected: Tensor, ref: list[Tensor]) -> Tensor:
    beta = objectives.BETAS[loss]
    apart = (chosen - ref[0]) - (rejected - ref[1])
    if loss == "dpo":
        return -F.logsigmoid(beta * apart).mean()
    if loss == "hinge":
        return (1 - beta * apart).clamp(min=0).mean()
    if loss == "ipo":
        return (apart - 1 / (2 * beta)).square().mean()
    if loss == "simpo":
        return -F.logsigmoid(beta * (chosen - rejected) - 0.5).mean()
    if loss == "cpo":
        return (-F.logsigmoid(beta * (chosen - rejected)) - chosen).mean()
    odds = [value - torch.log1p(-value.exp()) for value in (chosen, rejected)]
    return (-chosen - beta * F.logsigmoid(odds[0] - odds[1])).mean()


class Loss(torch.nn.Module):
    """What a step makes small, with the parameters of a model."""

    def __init__(self, model: Any, loss: str) -> None:
        super().__init__()
        self.model, self.config = model.eval(), DPOConfig(loss=loss)

    def forward(self, tokens: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        sums, counts = objectives.sequence_logprobs(self.model, tokens, targets)
        return objectives.objective(self.config, sums, counts, reference)[0]


class PlainLoss(Loss):
    def forward(self, tokens: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        kept, loss = targets != pairs.IGNORED, self.config.loss
        logprobs = self.model(tokens)[0].log_softmax(-1)
        picked = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * kept
        scale = kept.sum(1) if loss in ("ipo", "simpo", "orpo") else 1
        ref = list((reference / scale).chunk(2))
        return plain_loss(loss, *(picked.sum(1) / scale).chunk(2), ref)


@pytest.mark.parametrize("loss", objectives.BETAS)
@pytest.mark.parametrize("kind, plain", [(GRULM, PlainGRULM), (TransformerLM, PlainTransformerLM)])
def test_gradients_are_those_of_plain_pytorch(loss: str, kind: Any, plain: Any) -> None:
    ours, other = (
        Loss(make(kind), loss),
        PlainLoss(plain(TOKENIZER.vocab_size, **SIZES[kind]), loss),
    )
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in other.named_parameters()]
    batch = Encoded(some(5), TOKENIZER, 32, "auto").batch(range(5))

    def call(module: Loss) -> Any:
        def run(reference: Tensor, *values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            return torch.func.functional_call(module, given, (*batch, reference.detach()))

        return run

    reference = torch.linspace(-30, -10, 10)
    testing.check(call(ours), call(other), [reference, *ours.parameters()])


# ---- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, margin",
    # of 10 people 8 prefer a to b. The minimum over m = log-ratio of a less that of b: where
    # sigmoid(beta m) = 0.8; where the mean of +-m is 1 / (2 beta)
    [("dpo", math.log(4) / 0.5), ("ipo", (0.8 - 0.2) / (2 * 0.5))],
)
def test_the_optimum_is_the_known_one(loss: str, margin: float) -> None:
    votes = [preference("q", "a", "b")] * 8 + [preference("q", "b", "a")] * 2
    config = DPOConfig(
        loss=loss, beta=0.5, budget="150steps", batch=10, lr=2e-2, end="no", evals=1, floor=0.0
    )
    model, start = make(), make()
    DPO(model, TOKENIZER, votes, config, test=votes[:1]).fit()
    logits = [m(torch.tensor([[ord("q")]]))[0][0, 0].detach() for m in (model, start)]
    gained = logits[0] - logits[1]
    assert float(gained[ord("a")] - gained[ord("b")]) == pytest.approx(margin, rel=0.01)


@pytest.mark.parametrize("loss", objectives.BETAS)
@pytest.mark.parametrize("kind", SIZES)
def test_what_is_preferred_is_learned(loss: str, kind: Any) -> None:
    steps: list[Step] = []
    config = DPOConfig(loss=loss, budget="40steps", batch=8, lr=1e-2, evals=2)
    model = make(kind)
    run = DPO(model, TOKENIZER, some(40), config, on_step=steps.append)
    result = run.fit()
    assert (result.stopped, result.steps, len(run.scores)) == ("budget", 40, 3)
    before, after = result.before, result.after
    assert before.pairs == len(run.held) > 1 and after.accuracy.value > 0.9 > before.likelier.value
    assert after.loss < before.loss and after.margin > before.margin + 0.01
    assert after.likelier.value > 0.9
    losses = [step.loss for step in steps]
    assert sum(losses[-5:]) < sum(losses[:5])
    if loss in objectives.OF_REFERENCE:
        assert before.margin == 0.0 and before.accuracy.value == 0.5
        assert steps[0].margin == pytest.approx(0.0, abs=1e-4)


def test_reference_is_of_the_start_and_dropout_is_off() -> None:
    run = DPO(make(dropout=0.5), TOKENIZER, some(20), DPOConfig(budget="5steps", batch=4, lr=0.05))
    before = run._of_start()
    result = run.fit()
    assert run.reference is not None and torch.equal(run.reference, before)
    assert not torch.equal(run._of_start(), before)
    assert (result.before.margin, result.before.accuracy.value) == (0.0, 0.5)


@pytest.mark.parametrize("kind", SIZES)
def test_a_model_in_half_precision(kind: Any) -> None:
    model = make(kind).to(torch.bfloat16)
    before = dpo.fingerprint(model)
    result = DPO(model, TOKENIZER, some(20), DPOConfig(budget="5steps", batch=8, lr=0.05)).fit()
    assert result.after.loss < result.before.loss and dpo.fingerprint(model) != before


def test_the_fingerprint_is_of_the_bytes() -> None:
    model = make()
    hasher = hashlib.sha256()
    for name, value in model.state_dict().items():
        hasher.update(name.encode() + value.numpy().tobytes())
    assert dpo.fingerprint(model) == hasher.hexdigest()


def test_nothing_held_out_is_trained_on() -> None:
    found = some(60) + [preference(p.prompt, p.chosen, "zz") for p in some(60)]
    run = DPO(make(), TOKENIZER, found, DPOConfig(batch=7), holdout=0.3)
    trained = {row for _ in range(run.order.steps_per_epoch) for row in run.order.chosen()}
    assert trained == set(range(120)) - set(run.held) and 10 < len(run.held) < 60
    prompts = [bytes(row[0].tolist()) for row in run.encoded.rows]
    assert not {prompts[i] for i in trained} & {prompts[i] for i in run.held}


@pytest.mark.parametrize("kind", SIZES)
def test_resuming_is_to_the_bit(kind: Any, tmp_path: Path) -> None:
    def run(model: Any, budget: str, stop_at: int = 0, **options: Any) -> DPO:
        def on_step(done: Step) -> None:
            if done.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        config = DPOConfig(budget=budget, batch=4, lr=1e-2, evals=3)
        return DPO(model, TOKENIZER, some(21), config, on_step=on_step, **options)

    whole, rest = make(kind), make(kind)
    first = run(whole, "40steps")
    first.fit()
    part = run(make(kind), "40steps", stop_at=17, out=tmp_path)
    assert part.fit().stopped == "interrupted" and part.steps == 17
    torch.manual_seed(99)
    second = run(rest, "40steps", out=tmp_path)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    second.resume(saved)
    assert second.fit().steps == 40 and second.scores == first.scores
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 41))
    # what started from other weights is refused
    other = run(whole, "40steps")
    with pytest.raises(UsageError, match="data.start"):
        other.resume(saved)


def test_gradient_that_is_not_finite_changes_nothing() -> None:
    model = make()
    model.head.weight.register_hook(lambda grad: grad * math.nan)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match="not finite in step 1"):
        DPO(model, TOKENIZER, some(20)).fit()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "kto"}, "loss must be one of dpo, ipo, hinge, cpo, simpo, orpo, got 'kto'"),
        ({"beta": 0.0}, "above 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "ipo has no label_smoothing"),
        ({"end": "maybe"}, "end must be one of"),
        ({"longest": 1}, "longest must be at least 2"),
        ({"budget": "soon"}, "budget must be like"),
    ],
)
def test_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DPOConfig(**options)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and preferences."""
    path = tmp_path_factory.mktemp("dpo")
    (path / "text.txt").write_text(data.load().documents[0].text[5000:25000])
    train = ["train", "--data", str(path / "text.txt"), "--tokenizer", "bytes", "--hidden", "16"]
    train += ["--budget", "3steps", "--evals", "1", "--quiet", "--out", str(path / "run")]
    assert cli.main(train) == 0
    preferences.save(path / "prefs.jsonl", some(40))
    return path


def command(folder: Path, out: Path, *more: str) -> list[str]:
    found = ["dpo", "--model", str(folder / "run"), "--preferences", str(folder / "prefs.jsonl")]
    return [*found, "--out", str(out), "--lr", "1e-2", *more]


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(command(folder, out, "--budget", "6steps", "--json")) == errors.OK
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["steps"] == 6 and found["after"]["margin"] > 0 == found["before"]["margin"]
    text = found["held_out_text"]
    assert text["before"]["bits_per_byte"] != text["after"]["bits_per_byte"]
    assert "before: loss 0.693" in captured.err and "bits/byte before" in captured.err
    assert cli.main(["generate", str(out), "--max-new-tokens", "4"]) == errors.OK
    assert cli.main(["eval", str(out), "--samples", "0", "--quiet"]) == errors.OK
    # more of it, then something else
    again = command(folder, out, "--budget", "9steps", "--quiet")
    assert cli.main(again) == errors.OK
    assert checkpoint.all_in(out)[0].name == checkpoint.name(9)
    capsys.readouterr()
    assert cli.main([*again, "--loss", "ipo"]) == errors.USAGE
    assert "dpo.loss: dpo -> ipo" in capsys.readouterr().err
    assert cli.main([*again, "--resume", "never"]) == errors.USAGE


def test_command_is_interrupted_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = DPO.step

    def step(self: DPO) -> Step:
        done = real(self)
        if done.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(DPO, "step", step)
    arguments = command(folder, tmp_path / "out", "--budget", "4steps")
    assert cli.main(arguments) == errors.INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    assert cli.main(arguments) == errors.OK
    assert "resumed from" in capsys.readouterr().out


def test_command_refuses(folder: Path, tmp_path: Path, capsys: Any) -> None:
    no_origin = tmp_path / "none.jsonl"
    no_origin.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    arguments = command(folder, tmp_path / "out")
    arguments[4] = str(no_origin)
    assert cli.main(arguments) == errors.BAD_INPUT
    assert "no provenance" in capsys.readouterr().err
    arguments[2] = str(tmp_path / "nothing")
    assert cli.main(arguments) == errors.BAD_CHECKPOINT
    assert cli.main(command(folder, tmp_path / "out", "--loss", "ppo")) == errors.USAGE
    assert not (tmp_path / "out").exists()
