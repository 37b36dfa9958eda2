"""An op defined through library.define is a torch op like any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm import checks, dispatch, library

NAME = "library_test_scale"


def _fake(x: Tensor, factor: float = 2.0, index: Tensor | None = None) -> Tensor:
    return torch.empty_like(x)


def _check(named: dict[str, Any]) -> None:
    if named["index"] is not None:
        checks.index_range(NAME, "index", named["index"], 4, None)


def _scale(x: Tensor, factor: float, index: Tensor | None) -> Tensor:
    return x * factor


SCHEMA = "(Tensor x, float factor=2.0, Tensor? index=None) -> Tensor"
SCALE = library.define(NAME, "forward", SCHEMA, _fake, _check)
BACKWARD = library.define(NAME, "backward", "(Tensor dout) -> Tensor", torch.empty_like)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    dispatch.register(NAME, "reference", _scale, lambda dout: dout * 2)
    with fastlm.use_backend(None):
        yield
    del dispatch._OPS[NAME]


def test_names() -> None:
    assert SCALE is torch.ops.fastlm.library_test_scale.default
    assert BACKWARD is torch.ops.fastlm.library_test_scale_backward.default


def test_default_arguments_reach_the_kernel() -> None:
    x = torch.arange(3.0)
    assert torch.equal(SCALE(x), 2 * x)
    assert torch.equal(SCALE(x, 5.0), 5 * x)
    assert torch.equal(SCALE(x, factor=3.0, index=None), 3 * x)


def test_the_kernel_asks_dispatch_at_every_call() -> None:
    dispatch.register(
        NAME, "cpu", lambda x, factor, index: x - factor, refuses=lambda x, factor, index: None
    )
    x = torch.arange(3.0)
    assert torch.equal(SCALE(x), x - 2)
    with fastlm.use_backend("reference"):
        assert torch.equal(SCALE(x), 2 * x)
    with fastlm.use_backend("triton"), pytest.raises(RuntimeError, match="triton: not written"):
        SCALE(x)


def test_values_are_checked_before_any_backend_runs() -> None:
    with pytest.raises(IndexError, match=r"index must be in \[0, 4\), got 4 at \[1\]"):
        SCALE(torch.zeros(2), 1.0, torch.tensor([0, 4]))


def test_values_are_checked_under_compile_too() -> None:
    compiled = torch.compile(lambda x, i: SCALE(x, 1.0, i), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2), torch.tensor([0, 3])).shape == (2,)
    with pytest.raises(IndexError, match="got 4"):
        compiled(torch.zeros(2), torch.tensor([0, 4]))


def test_opcheck() -> None:
    torch.library.opcheck(SCALE, (torch.randn(3), 4.0, torch.tensor([1])))
    torch.library.opcheck(BACKWARD, (torch.randn(2, 3),))


def test_compiles_whole_with_any_size() -> None:
    compiled = torch.compile(lambda x: SCALE(x) + 1, fullgraph=True, dynamic=True, backend="eager")
    for size in (1, 3, 8):
        x = torch.randn(size)
        assert torch.equal(compiled(x), 2 * x + 1)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @library.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * dout


def test_a_second_derivative_raises_however_it_is_asked_for() -> None:
    def square(x: Tensor) -> Tensor:
        return _Square.apply(x).sum()

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for allow_unused in (False, True):
        (first,) = torch.autograd.grad(square(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(first.sum(), x, allow_unused=allow_unused)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.functional.hessian(square, x.detach())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.functional.hvp(square, x.detach(), torch.ones(3).double())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.gradgradcheck(square, x)


def test_the_first_derivative_with_a_graph_under_a_checkpoint() -> None:
    """It hands out what was saved once."""
    x = torch.randn(3, requires_grad=True)
    out = checkpoint(_Square.apply, x, use_reentrant=False)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * x)
