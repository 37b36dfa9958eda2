"""Row statistics in Triton's interpreter: what the tests of all backends do not ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch
from fastlm.ops.row_statistics import op, reference, triton_kernels
from fastlm.testing import check

ALL = op.Wanted(entropy=True, sum_sq=True, weighted_sum=True, argmax=True)
backward = dispatch._OPS["row_statistics"]["triton"].backward


def forward_both(
    logits: Tensor, target: Tensor | None, weight: Tensor | None, *options: Any
) -> Any:
    args = (logits, target, weight, -100, *options, *ALL, "")
    return op.triton_forward(*args), reference.forward(*args)


@pytest.mark.parametrize("scale, softcap", [(1.0, 0.0), (-0.5, 0.0), (0.0, 0.0), (2.0, 5.0)])
def test_what_is_not_finite_is_as_in_the_reference(scale: float, softcap: float) -> None:
    inf, nan = torch.inf, torch.nan
    classes = triton_kernels.BLOCK + 70  # the second block of a row
    logits = torch.randn(13, classes) * 3
    logits[0, [3, 9]] = nan
    logits[1, -1] = nan
    logits[2, [4, 2100]] = inf
    logits[3, 5] = -inf
    logits[4, :] = -inf
    logits[5, :2060] = -inf
    logits[6, :] = inf
    logits[7, 1], logits[7, 7] = inf, nan
    logits[8, 0], logits[8, 2111] = -3e38, 3e38
    logits[9, :] = nan
    logits[10, :], logits[10, -1] = nan, 1.0
    target = torch.randint(0, classes, (13,))
    target[11] = -100
    target[3] = 5
    for weight in (None, torch.rand(classes)):
        got, want = forward_both(logits, target, weight, scale, softcap)
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            if index == 6:  # row_max of a NaN row serves no purpose
                a, b = a.where(~b.isnan(), 0), b.where(~b.isnan(), 0)
            torch.testing.assert_close(a, b, equal_nan=True, msg=f"output {index}")
        factors = [torch.randn(13) for _ in range(5)]
        saved = (logits, target, weight, want[6], want[7], *factors, -100, scale, softcap)
        torch.testing.assert_close(backward(*saved), reference.backward(*saved), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softcap_near_and_far_from_its_cap(dtype: torch.dtype) -> None:
    logits = torch.cat([torch.randn(4, 300) * s for s in (1e-3, 1.0, 100.0)], 1).to(dtype)
    target = torch.tensor([0, 299, 500, 899])

    def ours(logits: Tensor) -> list[Tensor]:
        return list(op.row_statistics(logits, target, None, wanted=ALL, softcap=3.0)[:4])

    def plain(logits: Tensor) -> list[Tensor]:
        z = (logits / 3.0).tanh() * 3.0
        log_p = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1)
        p = log_p.exp()
        picked = log_p.gather(-1, target[:, None])[:, 0]
        lse = z.to(log_p.dtype).logsumexp(-1)
        return [picked, lse, -(p * log_p).sum(-1), p.square().sum(-1)]

    with fastlm.use_backend("triton"):
        check(ours, plain, (logits,))


def test_argmax_is_of_the_logits_not_of_the_equal_scores() -> None:
    logits = torch.tensor([[50.0, 60.0, 55.0], [-60.0, -50.0, -55.0]])
    for scale in (1.0, -1.0):
        got, want = forward_both(logits, None, None, scale, 1.0)
        assert got[5].tolist() == want[5].tolist()


@pytest.mark.parametrize("wide", [False, True])
def test_weights_of_any_layout(wide: bool) -> None:
    logits, target = torch.randn(3, 70), torch.tensor([1, -100, 69])
    weights = torch.rand(3, 141)[:, 1::2] if wide else torch.rand(141)[1::2]
    kinds = [weights] + ([weights[:1].expand(3, -1), weights.t().contiguous().t()] if wide else [])
    for weight in kinds:
        got, want = forward_both(logits, target, weight, 1.0, 0.0)
        torch.testing.assert_close(got[4], want[4])
        torch.testing.assert_close(got[8], want[8])
        saved = (logits, target, weight, want[6], want[7], None, None, None, torch.randn(3), None)
        options = (-100, 1.0, 0.0)
        torch.testing.assert_close(backward(*saved, *options), reference.backward(*saved, *options))


def test_a_broadcast_view_is_not_copied() -> None:
    row = torch.randn(1, 33)
    for logits in (row.expand(1 << 20, -1)[:3], torch.ones(1, 1).expand(3, 1 << 12)):
        got, want = forward_both(logits, None, None, 1.0, 0.0)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_row_gives_the_same_bits_alone_and_again() -> None:
    logits, target = torch.randn(3, 5000), torch.tensor([3, 4, 4999])
    first, _ = forward_both(logits, target, None, 1.0, 0.0)
    again, _ = forward_both(logits, target, None, 1.0, 0.0)
    alone, _ = forward_both(logits[2:], target[2:], None, 1.0, 0.0)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[2:], c)


class _Recorder:
    """Stands for a kernel and keeps the grid that it would be launched on."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grid = grid
        return lambda *_, **__: None


def test_the_grid_has_one_axis_whatever_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third axis of a grid end at 65535."""
    recorder = _Recorder()
    monkeypatch.setattr(triton_kernels, "forward_kernel", recorder)
    monkeypatch.setattr(triton_kernels, "backward_kernel", recorder)
    rows, classes = 70000, 5000
    logits, per_row = torch.zeros(1, 1).expand(rows, classes), torch.zeros(1).expand(rows)
    triton_kernels.forward(logits, None, None, -100, 1.0, 0.0, (None,) * 9)
    assert recorder.grid == (rows,)
    logits = torch.zeros(classes).expand(rows, -1)
    coefficients = (per_row, None, None, None, None)
    saved = (logits, None, None, per_row, per_row, coefficients, -100, 1.0, 0.0)
    triton_kernels.backward_into(logits, *saved)
    assert recorder.grid == (rows * -(-classes // triton_kernels.BLOCK),)


def test_what_no_grid_can_hold_is_refused() -> None:
    with fastlm.use_backend("triton"), pytest.raises(RuntimeError, match="2\\^30 classes"):
        op.row_statistics(torch.zeros(1, 1).expand(2, 1 << 30), None, None, wanted=op.Wanted())
