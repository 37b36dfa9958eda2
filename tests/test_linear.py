"""The linear layer: PyTorch's results and derivatives, whoever multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastlm
from fastlm import dispatch, extension, matmul, testing
from fastlm.ops.linear import op

SHAPES = [((9, 16), 24), ((1, 8, 17), 25), ((3, 5, 33), 40), ((2, 70, 130), 65)]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our product on every processor and for every size that it takes."""
    if extension.unavailable:
        pytest.skip(f"no compiled library: {extension.unavailable}")
    monkeypatch.setattr(matmul, "own_is_faster", lambda: True)
    monkeypatch.setattr(op, "_LEAST_WORK", 0)
    yield


def make(shape: tuple[int, ...], columns: int, dtype: Any = torch.float32) -> list[Tensor]:
    sizes = (shape, (columns, shape[-1]), (columns,))
    return [torch.randn(size, dtype=dtype) for size in sizes]


def runs(*args: Any) -> list[str | None]:
    return [step.chosen for step in fastlm.explain("linear", *args)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("shape, columns", SHAPES)
def test_matches_float64(own: None, shape: Any, columns: int, layout: str, with_bias: bool) -> None:
    args = [testing.strided(x, layout) for x in make(shape, columns)]
    args = args if with_bias else args[:2]
    assert runs(*args) == ["cpu"]
    testing.check(fastlm.linear, functional.linear, args)


@pytest.mark.parametrize("backend", dispatch.ready("linear"))
def test_every_backend(own: None, backend: str) -> None:
    with fastlm.use_backend(backend):
        args = make((3, 12, 20), 30)
        assert runs(*args) == [backend]
        testing.check(fastlm.linear, functional.linear, args)


@pytest.mark.parametrize("dtype", testing.FLOATS)
@pytest.mark.parametrize("shape, columns", [((0, 5), 7), ((2, 0, 5), 7), ((5,), 7), ((3, 5), 0)])
def test_what_pytorch_does_is_pytorch(dtype: Any, shape: Any, columns: int) -> None:
    args = make(shape, columns, dtype)
    assert runs(*args) == ["torch"]
    assert torch.equal(fastlm.linear(*args), functional.linear(*args))


def test_other_dtypes_and_autocast_are_pytorchs(own: None) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert runs(*make((9, 32), 40, dtype)) == ["torch"]
    args = make((9, 32), 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert runs(*args) == ["torch"]
        assert fastlm.linear(*args).dtype == torch.bfloat16


def test_upstream_gradient_of_stride_zero(own: None) -> None:
    def total(call: Any) -> Any:
        return lambda *args: call(*args).sum()

    args = make((3, 12, 20), 30)
    testing.check(total(fastlm.linear), total(functional.linear), args)


def test_second_derivative(own: None) -> None:
    def norm(call: Any) -> Any:
        """A function of first derivatives, so that its gradient is of the second kind."""

        def run(*args: Tensor) -> Tensor:
            with torch.enable_grad():  # the check asks for shapes without
                leaves = [a if a.requires_grad else a.clone().requires_grad_() for a in args]
                out = call(*leaves).square().sum()
                grads = torch.autograd.grad(out, leaves, create_graph=True)
                return torch.stack([g.square().sum() for g in grads]).sum()

        return run

    testing.check(norm(fastlm.linear), norm(functional.linear), make((9, 20), 30))


def test_only_needed_gradients(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    input, weight, bias = make((9, 20), 30)
    calls = 0
    product = op._product

    def counted(*args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return product(*args)

    monkeypatch.setattr(op, "_product", counted)
    fastlm.linear(input, weight.requires_grad_(), bias).sum().backward()
    assert calls == 1 and weight.grad is not None and weight.grad.is_contiguous()


def test_a_row_does_not_depend_on_others(own: None) -> None:
    input, weight, bias = make((40, 20), 30)
    whole = fastlm.linear(input, weight, bias)
    assert torch.equal(fastlm.linear(input[3:12], weight, bias), whole[3:12])


def test_compiles_to_one_graph(own: None) -> None:
    compiled = torch.compile(fastlm.linear, fullgraph=True, dynamic=True)
    for rows in (12, 9):
        args = make((2, rows, 20), 30)
        assert torch.equal(compiled(*args), fastlm.linear(*args))
        testing.check(compiled, functional.linear, args)


def test_opcheck(own: None) -> None:
    input, weight, bias = make((9, 20), 30)
    for given in ((input, weight, bias), (input, weight, None)):
        torch.library.opcheck(torch.ops.fastlm.linear.default, given)


@pytest.mark.parametrize("shapes", [((3, 4), (5, 6)), ((3, 4), (5, 4), (6,)), ((), (3, 4))])
def test_refusals_are_pytorchs(shapes: Any) -> None:
    args = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(RuntimeError) as theirs:
        functional.linear(*args)
    with pytest.raises(RuntimeError) as ours:
        fastlm.linear(*args)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(TypeError, match=r"fastlm.linear: input must be a tensor, got list"):
        fastlm.linear([1.0], args[1])  # type: ignore[arg-type]
