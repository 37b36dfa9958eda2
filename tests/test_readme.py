"""The README's code runs as printed, and so does every command there and in docs/system.md.

The commands tell one story in one folder, on little text and few steps: what a run adds to one
stands in `RUNS`. A command without a run, and a run without a command, fail.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pages import ROOT, STORY, Shown, is_test, matches, shown, story

import fastlm
from fastlm.lm import cli, data

README = (ROOT / "README.md").read_text("utf-8")
SYSTEM = (ROOT / "docs" / "system.md").read_text("utf-8")

# what the beginning of a command gets behind it, so that it takes a second: later options win
_FEW = "--count 24 --tokens 24 --prompt-tokens 8"
RUNS = {
    "fastlm doctor": "",
    "fastlm data": "",
    "fastlm data tokenize": "--vocab 300",
    "fastlm train": "--budget 40steps --hidden 32 --evals 4 --lr 0.02",
    "fastlm train --data tokens/ --model transformer": "--budget 2steps --hidden 32 --evals 1",
    "fastlm train --out": "--budget 44steps",
    "fastlm train --config": "--budget 2steps --evals 1",
    "fastlm train --pairs": "--budget 2steps --evals 1 --longest 64",
    "fastlm plan": "",
    "fastlm generate": "--max-new-tokens 20",
    "fastlm eval": "--samples 16",
    "fastlm cv": "--budget 0.1s --vocab 300",
    "fastlm summarize": "",
    "fastlm summarize runs/summaries": "--max-new-tokens 4",
    "fastlm dpo": "--budget 2steps",
    "fastlm report": "",
    "fastlm prefs sample": "--count 4 --tokens 20",
    "fastlm prefs label": "",
    "fastlm prefs check": "",
    "fastlm prefs synthetic": "",
    "fastlm prefs from-model": _FEW,
    "fastlm reward": "--budget 4steps --hidden 16",
    "fastlm rl": "--budget 2steps --batch 8 --group 4 --length 8 --prompt 8",
    "fastlm bench recall": "--budget 2steps --distance 8 --batch 2",
}
# what is typed at those that ask
TYPED = {"fastlm prefs label": "a\nb\nt\nq\n"}
# how many lines at the beginning are the model's own words, which are not compared
OWN_WORDS = {"fastlm generate": 99, "fastlm summarize": 1, "fastlm summarize runs/summaries": 2}
# not run here: why, or the test that runs it
EXCEPTIONS = {
    "make demo": "tests/test_lm_demo.py::test_every_phase_and_criterion",
    "make torture": "tests/test_lm_torture.py::test_twenty_kills_and_some_more",
    "make test": "it is what runs this",
    "pip install": "it installs; .venv is set up by the Makefile, in CI too",
    "torchrun": "tests/test_lm_distributed.py::test_torchrun",
    "fastlm bench model": "tests/test_bench.py::test_bench_model_agrees_and_reports",
}


@dataclass(frozen=True)
class Done:
    code: int | str | None
    out: str
    err: str


def longest(command: str, table: Mapping[str, object]) -> str | None:
    """The entry that a command begins with, the longest one."""
    words = command.split()
    found = [key for key in table if key.split() == words[: len(key.split())]]
    return max(found, key=len, default=None)


def write_inputs(folder: Path) -> None:
    """books/ with three texts, one of them twice and nearly so, and a web page."""
    texts = {document.name: document.text for document in data.load().documents}
    books = folder / "books"
    books.mkdir()
    for name in ("emma", "persuasion", "prideprejudice"):
        (books / f"{name}.txt").write_text(texts[name][5000:30000])
    again = texts["persuasion"][5000:30000].replace("Russell", "Benwick")
    (books / "reprint.txt").write_text(again)
    (books / "letter.html").write_text("<h1>A letter</h1><p>I am, dear madam, your servant.</p>")
    (folder / "chapter.txt").write_text(texts["persuasion"][6000:12000])
    docstrings = data.AUSTEN.parent / "docstrings" / "pairs.jsonl.gz"
    with gzip.open(docstrings, "rt", encoding="utf-8") as file:
        (folder / "summaries.jsonl").write_text("".join(next(file) for _ in range(80)))
    (folder / "prompts.txt").write_text("Captain Wentworth\nShe had never\n")
    (folder / "summary.txt").write_text("Sir Walter Elliot reads the Baronetage. He is vain.")


def run(command: Shown) -> Done:
    entry = longest(command.command, RUNS)
    assert entry is not None, command.command
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("sys.stdin", io.StringIO(TYPED.get(entry, "")))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        code: int | str | None
        try:
            code = cli.main([*command.words[1:], *RUNS[entry].split()])
        except SystemExit as stopped:
            code = stopped.code
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path, here = tmp_path_factory.mktemp("story"), Path.cwd()
    write_inputs(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        os.chdir(path)
        yield path
        os.chdir(here)


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Done]:
    """Every command once, in the order of the pages, each in what those before it left."""
    found: dict[str, Done] = {}
    for command in story():
        if longest(command.command, RUNS) and command.command not in found:
            found[command.command] = run(command)
    return found


def run_here() -> list[Shown]:
    return [command for command in story() if longest(command.command, EXCEPTIONS) is None]


@pytest.mark.parametrize("command", run_here(), ids=lambda c: f"{c.page} {c.command}"[:70])
def test_command(done: dict[str, Done], command: Shown) -> None:
    assert command.command in done, f"{command.page} shows a command that has no entry in RUNS"
    found = done[command.command]
    assert found.code == 0, found.err
    if command.output is not None:
        own = OWN_WORDS.get(longest(command.command, OWN_WORDS) or "", 0)
        expected, printed = (
            "\n".join(text.strip("\n").split("\n")[own:]) for text in (command.output, found.out)
        )
        assert found.out.strip() and matches(expected, printed), found.out


def test_no_entry_is_left_over() -> None:
    used = {longest(c.command, EXCEPTIONS) or longest(c.command, RUNS) for c in story()}
    assert used >= {*RUNS, *EXCEPTIONS}, {*RUNS, *EXCEPTIONS} - used
    for reason in EXCEPTIONS.values():
        assert not reason.startswith("tests/") or is_test(reason), reason


def test_every_command_of_fastlm_is_shown() -> None:
    verbs = {c.words[1] for c in story() if c.words[0] == "fastlm"} | {"demo"}  # by make demo
    assert verbs >= {*cli._COMMANDS, "bench"}


def test_a_session_has_its_output() -> None:
    """Each page shows commands, and the system's page what they print."""
    assert all(any(c.page == path.name for c in story()) for path in STORY)
    assert sum(c.output is not None for c in story()) > 10


def test_commands_are_found_and_outputs_compared() -> None:
    page = (
        "text\n\n    make demo    # this\n    loss = 1\n\n```bash\nfastlm a \\\n    --b  # c\n\n"
        "pip install x\n```\n\n"
        "```console\n$ fastlm d 'e f'\n1,024 of it   (5.0%)\n...\nend\n$ g\n```\n"
    )
    found = [(c.command, c.output) for c in shown(page, "p")]
    output = "1,024 of it   (5.0%)\n...\nend\n"
    assert found == [
        ("make demo", None),
        ("fastlm a --b", None),
        ("pip install x", None),
        ("fastlm d 'e f'", output),
        ("g", ""),
    ]
    assert matches(output, "7 of it (12.25%)\nmore\nand more\nend\n")
    assert matches(output, "7 of it (12.25%)\nend")
    for other in (
        "7 of it (x%)\nend",
        "7 of it (1%)",
        "7 of them (1%)\nend",
        "7 of it (1%)\nend\nx",
    ):
        assert not matches(output, other)
    assert matches("a ... z-1e-05 -> .5 0:42", "a b c z+2 -> .25 10:07") and not matches("", "x")
    assert matches("403 MiB, 0:20, 8GiB", "1.08 GiB, 2:00:00, 8GiB")
    assert not matches("403 MiB", "403 MB") and not matches("0:20", "soon")


def test_code_runs() -> None:
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    given = {
        "fastlm": fastlm,
        "hidden": torch.randn(6, 8),
        "head": torch.nn.Linear(8, 11),
        "vocabulary_head": torch.nn.Linear(512, 10000),
        "target": torch.randint(0, 11, (6,)),
        "tokens": torch.randint(0, 10000, (2, 3)),
        "logits": torch.randn(2, 3, 11),
        "t": 0,
        "advantages": torch.randn(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "document_ids": torch.tensor([[0, 0, 1, 1]]),
    }
    given |= {name: torch.randn(1, 4, 2, 16) for name in "qkv"}
    exec(code, given)
    assert given["loss"].shape == () and given["out"].shape == (1, 4, 2, 16)
    assert given["output"].shape == (2, 3, 512)


def test_the_same_in_python(done: dict[str, Done], capsys: pytest.CaptureFixture[str]) -> None:
    """The system's page, on the text that its commands cleaned."""
    (code,) = re.findall(r"```python\n(.*?)```", SYSTEM, re.DOTALL)
    assert '"2epochs"' in code and "2048" in code
    code = code.replace('"2epochs"', '"3steps"').replace("2048", "300")
    exec(code, {})
    assert "bits/byte" in capsys.readouterr().out


def test_every_public_function_is_named() -> None:
    functions = {name for name in fastlm.__all__ if name.islower()} - {"nn"}
    assert {name for name in functions if name not in README} == set()


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
