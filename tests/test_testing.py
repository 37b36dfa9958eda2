"""The oracle fails when it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlm import testing


def plain(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sin()


class WrongGradient(torch.autograd.Function):
    """Right forward; the gradient of x is off by one part in a thousand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return plain(x, y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        d = dout * (x * y).cos()
        return d * y * 1.001, d * x


@pytest.fixture
def args() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 7), torch.randn(5, 7)


@pytest.mark.parametrize("dtype", testing.FLOATS)
def test_equal_and_differently_rounded_results_pass(dtype: torch.dtype) -> None:
    args = (torch.randn(5, 7).to(dtype), torch.randn(5, 7).to(dtype))
    testing.check(plain, plain, args)
    testing.check(lambda x, y: (y.double() * x.double()).sin().to(dtype), plain, args)


def test_wrong_gradient(args: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(AssertionError, match="gradient 0: error"):
        testing.check(WrongGradient.apply, plain, args)


def test_missing_gradient(args: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(AssertionError, match="gradient 1: error"):
        testing.check(lambda x, y: plain(x, y.detach()), plain, args)
    with pytest.raises(AssertionError, match="1 results, expected 3"):
        testing.check(lambda x, y: plain(x, y).detach(), plain, args)


def test_slightly_wrong_output(args: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(AssertionError, match="output 0: error"):
        testing.check(lambda x, y: plain(x, y) * 1.00001, plain, args)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element(args: tuple[Tensor, Tensor], bad: float) -> None:
    def ours(x: Tensor, y: Tensor) -> Tensor:
        return plain(x, y).index_put((torch.tensor([4]), torch.tensor([6])), torch.tensor([bad]))

    with pytest.raises(AssertionError, match="output 0: error inf"):
        testing.check(ours, plain, args)


def test_a_finite_value_where_the_truth_is_nan() -> None:
    with pytest.raises(AssertionError, match="output 0: error inf"):
        testing.check(lambda x: x.sqrt().nan_to_num(), torch.sqrt, (torch.tensor([-1.0, 4.0]),))
    testing.check(torch.sqrt, torch.sqrt, (torch.tensor([-1.0, 4.0]),))


def test_plain_that_overflows_allows_nothing() -> None:
    x = torch.full((3,), 300.0, dtype=torch.float16)
    with pytest.raises(AssertionError, match="output 0: error inf"):
        testing.check(lambda x: x * x / 300, lambda x: x * x / 300, (x,))


def test_unwritten_output(args: tuple[Tensor, Tensor], poisoned: None) -> None:
    def forgets_the_last_row(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:-1] = plain(x, y)[:-1].detach()
        return out + 0 * plain(x, y)

    with pytest.raises(AssertionError, match="output 0: error inf"):
        testing.check(forgets_the_last_row, plain, args)


def test_written_input(args: tuple[Tensor, Tensor]) -> None:
    def scribbles(x: Tensor, y: Tensor) -> Tensor:
        out = plain(x, y)
        y.data.zero_()
        return out.detach() + 0 * x

    with pytest.raises(AssertionError, match="argument 1 was written to"):
        testing.check(scribbles, plain, args)


def test_wrong_shape_and_number_of_outputs(args: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(AssertionError, match=r"shapes \[\[7, 5\]\], expected \[\[5, 7\]\]"):
        testing.check(lambda x, y: plain(x, y).T, plain, args)
    with pytest.raises(AssertionError, match="outputs of shapes"):
        testing.check(lambda x, y: (plain(x, y), x), plain, args)


@pytest.mark.parametrize("kind", testing.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (0, 4), (6,), ()])
def test_strided_keeps_the_values(kind: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    other = testing.strided(value, kind)
    assert torch.equal(other, value)
    if kind in ("transposed", "sliced") and len(shape) > 1 and value.numel():
        assert not other.is_contiguous()
    if kind == "offset" and shape:
        assert other.storage_offset() == 3
