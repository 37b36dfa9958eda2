"""What the pages in docs/ name exists: tests, functions, arguments."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, is_test, story

import fastlm
import fastlm.compat
import fastlm.lm

SYSTEM = ROOT / "docs" / "system.md"  # of commands, where the others are of functions
PAGES = sorted({*(ROOT / "docs").glob("*.md")} - {SYSTEM})
ROOTS = {"fastlm": fastlm, "nn": fastlm.nn, "torch": torch, "F": torch.nn.functional}


@cache
def known_names() -> set[str]:
    """Public names, and the arguments and fields that go with them."""
    public = [getattr(fastlm, name) for name in fastlm.__all__]
    public += [getattr(fastlm.nn, name) for name in fastlm.nn.__all__]
    names = {*fastlm.__all__, *fastlm.TokenLogprobs._fields}
    for value in filter(callable, public):
        names |= set(inspect.signature(value).parameters)
    return names


def resolved(dotted: str) -> Any:
    """The object, or None."""
    root, *rest = dotted.split(".")
    value = ROOTS.get(root)
    if value is None and root in fastlm.__all__:
        value = getattr(fastlm, root)
    for name in rest:
        value = getattr(value, name, None)
    return value


def complaints_of_call(call: ast.Call) -> Iterator[str]:
    function = resolved(ast.unparse(call.func))
    if function is None:
        yield f"{ast.unparse(call.func)} is no function"
        return
    parameters = inspect.signature(function).parameters
    for keyword in call.keywords:
        if keyword.arg not in parameters:
            yield f"{ast.unparse(call.func)} has no argument {keyword.arg}"


def complaints_of_code(text: str, every_name: bool = True) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        yield f"{text} is no code"
        return
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from complaints_of_call(node)
        if isinstance(node, ast.Attribute):
            inner.add(node.value)
            if node not in inner and resolved(ast.unparse(node)) is None:
                yield f"{ast.unparse(node)} does not exist"
        if isinstance(node, ast.Name) and every_name and node not in inner:
            if node.id not in known_names():
                yield f"{node.id} is no name of fastlm"


def complaints_of_test(reference: str) -> Iterator[str]:
    if not is_test(reference):
        yield f"{reference} does not exist"


def complaints(page: str) -> list[str]:
    found: list[str] = []
    spans = set(re.findall(r"`([^`\n]+)`", page))
    for reference in set(re.findall(r"tests/[\w./]+(?:::\w+)?", page)):
        found += complaints_of_test(reference)
    for dotted in set(re.findall(r"\bfastlm(?:\.\w+)+", page)):
        known = dotted == "fastlm.testing.check" or resolved(dotted) is not None
        found += [] if known else [f"{dotted} does not exist"]
    for span in spans:
        if not span.startswith("tests/") and span != "fastlm.testing.check":
            found += complaints_of_code(span)
    for line in re.findall(r"^    (.*\bfastlm\..*)$", page, re.MULTILINE):
        found += complaints_of_code(line, every_name=False)
    return sorted(set(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert complaints(page.read_text("utf-8")) == []


def test_the_losses_have_a_page_with_their_tests() -> None:
    page = (ROOT / "docs" / "losses.md").read_text("utf-8")
    assert len(set(re.findall(r"tests/\w+\.py::\w+", page))) > 40
    losses = {n for n in fastlm.__all__ if n.endswith(("_loss", "entropy", "logprobs", "_div"))}
    losses.remove("generation_logprobs")  # of tokens that were generated: it stands in gru.md
    assert {name for name in losses if f"`{name}`" not in page} == set()


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """Cells of the rows of the tables below a heading, by the first cell."""
    section = re.split(r"^#+ ", page.partition(heading)[2], maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| (.+) \|$", section, re.MULTILINE)
    return {cells[0]: cells[1:] for cells in (row.split(" | ") for row in rows)}


def unproven(page: str) -> set[str]:
    """Features with a Y for fastlm and no test beside what one types."""
    table = rows_of(page, "## Beside other libraries\n")
    claimed = {feature for feature, cells in table.items() if re.match(r"Y\b", cells[-1])}
    assert claimed
    proofs = rows_of(page, "### What one types, and the test that proves it\n")
    return {f for f in claimed if not re.search(r"`tests/\w+\.py::\w+`", proofs.get(f, [""])[-1])}


def test_the_gru_has_a_page_with_its_tests() -> None:
    page = (ROOT / "docs" / "gru.md").read_text("utf-8")
    assert len(set(re.findall(r"tests/\w+\.py::\w+", page))) > 60
    names = {n for n in fastlm.__all__ if n.endswith("gru") or n.startswith("generat")}
    names |= {"token_plan", *(f"nn.{n}" for n in fastlm.nn.__all__ if "GRU" in n)}
    assert len(names) >= 9
    assert {n for n in names if f"`{n}`" not in page} == set()
    assert unproven(page) == set()


def test_attention_has_a_page_with_its_tests() -> None:
    page = (ROOT / "docs" / "attention.md").read_text("utf-8")
    assert len(set(re.findall(r"tests/\w+\.py::\w+", page))) > 60
    names = {n for n in fastlm.__all__ if "attention" in n} | {"AttnMask"}
    names |= {f"nn.{n}" for n in fastlm.nn.__all__ if "Attention" in n}
    assert len(names) >= 5
    assert {n for n in names if f"`{n}`" not in page} == set()
    assert unproven(page) == set()


@pytest.mark.parametrize("proof", ("", "| a | `gru` | none |", "| b | `gru` | `tests/t.py::t` |"))
def test_a_claim_without_a_test_is_seen(proof: str) -> None:
    page = "## Beside other libraries\n\n| a | – | Y (so) |\n| c | Y | – |\n\n"
    page += "### What one types, and the test that proves it\n\n"
    assert unproven(page + proof) == {"a"}
    assert unproven(page + "| a | `gru` | `tests/t.py::t` |") == set()


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("`tests/test_docs.py::test_nothing`", "tests/test_docs.py::test_nothing does not exist"),
        ("see tests/test_none.py::test_a", "tests/test_none.py::test_a does not exist"),
        ("fastlm.nn.Loss", "fastlm.nn.Loss does not exist"),
        ("`cross_entropy(..., label_smooth=0.1)`", "cross_entropy has no argument label_smooth"),
        (
            "`nn.LinearCrossEntropyLoss(4, 5, lse=1)`",
            "nn.LinearCrossEntropyLoss has no argument lse",
        ),
        ("`nn.GRU(4, 5, zone=1)`", "nn.GRU has no argument zone"),
        ("`nn.GRU.forward(..., length=1)`", "nn.GRU.forward has no argument length"),
        ("`nn.GRUDecoder.steps`", "nn.GRUDecoder.steps does not exist"),
        ("`linear_entropy(input)`", "linear_entropy is no function"),
        ("`max_memory`", "max_memory is no name of fastlm"),
        ("`torch.nothing`", "torch.nothing does not exist"),
        ("`a b`", "a b is no code"),
        ("    loss = fastlm.policy_loss(x, clip=2)", "fastlm.policy_loss has no argument clip"),
    ],
)
def test_a_wrong_name_is_seen(text: str, complaint: str) -> None:
    assert complaint in complaints(text)


def test_right_names_are_not_complained_about() -> None:
    right = """`cross_entropy(..., weight=weight)`, `group`, `nn.GRU`, `torch.compile`, fastlm.gae,
        `tests/test_docs.py::test_right_names_are_not_complained_about`

    loss = fastlm.linear_cross_entropy(hidden, part, target, group=group)
    """
    assert complaints(right) == []


def in_the_system(dotted: str) -> bool:
    """Whether fastlm.lm.MODULE.NAME, or the like, is there."""
    for cut in range(dotted.count(".") + 1, 0, -1):
        parts = dotted.split(".")
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            value = getattr(value, name, None)
        return value is not None
    return False


def unshown(page: str, commands: set[str]) -> list[str]:
    """Rows of requirements that show neither a test that exists nor a command that is run, and what
    they name that is not there."""
    found, ids = [], []
    for heading in ("## What was asked: a GRU", "## What was asked: a Transformer"):
        for name, cells in rows_of(page, heading).items():
            if not re.fullmatch(r"[AB]\d+", name):
                continue
            ids.append(name)
            spans = re.findall(r"`([^`]+)`", cells[-1])
            tests = [span for span in spans if span.startswith("tests/")]
            shown = [span for span in spans if span.startswith(("fastlm ", "make "))]
            found += [f"{name}: {test} does not exist" for test in tests if not is_test(test)]
            for span in shown:
                if not any(command.startswith(span) for command in commands):
                    found.append(f"{name}: no page shows {span}")
            if not tests and not shown:
                found.append(f"{name}: nothing shows it")
    wanted = [f"A{i}" for i in range(1, 18)] + [f"B{i}" for i in range(1, 14)]
    return found + [f"{name}: no row" for name in wanted if name not in ids]


def test_the_system_has_a_page_with_its_requirements() -> None:
    page = SYSTEM.read_text("utf-8")
    commands = {c.command for c in story()}
    assert unshown(page, commands) == []
    for dotted in set(re.findall(r"\bfastlm(?:\.\w+)+", page)):
        assert in_the_system(dotted), dotted
    for reference in set(re.findall(r"tests/[\w./]+\w(?:::\w+)?", page)):
        assert is_test(reference) or (ROOT / reference).is_file(), reference
    for span in re.findall(r"`(fastlm [^`]+)`", page):
        assert any(command.startswith(span) for command in commands), span


def test_a_requirement_that_nothing_shows_is_seen() -> None:
    page = (
        "## What was asked: a GRU\n\n| A1 | x | `tests/test_docs.py::test_none` |\n"
        "| A2 | x | `fastlm fly` |\n| A3 | x | promised |\n"
        "| A4 | x | `tests/test_docs.py::test_right_names_are_not_complained_about` |\n"
        "| A5 | x | `fastlm data` |\n"
    )
    found = unshown(page, {"fastlm data clean"})
    assert found[:3] == [
        "A1: tests/test_docs.py::test_none does not exist",
        "A2: no page shows fastlm fly",
        "A3: nothing shows it",
    ]
    assert found[3:5] == ["A6: no row", "A7: no row"] and len(found) == 3 + 30 - 5
    assert in_the_system("fastlm.lm.folds.variant") and not in_the_system("fastlm.lm.folds.none")
