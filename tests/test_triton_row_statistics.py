"""Row statistics in Triton: what the tests of all backends do not ask.

On a GPU where there is one, else in Triton's interpreter, which test_triton_interpreted.py starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch
from fastlm.ops.row_statistics import op, reference
from fastlm.testing import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if "triton" not in dispatch.ready("row_statistics", DEVICE):
    why = fastlm.backends()["row_statistics"]["triton"]
    pytest.skip(f"{why}; test_triton_interpreted.py runs this file", allow_module_level=True)

from fastlm.ops.row_statistics import triton_kernels  # noqa: E402

pytestmark = pytest.mark.gpu
ALL = op.Wanted(entropy=True, sum_sq=True, weighted_sum=True, argmax=True)
MANY = 70000 if DEVICE == "cuda" else 7  # a program takes milliseconds in the interpreter
backward = dispatch._OPS["row_statistics"]["triton"].backward
assert backward is not None


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def close(got: Tensor, want: Tensor, what: str = "") -> None:
    message = (lambda text: f"{what}: {text}") if what else None
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True, msg=message)


def forward_both(
    logits: Tensor, target: Tensor | None, weight: Tensor | None, *options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs of Triton and of the reference."""
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
            close(a, b, f"output {index}")
        factors = [torch.randn(13) for _ in range(5)]
        saved = (logits, target, weight, want[6], want[7], *factors, -100, scale, softcap)
        close(backward(*saved), reference.backward(*saved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, classes", [(3, 33), (2, 4097), (1, 50257)])
def test_statistics_and_gradients(dtype: torch.dtype, rows: int, classes: int) -> None:
    logits = (torch.randn(rows, classes) * 3).to(dtype)
    target = torch.randint(0, classes, (rows,))

    def ours(logits: Tensor) -> list[Tensor]:
        return list(op.row_statistics(logits, target, None, wanted=ALL)[:5])

    def plain(logits: Tensor) -> list[Tensor]:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        picked = log_p.gather(-1, target[:, None])[:, 0]
        return [picked, z.logsumexp(-1), -(p * log_p).sum(-1), p.square().sum(-1), log_p.sum(-1)]

    # check draws on the CPU
    with fastlm.use_backend("triton"), torch.device("cpu"):
        check(ours, plain, (logits,))


def test_many_rows_with_one_out_of_range_and_no_wait_for_the_device() -> None:
    logits, target = torch.randn(MANY, 3), torch.randint(0, 3, (MANY,))
    target[1], target[MANY - 2] = 3, -100
    leaf = logits.clone().requires_grad_()
    call = _call_without_waiting if DEVICE == "cuda" else _direct_call
    got, dlogits = call(leaf, target)
    want, _ = forward_both(logits, target, None, 1.0, 0.0)
    assert got[1].isnan() and got[MANY - 2] == 0 and int(got.isnan().sum()) == 1
    assert dlogits[1].isnan().all() and int(dlogits.isnan().sum()) == 3
    kept = torch.arange(MANY) != 1
    z = logits.log_softmax(-1).gather(-1, target.clamp(0, 2)[:, None])[:, 0]
    close(got[kept], z.where(target >= 0, 0)[kept])
    close(want[0][kept], got[kept])
    onehot = torch.nn.functional.one_hot(target.clamp(0, 2), 3)
    each = (onehot - logits.softmax(-1)) * (target >= 0)[:, None]
    close(dlogits[kept], each[kept])


def _direct_call(leaf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Beneath the op, which would raise on the CPU."""
    found, _ = forward_both(leaf.detach(), target, None, 1.0, 0.0)
    ones = torch.ones(len(leaf))
    options = (-ones, None, None, None, ones, -100, 1.0, 0.0)
    assert backward is not None
    return found[0], backward(leaf.detach(), target, None, found[6], found[7], *options)


def _call_without_waiting(leaf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Through the op; a wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with fastlm.use_backend("triton"):
            found = op.row_statistics(leaf, target, None, wanted=op.Wanted())
            (dlogits,) = torch.autograd.grad(found.logprob.sum(), leaf)
        return found.logprob.detach(), dlogits
    finally:
        torch.cuda.set_sync_debug_mode(before)


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

    # check draws on the CPU
    with fastlm.use_backend("triton"), torch.device("cpu"):
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
        close(got[4], want[4])
        close(got[8], want[8])
        saved = (logits, target, weight, want[6], want[7], None, None, None, torch.randn(3), None)
        options = (-100, 1.0, 0.0)
        close(backward(*saved, *options), reference.backward(*saved, *options))


def test_a_broadcast_view_is_not_copied() -> None:
    row = torch.randn(1, 33)
    for logits in (row.expand(1 << 20, -1)[:3], torch.ones(1, 1).expand(3, 1 << 12)):
        got, want = forward_both(logits, None, None, 1.0, 0.0)
        for a, b in zip(got, want, strict=True):
            close(a, b)


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
