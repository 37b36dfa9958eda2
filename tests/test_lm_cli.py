"""The command line: exit codes, one-line errors, and a run that is stopped and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.lm import checkpoint, cli, data, distributed, errors, machine

TINY = ["--tokenizer", "bytes", "--hidden", "16", "--batch", "4", "--seq", "16", "--evals", "2"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text(data.load().documents[0].text[5000:25000])
    return str(path)


def train(text: str, out: Path, *more: str) -> int:
    return cli.main(["train", "--data", text, "--out", str(out), *TINY, *more])


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fastlm: error: "), error
    return error


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"\xff\x00\x81" * 50, "not text"),
        (b"short\n", "too short|too few"),
    ],
)
def test_bad_input_is_3_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, reason: str
) -> None:
    path, out = tmp_path / "x.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    assert train(str(path), out, "--budget", "2steps") == errors.BAD_INPUT
    assert re.search(reason, only_line(capsys))
    assert not out.exists()


def test_missing_held_out_document_is_3(text: str, tmp_path: Path) -> None:
    assert train(text, tmp_path / "out", "--holdout", "nothing") == errors.BAD_INPUT


def test_usage_is_2(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(text, tmp_path / "out", "--budget", "soon") == errors.USAGE
    assert "budget must be like 90s" in only_line(capsys)
    for wrong in (["nonsense"], ["train", "--no-such-option"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(wrong)
        assert caught.value.code == errors.USAGE


def test_train_generate_resume(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(text, out, "--budget", "3steps", "--json") == errors.OK
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 3
    assert "held out:" in captured.err

    # options that are not given come from the checkpoint
    again = ["train", "--out", str(out)]
    assert cli.main(again) == errors.OK
    assert "budget of 3steps is used" in capsys.readouterr().out
    more = ["--budget", "5steps", "--allow-change", "budget"]
    assert cli.main([*again, *more, "--quiet"]) == errors.OK
    assert capsys.readouterr().out == ""
    assert checkpoint.all_in(out)[0].name == checkpoint.name(5)

    # another model in the same folder is refused, with the difference
    assert cli.main([*again, "--hidden", "32"]) == errors.USAGE
    assert "model.hidden_size: 16 -> 32" in only_line(capsys)
    assert cli.main([*again, "--resume", "never"]) == errors.USAGE
    assert "has checkpoints" in only_line(capsys)

    command = ["generate", str(out), "--prompt", "It is", "--max-new-tokens", "20", "--seed", "4"]
    assert cli.main(command) == errors.OK
    first = capsys.readouterr().out
    assert cli.main([*command, "--json"]) == errors.OK
    assert first == "It is" + json.loads(capsys.readouterr().out)["text"] + "\n"
    assert cli.main([*command, "--temperature", "-1"]) == errors.USAGE
    assert "temperature" in only_line(capsys)


def test_workers_change_nothing(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for workers in ("0", "1"):
        out = tmp_path / workers
        assert train(text, out, "--budget", "3steps", "--workers", workers, "--quiet") == errors.OK
        found.append(checkpoint.find(out).tensors(checkpoint.MODEL))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert train(text, tmp_path / "2", "--workers", "-1") == errors.USAGE
    assert "workers must not be negative" in only_line(capsys)


@pytest.mark.parametrize("gpu", [False, True])
def test_device(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert machine.device_of("cpu").type == "cpu"
    assert machine.device_of("auto").type == ("cuda" if gpu else "cpu")
    with distributed.connected() as ranks:
        assert ranks.device == machine.device_of("auto")
    with distributed.connected(device="cpu") as ranks:
        assert ranks.device.type == "cpu" == distributed.Ranks.device.type
    if not gpu:
        with pytest.raises(errors.UsageError, match="finds no GPU"):
            machine.device_of("cuda")


def test_train_and_generate_with_a_transformer(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--model", "transformer", "--heads", "2", "--kv-heads", "1", "--layers", "2"]
    options += ["--dropout", "0.1", "--recompute", "--budget", "3steps", "--quiet"]
    assert train(text, out, *options) == errors.OK
    # kind, sizes and context come from the checkpoint
    again = ["train", "--out", str(out), "--budget", "5steps", "--allow-change", "budget"]
    assert cli.main([*again, "--quiet"]) == errors.OK
    saved = checkpoint.newest(out)
    assert saved is not None and saved.state["counters"]["steps"] == 5
    model = saved.state["config"]["model"]
    assert (model["kind"], model["context"], model["end"]) == ("TransformerLM", 16, 256)
    assert cli.main([*again, "--model", "gru"]) == errors.USAGE
    assert "is of --model transformer, not gru" in only_line(capsys)

    # 40 tokens in a context of 16
    command = ["generate", str(out), "--prompt", "It is a truth", "--max-new-tokens", "40"]
    assert cli.main(command) == errors.OK
    first = capsys.readouterr().out
    assert cli.main(command) == errors.OK
    assert capsys.readouterr().out == first and len(first) > 20


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--heads", "2"], "--heads is for --model transformer, not for gru"),
        (["--model", "transformer", "--embedding", "8"], "--embedding is for --model gru"),
        (["--model", "transformer", "--context", "8"], r"context must be at least seq \(16\)"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert train(text, tmp_path / "out", *options) == errors.USAGE
    assert re.search(reason, only_line(capsys))


def test_bad_checkpoint_is_4_and_nothing_is_overwritten(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(text, out, "--budget", "2steps", "--quiet") == errors.OK
    for path in (*checkpoint.all_in(out), out / "model"):
        file = path / checkpoint.MODEL
        file.write_bytes(file.read_bytes()[:-100])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert cli.main(["train", "--out", str(out)]) == errors.BAD_CHECKPOINT
    line = only_line(capsys)
    assert checkpoint.MODEL in line and "truncated" in line
    assert cli.main(["generate", str(out)]) == errors.BAD_CHECKPOINT
    assert cli.main(["generate", str(tmp_path / "none")]) == errors.BAD_CHECKPOINT
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_damaged_newest_checkpoint_is_skipped_and_said(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(text, out, "--budget", "3steps", "--quiet", "--save-every", "0") == errors.OK
    newest, older = checkpoint.all_in(out)
    (newest / checkpoint.STATE).write_text("{}")
    assert cli.main(["train", "--out", str(out), "--quiet"]) == errors.OK
    assert "skipped a damaged checkpoint" in capsys.readouterr().err
    assert older.name == checkpoint.name(2)


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device")])
def test_out_of_space_is_5(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setitem(cli._COMMANDS, "doctor", fail)
    assert cli.main(["doctor"]) == errors.OUT_OF_SPACE
    assert "out of memory or disk" in only_line(capsys)


def test_folder_that_cannot_be_made_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    assert train(text, out, "--budget", "2steps", "--quiet") == errors.USAGE
    assert str(out) in only_line(capsys)


def test_ctrl_c_saves_and_says_how_to_resume(text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastlm.lm", "train", "--data", text, "--out", str(out)]
    process = subprocess.Popen(
        [*command, *TINY, "--budget", "10000steps"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and '"step": 2' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    while '"event": "end"' not in metrics.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # all is saved: a second one changes no exit code
    _, error = process.communicate(timeout=60)
    assert process.returncode == errors.INTERRUPTED
    assert f"fastlm train --out {out} --resume auto" in error and "Traceback" not in error
    saved = checkpoint.newest(out)
    assert saved is not None and saved.state["counters"]["steps"] >= 2
    assert metrics.read_text().splitlines()[-1].startswith('{"event": "end"')


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == errors.OK
    assert "what a small float32 call runs here" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == errors.OK
    report = json.loads(capsys.readouterr().out)
    assert {"embedding_gru", "linear_cross_entropy", "sample"} <= report["ops"].keys()
    assert not [name for name, op in report["ops"].items() if "error" in op]


def test_bench_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = type(sys)("fastlm.bench")
    module.main = lambda argv: seen.append(argv) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastlm.bench", module)
    assert cli.main(["bench", "model", "--help"]) == 7 and seen == [["model", "--help"]]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fastlm.lm import cli; "
        "heavy = {'tokenizers', 'safetensors', 'rich', 'matplotlib', 'transformers'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
