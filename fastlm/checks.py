"""Argument checks of public functions: one error format, written once.

fastlm.OP: WHAT must be EXPECTED, got ACTUAL; REMEDY
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _message(op: str, what: str, expected: object, got: object, remedy: str) -> str:
    tail = f"; {remedy}" if remedy else ""
    return f"fastlm.{op}: {what} must be {expected}, got {got}{tail}"


def bad_value(op: str, what: str, expected: object, got: object, remedy: str = "") -> NoReturn:
    raise ValueError(_message(op, what, expected, got, remedy))


def bad_type(op: str, what: str, expected: object, got: object, remedy: str = "") -> NoReturn:
    raise TypeError(_message(op, what, expected, got, remedy))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(op: str, what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        bad_type(op, what, "a tensor", type(value).__name__)


def readable(value: Tensor) -> bool:
    """Whether a look at the values costs nothing: a GPU would be waited for, a trace has none."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return fakes is None or not isinstance(value, fakes.FakeTensor)


def floating(op: str, what: str, value: Tensor) -> None:
    tensor(op, what, value)
    if value.dtype not in FLOATS:
        bad_type(op, what, "float64, float32, float16 or bfloat16", short(value.dtype))


def integer(op: str, what: str, value: Tensor) -> None:
    tensor(op, what, value)
    if value.dtype not in INTEGERS:
        bad_type(op, what, "an integer tensor", short(value.dtype), "call .long()")


def same_dtype(op: str, what: str, value: Tensor, as_what: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        bad_type(op, what, f"{short(other.dtype)} (as {as_what})", short(value.dtype))


def same_device(op: str, what: str, value: Tensor, as_what: str, other: Tensor) -> None:
    if value.device != other.device:
        bad_value(op, what, f"on {other.device} (as {as_what})", f"a tensor on {value.device}")


def shape(op: str, what: str, value: Tensor, expected: Sequence[int | None], why: str = "") -> None:
    """Exact sizes; None stands for any."""
    if value.shape == expected:
        return
    fits = value.dim() == len(expected) and all(
        want is None or have == want for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        text = "[" + ", ".join("*" if n is None else str(n) for n in expected) + "]"
        bad_value(op, what, text + (f" ({why})" if why else ""), list(value.shape))


def one_of(op: str, what: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        bad_value(op, what, "one of " + ", ".join(map(repr, choices)), repr(value))


def index_range(op: str, what: str, index: Tensor, size: int, ignore_index: int | None) -> None:
    """On the CPU an index outside [0, size) raises IndexError with its value and position.

    On a GPU this would be a host synchronisation: kernels give NaN in that row instead.
    """
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low >= 0 and high < size:
        return
    outside = (index < 0) | (index >= size)
    if ignore_index is not None:
        outside &= index != ignore_index
    if not bool(outside.any()):
        return
    position = outside.nonzero()[0].tolist()
    allowed = f"in [0, {size})" + ("" if ignore_index is None else f" or {ignore_index}")
    got = f"{int(index[tuple(position)])} at {position}"
    raise IndexError(_message(op, what, allowed, got, ""))
