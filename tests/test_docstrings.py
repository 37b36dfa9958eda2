"""The code that a docstring gives as the same thing runs, and is the same."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastlm
from fastlm import compat, testing

# those whose code leaves something out, with the test that compares them
ELSEWHERE = {
    "embedding_gru": "test_embedding_gru.py",
    "generate": "test_generation.py",
    "gru": "test_gru_options.py",
    "linear_cross_entropy": "test_linear_cross_entropy.py",
    "linear_policy_loss": "test_linear_policy_loss.py",
    "linear_token_logprobs": "test_token_logprobs.py",
    "swap": "test_swap.py",
}
LAYER = {
    "student": torch.randn(5, 7),
    "student_weight": torch.randn(33, 7),
    "student_bias": torch.randn(33),
    "temperature": 1.5,
}
TEACHER = {"teacher": torch.randn(5, 6), "teacher_weight": torch.randn(33, 6)}
TOP = torch.randn(5, 33).log_softmax(-1).topk(4)
QKV = {name: torch.randn(1, 3, 5, 8) for name in ("q", "k", "v")}
CACHE = {name: torch.randn(1, 6, 2, 8) for name in ("k_cache", "v_cache")}
PAIR = {name: -torch.rand(4) - 0.1 for name in ("chosen", "rejected")}
REF = {f"ref_{name}": -torch.rand(4) for name in PAIR}
TARGET = torch.tensor([0, 32, 5, 7, 11])

# function -> its arguments
CALLS: dict[str, dict[str, Any]] = {
    "attention": {**QKV, "layout": "bhsd"},
    "cpo_loss": PAIR,
    "cross_entropy": {
        "input": torch.randn(5, 33),
        "target": TARGET.int(),
        "weight": None,
        "ignore_index": 5,
        "label_smoothing": 0.1,
    },
    "decode_attention": {"q": torch.randn(1, 1, 4, 8), **CACHE, "cache_seqlens": 4, "n": 4},
    "dpo_loss": PAIR | REF,
    "entropy": {"logits": torch.randn(5, 33), "temperature": 0.7},
    "kto_loss": PAIR | REF | {"kl": torch.rand(3)},
    "linear": {"input": LAYER["student"], "weight": LAYER["student_weight"]},
    "linear_kl_div": LAYER | TEACHER,
    "linear_topk_kl_div": LAYER | {"teacher_logprobs": TOP[0], "teacher_indices": TOP[1]},
    "merge_attention": {
        "outs": [torch.randn(1, 3, 2, 8) for _ in range(2)],
        "lses": [torch.randn(1, 2, 3) for _ in range(2)],
    },
    "orpo_loss": PAIR,
    "reward_loss": {"chosen_reward": torch.randn(4), "rejected_reward": torch.randn(4)},
    "sdpa": {name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")},
    "simpo_loss": PAIR,
    "token_logprobs": {"logits": torch.randn(2, 5, 33), "target": TARGET.expand(2, 5)},
    "token_plan": {"ids": torch.tensor([[4, 1], [4, 0]]), "num_embeddings": 9},
}


def function(name: str) -> Callable[..., Any]:
    return compat.sdpa if name == "sdpa" else getattr(fastlm, name)


def promised(call: Callable[..., Any]) -> str | None:
    """The lines under "Same as"."""
    found = re.search(r"^Same as.*:\n((?: {4}.*\n)+)", inspect.getdoc(call) or "", re.MULTILINE)
    return textwrap.dedent(found.group(1)) if found else None


def evaluated(code: str, names: dict[str, Any]) -> Any:
    """What was assigned to `out` and `lse`, or the value of the last line."""
    *lines, last = ast.parse(code).body
    exec(compile(ast.Module(lines, []), "docstring", "exec"), names)
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "docstring", "eval"), names)
    exec(compile(ast.Module([last], []), "docstring", "exec"), names)
    return names["out"], names["lse"]


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_the_code_is_the_function(name: str) -> None:
    call, code = function(name), promised(function(name))
    assert code is not None
    code = code.replace(".float()", "")  # the truth is float64
    defaults = {p.name: p.default for p in inspect.signature(call).parameters.values()}
    values, form = tree_flatten(CALLS[name])

    def ours(*values: Any) -> list[Tensor]:
        given = tree_unflatten(values, form)
        return tensors(call(**{key: given[key] for key in given if key in defaults}))

    def theirs(*values: Any) -> list[Tensor]:
        names = {"linear": functional.linear, "kl_div": functional.kl_div, "fastlm": fastlm}
        names |= {"torch": torch, "TokenPlan": fastlm.TokenPlan} | defaults
        return tensors(evaluated(code, names | tree_unflatten(values, form)))

    if any(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        testing.check(ours, theirs, values)
    else:
        assert all(map(torch.equal, ours(*values), theirs(*values)))


def test_every_such_docstring_is_here() -> None:
    names = [name for name in fastlm.__all__ if inspect.isfunction(getattr(fastlm, name))]
    found = {name for name in [*names, "sdpa"] if promised(function(name)) is not None}
    assert found == {*CALLS, *ELSEWHERE}
