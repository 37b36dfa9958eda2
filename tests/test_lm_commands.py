"""The commands around a trained model: eval, cv, summarize, prefs from-model, reward, rl."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from fastlm.lm import cli, data, policy
from fastlm.lm.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of two documents, one of them held out."""
    folder = tmp_path_factory.mktemp("run")
    text = data.load().documents[0].text
    (folder / "one.txt").write_text(text[5000:45000])
    (folder / "two.txt").write_text(text[45000:60000])
    arguments = ["train", "--data", str(folder / "one.txt"), str(folder / "two.txt")]
    arguments += ["--holdout", "two", "--tokenizer", "bytes", "--hidden", "32", "--budget"]
    arguments += ["30steps", "--evals", "1", "--quiet", "--out", str(folder / "run")]
    assert cli.main(arguments) == 0
    return folder


def said(capsys: pytest.CaptureFixture, *arguments: str, code: int = 0) -> dict:
    assert cli.main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_eval_is_by_document(run: Path, capsys: pytest.CaptureFixture) -> None:
    held = said(capsys, "eval", str(run / "run"))
    assert list(held["documents"]) == ["two"] and held["all"] == held["documents"]["two"]
    samples = held["samples"]
    for n in (1, 2, 3):
        assert 0 < samples[f"distinct_{n}"] <= 1 and 0 < samples[f"distinct_{n}_of_the_text"] <= 1
    assert 0 <= samples["auc_own"]["low"] <= samples["auc_own"]["value"] <= 1
    both = said(capsys, "eval", str(run / "run"), str(run / "one.txt"), str(run / "two.txt"))
    assert both["documents"]["two"]["bits_per_byte"] == held["all"]["bits_per_byte"]
    one, two, all_ = both["documents"]["one"], both["documents"]["two"], both["all"]
    bits = one["bits_per_byte"] * one["bytes"] + two["bits_per_byte"] * two["bytes"]
    assert all_["bits_per_byte"] == pytest.approx(bits / (one["bytes"] + two["bytes"]))
    assert cli.main(["eval", str(run / "run"), str(run / "one.txt")]) == 0
    assert "bits/byte" in capsys.readouterr().out


def test_cross_validation_holds_each_document_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = [str(run / "one.txt"), str(run / "two.txt")]
    arguments = ["cv", "--data", *paths, "--budget", "3steps", "--vocab", "300"]
    out, kinds = tmp_path / "cv.json", ["gru:hidden=32", "transformer:hidden=32:heads=2"]
    found = said(capsys, *arguments, "--compare", ",".join(kinds), "--out", str(out))
    assert list(found["bits_per_byte"]) == kinds
    for scores in found["bits_per_byte"].values():
        assert list(scores) == ["one", "two"] and all(2 < v < 9 for v in scores.values())
    assert all(score["steps"] == 3 for s in found["runs"].values() for score in s.values())
    assert sum(s["best_in"] for s in found["summary"].values()) == 2
    assert json.loads(out.read_text()) == found
    assert cli.main(["cv", "--data", paths[0], "--budget", "1steps"]) == 3
    assert "at least 2 documents" in capsys.readouterr().err
    assert cli.main(["cv", "--data", *paths, "--model", "lstm"]) == 2


def test_equal_seconds_and_what_repeats_is_no_fold(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    again = tmp_path / "again.txt"
    again.write_text((run / "one.txt").read_text())
    paths = [str(run / "one.txt"), str(again), str(run / "two.txt")]
    arguments = ["cv", "--data", *paths, "--budget", "0.3s", "--vocab", "300", "--first", "1"]
    found = said(capsys, *arguments, "--compare", "gru:hidden=32,transformer:hidden=32:heads=2")
    for scores in found["runs"].values():
        assert list(scores) == ["one"] and 0.3 <= scores["one"]["seconds"] < 3
    assert cli.main([*arguments, "--compare", "gru:hidden=32"]) == 0
    printed = capsys.readouterr().out
    assert "bits per byte, 0.3s of training each:" in printed
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == [
        "held",
        "one",
        "mean",
        "deviation",
    ]


def test_summary_beside_the_lead(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, reference = tmp_path / "text.txt", tmp_path / "reference.txt"
    path.write_text("The cat sat on the mat. A dog barked at it all night. They all went home.")
    reference.write_text("A cat and a dog.")
    found = said(capsys, "summarize", str(run / "run"), str(path), "--sentences", "1")
    assert found["summary"] in path.read_text() and found["lead"] == "The cat sat on the mat."
    arguments = ["summarize", str(run / "run"), str(path), "--reference", str(reference)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "rouge lead 1: rouge1" in printed and printed.count("rougeL") == 2
    assert cli.main([*arguments[:-1], str(tmp_path / "none")]) == 3


def test_from_preferences_to_a_policy(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, train, held = str(run / "run"), str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    made = ["--tokens", "20", "--prompt-tokens", "8"]
    found = said(capsys, "prefs", "from-model", model, "--out", train, "--count", "60", *made)
    assert found == {"preferences": 60, "by": {"human-over-model": 60}}
    arguments = ["--count", "30", "--split", "held", "--seed", "1", *made]
    said(capsys, "prefs", "from-model", model, "--out", held, *arguments)
    for kind, name in (("ngrams", "rm"), ("gru", "judge")):
        out = str(tmp_path / name)
        arguments = [train, "--test", held, "--model", model, "--out", out, "--kind", kind]
        report = said(capsys, "reward", *arguments, "--budget", "20steps", "--hidden", "16")
        assert report["report"]["pairs"] == 30 and 0 <= report["report"]["auc"]["low"] <= 1
        assert said(capsys, "eval", out, held) == report["report"]
    assert cli.main(["eval", out]) == 2
    assert "is a reward model: name files of preferences" in capsys.readouterr().err
    out = str(tmp_path / "rl")
    arguments = ["rl", model, "--out", out, "--reward", str(tmp_path / "rm")]
    arguments += ["--judge", str(tmp_path / "judge"), "--batch", "8", "--group", "4"]
    arguments += ["--length", "8", "--prompt", "8", "--algorithm", "grpo"]
    found = said(capsys, *arguments, "--budget", "2steps")
    assert len(found["history"]) == 2 and set(found["after"]) == {"reward", "judge"}
    again = said(capsys, *arguments, "--budget", "4steps")
    assert [i["iteration"] for i in again["history"]] == [1, 2, 3, 4]
    assert cli.main([*arguments, "--resume", "never"]) == 2
    assert cli.main(["generate", str(tmp_path / "rl"), "--max-new-tokens", "3"]) == 0


def test_a_reward_of_ones_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["rl", str(run / "run"), "--out", str(tmp_path / "rl"), "--budget", "1steps"]
    assert cli.main([*arguments, "--reward", "nowhere:nothing"]) == 2
    assert "MODULE:FUNCTION" in capsys.readouterr().err
    assert cli.main([*arguments, "--reward", "builtins:zip"]) == 3
    assert "the reward function" in capsys.readouterr().err
    with pytest.raises(InputError, match="raised"):
        policy.judged(lambda prompts, texts: [1 / 0], ["p"], ["t"])


def test_another_text_than_in_training_is_noticed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--out", str(tmp_path / "a.jsonl")]
    arguments = ["prefs", "from-model", str(run / "run"), "--data", str(run / "one.txt")]
    assert cli.main([*arguments, "--holdout", "0.1", "--count", "2", *out]) == 0  # bytes are bytes
    assert cli.main(["prefs", "from-model", str(tmp_path), *out]) == 4


def test_a_person_judges_two_texts_of_the_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, answers = str(tmp_path / "q.jsonl"), str(tmp_path / "a.jsonl")
    arguments = ["prefs", "sample", str(run / "run"), "--out", questions, "--count", "4"]
    assert said(capsys, *arguments, "--tokens", "20", "--split", "held")["questions"] == 4
    records = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    text = data.clean((run / "two.txt").read_text())[0]
    for record in records:
        assert record["prompt"] in text and record["a"] != record["b"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nt\na\n"))
    assert cli.main(["prefs", "label", questions, "--out", answers, "--annotator", "ann"]) == 0
    capsys.readouterr()
    found = said(capsys, "prefs", "check", answers)
    assert found == {"preferences": 3, "by": {"human": 3}}
    assert cli.main([*arguments, "--prompt-tokens", "0"]) == 2
    assert "--prompt-tokens must be at least 1, got 0" in capsys.readouterr().err
