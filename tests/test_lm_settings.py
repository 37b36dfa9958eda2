"""Settings of a run by name: TOML, --set, precedence, the file that repeats a run, TensorBoard."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fastlm import lm
from fastlm.lm import checkpoint, cli, data, errors, settings, sinks
from fastlm.lm.errors import UsageError
from fastlm.lm.options import build_parser
from fastlm.lm.recipe import Recipe

TINY = """
[data]
tokenizer = "bytes"
[model]
hidden = 16
[train]
batch = 4
seq = 16
evals = 2
eval_tokens = 500
budget = "4steps"
"""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(data.load().documents[0].text[5000:15000])
    path = tmp_path / "run.toml"
    path.write_text(TINY.replace("[data]", f'[data]\npaths = "{tmp_path / "book.txt"}"'))
    return path


def given(*words: str) -> dict[str, Any]:
    return settings.given(build_parser().parse_args(["train", *words]))


def test_every_setting_has_one_key_and_one_option() -> None:
    names = {field.name for field in fields(Recipe)}
    assert set(settings.keys().values()) == names
    assert {key.split(".")[0] for key in settings.keys()} == {"data", "model", "train"}
    options = {"--no-clean" if name == "clean" else f"--{name.replace('_', '-')}" for name in names}
    text = build_parser()._subparsers._group_actions[0].choices["train"].format_help()  # type: ignore
    assert [option for option in options if option not in text] == []


def test_defaults_under_file_under_set_under_options(file: Path) -> None:
    with file.open("a") as out:
        out.write("lr = 1e-2\nclip = 2\nwarmup = 0.25\n")
    found = given("--config", str(file), "--set", "train.lr=2e-2", "--set", "train.clip=3",
                  "--clip", "4")  # fmt: skip
    recipe = Recipe.of({}, found)
    assert (recipe.warmup, recipe.lr, recipe.clip, recipe.floor) == (0.25, 2e-2, 4.0, 0.05)
    assert isinstance(recipe.lr, float) and recipe.data == (str(file.with_name("book.txt")),)
    # what the kind of model is decides where the rest starts
    assert Recipe.of({}, given("--set", "model.kind=transformer")).hidden == 128


@pytest.mark.parametrize(
    "word, field, value",
    [
        ("train.lr=1e-3", "lr", 1e-3),
        ("model.hidden=512", "hidden", 512),
        ("model.tied=true", "tied", True),
        ("data.clean=false", "clean", False),
        ("data.holdout=0.25", "holdout", "0.25"),
        ("data.paths=a.txt,b", "data", ("a.txt", "b")),
        ("train.patience=none", "patience", None),
        ("train.budget = '2 epochs'", "budget", "2 epochs"),
        ("model.kind=transformer", "model", "transformer"),
    ],
)
def test_set(word: str, field: str, value: Any) -> None:
    found = settings.assigned([word])
    assert found == {field: value} and type(found[field]) is type(value)


@pytest.mark.parametrize(
    "word, reason",
    [
        ("train.lrr=1", "--set train.lrr=1: unknown key train.lrr; did you mean train.lr?"),
        ("model.hiden=1", "unknown key model.hiden; did you mean model.hidden?"),
        ("lr=1", "unknown key lr; did you mean train.lr?"),
        ("model.lr=1", "unknown key model.lr; did you mean train.lr?"),
        ("zzzz=1", "unknown key zzzz; the keys are data.paths, "),
        ("train.lr=fast", "train.lr must be a number, got 'fast'"),
        ("model.hidden=1.5", "model.hidden must be a whole number, got '1.5'"),
        ("model.tied=maybe", "model.tied must be true or false, got 'maybe'"),
        ("model.hidden=none", "model.hidden must be a whole number, got 'none'"),
        ("train.lr", "--set train.lr: must be like train.lr=1e-3"),
    ],
)
def test_set_refuses(word: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--set", word]) == errors.USAGE
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, reason",
    [
        ("[train]\nwarmpu = 0.1", "run.toml: unknown key train.warmpu; did you mean train.warmup?"),
        ("[trian]\nlr = 0.1", "unknown key trian.lr; did you mean train.lr?"),
        ("lr = 0.1", "lr stands outside of [data], [model] and [train]; did you mean train.lr?"),
        ("[train]\nlr = '0.1'", "train.lr must be a number, got '0.1'"),
        ("[train]\nlr = true", "train.lr must be a number, got True"),
        ("[model]\nhidden = 16.0", "model.hidden must be a whole number, got 16.0"),
        ("[model]\nkind = 3", "model.kind must be a string, got 3"),
        ("[data]\npaths = [1]", "data.paths must be a string or a list of strings, got [1]"),
        ("[data]\ntokenizer = 'word'", "tokenizer must be one of auto, bpe, bytes, got 'word'"),
        ("[model]\nheads = 2", "--heads is for --model transformer, not for gru"),
        ("[train", "run.toml: not TOML: "),
        ("[train]\nbudget = '\xff'", "run.toml: not TOML: "),
        (None, "run.toml: No such file or directory"),
    ],
)
def test_file_refuses(
    tmp_path: Path, content: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert cli.main(["train", "--config", str(path)]) == errors.USAGE
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_what_is_written_reads_the_same(tmp_path: Path, kind: str) -> None:
    words = ["--model", kind, "--data", 'a "quoted" \\ path', "\x7f\u00e4", "--holdout", "0.1"]
    recipe = Recipe.of({}, given(*words, "--lr", "1e-05", "--patience", "3"))
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(recipe), encoding="utf-8")
    assert Recipe.of({}, settings.load(path)) == recipe
    assert ("heads" in path.read_text()) == (kind == "transformer")


def test_the_written_file_repeats_the_run(file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    command = ["train", "--config", str(file), "--out", str(first), "--quiet"]
    assert cli.main([*command, "--set", "train.label_smoothing=0.1", "--dropout", "0.1"]) == 0
    again = ["train", "--config", str(first / "config.toml"), "--out", str(second), "--quiet"]
    assert cli.main(again) == errors.OK
    one, two = (checkpoint.newest(out) for out in (first, second))
    assert one is not None and two is not None
    assert one.state["settings"] == two.state["settings"]
    sums = [json.loads((c.path / "manifest.json").read_text())["files"] for c in (one, two)]
    name = checkpoint.MODEL
    assert sums[0][name]["sha256"] == sums[1][name]["sha256"]


def test_a_run_from_python(file: Path, tmp_path: Path) -> None:
    options = {**settings.load(file), "budget": "2steps"}
    out, seen = tmp_path / "out", []
    text = options.pop("data")[0]
    run = lm.make_trainer(text, out=str(out), resume="auto", lr=4e-3, seed=0, **options)
    run.on("eval", lambda score: seen.append(score.bits_per_byte))
    result = run.fit()
    assert seen == [score.bits_per_byte for score in run.scores] and len(seen) == 2
    assert result.steps == 2 and result.score is not None and "nats/token" in result.verdict
    assert len("".join(lm.generate(run.model, run.tokenizer, "It", max_new_tokens=8))) > 0
    # the settings that are not given are those of the run
    more = lm.make_trainer(text, out=out, budget="3steps", allow_change=["budget"])
    assert more.config.batch == 4 and more.fit().steps == 3
    with pytest.raises(UsageError, match="has checkpoints; choose another folder"):
        lm.make_trainer(text, out=out, resume="never")
    with pytest.raises(UsageError, match="unknown setting hiden; did you mean hidden?"):
        lm.make_trainer(text, hiden=3)
    with pytest.raises(UsageError, match="hidden must be a whole number, got '3'"):
        lm.make_trainer(text, hidden="3")


def test_python_without_a_reader_of_toml(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(UsageError, match=r"needs the package tomli; pip install 'fastlm\[lm\]'"):
        settings.load(file)


def test_tensorboard(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    command = ["train", "--config", str(file), "--out", str(out), "--tensorboard", "--quiet"]
    assert cli.main(command) == errors.OK
    more = ["--budget", "6steps", "--allow-change", "budget"]
    assert cli.main([*command, *more]) == errors.OK
    read = EventAccumulator(str(out / "tensorboard")).Reload()
    losses = read.Scalars("step/loss")
    assert [event.step for event in losses] == list(range(1, 7))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [event.value for event in losses] == pytest.approx([step["loss"] for step in steps])
    assert {"step/mfu", "step/learning_rate", "eval/bits_per_byte"} <= set(read.Tags()["scalars"])
    # a process that went on to step 9 and died left steps that are taken back
    sink = sinks.TensorBoard(tmp_path / "again")
    for step in range(1, 10):
        sink.record("step", step, {"loss": 1.0})
    sink.close()
    sink = sinks.TensorBoard(tmp_path / "again", 6)
    sink.record("step", 7, {"loss": 2.0, "words": "left out"})
    sink.close()
    events = EventAccumulator(str(tmp_path / "again")).Reload().Scalars("step/loss")
    assert [(e.step, e.value) for e in events] == [(s, 1.0) for s in range(1, 7)] + [(7, 2.0)]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert cli.main(command) == errors.USAGE
    assert "needs the package tensorboard; pip install 'fastlm[track]'" in capsys.readouterr().err


def test_every_step_has_its_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--config", str(file), "--out", str(tmp_path / "out"), "--log-every", "0"]
    assert cli.main(command) == errors.OK
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in lines] == [f"step {i}/4" for i in range(1, 5)]
    parts = [part.split()[0] for part in lines[0].split(" | ")]
    assert parts[1] == "loss" and parts[3] == "lr" and parts[5:] == ["mfu", "peak", "eta"]
    assert "bits/byte" in lines[0] and "tok/s" in lines[0]


def test_tensorboard_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.excepthook
    sink = sinks.TensorBoard(tmp_path / "events")

    def full(data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # what its thread writes with: the thread ends, and a later call is told
    sink._writer._get_file_writer().event_writer._async_writer._writer.write = full
    for step in range(2000):
        sink.record("step", step, {"loss": 1.0})
        if sink._writer is None:
            break
        time.sleep(0.001)
    sink.record("step", 2001, {"loss": 1.0})
    sink.close()
    assert threading.excepthook is not sink._thread_failed
    said = capsys.readouterr().err
    assert said == "fastlm: warning: TensorBoard gets no more: No space left on device\n"
    assert threading.excepthook == before


def test_dry_run_writes_nothing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["train", "--config", str(file), "--out", str(out), "--dry-run"]
    assert cli.main(command) == errors.OK
    shown = capsys.readouterr().out
    assert "[train]\n" in shown and 'budget = "4steps"' in shown and "memory: " in shown
    assert not out.exists()
    text = shown[: shown.index("model: ")]
    (tmp_path / "shown.toml").write_text(text)
    assert Recipe.of({}, settings.load(tmp_path / "shown.toml")).hidden == 16
