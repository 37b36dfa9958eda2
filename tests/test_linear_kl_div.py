"""Distillation losses: float64 against PyTorch's own kl_div, all gradients, memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import dispatch, testing
from fastlm.dispatch import ready
from fastlm.ops.linear_kl_div import loop, op, reference

KINDS = ("forward", "reverse", "jsd")
FLOAT64 = torch.float64
BACKENDS = ready("linear_kl_div")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.use_backend(request.param):
        yield request.param


@pytest.fixture
def widest(backend):
    """What the backend takes at most; the truth is float64."""
    return FLOAT64 if backend == "reference" else torch.float32


def chunked(rows: int, classes: int, itemsize: int = 8) -> fastlm.LinearCrossEntropyOptions:
    return fastlm.LinearCrossEntropyOptions(max_memory_bytes=4 * rows * classes * itemsize)


def make(rows: int, features: int, wide: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    """student, student_weight, student_bias, teacher, teacher_weight, teacher_bias."""
    shapes = ((rows, features), (classes, features), (classes,))
    shapes += ((rows, wide), (classes, wide), (classes,))
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def ours(**options):
    def run(student, weight, bias, teacher, teacher_weight, teacher_bias):
        args = (student, weight, teacher.detach(), teacher_weight.detach())
        biases = {"student_bias": bias, "teacher_bias": teacher_bias.detach()}
        return fastlm.linear_kl_div(*args, **biases, **options)

    return run


def log_softmax(x: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Logits in float32 at least, which is what ours promises."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return (F.linear(x.to(wide), weight.to(wide), bias) / temperature).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def plain(divergence="forward", beta=0.5, temperature=1.0, reduction="mean", mask=None):
    def run(student, weight, bias, teacher, teacher_weight, teacher_bias):
        log_q = log_softmax(student, weight, bias, temperature)
        log_p = log_softmax(teacher, teacher_weight, teacher_bias, temperature).detach()
        if divergence == "forward":
            value = kl(log_p, log_q)
        elif divergence == "reverse":
            value = kl(log_q, log_p)
        else:
            parts = (log_p + math.log(beta), log_q + math.log1p(-beta))
            log_m = torch.stack(parts).logsumexp(0)
            value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        if mask is not None:
            value = value[mask]
        return {"mean": value.mean, "sum": value.sum, "none": value.clone}[reduction]()

    return run


def agree(ours, plain, args):
    """Value and gradients, plain in float64, to the digits of the arguments' dtype."""
    results = []
    for run, dtype in ((ours, args[0].dtype), (plain, FLOAT64)):
        student, weight, bias, *rest = [a.detach().to(dtype) for a in args]
        leaves = [a.clone().requires_grad_() for a in (student, weight, bias)]
        value = run(*leaves, *rest)
        upstream = torch.linspace(-1, 2, max(1, value.numel()), dtype=dtype).view_as(value)
        found = (value, *torch.autograd.grad(value, leaves, upstream))
        results.append([x.to(args[0].dtype) for x in found])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (7, 5, 3, 33), (70, 9, 17, 129), (3, 4, 4, 9001)])
@pytest.mark.parametrize("divergence", KINDS)
def test_as_accurate_as_plain(backend, divergence, shape, dtype):
    for reduction in ("mean", "none"):
        options = {"divergence": divergence, "reduction": reduction}
        testing.check(ours(**options), plain(**options), make(*shape, dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", KINDS)
def test_options_and_chunks(backend, widest, divergence, reduction):
    options = {"divergence": divergence, "temperature": 1.7, "reduction": reduction, "beta": 0.3}
    args = make(11, 4, 6, 10, widest)
    for rows in (1, 4, 11):
        by_rows = fastlm.LinearCrossEntropyOptions(batch_chunk_size=rows)
        for chunks in (chunked(rows, 10), by_rows):
            agree(ours(**options, options=chunks), plain(**options), args)


def test_the_docstring():
    student, weight, bias, teacher, teacher_weight, teacher_bias = make(6, 3, 4, 9, FLOAT64)
    temperature = 2.0
    log_q = (F.linear(student, weight, bias) / temperature).log_softmax(-1)
    log_p = (F.linear(teacher, teacher_weight, teacher_bias) / temperature).log_softmax(-1)
    want = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    args = (student, weight, teacher, teacher_weight)
    biases = {"student_bias": bias, "teacher_bias": teacher_bias}
    got = fastlm.linear_kl_div(*args, **biases, temperature=temperature)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("divergence", KINDS)
def test_one_class_is_certain(backend, divergence):
    args = [a.requires_grad_() for a in make(3, 2, 2, 1, torch.float32)]
    loss = ours(divergence=divergence)(*args)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(a.grad.abs().max()) == 0 for a in args[:3])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("divergence", KINDS)
def test_gradcheck(divergence):
    args = make(4, 3, 2, 5, FLOAT64)
    leaves = [a.requires_grad_() for a in args[:3]]
    weight = torch.randn(4, dtype=FLOAT64, requires_grad=True)
    for reduction in ("mean", "none"):
        options = {"divergence": divergence, "reduction": reduction, "options": chunked(3, 5)}

        def run(w, *a, options=options):
            return ours(token_weight=w, **options)(*a, *args[3:])

        for per_token in (weight, weight.detach()):
            assert torch.autograd.gradcheck(run, [per_token, *leaves])


def test_ends_of_beta(backend, widest):
    args = make(5, 3, 4, 7, widest)
    for beta, other in ((0, "forward"), (1, "reverse")):
        assert torch.equal(ours(divergence="jsd", beta=beta)(*args), ours(divergence=other)(*args))
    for beta in (1e-7, 1e-3, 1 - 1e-3):
        agree(ours(divergence="jsd", beta=beta), plain("jsd", beta), args)
    # where one of the distributions hardly counts, the other's divergence stays finite
    for beta in (1e-30, 1 - 1e-12):
        assert bool(ours(divergence="jsd", beta=beta)(*args).isfinite())


def test_jsd_is_bounded_and_symmetric(backend, widest):
    student, weight, bias, teacher, teacher_weight, teacher_bias = make(5, 3, 4, 7, widest)
    far = ours(divergence="jsd", reduction="none")(
        100 * student, weight, bias, 100 * teacher, teacher_weight, teacher_bias
    )
    last_digits = testing.FLOOR_EPS * torch.finfo(widest).eps
    assert bool((far >= -last_digits).all()) and bool((far <= math.log(2) + last_digits).all())
    there = ours(divergence="jsd")(student, weight, bias, teacher, teacher_weight, teacher_bias)
    back = ours(divergence="jsd")(teacher, teacher_weight, teacher_bias, student, weight, bias)
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize("divergence", KINDS)
def test_equal_models_have_no_gradient(backend, divergence):
    student, weight, bias, *_ = make(5, 3, 4, 7, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (student, weight, bias)]
    loss = ours(divergence=divergence)(*leaves, student, weight, bias)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert all(float(x.grad.abs().max()) < 1e-6 for x in leaves)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_nothing_behind_the_mask_counts(backend, widest, divergence, elsewhere, monkeypatch):
    """NaN in masked rows of student, teacher and weight; and as on a device, where rows are not
    chosen but zeroed."""
    if elsewhere:
        monkeypatch.setattr(loop, "_on_cpu", lambda value: False)
    args = make(7, 3, 4, 10, widest)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1])
    per_token = torch.rand(7, dtype=widest)
    want_args = [a.requires_grad_() for a in args]
    each = plain(divergence, reduction="none")(*want_args)
    want = (each * per_token)[mask == 1].sum() / 4
    args, per_token = [a.detach().clone() for a in args], per_token.clone()
    for value in (args[0], args[3], per_token):
        value[mask == 0] = math.nan
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "options": chunked(2, 10), "token_weight": per_token}
        leaves = [a.clone().requires_grad_() for a in args]
        got = ours(divergence=divergence, mask=mask, **options)(*leaves)
        if reduction == "none":
            assert bool((got[mask == 0] == 0).all())
            got = got.sum() / 4
        torch.testing.assert_close(got, want)
        expected = torch.autograd.grad(want, want_args[:3], retain_graph=True)
        for a, b in zip(torch.autograd.grad(got, leaves[:3]), expected, strict=True):
            torch.testing.assert_close(a, torch.where(b == 0, 0.0, b))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [0, 4])
def test_no_token_at_all(backend, rows, reduction):
    args = [a.requires_grad_() for a in make(rows, 3, 4, 5, torch.float32)]
    loss = ours(mask=torch.zeros(rows), reduction=reduction)(*args)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(bool((a.grad == 0).all()) for a in args[:3])
    if rows == 0:
        assert float(ours()(*args).detach()) == 0
        assert ours(reduction="none")(*args).shape == (0,)


@pytest.mark.parametrize("divergence", KINDS)
def test_classes_taken_out(backend, widest, divergence):
    """-inf in both biases is a smaller vocabulary; where only the student may, it costs nothing."""
    args = make(5, 3, 4, 9, widest)
    kept = torch.tensor([0, 2, 3, 6, 7])
    small = [args[0], args[1][kept], args[2][kept], args[3], args[4][kept], args[5][kept]]
    small = [a.requires_grad_() for a in small]
    gone = torch.ones(9, dtype=torch.bool)
    gone[kept] = False
    args[2][gone] = args[5][gone] = -math.inf
    leaves = [a.clone().requires_grad_() for a in args]
    want, got = (ours(divergence=divergence)(*a) for a in (small, leaves))
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, small[:3])
    found = torch.autograd.grad(got, leaves[:3])
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a[kept], b)
        assert bool((a[gone] == 0).all())
    teacher_only = [*args[:2], torch.where(gone, 0.0, args[2]), *args[3:]]
    value = ours(divergence=divergence)(*teacher_only)
    assert bool(value.isfinite()) == (divergence != "reverse")


def test_large_logits(backend):
    args = make(6, 4, 4, 50, torch.float32)
    args[0] *= 1e4
    leaves = [a.requires_grad_() for a in args]
    for divergence in KINDS:
        loss = ours(divergence=divergence)(*leaves)
        grads = torch.autograd.grad(loss, leaves[:3])
        assert bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_and_upstream(backend, widest, reduction):
    args = make(6, 3, 4, 9, widest)
    leaves = [a.requires_grad_() for a in args[:3]]
    got = ours(reduction=reduction)(*leaves, *args[3:])
    want = plain(reduction=reduction)(*leaves, *args[3:])
    first = torch.autograd.grad(got.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(got.sum(), leaves, retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b)
    for factor in (-2.5, 0.0):
        upstream = factor * torch.randn_like(want)
        a = torch.autograd.grad(got, leaves, upstream, retain_graph=True)
        b = torch.autograd.grad(want, leaves, upstream, retain_graph=True)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts(backend, widest, reduction):
    for learns in ((True, False, False), (False, True, False), (False, False, True)):
        args = make(6, 3, 4, 9, widest)
        leaves = [a.requires_grad_(r) for a, r in zip(args, learns, strict=False)]
        learning = [a for a in leaves if a.requires_grad]
        got = ours(reduction=reduction)(*leaves, *args[3:]).sum()
        want = plain(reduction=reduction)(*leaves, *args[3:]).sum()
        found = torch.autograd.grad(got, learning)
        torch.testing.assert_close(found, torch.autograd.grad(want, learning))


def test_no_gradient_for_the_teacher(backend):
    student, weight, _, *teacher = [a.requires_grad_() for a in make(6, 3, 4, 9, torch.float32)]
    for reduction in ("sum", "none"):
        loss = fastlm.linear_kl_div(
            student, weight, *teacher[:2], teacher_bias=teacher[2], reduction=reduction
        )
        loss.sum().backward()
    assert all(x.grad is None for x in teacher) and student.grad is not None
    frozen = fastlm.linear_kl_div(student.detach(), weight.detach(), *teacher[:2])
    assert not frozen.requires_grad


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(backend, widest, reduction):
    args = [a.requires_grad_() for a in make(3, 2, 2, 4, widest)]
    loss = ours(reduction=reduction)(*args).sum()
    (grad,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.usefixtures("kernels")
def test_teacher_of_another_dtype():
    student, weight, bias, teacher, *head = make(5, 3, 4, 9, torch.float32)
    half = [x.bfloat16() for x in (teacher, *head)]
    got = ours()(student, weight, bias, *half)
    torch.testing.assert_close(got, ours()(student, weight, bias, *(x.float() for x in half)))
    with pytest.raises(TypeError, match="teacher must be at most float32 .as student., got float6"):
        ours()(student, weight, bias, *(x.double() for x in half))
    with pytest.raises(TypeError, match="teacher must be float64 .as student., got bfloat16"):
        ours()(*(x.double() for x in (student, weight, bias)), *half)


def test_shapes_and_layouts(backend, widest):
    student, weight, bias, teacher, *head = make(6, 3, 4, 9, widest)
    want = ours(reduction="none")(student, weight, bias, teacher, *head)
    cube = ours(reduction="none")(student.view(2, 3, 3), weight, bias, teacher.view(2, 3, 4), *head)
    assert torch.equal(cube, want.view(2, 3))
    for kind in testing.LAYOUTS:
        args = [testing.strided(x, kind) for x in (student, weight, bias, teacher, *head)]
        torch.testing.assert_close(ours(reduction="none")(*args), want)
    one = [student[:1].expand(6, 3), weight, bias, teacher[:1].expand(6, 4), *head]
    torch.testing.assert_close(ours()(*one), want[0])
    vector = ours()(student[0], weight, bias, teacher[0], *head)
    torch.testing.assert_close(vector, want[0])


def test_every_element_is_written(backend, poisoned):
    for dtype in (torch.float32, torch.bfloat16):
        for mask in (None, torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])):
            args = [a.requires_grad_() for a in make(9, 5, 4, 30, dtype)]
            for divergence in KINDS:
                ours(divergence=divergence, mask=mask, options=chunked(4, 30, 4))(*args).backward()
            assert all(bool(a.grad.isfinite().all()) for a in args[:3])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_compile(reduction, masked):
    _, weight, bias, _, *head = make(5, 4, 3, 11, torch.float32)
    weight.requires_grad_()

    def run(x, t, mask):
        options = {"divergence": "jsd", "reduction": reduction, "mask": mask if masked else None}
        return 3 * ours(**options)(x, weight, bias, t, *head).sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        x, t = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 3)
        mask = torch.rand(rows) < 0.7
        want, got = run(x, t, mask), compiled(x, t, mask)
        torch.testing.assert_close(got, want)
        found = torch.autograd.grad(got, (x, weight))
        torch.testing.assert_close(found, torch.autograd.grad(want, (x, weight)))


def test_opcheck(backend):
    args = make(5, 3, 4, 7, torch.float32)
    keep = torch.tensor([True, False, True, True, True])
    for row_weight, needs in ((torch.randn(5), (True, False, True)), (None, (False,) * 3)):
        rest = (keep, row_weight, "jsd", 0.3, 0.7, 400, *needs)
        torch.library.opcheck(torch.ops.fastlm.linear_kl_div.default, (*args, *rest))


def exactly(value: Tensor) -> Tensor:
    """NaN and both infinities as 3, 1 and -1; 0 elsewhere."""
    return value.isnan() * 3 + value.isposinf() * 1 - value.isneginf() * 1


@pytest.mark.parametrize("divergence", KINDS)
def test_what_is_not_finite_is_as_in_the_reference(backend, divergence):
    """Infinite and NaN logits of either, at the edges of vectors and blocks."""
    rows, classes = 14, 4096 + 70
    logits, theirs = torch.randn(2, rows, classes) * 3
    inf, nan = math.inf, math.nan
    at = [0, 15, 16, 4095, 4096, classes - 1]
    for row, (ours_are, theirs_are) in enumerate(
        [(nan, 0), (0, nan), (inf, 0), (0, inf), (-inf, 0), (0, -inf), (-inf, -inf), (inf, inf)]
    ):
        if ours_are:
            logits[row, at] = ours_are
        if theirs_are:
            theirs[row, at] = theirs_are
    logits[8] = theirs[9] = -inf
    logits[10, :-1] = theirs[10, :-1] = -inf  # one class is left
    logits[11, 1:] = theirs[11, :-1] = -inf  # nothing in common
    logits[12, 7] = theirs[12, 7] = 1e4  # all others underflow
    logits[13] = theirs[13] = 1e30
    kernel = {"cpu": op._compiled, "triton": op._triton}.get(backend)
    if kernel is None:
        pytest.skip("the reference is what the others are compared with")
    for factor in (None, torch.linspace(-1, 2, rows)):
        options = (factor, divergence, 0.3, 0.7)
        got = kernel(logits.clone(), theirs.clone(), *options)
        scratch = torch.empty(2, rows, classes)
        want = reference.divergence(logits.clone(), theirs.clone(), *options, *scratch)
        for a, b in zip(got[: 1 if factor is None else 2], want, strict=False):
            assert torch.equal(exactly(a), exactly(b))
            finite = b.isfinite()
            torch.testing.assert_close(a[finite], b[finite], rtol=1e-5, atol=1e-5)


def test_a_row_gives_the_same_bits_alone_and_on_any_number_of_threads(backend):
    args = make(9, 5, 4, 5000, torch.float32)
    if backend == "reference":
        pytest.skip("plain PyTorch promises no order")
    logits = [F.linear(args[0], args[1]), F.linear(args[3], args[4])]
    factor = torch.randn(9)
    kernel = {"cpu": op._compiled, "triton": op._triton}[backend]

    def found(rows, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        chunk = [x[rows].clone() for x in logits]
        result = kernel(*chunk, factor[rows].clone(), "jsd", 0.3, 0.7)
        torch.set_num_threads(before)
        return result

    everything = found(slice(None), 2)
    for value, again in zip(everything, found(slice(None), 1), strict=True):
        assert torch.equal(value, again)
    for value, alone in zip(everything, found(slice(3, 4), 1), strict=True):
        assert torch.equal(value[3:4], alone)


def test_confident_models(backend):
    """Most of both on one class."""
    student, weight, bias, teacher, *head = make(6, 3, 4, 9, torch.float32)
    bias[2], head[1][2] = 5.0, 7.0
    for divergence in KINDS:
        for reduction in ("mean", "none"):
            options = {"divergence": divergence, "reduction": reduction}
            testing.check(
                ours(**options), plain(**options), [student, weight, bias, teacher, *head]
            )


@pytest.mark.usefixtures("kernels")
def test_which_backend_takes_a_call():
    args = make(3, 2, 2, 5, FLOAT64)
    names = ("student", "student_weight", "teacher", "teacher_weight")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, FLOAT64):
        layer = [args[i].to(dtype) for i in (0, 1, 3, 4)]
        call = dict(zip(names, layer, strict=True))
        (found,) = fastlm.explain("linear_kl_div", **call)
        compiled = "cpu" in BACKENDS and dtype != FLOAT64
        assert found.chosen == ("cpu" if compiled else "reference")
        for name in BACKENDS:
            if name == "reference" or dtype != FLOAT64:
                continue
            with fastlm.use_backend(name), pytest.raises(RuntimeError, match="not float64"):
                fastlm.linear_kl_div(**call)
    assert not dispatch._OPS["linear_kl_div"]["triton"].proven


def test_autocast_no_grad_and_inference():
    head, teacher_head = torch.nn.Linear(6, 10), torch.nn.Linear(4, 10)
    x, t = torch.randn(5, 6), torch.randn(5, 4)

    def run(x, t):
        biases = {"student_bias": head.bias, "teacher_bias": teacher_head.bias}
        return fastlm.linear_kl_div(x, head.weight, t, teacher_head.weight, **biases)

    want = kl(teacher_head(t).log_softmax(-1), head(x).log_softmax(-1)).mean()
    with torch.autocast("cpu", torch.bfloat16):
        half = run(x.bfloat16(), t)
    assert half.dtype == torch.float32
    half.backward()
    assert head.weight.grad.dtype == torch.float32 and teacher_head.weight.grad is None
    torch.testing.assert_close(half, want, rtol=2e-2, atol=2e-2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = run(x, t)
            torch.testing.assert_close(got, want)
            assert not got.requires_grad


MEMORY_SCRIPT = """
import resource, sys, torch, torch.nn.functional as F, fastlm
torch.set_num_threads(1)
def run(rows, classes):
    x, w = torch.randn(rows, 16, requires_grad=True), torch.randn(classes, 16, requires_grad=True)
    t, tw = torch.randn(rows, 16), torch.randn(classes, 16)
    w.grad, x.grad = torch.zeros_like(w), torch.zeros_like(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.argv[1] == "plain":
        with torch.no_grad():
            p = F.linear(t, tw).log_softmax(-1)
        q = F.linear(x, w).log_softmax(-1)
        F.kl_div(q, p, reduction="batchmean", log_target=True).backward()
    else:
        fastlm.linear_kl_div(x, w, t, tw, divergence=sys.argv[1]).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
run(8, 1000)
print(run(1024, 10000))
"""


def test_memory_is_a_small_share_of_plains():
    peak = {}
    for which in ("plain", "forward", "jsd"):
        command = [sys.executable, "-c", MEMORY_SCRIPT, which]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak[which] = int(done.stdout)
    # the 2 MiB are the gradients themselves and the GEMM's packing buffers
    for which in ("forward", "jsd"):
        assert peak[which] <= 0.05 * peak["plain"] + 2048, peak


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the reference's operations hold more")
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("budget", [1 << 19, 1 << 20, 1 << 22])
def test_chunks_stay_within_the_budget(peak_bytes, divergence, budget):
    student, weight, _, teacher, head, _ = make(500, 8, 6, 6000, torch.float32)
    leaves = student.requires_grad_(), weight.requires_grad_()
    options = fastlm.LinearCrossEntropyOptions(max_memory_bytes=budget)

    def call():
        options_of_call = {"divergence": divergence, "options": options}
        loss = fastlm.linear_kl_div(*leaves, teacher, head, **options_of_call)
        return torch.autograd.grad(loss, leaves)

    gradients = 4 * sum(leaf.numel() for leaf in leaves)
    assert peak_bytes(call) <= 1.05 * budget + gradients


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"teacher": torch.zeros(3, 4)}, ValueError, r"teacher must be \[5, \*\] \(rows as stud"),
        ({"teacher_weight": torch.zeros(8, 4)}, ValueError, r"teacher_weight must be \[9, \*\]"),
        ({"teacher_weight": torch.zeros(9, 3)}, ValueError, r"teacher_weight must be \[\*, 4\]"),
        ({"student_weight": torch.zeros(9, 2)}, ValueError, r"student_weight must be \[\*, 3\]"),
        ({"student_weight": torch.zeros(0, 3)}, ValueError, "student_weight must be of at least"),
        ({"student_bias": torch.zeros(8)}, ValueError, r"student_bias must be \[9\]"),
        ({"teacher_bias": torch.zeros(8)}, ValueError, r"teacher_bias must be \[9\]"),
        ({"student": torch.zeros(5, 3).long()}, TypeError, "student must be float64"),
        ({"teacher_weight": torch.zeros(9, 4).half()}, TypeError, "teacher_weight must be float32"),
        ({"mask": torch.zeros(4)}, ValueError, r"mask must be \[5\] \(one per row of student\)"),
        ({"token_weight": torch.zeros(4)}, ValueError, r"token_weight must be \[5\]"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward', 'reverse', 'jsd'"),
        ({"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"options": 3}, TypeError, "options must be LinearCrossEntropyOptions"),
        (
            {"options": fastlm.LinearCrossEntropyOptions(grad_accum_into=torch.zeros(9, 3))},
            ValueError,
            "options.grad_accum_into must be None",
        ),
    ],
)
def test_rejects(change, error, message):
    call = {
        "student": torch.zeros(5, 3),
        "student_weight": torch.zeros(9, 3),
        "teacher": torch.zeros(5, 4),
        "teacher_weight": torch.zeros(9, 4),
    }
    with pytest.raises(error, match="fastlm.linear_kl_div: " + message):
        fastlm.linear_kl_div(**call | change)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_of_a_scaled_loss(backend, reduction):
    """As float16 the gradients of a mean over many rows would be subnormal."""
    x, w = torch.randn(4096, 8).half(), (torch.randn(60, 8) * 1e-3).half()
    teacher, head = torch.randn(4096, 6).half(), torch.randn(60, 6).half()

    def ours(x, w):
        return fastlm.linear_kl_div(x, w, teacher, head, reduction=reduction).mean() * 2**16

    def plain(x, w):
        q = F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)
        p = F.linear(teacher.to(x.dtype), head.to(x.dtype)).to(q.dtype).log_softmax(-1)
        return F.kl_div(q, p, reduction="batchmean", log_target=True) * 2**16

    testing.check(ours, plain, (x, w))
