"""The compiled matrix product: exact to rounding, the same bits whatever surrounds an element."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


PAIRS = """
import torch
from fastlm import extension, matmul, testing
from test_matmul import RANGES, SHAPES, operand
assert extension.cpu_isa() == "{isa}"
torch.manual_seed(0)
for rows, depth, columns in [*SHAPES, (70, 531, 90), (33, 1024, 40)]:
    for scale_a, scale_b in RANGES:
        # PyTorch takes denormal numbers for 0 in products of more
        if scale_a < 1 and rows * depth * columns <= 16**3:
            continue
        for layout in ("contiguous", "transposed", "sliced"):
            a = operand(rows, depth, layout, torch.float32) * scale_a
            b = operand(depth, columns, layout, torch.float32) * scale_b
            exact = a.bfloat16(), b.bfloat16()
            want = exact[0].double() @ exact[1].double()
            plain = testing.error((exact[0] @ exact[1]).double(), want)
            got = matmul.own_into(torch.empty(rows, columns), *exact)
            floor = testing.FLOOR_EPS * torch.finfo(torch.float32).eps * float(want.abs().max())
            error = testing.error(got.double(), want)
            assert error <= 2 * plain + floor, (rows, depth, columns, scale_a, layout, error, plain)
            # an operand that is rounded while it is packed, and one that was rounded before
            for pair in ((a, exact[1]), (exact[0], b), (a, b)):
                same = matmul.own_into(torch.empty(rows, columns), *pair, round=True)
                assert torch.equal(same, got)
"""

# of the operands: ordinary; sums near the largest float32; a denormal operand; denormal results
RANGES = [(1.0, 1.0), (1e18, 1e18), (1e-39, 1e30), (1e-20, 1e-20)]


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512_bf16"])
def test_products_of_bfloat16_on_every_instruction_set(isa):
    folder = Path(__file__).parent
    env = os.environ | {"FASTLM_CPU_ISA": isa, "PYTHONPATH": f"{folder.parent}:{folder}"}
    command = [sys.executable, "-c", PAIRS.replace("{isa}", isa)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if "does not have it" in done.stderr:
        pytest.skip(f"no {isa} on this processor, or in this build")
    assert done.returncode == 0, done.stderr


def test_rounding_follows_the_nearest_bfloat16():
    """Halfway cases, infinities and NaN, by the packing of either operand."""
    halfway = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.3895314e38, -float("inf"), 0.0])
    values = torch.cat((halfway, torch.tensor([float("nan"), 1.00001]), torch.randn(60)))
    identity = torch.eye(len(values))
    for a, b in ((identity * values.nan_to_num(), identity), (identity, values.repeat(67, 1))):
        got = matmul.own_into(torch.empty(67, 67), a, b, round=True)
        want = a.bfloat16().float() @ b.bfloat16().float()
        assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


def test_mixed_operands_are_rounded_where_that_is_faster(monkeypatch):
    a, b = torch.randn(40, 30), torch.randn(30, 50).bfloat16()
    for pairs in (False, True):
        monkeypatch.setattr(matmul, "own_is_faster", lambda: True)
        monkeypatch.setattr(matmul, "multiplies_pairs", lambda pairs=pairs: pairs)
        got = matmul.into_rounded(torch.empty(40, 50), a, b)
        assert torch.equal(got, matmul.own_into(torch.empty(40, 50), a, b, round=pairs))
        got = matmul.into_rounded(torch.empty(40, 50), a, b.float())
        assert torch.equal(got, matmul.own_into(torch.empty(40, 50), a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_depends_on_its_row_and_column_alone(dtype):
    a, b = torch.randn(200, 300).to(dtype), torch.randn(300, 1100).to(dtype)
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
