"""Row statistics: every statistic and its gradient, on every backend."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import fastlm
from fastlm import dispatch
from fastlm.dispatch import ready
from fastlm.ops.row_statistics import half, op, reference
from fastlm.testing import FLOATS, LAYOUTS, check, strided

BACKENDS = ready("row_statistics")
REFUSED = {"cpu": (torch.float64,), "triton": (torch.float64,)}
ALL = op.Wanted(entropy=True, sum_sq=True, weighted_sum=True, argmax=True)
SIZES = [(1, 1), (3, 2), (7, 33), (2, 63), (2, 64), (2, 65), (5, 257), (3, 4097), (2, 50257)]


def make(rows, classes, dtype=torch.float32, spread=3.0):
    logits = (torch.randn(rows, classes, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(0, classes, (rows,))
    if rows > 2:
        target[1] = -100
    return logits, target


def floats(found):
    return [v for v in found[:5] if v.numel()]


def plain(scale=1.0, softcap=0.0, weight=None):
    """The same five numbers by ordinary PyTorch."""

    def run(logits, target):
        z = logits if softcap == 0 else torch.tanh(logits / softcap) * softcap
        z = (z * scale).to(torch.promote_types(z.dtype, torch.float32))
        kept = target != -100
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        w = torch.ones(()) if weight is None else weight
        found = (
            log_p.gather(-1, target.where(kept, 0)[:, None])[:, 0],
            z.logsumexp(-1),
            -(p * log_p).sum(-1),
            p.square().sum(-1),
            (w.to(z.dtype) * log_p).sum(-1),
        )
        return [torch.where(kept, f, 0.0) for f in found]

    return run


def ours(scale=1.0, softcap=0.0, weight=None):
    def run(logits, target):
        dtype = op.result_dtype(logits)
        found = op.row_statistics(
            logits,
            target,
            None if weight is None else weight.to(dtype),
            wanted=ALL,
            scale=scale,
            softcap=softcap,
        )
        return floats(found)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize("rows, classes", SIZES)
def test_statistics_and_gradients(backend, dtype, rows, classes):
    if dtype in REFUSED.get(backend, ()):
        logits, target = make(2, 5, dtype)
        with fastlm.use_backend(backend), pytest.raises(RuntimeError, match="takes float32"):
            op.row_statistics(logits, target, None, wanted=ALL)
        return
    if dtype == torch.float64 and classes > 5000:
        return  # the truth is then one float64 sum in another order
    with fastlm.use_backend(backend):
        check(ours(), plain(), make(rows, classes, dtype))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels")
@pytest.mark.parametrize("each", [False, True])
def test_float16_in_pieces(monkeypatch, each):
    monkeypatch.setattr(half, "_ELEMENTS", 100)  # 3 of 7 rows, the last piece shorter
    logits, target = make(7, 33, torch.float16)
    weight = torch.rand((7, 33) if each else (33,), dtype=torch.float64)
    with fastlm.use_backend("cpu"):
        check(ours(0.5, 0.0, weight), plain(0.5, 0.0, weight), (logits, target))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale, softcap", [(0.5, 0.0), (-1.5, 0.0), (1.25, 5.0), (-1.0, 2.0)])
@pytest.mark.parametrize("weights", ["none", "class", "each"])
def test_scale_softcap_weight(backend, scale, softcap, weights):
    logits, target = make(6, 131)
    shape = {"none": None, "class": (131,), "each": (6, 131)}[weights]
    weight = None if shape is None else torch.rand(shape, dtype=torch.float64)
    with fastlm.use_backend(backend):
        options = (scale, softcap, weight)
        check(ours(*options), plain(*options), (logits, target))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, layout, dtype):
    logits, target = make(5, 77, dtype)
    with fastlm.use_backend(backend):
        want = ours()(logits, target)
        leaf = strided(logits, layout).detach().requires_grad_()
        got = ours()(leaf, strided(target, layout))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        # stride-0 upstream of .sum()
        sum(g.sum() for g in got).backward()
        whole = logits.clone().requires_grad_()
        sum(g.sum() for g in ours()(whole, target)).backward()
        torch.testing.assert_close(leaf.grad, whole.grad)


@pytest.mark.parametrize("forward, backward", list(itertools.product(BACKENDS, BACKENDS)))
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_any_forward_with_any_backward(forward, backward, softcap):
    logits, target = make(6, 300)

    def total(found):
        return sum((f * (i + 1)).sum() for i, f in enumerate(found))

    leaf = _leaf(logits)
    want = torch.autograd.grad(total(plain(0.7, softcap)(leaf, target)), leaf)[0]
    leaf = _leaf(logits)
    with fastlm.use_backend(forward):
        found = ours(0.7, softcap)(leaf, target)
    with fastlm.use_backend(backward):
        got = torch.autograd.grad(total(found), leaf)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _leaf(value):
    return value.detach().clone().requires_grad_()


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradcheck_of_each_statistic(index, softcap):
    logits, target = make(4, 7, torch.float64, spread=1.0)
    weight = torch.rand(4, 7, dtype=torch.float64, requires_grad=True)

    def one(logits, weight):
        found = op.row_statistics(logits, target, weight, wanted=ALL, scale=0.8, softcap=softcap)
        return found[index]

    assert torch.autograd.gradcheck(one, (logits.requires_grad_(), weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(5))
def test_upstream_on_one_statistic_alone(backend, index):
    logits, target = make(5, 50)
    with fastlm.use_backend(backend):
        check(
            lambda *a: ours()(*a)[index],
            lambda *a: plain()(*a)[index],
            (logits, target),
            seed=index,
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1e4, -1e4, -120.0])
def test_large_logits(backend, value):
    logits, target = make(4, 300)
    with fastlm.use_backend(backend):
        check(ours(), plain(), (logits + value, target))
        check(ours(), plain(), (logits * value, target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_as_log_softmax(backend):
    logits, target = make(6, 40)
    logits[0, 3] = torch.nan
    logits[2, 4] = torch.inf
    logits[3, :] = -torch.inf
    logits[4, ::2] = -torch.inf
    target[4], target[5] = 1, 0
    leaf, twin = _leaf(logits), _leaf(logits)
    want = twin.log_softmax(-1).gather(-1, target.where(target >= 0, 0)[:, None])[:, 0]
    with fastlm.use_backend(backend):
        got = op.row_statistics(leaf, target, None, wanted=ALL)
        got.logprob.sum().backward()
    want.where(target >= 0, 0.0).sum().backward()
    kept = target >= 0
    torch.testing.assert_close(got.logprob[kept], want[kept], equal_nan=True)
    torch.testing.assert_close(leaf.grad[kept], twin.grad[kept], equal_nan=True)
    assert not leaf.grad[~kept].any()
    # classes of probability 0 have no entropy, rather than 0 * -inf
    assert got.entropy[4].isfinite() and int(got.argmax[0]) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_row_keeps_a_nan_gradient_under_upstream_zero(backend):
    logits = torch.randn(2, 9)
    logits[0, 2] = torch.nan
    leaf = _leaf(logits)
    with fastlm.use_backend(backend):
        found = op.row_statistics(leaf, torch.tensor([1, 1]), None, wanted=op.Wanted())
        (found.logprob * torch.tensor([0.0, 0.0])).sum().backward()
    assert leaf.grad[0].isnan().all() and not leaf.grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_takes_the_first_of_equals(backend, dtype):
    logits = torch.zeros(5, 9000, dtype=dtype)
    logits[1, [8000, 5000, 8999]] = 2
    logits[2, 8999] = 1
    logits[3, :] = -torch.inf
    logits[4, [4095, 4096]] = 3
    with fastlm.use_backend(backend):
        found = op.row_statistics(logits, None, None, wanted=op.Wanted(argmax=True))
        assert found.argmax.tolist() == [0, 5000, 8999, 0, 4095]
        found = op.row_statistics(
            -logits[:3], None, None, wanted=op.Wanted(argmax=True), scale=-1.0
        )
        assert found.argmax.tolist() == [0, 5000, 8999]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(backend, poisoned):
    logits, target = make(5, 70)
    leaf = _leaf(logits)
    with fastlm.use_backend(backend):
        found = op.row_statistics(leaf, target, None, wanted=ALL)
        sum(f.sum() for f in floats(found)).backward()
    assert all(f.isfinite().all() for f in floats(found)) and leaf.grad.isfinite().all()
    assert int(found.argmax[1]) == -1 and not any(f[1] for f in floats(found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    leaf = torch.zeros(0, 7, requires_grad=True)
    with fastlm.use_backend(backend):
        found = op.row_statistics(leaf, torch.zeros(0, dtype=torch.int64), None, wanted=ALL)
        found.entropy.sum().backward()
    assert found.logprob.shape == (0,) and leaf.grad.shape == (0, 7)


def run_bits(threads, logits, target):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaf = _leaf(logits)
        found = op.row_statistics(leaf, target, None, wanted=ALL)
        sum(f.sum() for f in floats(found)).backward()
        return [*found, leaf.grad]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows, classes", [(37, 1001), (3, 40000)])
def test_same_bits_for_any_threads_and_any_split_of_the_rows(rows, classes):
    logits, target = make(rows, classes)
    want = run_bits(1, logits, target)
    for threads in (2, 3):
        for a, b in zip(run_bits(threads, logits, target), want, strict=True):
            assert torch.equal(a, b)
    for row in (0, rows - 1):
        one = slice(row, row + 1)
        for a, b in zip(run_bits(2, logits[one], target[one]), want, strict=True):
            assert torch.equal(a, b[one])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels")
def test_more_than_2_to_the_31_elements():
    row = torch.randn(1, 1 << 20)
    rows = 2049
    logits = row.expand(rows, -1)
    target = torch.arange(rows) * 500
    with fastlm.use_backend("cpu"):
        got = op.row_statistics(logits, target, None, wanted=op.Wanted())
    want = row.double().log_softmax(-1)[0, target].float()
    torch.testing.assert_close(got.logprob, want)
    # both strides 0: a copy would take 8 GiB
    flat = torch.ones(1, 1).expand(1 << 11, (1 << 20) + 1)
    with fastlm.use_backend("cpu"):
        got = op.row_statistics(flat[:8], target[:8], None, wanted=op.Wanted())
    torch.testing.assert_close(got.logprob, torch.full((8,), -13.8629446))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [True, False])
def test_opcheck(backend, target):
    logits, index = make(4, 6)
    index = index if target else None
    args = (logits, index, torch.rand(6), -100, 0.5, 3.0, True, True, True, True, "test")
    with fastlm.use_backend(backend):
        torch.library.opcheck(torch.ops.fastlm.row_statistics.default, args)
        found = torch.ops.fastlm.row_statistics(*args)
        factors = [torch.randn(4) for _ in range(4)] + [torch.randn(4) if target else None]
        args = (logits, index, torch.rand(6), found[6], found[7], *factors, -100, 0.5, 3.0)
        torch.library.opcheck(torch.ops.fastlm.row_statistics_backward.default, args)


ISA_SCRIPT = """
import torch
from fastlm.ops.row_statistics import op, reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for classes in (3, 16, 61, 4099):
        x = (torch.randn(4, classes) * 3).to(dtype)
        t = torch.randint(0, classes, (4,))
        w = torch.rand(classes)
        options = (-100, 0.7, 3.0)
        got = op.cpu_forward(x, t, w, *options, True, True, True, True, "")
        want = reference.forward(x, t, w, *options, True, True, True, True, "")
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        factors = [torch.randn(4) for _ in range(5)]
        saved = (x, t, w, want[6], want[7])
        a = torch.empty_like(x)
        op.cpu_backward_into(a, *saved, factors, *options)
        b = reference.backward(*saved, *factors, *options)
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    env = dict(os.environ, FASTLM_CPU_ISA=isa)
    done = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT], env=env, capture_output=True, text=True
    )
    if "does not have it" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [5, -1, 2**40, -(2**40)])
def test_target_outside_the_classes_is_nan_in_the_kernels(backend, index):
    forward = {"cpu": op.cpu_forward, "triton": op.triton_forward}.get(backend, reference.forward)
    logits = torch.randn(2, 5)
    target = torch.tensor([index, 1])
    found = forward(logits, target, None, -100, 1.0, 0.0, False, False, False, False, "")
    assert found[0][0].isnan() and found[0][1].isfinite()
    if backend == "cpu":
        return  # its op has checked
    on_target = torch.randn(2)
    options = (-on_target, None, None, None, on_target, -100, 1.0, 0.0)
    backward = dispatch._OPS["row_statistics"][backend].backward
    dlogits = backward(logits, target, None, found[6], found[7], *options)
    assert dlogits[0].isnan().all() and dlogits[1].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("size", [1e4, 1e12, 1e30])
def test_equal_logits_of_any_size_with_a_temperature(size, softcap):
    logits = torch.full((3, 50), size).requires_grad_()
    found = fastlm.token_logprobs(
        logits, torch.tensor([0, 7, 49]), temperature=1 / 0.7, logit_softcapping=softcap
    )
    torch.testing.assert_close(found, torch.full((3,), -math.log(50)))
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert bool(grad.isfinite().all())
