"""The compiled matrix product: exact to rounding, the same bits whatever surrounds an element."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fastlm
from fastlm import extension, matmul, testing

pytestmark = pytest.mark.skipif(
    extension.unavailable is not None, reason=f"no compiled library: {extension.unavailable}"
)

# one, less and more than a tile, a panel, a block of rows, of columns, of the depth
SHAPES = [(1, 1, 1), (12, 128, 32), (13, 129, 33), (5, 300, 17), (130, 70, 65), (121, 257, 1030)]


def operand(rows: int, columns: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    return testing.strided(torch.randn(rows, columns).to(dtype), layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_b", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("of_a", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("rows, depth, columns", SHAPES)
def test_matches_float64(rows, depth, columns, of_a, of_b, dtype):
    a, b = operand(rows, depth, of_a, dtype), operand(depth, columns, of_b, dtype)
    bias, start = torch.randn(columns), torch.randn(rows, columns)
    for accumulate in (False, True):
        begin = start if accumulate else bias
        want = a.double() @ b.double() + begin
        plain = testing.error((a.float() @ b.float() + begin).double(), want)
        # a part of a wider matrix: the rest of it must stay
        wide = torch.full((rows, columns + 5), 7.0)
        out = wide[:, 2 : columns + 2]
        out.copy_(start if accumulate else float("nan"))
        matmul.own_into(out, a, b, None if accumulate else bias, accumulate=accumulate)
        floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(want.abs().max())
        assert testing.error(out.double(), want) <= 2 * plain + floor
        assert bool((wide[:, :2] == 7).all() and (wide[:, columns + 2 :] == 7).all())


def test_broadcast_operands():
    a = torch.randn(1, 70).expand(20, 70)
    b = torch.randn(70, 1).expand(70, 40)
    out = torch.empty(20, 40)
    matmul.own_into(out, a, b)
    torch.testing.assert_close(out, a.contiguous() @ b.contiguous())
    for bias in (torch.randn(80)[::2], torch.randn(1).expand(40), torch.randn(41)[1:]):
        matmul.own_into(out, a, b, bias)
        torch.testing.assert_close(out, a.contiguous() @ b.contiguous() + bias)


def test_an_element_depends_on_its_row_and_column_alone():
    a, b = torch.randn(200, 300), torch.randn(300, 1100)
    whole = matmul.own_into(torch.empty(200, 1100), a, b)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 6):
            torch.set_num_threads(count)
            assert torch.equal(matmul.own_into(torch.empty(200, 1100), a, b), whole)
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (3, 10), (7, 200)):
        part = matmul.own_into(torch.empty(end - begin, 1100), a[begin:end], b)
        assert torch.equal(part, whole[begin:end])
    part = matmul.own_into(torch.empty(200, 41), a, b[:, 30:71])
    assert torch.equal(part, whole[:, 30:71])
    other = b.t().contiguous().t()
    assert torch.equal(matmul.own_into(torch.empty(200, 1100), a, other), whole)


def test_not_finite_values_stay_in_their_row_and_column():
    a, b = torch.randn(30, 40), torch.randn(40, 50)
    clean = matmul.own_into(torch.empty(30, 50), a, b)
    a[7, 3], b[5, 11] = float("nan"), float("inf")
    out = matmul.own_into(torch.empty(30, 50), a, b)
    assert bool(out[7].isnan().all())
    assert not bool(out[:7, 11].isfinite().any())
    rest = torch.ones(30, 50, dtype=torch.bool)
    rest[7], rest[:, 11] = False, False
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("own", [False, True])
def test_into_takes_every_shape(own, monkeypatch):
    monkeypatch.setattr(matmul, "own_is_faster", lambda: own)
    for rows, depth, columns in ((0, 3, 4), (3, 0, 40), (1, 64, 64), (64, 64, 1), (16, 32, 48)):
        a, b = torch.randn(rows, depth), torch.randn(depth, columns)
        bias, out = torch.randn(columns), torch.empty(rows, columns)
        assert matmul.into(out, a, b, bias) is out
        torch.testing.assert_close(out, a @ b + bias)
        matmul.into(out, a, b, accumulate=True)
        torch.testing.assert_close(out, 2 * (a @ b) + bias)
        doubled = matmul.into(out.double(), a.double(), b.double())
        torch.testing.assert_close(doubled, a.double() @ b.double())
    if own:
        half = torch.randn(3, 5).bfloat16()
        assert matmul.takes_mixed(half) and not matmul.takes_mixed(half.half())
        out = matmul.into(torch.empty(3, 2), half, torch.randn(5, 2))
        assert out.dtype == torch.float32
        empty = matmul.into(torch.empty(3, 2), half[:, :0], torch.randn(0, 2))
        assert bool((empty == 0).all())


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [None, 1])
def test_half_operands_for_a_float32_result(adds, dtype, budget, monkeypatch):
    """What runs on a GPU whose PyTorch has such products; here they are emulated."""
    calls = {"mm": 0, "addmm": 0}

    def product(out, a, b):
        assert a.dtype == b.dtype == dtype and out.dtype == torch.float32
        return a.float() @ b.float()

    def wide_mm(out, a, b):
        calls["mm"] += 1
        out.copy_(product(out, a, b))

    def wide_addmm(out, a, b):
        calls["addmm"] += 1
        out.add_(product(out, a, b))

    monkeypatch.setattr(matmul, "_wide_mm", wide_mm)
    monkeypatch.setattr(matmul, "_wide_addmm", wide_addmm)
    monkeypatch.setattr(
        matmul, "_has", lambda product, kind, _: kind == dtype and (adds or product is wide_mm)
    )
    x, w, bias = torch.randn(100, 24), torch.randn(70, 24) * 0.2, torch.randn(70)
    target = torch.randint(0, 70, (100,))
    options = fastlm.LinearCrossEntropyOptions(
        max_memory_bytes=budget, batch_chunk_size=None if budget else 30
    )

    def ours(x, w, bias):
        return fastlm.linear_cross_entropy(x, w, target, linear_bias=bias, options=options)

    def plain(x, w, bias):
        return functional.cross_entropy(functional.linear(x, w, bias), target)

    with fastlm.use_backend("reference"):
        testing.check(ours, plain, [value.to(dtype) for value in (x, w, bias)])
    assert calls["mm"] > 0
    assert (calls["addmm"] > 0) == adds
