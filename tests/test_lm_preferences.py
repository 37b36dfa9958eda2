"""Preferences and where they come from; labelling by a person, key by key."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastlm.lm import cli, errors, labelling, learnoptions, preferences, synthetic
from fastlm.lm.errors import InputError, UsageError
from fastlm.lm.preferences import Preference


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    return path


def record(**changes: object) -> dict[str, object]:
    own = {"prompt": "p", "chosen": "c", "rejected": "r", "provenance": "human:ann"}
    return {**own, **changes}


def test_own_form_round_trips(tmp_path: Path) -> None:
    found = [
        Preference("p", "c\u00e9", "r", "human-over-model"),
        Preference("", "a", "b", "human:x"),
    ]
    preferences.save(tmp_path / "a.jsonl", found)
    assert preferences.load([tmp_path / "a.jsonl"]) == found
    assert preferences.origins(found) == {"human-over-model": 1, "human": 1}


@pytest.mark.parametrize(
    "provenance", [None, "", "someone", "human", "human:", "human-over-model:x", 5]
)
def test_a_record_without_provenance_is_refused(tmp_path: Path, provenance: object) -> None:
    path = write(tmp_path / "a.jsonl", record(), record(provenance=provenance))
    with pytest.raises(InputError, match="line 2: .*provenance"):
        preferences.load([path])


def test_provenance_given_for_a_file_does_not_overrule_its_own(tmp_path: Path) -> None:
    bare = record()
    del bare["provenance"]
    path = write(tmp_path / "a.jsonl", record(), bare)
    found = preferences.load([path], "fastlm", "dataset:x")
    assert [p.provenance for p in found] == ["human:ann", "dataset:x"]
    with pytest.raises(InputError, match="--provenance: provenance must be"):
        preferences.load([path], "fastlm", "x")


def test_dialogues(tmp_path: Path) -> None:
    before = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: well?\n\nAssistant:"
    path = write(tmp_path / "a.jsonl", {"chosen": before + " good", "rejected": before + " bad"})
    with pytest.raises(InputError, match="no provenance"):
        preferences.load([path])
    (found,) = preferences.load([path], provenance="dataset:hh-rlhf")
    assert found == Preference(before, " good", " bad", "dataset:hh-rlhf")
    write(path, {"chosen": before + " a", "rejected": "\n\nHuman: x\n\nAssistant: b"})
    with pytest.raises(InputError, match="line 1: the dialogues share no beginning"):
        preferences.load([path], provenance="dataset:hh-rlhf")


def test_dialogues_that_part_early_and_gzip(tmp_path: Path) -> None:
    """The published files are gzipped, and a few dialogues go on after the answer that differs."""
    start = "\n\nHuman: hi\n\nAssistant:"
    rest = "\n\nHuman: and?\n\nAssistant: so"
    line = json.dumps({"chosen": start + " yes" + rest, "rejected": start + " no"})
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(line.encode()))
    (found,) = preferences.load([path], provenance="dataset:hh-rlhf")
    assert found == Preference(start, " yes" + rest, " no", "dataset:hh-rlhf")


def test_rated_answers(tmp_path: Path) -> None:
    def rated(*scores: object) -> dict[str, object]:
        answers = [{"response": f"r{i}", "overall_score": s} for i, s in enumerate(scores)]
        return {"instruction": "q", "completions": answers}

    path = write(tmp_path / "a.jsonl", rated(3.0, 7.5, 1.0), rated(2.0, 2.0), rated(4.0), rated())
    found = preferences.load([path], provenance="dataset:ultrafeedback")
    assert found == [Preference("q", "r1", "r2", "dataset:ultrafeedback")]
    for broken in (rated(3.0, None), {"instruction": "q", "completions": ["x"]}):
        write(path, broken)
        with pytest.raises(InputError, match="line 1: "):
            preferences.load([path], provenance="dataset:ultrafeedback")


def test_published_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [record(provenance=None), record(chosen="other", provenance=None)]
    package = SimpleNamespace(load_dataset=lambda *_, **__: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", package)
    with pytest.raises(InputError, match="hf:some: record 1: no provenance"):
        preferences.load(["hf:some"], "fastlm")


def test_the_command_knows_every_format() -> None:
    assert learnoptions.PREFERENCES == preferences.FORMATS


def test_messages(tmp_path: Path) -> None:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

    path = write(
        tmp_path / "a.jsonl", {"prompt": "q", "chosen": turns("a"), "rejected": turns("b")}
    )
    (found,) = preferences.load([path], provenance="dataset:ultra")
    assert found == Preference("user: q\n", "a", "b", "dataset:ultra")
    write(path, {"prompt": "q", "chosen": turns("a")[1:], "rejected": turns("b")[1:]})
    (found,) = preferences.load([path], provenance="dataset:ultra")
    assert found.prompt == "q"
    tie = {"chosen": turns("a"), "rejected": turns("b"), "score_chosen": 7, "score_rejected": 7}
    write(path, tie, {**tie, "score_chosen": 8})
    assert len(preferences.load([path], provenance="dataset:ultra")) == 1
    write(path, {"chosen": turns("a"), "rejected": [{"content": "b"}]})
    with pytest.raises(InputError, match="no role and content"):
        preferences.load([path], provenance="dataset:ultra")


def test_ties_and_equal_texts_are_left_out(tmp_path: Path) -> None:
    answer = {"prompt": "p", "a": "x", "b": "y", "provenance": "human:ann"}
    path = write(
        tmp_path / "a.jsonl",
        *({**answer, "choice": c} for c in ("a", "b", "tie", "skip")),
        record(chosen="r"),
    )
    assert [(p.chosen, p.rejected) for p in preferences.load([path])] == [("x", "y"), ("y", "x")]
    write(path, {**answer, "choice": "tie"})
    with pytest.raises(InputError, match="no preference in it"):
        preferences.load([path])


@pytest.mark.parametrize("broken", ["{", "[]", '{"provenance": "human:x", "prompt": "p"}'])
def test_damaged_records_are_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record()) + "\n" + broken)
    with pytest.raises(InputError, match="a.jsonl: line 2"):
        preferences.load([path])
    with pytest.raises(UsageError, match="format must be one of"):
        preferences.load([path], "xml")


QUESTIONS = [labelling.Question("p", f"first {i}", f"second {i}") for i in range(6)]


def answer(path: Path, keys: str, **options: object) -> tuple[int, labelling.Answers, str]:
    answers, out, pressed = labelling.Answers(path), io.StringIO(), iter(keys)
    count = labelling.label(
        QUESTIONS, answers, annotator="ann", key=lambda: next(pressed), out=out, **options
    )
    return count, answers, out.getvalue()


def test_answers_name_the_text_and_not_the_place(tmp_path: Path) -> None:
    count, answers, shown = answer(tmp_path / "a.jsonl", "aaaaaa")
    assert count == 6 and {r["shown_first"] for r in answers.records} == {"a", "b"}
    for r in answers.records:
        assert r["choice"] == r["shown_first"] and r["provenance"] == "human:ann"
    assert "6 answers" in shown and "1 of 6" in shown
    found = preferences.load([tmp_path / "a.jsonl"])
    assert len(found) == 6 and {p.provenance for p in found} == {"human:ann"}


def test_quitting_resumes_and_other_keys_ask_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    count, _, shown = answer(path, "atx?sq")
    assert count == 3 and "3 questions left" in shown and shown.count(labelling.HELP) == 4 + 2
    count, answers, _ = answer(path, "bbb")
    assert count == 3
    assert [r["prompt"] + r["a"] for r in answers.records] == [f"pfirst {i}" for i in range(6)]
    assert [r["choice"] for r in answers.records][1:3] == ["tie", "skip"]
    assert answer(path, "")[0] == 0


def test_undo_takes_back_on_disk_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    count, answers, shown = answer(path, "uatuuttq")
    assert "nothing to undo" in shown and count == 2
    assert [r["choice"] for r in answers.records] == ["tie", "tie"]
    assert labelling.Answers(path).records == answers.records


def test_a_killed_session_loses_at_most_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answer(path, "ttq")
    whole = path.read_text()
    path.write_text(whole + '{"key": "half')
    assert len(labelling.Answers(path).records) == 2 and path.read_text() == whole
    path.write_text("{\n" + whole)
    with pytest.raises(InputError, match="line 1 is damaged"):
        labelling.Answers(path)


def test_the_command_in_a_terminal(tmp_path: Path) -> None:
    """Single keys, no Enter, on a pseudo-terminal."""
    questions = write(tmp_path / "q.jsonl", *(vars(q) for q in QUESTIONS))
    command = [sys.executable, "-m", "fastlm.lm", "prefs", "label", str(questions)]
    command += ["--out", str(tmp_path / "a.jsonl"), "--annotator", "ann"]
    parent, child = pty.openpty()
    process = subprocess.Popen(command, stdin=child, stdout=subprocess.PIPE, text=True)
    os.close(child)
    assert process.stdout is not None
    for key, place in ((b"a", "1 of 6"), (b"t", "2 of 6"), (b"q", "3 of 6")):
        while place not in (line := process.stdout.readline()):
            assert line, "the command ended early"
        os.write(parent, key)
    output, _ = process.communicate(timeout=60)
    os.close(parent)
    assert process.returncode == 0 and "2 answers" in output
    assert len(labelling.Answers(tmp_path / "a.jsonl").records) == 2


def test_check_counts_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", record(), record(provenance="synthetic:rule"))
    out = tmp_path / "out.jsonl"
    assert cli.main(["prefs", "check", str(path), "--out", str(out)]) == 0
    assert "2 preferences: 1 human, 1 synthetic" in capsys.readouterr().out
    assert len(preferences.load([out])) == 2
    assert cli.main(["prefs", "check", str(tmp_path / "none.jsonl")]) == 3
    (tmp_path / "q.jsonl").write_text('{"prompt": "p", "a": "x"}')
    label = ["prefs", "label", str(tmp_path / "q.jsonl"), "--out", str(out)]
    assert cli.main(label) == 3
    assert "no column 'b'" in capsys.readouterr().err


# ---- a rule instead of a person ------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, better, worse",
    [
        ("quotes", 'He said "no" and went.', 'He said "no and went.'),
        ("quotes", "\u201cNo,\u201d he said.", "\u201cNo, he said."),
        ("sentence", "They went home.\u201d\n", "They went"),
        ("repetition", "a b c d e f g h", "a b c d a b c d"),
        ("variety", "one two three", "one one one"),
    ],
)
def test_a_rule_prefers(rule: str, better: str, worse: str) -> None:
    tie = labelling.Question("p", better, better)
    questions = [
        labelling.Question("p", better, worse),
        tie,
        labelling.Question("q", worse, better),
    ]
    assert synthetic.prefer(questions, rule) == [
        preferences.Preference(prompt, better, worse, f"synthetic:{rule}") for prompt in "pq"
    ]


def test_synthetic_in_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, out = tmp_path / "questions.jsonl", tmp_path / "made.jsonl"
    texts = [("It ends.", "It goes"), ("a.", "b."), ("It goes", "It ends.")]
    labelling.save_questions(asked, [labelling.Question("p", *both) for both in texts])
    command = ["prefs", "synthetic", str(asked), "--rule", "sentence", "--out", str(out)]
    assert cli.main(command) == errors.OK
    said = capsys.readouterr().out
    assert said == "1 of 3 questions left out: ties\n2 preferences: 2 synthetic\n"
    assert {p.provenance for p in preferences.load([out])} == {"synthetic:sentence"}
    assert cli.main([*command[:-3], "quotes", "--out", str(out)]) == errors.BAD_INPUT
    assert "quotes prefers no text to its other one" in capsys.readouterr().err
