"""Training on pairs and from a saved model: what is learned, exact resume, the command."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm import lm
from fastlm.lm import checkpoint, cli, config, data, errors, pairdata, pairs, starting, trainer
from fastlm.lm.evaluation import evaluate
from fastlm.lm.model import GRULM, PlainGRULM
from fastlm.lm.recipe import Recipe
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.transformer import TransformerLM

SMALL = config.TrainConfig(budget="40steps", batch=4, evals=3, eval_tokens=100, lr=1e-2)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """The answer is the first letter of the question, twice; JSON lines."""
    path = tmp_path / "questions.jsonl"
    words = [f"{chr(97 + i % 5)}{'xyz'[i % 3] * (i % 7)}{i}" for i in range(60)]
    records = [
        {"question": w, "answer": w[0] * 2, "page": f"{i % 20}"} for i, w in enumerate(words)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.fixture
def prepared(questions: str) -> pairdata.PreparedPairs:
    return pairdata.prepare_pairs(
        pairdata.PairConfig((questions,), "qa", holdout=0.2, tokenizer="bytes", longest=40)
    )


def make(
    prepared: pairdata.PreparedPairs,
    settings: config.TrainConfig = SMALL,
    *,
    kind: Any = GRULM,
    stop_at: int = 0,
    dropout: float = 0.3,
    **options: Any,
) -> trainer.Trainer:
    def on_step(step: int) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(3)
    size: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "dropout": dropout}
    if kind is TransformerLM:
        size |= {"num_heads": 2, "context": 39, "end": prepared.tokenizer.end}
    model = kind(prepared.tokens.vocab_size, **size)
    return trainer.Trainer(
        model, prepared.tokens, prepared.tokenizer, settings, on_step=on_step, **options
    )


@pytest.mark.parametrize("kind", [GRULM, TransformerLM])
def test_resume_is_bitwise(kind: Any, prepared: pairdata.PreparedPairs, tmp_path: Path) -> None:
    whole = make(prepared, kind=kind)
    assert whole.lanes.steps_per_epoch < 17  # the cursor wraps, with a smaller batch before
    assert whole.fit().stopped == "budget"
    part = make(prepared, kind=kind, stop_at=17, out=tmp_path / "run")
    result = part.fit()
    assert (result.stopped, result.steps) == ("interrupted", 17)
    torch.rand(7)
    rest = make(prepared, kind=kind, out=tmp_path / "run")
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    rest.resume(saved)
    assert rest.fit().steps == 40
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    assert whole.scores == rest.scores


@pytest.mark.parametrize("kind", [GRULM, TransformerLM])
def test_targets_are_learned(kind: Any, prepared: pairdata.PreparedPairs) -> None:
    run = make(prepared, replace(SMALL, budget="300steps"), kind=kind, dropout=0.0)
    before = evaluate(run.model, prepared.tokens, prepared.tokenizer)
    score = run.fit().score
    assert score is not None and score.tokens == 3 * len(prepared.tokens.rows("held"))
    assert score.nats_per_token < 0.5 < 4 < before.nats_per_token


def test_the_score_is_of_held_out_targets(prepared: pairdata.PreparedPairs) -> None:
    store, tokenizer = prepared.tokens, prepared.tokenizer
    model = PlainGRULM(store.vocab_size, 16, dropout=0.5).train()
    found = evaluate(model, store, tokenizer)
    assert model.training
    nats, count, size = 0.0, 0, 0
    model.eval()
    for row in store.rows("held"):  # each pair for itself
        start, middle, stop = store.places[row].tolist()
        ids = torch.tensor(store.ids[start:stop].astype(int))
        logprobs = model(ids[None, :-1])[0][0].log_softmax(-1).detach()
        for at in range(middle - start, stop - start):
            nats -= float(logprobs[at - 1, ids[at]])
            count += 1
            size += len(tokenizer.table[int(ids[at])])
    assert (found.tokens, found.bytes) == (count, size)
    assert found.nats_per_token == pytest.approx(nats / count, rel=1e-5)
    # a limit counts targets
    assert evaluate(model, store, tokenizer, limit=7).tokens == 9


def test_prepared_once_and_again_where_it_is_damaged(questions: str, tmp_path: Path) -> None:
    choice = pairdata.PairConfig((questions,), "qa", group="page", tokenizer="bytes")
    first = pairdata.prepare_pairs(choice)
    again = pairdata.prepare_pairs(choice)
    assert (first.cached, again.cached) == (False, True)
    assert again.tokens.sha256 == first.tokens.sha256
    (file,) = (tmp_path / "cache" / "fastlm" / "pairs").glob("*/tokens.bin")
    file.write_bytes(file.read_bytes()[:-1])
    repaired = pairdata.prepare_pairs(choice)
    assert not repaired.cached and repaired.tokens.sha256 == first.tokens.sha256
    texts = pairdata.held_out(choice)
    assert (
        len(texts) == len(first.tokens.rows("held")) == 60 - len(pairdata.held_out(choice, "train"))
    )
    other = pairdata.prepare_pairs(replace(choice, group=None))
    assert other.tokens.sha256 != first.tokens.sha256
    # of a tokenizer that is given, and one that is trained on the training part alone
    assert pairdata.prepare_pairs(choice, ByteTokenizer()).tokens.vocab_size == 257
    bpe = pairdata.prepare_pairs(replace(choice, tokenizer="bpe", vocab_size=300))
    assert bpe.tokenizer.kind == "bpe"
    assert any("pairs" in line and "held out" in line for line in pairdata.describe(bpe))


# ---- the command ---------------------------------------------------------------------------------


def train(out: Path, *more: str) -> int:
    return cli.main(["train", "--out", str(out), "--evals", "1", "--batch", "4", *more])


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text(data.load().documents[0].text[5000:20000])
    return str(path)


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_from_text_to_pairs_to_text(
    kind: str, text: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, last = tmp_path / "base", tmp_path / "tuned", tmp_path / "last"
    options = ["--tokenizer", "bytes", "--hidden", "16", "--seq", "48", "--budget", "3steps"]
    assert train(base, "--data", text, "--model", kind, *options) == errors.OK
    capsys.readouterr()
    command = ["--pairs", questions, "--format", "qa", "--init", str(base), "--budget", "2steps"]
    assert train(tuned, *command, "--holdout", "0.2") == errors.OK
    said = capsys.readouterr().out
    assert "starting from" in said and "tokens of targets" in said
    # the saved model is what it started from: with a step of almost nothing it is still there
    assert train(tmp_path / "still", *command[:-2], "--budget", "1steps", "--lr", "1e-12") == 0
    weights = [
        checkpoint.find(run).tensors(checkpoint.MODEL)["head.weight"]
        for run in (base, tmp_path / "still")
    ]
    torch.testing.assert_close(*weights)
    capsys.readouterr()
    assert cli.main(["eval", str(tuned), "--json"]) == errors.OK
    assert json.loads(capsys.readouterr().out)["pairs"] > 0
    assert cli.main(["generate", str(tuned), "--max-new-tokens", "3"]) == errors.OK
    # what it started from is not needed any more
    for path in sorted(base.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    more = ["--budget", "4steps", "--allow-change", "budget"]
    assert train(tuned, *more) == errors.OK
    assert checkpoint.all_in(tuned)[0].name == checkpoint.name(4)
    # and back to text
    assert train(last, "--init", str(tuned), "--data", text, "--budget", "2steps") == errors.OK
    assert cli.main(["eval", str(last), "--samples", "0", "--quiet"]) == errors.OK


def test_plan_config_file_and_python_know_pairs_and_a_start(
    text: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    options = ["--tokenizer", "bytes", "--hidden", "16", "--seq", "16", "--budget", "1steps"]
    assert train(base, "--data", text, *options) == errors.OK
    more = ["--pairs", questions, "--format", "qa", "--init", str(base), "--budget", "2epochs"]
    # what is planned is what is then trained: sizes, tokenizer, lr, and pairs for steps
    capsys.readouterr()
    assert train(out, *more, "--dry-run", "--json") == errors.OK
    assert not out.exists()
    planned = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", *more, "--batch", "4", "--json"]) == errors.OK
    assert json.loads(capsys.readouterr().out)["steps"] == planned["steps"]
    assert cli.main(["plan", *more, "--memory", "8GiB", "--measure", "--quiet"]) == errors.OK
    assert train(out, *more, "--json") == errors.OK
    trained = json.loads(capsys.readouterr().out)
    saved = checkpoint.newest(out)
    assert saved is not None and saved.state["settings"] == planned["settings"]
    assert trained["steps"] == planned["steps"] and planned["epochs"] == 2
    # a plan refuses what the run would refuse
    assert train(tmp_path / "wide", *more, "--hidden", "32", "--dry-run") == errors.USAGE
    assert train(out, "--hidden", "32", "--dry-run") == errors.USAGE
    assert "hidden_size: 16 -> 32" in capsys.readouterr().err
    # its config.toml repeats it, and the one of the start can be given beside it
    again = ["--config", str(out / "config.toml"), "--quiet"]
    assert train(tmp_path / "again", *again) == errors.OK
    weights = [checkpoint.find(run).tensors(checkpoint.MODEL) for run in (out, tmp_path / "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    both = ["--config", str(base / "config.toml"), "--init", str(base), "--budget", "1steps"]
    assert train(tmp_path / "both", *both, "--quiet") == errors.OK
    made = lm.make_trainer(
        out=tmp_path / "python", pairs=(questions,), format="qa", init=str(base), batch=4,
        evals=1, budget="2epochs",
    )  # fmt: skip
    assert made.fit().steps == planned["steps"]
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, weights[0][name])
    assert lm.make_trainer(out=tmp_path / "python").finished()


def test_refusals(
    text: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    options = ["--tokenizer", "bytes", "--hidden", "16", "--seq", "16", "--budget", "1steps"]
    assert train(base, "--data", text, *options) == errors.OK
    qa = ["--pairs", questions, "--format", "qa", "--budget", "1steps"]
    init = [*qa, "--init", str(base)]

    def refused(code: int, reason: str, *arguments: str) -> None:
        capsys.readouterr()
        assert train(out, *arguments) == code
        assert reason in capsys.readouterr().err

    refused(errors.USAGE, "one of them", *qa, "--data", text)
    refused(errors.USAGE, "hidden_size: 16 -> 32", *init, "--hidden", "32")
    refused(errors.USAGE, "--vocab is decided by --init", *init, "--vocab", "500")
    refused(errors.USAGE, "a share such as 0.1, got 'emma'", *qa, "--holdout", "emma")
    refused(errors.BAD_INPUT, "no column 'text'", "--pairs", questions, "--format", "summary")
    refused(errors.BAD_INPUT, "'page' (--format, --group)", *qa, "--group", "chapter")
    refused(errors.BAD_CHECKPOINT, "no such folder", *qa, "--init", str(tmp_path / "none"))
    assert not out.exists()
    assert train(out, *init) == errors.OK
    refused(errors.USAGE, f"started from {base}", *qa, "--init", str(out))
    refused(errors.USAGE, "data.tokens", *qa, "--init", str(base), "--learn", "all")
    prefs = ["prefs", "from-model", str(out), "--out", str(tmp_path / "p.jsonl"), "--count", "2"]
    assert cli.main(prefs) == errors.USAGE
    assert "was trained on pairs" in capsys.readouterr().err
    assert cli.main([*prefs, "--data", text]) == errors.OK


def test_csv_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "words.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("source", "target"), *((f"wort {i}", f"word {i}") for i in range(30))])
        rows.writerow(["leer", ""])
    options = ["--pairs", str(path), "--format", "translation", "--vocab", "300", "--hidden", "16"]
    assert train(tmp_path / "out", *options, "--budget", "2epochs") == errors.OK
    said = capsys.readouterr().out
    assert "left out: 1 pairs with an empty side" in said and "held out: bits" not in said


def test_settings_of_a_start(tmp_path: Path) -> None:
    model = TransformerLM(257, hidden_size=16, num_layers=1, num_heads=2, context=20, end=256)
    state = {"config": {"model": {"kind": "PlainTransformerLM", **model.config_dict()}}}
    checkpoint.write(tmp_path / "m", model.state_dict(), {}, state, ByteTokenizer())
    start = starting.start_from(tmp_path / "m")
    chosen = Recipe.of(start.settings, {"dropout": 0.1})
    assert (chosen.model, chosen.hidden, chosen.context, chosen.seq) == ("transformer", 16, 20, 20)
    again = chosen.make_model(pairs_like())
    start.load_into(again)
    assert again.config.dropout == 0.1
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def pairs_like() -> Any:
    class Store:
        vocab_size = 257

        def token_counts(self, split: str) -> torch.Tensor:
            return torch.ones(257)

    return Store()


def test_public_names_are_there() -> None:
    for name in lm.__all__:
        assert getattr(lm, name).__module__.startswith("fastlm.lm."), name
    assert {"DPO", "DPOConfig", "PairConfig", "prepare_pairs", "summaries"} <= set(lm.__all__)


def test_flops_of_prompts_leave_out_the_head(prepared: pairdata.PreparedPairs) -> None:
    batches = pairs.PairBatches(prepared.tokens, batch=4)
    totals = [prepared.tokens.totals(split) for split in ("train", "held")]
    targets = sum(t["tokens"] for t in totals)
    whole = targets + sum(t["prompt_tokens"] for t in totals)
    assert batches.learned_share == pytest.approx(targets / whole)
    assert batches.tokens_per_step == pytest.approx(4 * whole / len(prepared.tokens))
