"""`fastlm generate`: where prompts come from, many texts, what is refused, exit codes."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastlm.lm import cli

TEXT = "The cat sat on the mat, and the dog ran to the cat; nobody could say why. " * 120
TINY = ["--tokenizer", "bytes", "--hidden", "16", "--batch", "4", "--seq", "16", "--evals", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of each kind that has hardly learnt anything."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    found = {}
    for kind, more in (("gru", []), ("transformer", ["--heads", "2", "--layers", "1"])):
        arguments = ["train", "--data", str(folder / "text.txt"), "--out", str(folder / kind)]
        arguments += ["--model", kind, *more, *TINY, "--budget", "20steps", "--quiet"]
        assert cli.main(arguments) == 0
        found[kind] = str(folder / kind)
    return found


@pytest.fixture
def run(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str, kind: str = "gru", code: int = 0) -> Any:
        command = ["generate", runs[kind], "--max-new-tokens", "20", *arguments]
        assert cli.main(command) == code
        captured = capsys.readouterr()
        if code:
            assert captured.err.startswith("fastlm: error: ") and captured.err.count("\n") == 1
            return captured.err
        return json.loads(captured.out) if "--json" in arguments else captured.out

    return call


def standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_prompt_from_standard_input(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    want = run("--prompt", "naïve")
    for data in ("naïve", "naïve\n", "\ufeffnaïve\r\n"):
        standard_input(monkeypatch, data.encode())
        assert run("--prompt", "-") == want
    standard_input(monkeypatch, b"")
    assert run("--prompt", "-") == run() == run("--prompt", "")
    standard_input(monkeypatch, b"na\xefve")
    assert "standard input: not UTF-8: invalid continuation byte at byte 2" in run(
        "--prompt", "-", code=3
    )


def test_prompts_of_a_file(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_bytes(b"The cat\r\n\nThe very long dog of nobody at all\n  \nx")
    prompts = ["The cat", "The very long dog of nobody at all", "x"]
    values = [{"prompt": prompts[0], "id": 7}, prompts[1], {"prompt": prompts[2]}]
    records.write_text("\n".join(map(json.dumps, values)) + "\n")
    options = ["-n", "2", "--seed", "3", "--repetition-penalty", "1.2", "--min-p", "0.01", "--json"]
    found = run("--prompts", str(lines), *options)
    assert run("--prompts", str(records), *options) == found
    standard_input(monkeypatch, lines.read_bytes())
    assert run("--prompts", "-", *options) == found
    assert [(t["prompt"], t["sample"]) for t in found["texts"]] == [
        (prompt, sample) for prompt in prompts for sample in (0, 1)
    ]
    for number, prompt in enumerate(prompts):
        alone = run("--prompt", prompt, *options)["texts"]
        assert alone == found["texts"][2 * number : 2 * number + 2]
        first = run("--prompt", prompt, *options, "-n", "1")
        assert first == alone[0] | {"seed": 3}
    shown = run("--prompts", str(lines), *options[:-1])
    want = [
        f"==> prompt {i // 2 + 1}, sample {i % 2 + 1} <==\n{t['prompt']}{t['text']}\n"
        for i, t in enumerate(found["texts"])
    ]
    assert shown == "\n".join(want) + "\n"
    records.write_text('{"prompt": ""}\n')
    assert run("--prompts", str(records), "--json")["texts"][0]["text"] == run("--json")["text"]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"\n \n", "a.txt: no prompt in it"),
        ("a.txt", b"ok\n\xff\n", "a.txt: not UTF-8: invalid start byte at byte 3"),
        ("a.jsonl", b'"fine"\n\n{"prompt": 3}\n', "a.jsonl, line 3: a string, or an object with"),
        ("a.jsonl", b'{"text": "a"}', "a.jsonl, line 1: a string, or an object"),
        ("a.jsonl", b'"a"\n{"prompt"', "a.jsonl, line 2: no JSON"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "cannot be written as UTF-8"),
        ("a.txt", None, "a.txt: No such file"),
    ],
)
def test_prompts_that_cannot_be_read_are_3(
    run: Any, tmp_path: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert message in run("--prompts", str(tmp_path / name), code=3)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "-1"], "temperature must be finite and >= 0, got -1"),
        (["--top-k", "0"], "top_k must be >= 1"),
        (["--top-p", "1.5"], r"top_p must be in \[0, 1\]"),
        (["--min-p", "-0.1"], r"min_p must be in \[0, 1\]"),
        (["--repetition-penalty", "0"], "repetition_penalty must be finite and > 0"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--max-new-tokens", "-3"], "max_new_tokens must not be negative, got -3"),
    ],
)
def test_options_that_make_no_sense_are_2(run: Any, options: list[str], message: str) -> None:
    assert re.search(message, run(*options, code=2))


def test_prompt_and_prompts_exclude_each_other(runs: dict[str, str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", runs["gru"], "--prompt", "a", "--prompts", "b"])
    assert caught.value.code == 2


def test_stops_and_what_stopped_a_text(run: Any) -> None:
    whole = run("--prompt", "The", "--json", "--temperature", "0")
    assert whole["stopped"] == "length" and whole["tokens"] == 20
    stop = whole["text"][4:7]
    cut = run("--prompt", "The", "--json", "--temperature", "0", "--stop", "\n\n", "--stop", stop)
    assert cut["stopped"] == "stop" and cut["text"] == whole["text"].split(stop)[0]
    assert run("--max-new-tokens", "0", "--prompt", "a") == "a\n"


def test_a_prompt_beyond_the_context_of_a_transformer_is_told(
    runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", runs["transformer"], "--max-new-tokens", "40", "--prompt"]
    assert cli.main([*command, "The cat sat on"]) == 0
    assert capsys.readouterr().err == ""
    long = "The cat sat on the mat, and the dog"
    assert cli.main([*command, long]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "fastlm generate: the prompt has 35 tokens, the model's context is 16: its first 24 do not "
        "count\n"
    )
    # nothing but what is left decides
    assert cli.main([*command, long[24:], "--quiet"]) == 0
    again = capsys.readouterr()
    assert again.err == "" and captured.out == long[:24] + again.out


def test_a_terminal_that_is_not_utf_8(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["generate", runs["gru"], "--prompt", "naïve", "--max-new-tokens", "3"]) == 0
    assert out.buffer.getvalue().startswith(b"na?ve")  # type: ignore[attr-defined]
