"""The README's code runs as printed, and the commands it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

import fastlm
from fastlm.lm.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


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


def test_every_public_function_is_named() -> None:
    functions = {name for name in fastlm.__all__ if name.islower()} - {"nn"}
    assert {name for name in functions if name not in README} == set()


def test_pictures_exist() -> None:
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_commands_parse() -> None:
    lines = re.findall(r"^    fastlm ([a-z].*?)(?:  +#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        if not line.startswith("bench"):  # has a parser of its own, run in tests/test_bench.py
            build_parser().parse_args(shlex.split(line))
