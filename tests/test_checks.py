"""One error format: fastlm.OP: WHAT must be EXPECTED, got ACTUAL; REMEDY."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from fastlm import checks

F, I64 = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: checks.tensor("op", "x", 3), TypeError, "op: x must be a tensor, got int"),
        (
            lambda: checks.floating("op", "x", I64),
            TypeError,
            "op: x must be float64, float32, float16 or bfloat16, got int64",
        ),
        (
            lambda: checks.integer("op", "target", F),
            TypeError,
            "op: target must be an integer tensor, got float32; call .long()",
        ),
        (
            lambda: checks.integer("op", "target", torch.zeros(1, dtype=torch.bool)),
            TypeError,
            "op: target must be an integer tensor, got bool; call .long()",
        ),
        (
            lambda: checks.same_dtype("op", "k", F.double(), "q", F),
            TypeError,
            "op: k must be float32 (as q), got float64",
        ),
        (
            lambda: checks.same_device("op", "k", F, "q", torch.zeros(1, device="meta")),
            ValueError,
            "op: k must be on meta (as q), got a tensor on cpu",
        ),
        (
            lambda: checks.shape("op", "x", F, [2, None, 3]),
            ValueError,
            "op: x must be [2, *, 3], got [2, 3]",
        ),
        (
            lambda: checks.shape("op", "x", F, [2, 4], "as weight"),
            ValueError,
            "op: x must be [2, 4] (as weight), got [2, 3]",
        ),
        (
            lambda: checks.one_of("op", "reduction", "avg", ("mean", "sum")),
            ValueError,
            "op: reduction must be one of 'mean', 'sum', got 'avg'",
        ),
        (
            lambda: checks.bad_value("op", "x", "positive", -1, "use abs()"),
            ValueError,
            "op: x must be positive, got -1; use abs()",
        ),
    ],
)
def test_message(call: Callable[[], None], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{re.escape('fastlm.' + text)}$"):
        call()


def test_good_values_pass() -> None:
    checks.floating("op", "x", F.half())
    for dtype in checks.INTEGERS:
        checks.integer("op", "target", I64.to(dtype))
    checks.shape("op", "x", F, [None, 3])
    checks.shape("op", "x", torch.zeros(()), [])
    checks.same_dtype("op", "k", F, "q", F)
    checks.same_device("op", "k", F, "q", F)
    checks.one_of("op", "reduction", "sum", ("mean", "sum"))


@pytest.mark.parametrize("dtype", checks.INTEGERS)
def test_index_range_names_value_and_position(dtype: torch.dtype) -> None:
    index = torch.tensor([[0, 1], [2, 7]], dtype=dtype)
    checks.index_range("op", "target", index, 8, None)
    with pytest.raises(IndexError, match=r"target must be in \[0, 7\), got 7 at \[1, 1\]$"):
        checks.index_range("op", "target", index, 7, None)


def test_index_range_negative_ignored_empty_and_scalar() -> None:
    index = torch.tensor([0, -100, 3])
    checks.index_range("op", "target", index, 4, -100)
    with pytest.raises(IndexError, match=r"in \[0, 4\), got -100 at \[1\]"):
        checks.index_range("op", "target", index, 4, None)
    with pytest.raises(IndexError, match=r"in \[0, 3\) or -100, got 3 at \[2\]"):
        checks.index_range("op", "target", index, 3, -100)
    checks.index_range("op", "target", index[:0], 0, None)
    with pytest.raises(IndexError, match=r"got 5 at \[\]"):
        checks.index_range("op", "target", torch.tensor(5), 5, None)


def test_index_range_does_not_read_a_device() -> None:
    checks.index_range("op", "target", torch.empty(3, dtype=torch.int64, device="meta"), 2, None)
