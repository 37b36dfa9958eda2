"""The commands around a trained model: eval, cv, summarize, prefs from-model, reward, rl."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from fastlm.lm import cli, data


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


@pytest.mark.parametrize(
    "options", [["cv", "--first", "0"], ["summarize", "RUN", "--pairs", "x", "--count", "0"]]
)
def test_nothing_to_count_is_2(
    run: Path, options: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main([str(run / "run") if word == "RUN" else word for word in options]) == 2
    assert f"{options[-2]} must be at least 1, got 0" in capsys.readouterr().err


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


REWARDS = """
import math

def letters(prompts, texts):
    return [text.count("e") / 10 for text in texts]

def raises(prompts, texts):
    return [1 / (len(text) > 10**6) for text in texts]

def nan(prompts, texts):
    return [0.5, math.nan] + [0.5] * (len(texts) - 2)

def short(prompts, texts):
    return [0.5, 0.5, 0.5]

def words(prompts, texts):
    return ["good"] * len(texts)

def nothing(prompts, texts):
    pass

def equal(prompts, texts):
    return [2] * len(texts)

limit = 3
"""
RL = ["--budget", "2steps", "--batch", "8", "--group", "4", "--length", "6", "--prompt", "6"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of rewards, to work in."""
    (tmp_path / "rewards_of_ones_own.py").write_text(REWARDS)
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("rewards_of_ones_own", "broken_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("nowhere:nothing", 2, "MODULE:FUNCTION.*No module named 'nowhere'$"),
        ("runs/rewrad", 2, "'runs/rewrad': no such folder"),
        ("rewards_of_one_own:nan", 2, "No module named.*did you mean rewards_of_ones_own?"),
        ("rewards_of_ones_own:leters", 2, "has no leters; did you mean letters?"),
        ("rewards_of_ones_own:limit", 2, "no function but int"),
        ("broken_rewards:letters", 2, "importing it raised ZeroDivisionError: division by zero"),
        (
            "rewards_of_ones_own:raises", 3,
            r"raised ZeroDivisionError: division by zero \(rewards_of_ones_own.py, line 8\); "
            "text 0 is ['\"]",
        ),
        ("rewards_of_ones_own:nan", 3, "reward of text 1 must be a finite number, got nan; text 1"),
        ("rewards_of_ones_own:short", 3, "3 rewards for 200 texts; text 3 is ['\"]"),
        ("rewards_of_ones_own:words", 3, "text 0 must be a finite number, got 'good'; text 0 is"),
        ("rewards_of_ones_own:nothing", 3, "gave NoneType, not a list of numbers"),
    ],
)  # fmt: skip
def test_rewards_that_cannot_be_used(
    run: Path, own: Path, capsys: pytest.CaptureFixture, name: str, code: int, message: str
) -> None:
    arguments = ["rl", str(run / "run"), "--out", str(own / "rl"), "--reward", name, *RL]
    assert cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("fastlm: error: ") and error.count("\n") == 1
    assert re.search(message, error.strip()), error
    assert not (own / "rl" / "model").exists()


def test_a_reward_of_ones_own(run: Path, own: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["rl", str(run / "run"), "--reward", "rewards_of_ones_own:letters", *RL]
    found = said(capsys, *arguments, "--out", str(own / "rl"))
    assert found["stopped"] == "budget" and len(found["history"]) == 2
    far = said(capsys, *arguments, "--out", str(own / "far"), "--largest-kl", "1e-9", "--lr", "0.1")
    assert far["stopped"] == "kl" and len(far["history"]) == 2
    assert cli.main([*arguments, "--out", str(own / "long"), "--prompt", "99999"]) == 3
    assert "no document of the train part has 100000 tokens" in capsys.readouterr().err


def test_a_place_for_the_reward_model_is_asked_for_first(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pairs, file = tmp_path / "p.jsonl", tmp_path / "file"
    made = ["prefs", "from-model", str(run / "run"), "--count", "4", "--out", str(pairs)]
    assert cli.main([*made, "--prompt-tokens", "6", "--tokens", "6", "--quiet"]) == 0
    file.write_text("")
    options = ["reward", str(pairs), "--model", str(run / "run"), "--budget", "1steps"]
    assert cli.main([*options, "--out", str(file / "reward")]) == 2
    found = capsys.readouterr()
    assert str(file) in found.err and "steps" not in found.out


def test_what_follows_a_policy_knows_its_text(
    run: Path, own: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["rl", str(run / "run"), "--reward", "rewards_of_ones_own:letters", *RL]
    assert cli.main([*arguments, "--out", str(own / "rl"), "--quiet"]) == 0
    found = said(capsys, "eval", str(own / "rl"), "--samples", "0")
    assert found["documents"].keys() == {"two"}
    # before it has ended too, and nothing else is done in its folder
    shutil.rmtree(own / "rl" / "model")
    assert said(capsys, "eval", str(own / "rl"), "--samples", "0") == found
    for other in (["train"], ["train", "--dry-run"]):
        assert cli.main([*other, "--out", str(own / "rl")]) == 2
        assert "is of another command than train" in capsys.readouterr().err
    assert cli.main([*arguments, "--out", str(run / "run")]) == 2
    assert "is of another command; use another --out" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(run / "run" / "model")]) == 2
    assert "is a saved model itself" in capsys.readouterr().err


def test_equal_rewards_are_a_warning(run: Path, own: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["rl", str(run / "run"), "--reward", "rewards_of_ones_own:equal", *RL]
    with pytest.warns(UserWarning, match="all 8 rewards are 2: nothing to learn from them"):
        found = said(capsys, *arguments, "--out", str(own / "rl"))
    numbers = [value for done in found["history"] for value in done.values()]
    assert all(map(math.isfinite, numbers)) and found["before"] == found["after"]


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
