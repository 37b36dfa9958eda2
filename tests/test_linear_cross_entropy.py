"""linear_cross_entropy against cross_entropy of the logits it never holds."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.dispatch import ready
from fastlm.nn.losses import LinearCrossEntropyLoss
from fastlm.ops.linear_row_statistics.chunks import chunk_rows
from fastlm.testing import check

BACKENDS = ready("linear_cross_entropy")
REDUCTIONS = ["none", "mean", "sum"]
TORCHS = getattr(torch.nn, "LinearCrossEntropyOptions", None)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.use_backend(request.param):
        yield request.param


def chunked(rows, classes):
    return fastlm.LinearCrossEntropyOptions(batch_chunk_size=rows)


def make(rows, features, classes, dtype=torch.float32, bias=True):
    target = torch.randint(0, classes, (rows,))
    if rows > 2:
        target[1] = -100
    weight = torch.randn(classes, features).to(dtype)
    layer = (torch.randn(rows, features).to(dtype), weight)
    return (*layer, torch.randn(classes).to(dtype), target) if bias else (*layer, target)


def ours(**options):
    def run(input, weight, *rest):
        *bias, target = rest
        call = {"linear_bias": bias[0] if bias else None, **options}
        return fastlm.linear_cross_entropy(input, weight, target, **call)

    return run


def theirs(**options):
    """PyTorch with float32 logits of half-precision inputs, which is what ours promises."""

    def run(input, weight, *rest):
        *bias, target = rest
        wide = torch.promote_types(input.dtype, torch.float32)
        logits = F.linear(input.to(wide), weight.to(wide), bias[0].to(wide) if bias else None)
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)

    return run


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_is_cross_entropy_of_linear(backend, reduction, label_smoothing, weighted, bias):
    weight = torch.rand(41) if weighted else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing}

    def plain(*args):
        w = weight if weight is None else weight.to(args[0].dtype)
        return theirs(weight=w, **options)(*args)

    run = ours(weight=weight, options=chunked(4, 41), **options)
    check(run, plain, make(11, 7, 41, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    "rows, features, classes", [(1, 1, 1), (3, 33, 2), (40, 129, 257), (50, 513, 1201)]
)
def test_dtypes_and_sizes(backend, dtype, reduction, rows, features, classes):
    # a product of few rows is less exact in the library itself
    run = ours(reduction=reduction, options=chunked(16, classes))
    check(run, theirs(reduction=reduction), make(rows, features, classes, dtype))


def test_slices_of_a_wide_weight(backend):
    # 2 MiB of float32 is one slice: this weight takes five
    check(ours(options=chunked(2, 8300)), theirs(), make(5, 300, 8300, torch.bfloat16))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities(backend, reduction, weighted):
    input, weight, bias, _ = make(6, 5, 19)
    target = torch.rand(6, 19, dtype=torch.float64).softmax(-1)
    class_weight = torch.rand(19, dtype=torch.float64) if weighted else None
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def plain(x, w, b):
        cw = class_weight if class_weight is None else class_weight.to(x.dtype)
        return F.cross_entropy(F.linear(x, w, b), target.to(x.dtype), cw, **options)

    def run(x, w, b):
        call = {"linear_bias": b, "weight": class_weight, "options": chunked(2, 19), **options}
        return fastlm.linear_cross_entropy(x, w, target.to(x.dtype), **call)

    check(run, plain, (input, weight, bias))
    # the gradient of the probabilities too
    check(
        lambda x, w, t: fastlm.linear_cross_entropy(x, w, t, **options),
        lambda x, w, t: F.cross_entropy(F.linear(x, w), t, **options),
        (input, weight, target.float()),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weight_of_more_dimensions(backend, reduction):
    input, weight = torch.randn(4, 6), torch.randn(5, 2, 3, 6)
    bias, target = torch.randn(5, 2, 3), torch.randint(0, 5, (4, 2, 3))

    def plain(x, w, b):
        logits = F.linear(x, w.flatten(0, -2), b.flatten()).view(4, 5, 2, 3)
        return F.cross_entropy(logits, target, reduction=reduction)

    def run(x, w, b):
        return fastlm.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)

    check(run, plain, (input, weight, bias))


@pytest.mark.skipif(TORCHS is None, reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torchs_own_function_and_options(backend, reduction):
    input, weight, bias, target = make(9, 6, 30)
    want = F.linear_cross_entropy(input, weight, target, linear_bias=bias, reduction=reduction)
    for options in (
        None,
        TORCHS(),
        TORCHS(batch_chunk_size=2, chunking_method=None),
        TORCHS(chunking_method="aspect_ratio:2"),
        TORCHS(chunking_method=None, acc_policy="accurate"),
    ):
        call = {"linear_bias": bias, "reduction": reduction, "options": options}
        got = fastlm.linear_cross_entropy(input, weight, target, **call)
        torch.testing.assert_close(got, want)
    one = fastlm.linear_cross_entropy(input[0], weight, target[0], reduction=reduction)
    torch.testing.assert_close(one, F.linear_cross_entropy(input[0], weight, target[0]))
    assert one.shape == ()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("learned", [False, True])
def test_what_is_added(backend, reduction, learned):
    input, weight, bias, target = make(8, 5, 23)
    token_weight = torch.randn(8)
    options = {
        "reduction": reduction,
        "label_smoothing": 0.1,
        "z_loss_weight": 0.02,
        "logit_softcapping": 4.0,
        "logit_scale": 1.5,
        "temperature": 0.7,
    }

    def plain(x, w, b, t, tw):
        z = 4 * torch.tanh(F.linear(x, w, b) / 4) * (1.5 / 0.7)
        kept = t != -100
        loss = F.cross_entropy(z, t, reduction="none", label_smoothing=0.1)
        loss = (loss + torch.where(kept, 0.02 * z.logsumexp(-1).square(), 0.0)) * tw
        if reduction == "none":
            return loss
        return loss.sum() / (kept.sum() if reduction == "mean" else 1)

    def run(x, w, b, t, tw):
        call = {"linear_bias": b, "token_weight": tw, "options": chunked(3, 23), **options}
        return fastlm.linear_cross_entropy(x, w, t, **call)

    layer = (input, weight, bias, target)
    if learned:
        check(run, plain, (*layer, token_weight))
    else:
        fixed = token_weight.double()
        check(
            lambda *a: run(*a, fixed.to(a[0].dtype)),
            lambda *a: plain(*a, fixed.to(a[0].dtype)),
            layer,
        )


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shift_compares_with_a_later_token(backend, shift, reduction):
    input, weight = torch.randn(2, 6, 4), torch.randn(9, 4)
    target = torch.randint(0, 9, (2, 6))

    def plain(x, w):
        logits = F.linear(x, w)[:, :-shift].flatten(0, 1)
        loss = F.cross_entropy(logits, target[:, shift:].flatten(), reduction=reduction)
        return loss.view(2, 6 - shift) if reduction == "none" else loss

    def run(x, w):
        return fastlm.linear_cross_entropy(x, w, target, shift=shift, reduction=reduction)

    check(run, plain, (input, weight))


def test_shift_past_the_end_and_no_rows(backend):
    input, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.randint(0, 9, (2, 3))
    assert fastlm.linear_cross_entropy(input, weight, target, shift=5).isnan()
    empty = torch.zeros(0, 4, requires_grad=True)
    for reduction in REDUCTIONS:
        got = fastlm.linear_cross_entropy(empty, weight, target[:0, 0], reduction=reduction)
        want = F.cross_entropy(empty @ weight.t(), target[:0, 0], reduction=reduction)
        torch.testing.assert_close(got, want, equal_nan=True)
        assert not torch.autograd.grad(got.sum(), weight)[0].nan_to_num().any()


def test_all_ignored(backend):
    input, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.full((3,), 2)
    loss = fastlm.linear_cross_entropy(input, weight, target, ignore_index=2)
    assert loss.isnan()
    loss.backward()
    assert not input.grad.any() and not weight.grad.any()
    total = fastlm.linear_cross_entropy(input, weight, target, ignore_index=2, reduction="sum")
    assert total == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", range(3))
def test_frozen_part(backend, reduction, frozen):
    *layer, target = make(6, 4, 9)
    found = []
    for freeze in (False, True):
        leaves = [
            v.clone().requires_grad_(not (freeze and i == frozen)) for i, v in enumerate(layer)
        ]
        ours(reduction=reduction)(*leaves, target).sum().backward()
        found.append([v.grad for v in leaves])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert b is None if i == frozen else torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_with_different_gradients(backend, dtype):
    *layer, target = make(7, 4, 9, dtype)
    leaves = [v.requires_grad_() for v in layer]
    fresh = torch.autograd.grad(ours()(*leaves, target), leaves)
    loss = ours()(*leaves, target)
    grads = [torch.autograd.grad(loss, leaves, retain_graph=True)]
    copies = [g.clone() for g in grads[0]]
    grads.append(torch.autograd.grad(loss, leaves, torch.tensor(-2.0), retain_graph=True))
    grads.append(torch.autograd.grad(loss, leaves))
    for first, copy, second, third, want in zip(*grads[:1], copies, *grads[1:], fresh, strict=True):
        assert torch.equal(first, copy)  # what was handed out is not touched again
        torch.testing.assert_close(first, want)
        torch.testing.assert_close(second, -2 * want)
        torch.testing.assert_close(third, want)


@pytest.mark.usefixtures("kernels")
def test_gradient_is_taken_over_without_a_copy():
    *layer, target = make(7, 4, 9)
    leaves = [v.requires_grad_() for v in layer]
    loss = ours()(*leaves, target)
    kept = [g.data_ptr() for g in loss.grad_fn.gradients]
    loss.backward()
    assert [v.grad.data_ptr() for v in leaves] == kept


def test_scaled_loss_and_accumulation(backend):
    *layer, target = make(7, 4, 9)
    leaves = [v.requires_grad_() for v in layer]
    for _ in range(3):
        (ours()(*leaves, target) / 3).backward()
    want = torch.autograd.grad(theirs()(*leaves, target), leaves)
    for leaf, grad in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_auxiliary_results_and_their_gradients(backend):
    input, weight, target = make(7, 5, 12, bias=False)
    names = ("lse", "z_loss", "entropy", "argmax", "accuracy")

    def total(loss, aux):
        return 2 * loss + aux["entropy"].square().sum() - aux["lse"].sum() + aux["z_loss"]

    results = []
    for reduction in ("mean", "sum"):
        for linear in (True, False):
            x, w = (v.clone().requires_grad_() for v in (input, weight))
            call = {"z_loss_weight": 0.1, "return_aux": names, "reduction": reduction}
            if linear:
                loss, aux = fastlm.linear_cross_entropy(x, w, target, **call)
            else:
                loss, aux = fastlm.cross_entropy(F.linear(x, w), target, **call)
            for part in (total(loss, aux), loss):
                grads = torch.autograd.grad(part, (x, w), retain_graph=True)
                results.append((loss, *aux.values(), *grads))
    for a, b in zip(results[:2] + results[4:6], results[2:4] + results[6:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("kernels")
def test_gradcheck():
    *layer, target = make(5, 3, 6, torch.float64)
    leaves = [v.requires_grad_() for v in layer]
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss_weight": 0.1}
        run = ours(logit_softcapping=3.0, options=chunked(2, 12), **options)
        assert torch.autograd.gradcheck(lambda *a, run=run: run(*a, target), leaves)


@pytest.mark.parametrize("forward, backward", list(itertools.product(BACKENDS, BACKENDS)))
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_forward_with_any_backward(forward, backward, reduction):
    *layer, target = make(6, 5, 30)
    leaves = [v.requires_grad_() for v in layer]
    want = torch.autograd.grad(theirs(reduction=reduction)(*leaves, target).sum(), leaves)
    with fastlm.use_backend(forward):
        loss = ours(reduction=reduction)(*leaves, target).sum()
    with fastlm.use_backend(backward):
        for _ in range(2):  # handed out, then computed again
            got = torch.autograd.grad(loss, leaves, retain_graph=True)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_element_is_written(backend, poisoned):
    for dtype in (torch.float32, torch.bfloat16):
        *layer, target = make(9, 5, 30, dtype)
        leaves = [v.requires_grad_() for v in layer]
        ours(options=chunked(4, 30), label_smoothing=0.1)(*leaves, target).backward()
        assert all(v.grad.isfinite().all() for v in leaves)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("aux", [(), ("entropy",)])
def test_compile(backend, reduction, aux):
    weight = torch.randn(11, 4, requires_grad=True)

    def run(x, t):
        options = {"reduction": reduction, "return_aux": aux, "label_smoothing": 0.1}
        found = fastlm.linear_cross_entropy(x, weight, t, **options)
        loss, extra = found if aux else (found, {})
        return 3 * loss.sum() + sum(v.sum() for v in extra.values())

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        x = torch.randn(rows, 4, requires_grad=True)
        target = torch.randint(0, 11, (rows,))
        want, got = run(x, target), compiled(x, target)
        torch.testing.assert_close(got, want)
        a = torch.autograd.grad(got, (x, weight))
        torch.testing.assert_close(a, torch.autograd.grad(want, (x, weight)))


def test_opcheck(backend):
    input, weight, bias, target = make(5, 3, 7)
    rows = [torch.randn(5) for _ in range(3)]
    args = (input, weight, bias, target, torch.rand(7), -100, 0.7, 2.0)
    args = (*args, True, False, True, True, 60, "test", *rows, True, False, True)
    torch.library.opcheck(torch.ops.fastlm.linear_cross_entropy.default, args)


def test_autocast_no_grad_and_inference(backend):
    layer = torch.nn.Linear(6, 10)
    x, target = torch.randn(5, 6), torch.randint(0, 10, (5,))
    call = {"linear_bias": layer.bias}
    want = F.cross_entropy(layer(x), target)
    with torch.autocast("cpu", torch.bfloat16):
        half = fastlm.linear_cross_entropy(x.bfloat16(), layer.weight, target, **call)
    assert half.dtype == torch.float32
    half.backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(half, want, rtol=2e-2, atol=2e-2)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = fastlm.linear_cross_entropy(x, layer.weight, target, **call)
            torch.testing.assert_close(got, want)
            assert not got.requires_grad


def test_layouts(backend):
    input, weight = torch.randn(5, 3, 4), torch.randn(4, 9)
    target = torch.randint(0, 9, (3, 5))
    got = fastlm.linear_cross_entropy(input.transpose(0, 1), weight.t(), target)
    logits = input.transpose(0, 1) @ weight
    torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), target.flatten()))
    rows = input[0, :1].expand(7, 4)
    got = fastlm.linear_cross_entropy(rows, weight.t(), target.flatten()[:1].expand(7))
    want = F.cross_entropy(rows @ weight, target.flatten()[:1].expand(7))
    torch.testing.assert_close(got, want)


def test_rows_of_a_chunk():
    mib = 1 << 20
    cpu = torch.device("cpu")
    assert chunk_rows(2048, 10000, 4, 0, cpu) == 256  # 10 MiB: 4.2% of three tensors of logits
    assert chunk_rows(100, 10, 4, 0, cpu) == 100
    assert chunk_rows(65, 10, 4, 640, cpu) == 13  # 16 rows fit, 5 chunks: all equal
    assert chunk_rows(10, 1 << 20, 4, 1, cpu) == 1
    assert chunk_rows(0, 10, 4, mib, cpu) == 0
    for rows, classes in itertools.product((1, 63, 1000, 9999), (3, 50257)):
        for limit in (1, mib, 100 * mib):
            chunk = chunk_rows(rows, classes, 4, limit, cpu)
            assert chunk == 1 or chunk * classes * 4 <= limit


MEMORY_SCRIPT = """
import resource, sys, torch, torch.nn.functional as F, fastlm
torch.set_num_threads(1)
def run(rows, classes):
    x, w = torch.randn(rows, 16, requires_grad=True), torch.randn(classes, 16, requires_grad=True)
    t = torch.randint(0, classes, (rows,))
    w.grad, x.grad = torch.zeros_like(w), torch.zeros_like(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.argv[1] == "ours":
        fastlm.linear_cross_entropy(x, w, t).backward()
    else:
        F.cross_entropy(F.linear(x, w), t).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
run(8, 1000)
print(run(2048, 10000))
"""


def test_memory_is_a_small_share_of_plains():
    peak = {}
    for which in ("ours", "plain"):
        command = [sys.executable, "-c", MEMORY_SCRIPT, which]
        peak[which] = int(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
    # the 2 MiB are the gradients themselves and the GEMM's packing buffers
    assert peak["ours"] <= 0.05 * peak["plain"] + 2048, peak


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target must be \[4\].*\[5\]"),
        ({"target": torch.rand(4, 9), "ignore_index": -100}, ValueError, "ignore_index must be"),
        ({"linear_weight": torch.zeros(9, 2)}, ValueError, r"linear_weight must be \[\*, 3\]"),
        ({"linear_weight": torch.zeros(0, 3)}, ValueError, "at least one class"),
        ({"linear_weight": torch.zeros(9, 3).double()}, TypeError, "linear_weight must be float32"),
        ({"linear_bias": torch.zeros(8)}, ValueError, r"linear_bias must be \[9\]"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight must be \[9\]"),
        ({"token_weight": torch.zeros(8)}, ValueError, r"token_weight must be \[4\]"),
        ({"shift": -1}, ValueError, "shift must be an integer >= 0"),
        ({"options": 3}, TypeError, "options must be LinearCrossEntropyOptions"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"target": torch.tensor([0, 1, 9, 2])}, IndexError, r"in \[0, 9\).*9 at \[2\]"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    call = {
        "input": torch.zeros(4, 3),
        "linear_weight": torch.zeros(9, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        **kwargs,
    }
    with pytest.raises(error, match=message) as caught:
        fastlm.linear_cross_entropy(**call)
    assert str(caught.value).startswith("fastlm.linear_cross_entropy: ")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_invariant": True},
        {"filter_eps": 1e-4},
        {"grad_accum_into": torch.zeros(1, requires_grad=True)},
        {"batch_chunk_size": 0},
        {"acc_dtype": torch.bfloat16},
        {"max_memory_bytes": 0},
    ],
)
def test_options_that_are_not_offered_raise(kwargs):
    with pytest.raises(ValueError, match="fastlm.LinearCrossEntropyOptions: " + next(iter(kwargs))):
        fastlm.LinearCrossEntropyOptions(**kwargs)


@pytest.mark.parametrize("out_features", [(), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_module(out_features, bias):
    options = {
        "bias": bias,
        "out_features": out_features,
        "weight": torch.rand(7),
        "reduction": "sum",
    }
    mine = LinearCrossEntropyLoss(5, 7, ignore_index=1, label_smoothing=0.1, **options)
    names = {"weight", "linear.weight"} | ({"linear.bias"} if bias else set())
    assert set(mine.state_dict()) == names
    x, target = torch.randn(4, 5), torch.randint(0, 7, (4, *out_features))
    if TORCHS is None:
        return
    theirs = torch.nn.LinearCrossEntropyLoss(5, 7, ignore_index=1, label_smoothing=0.1, **options)
    theirs.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine(x, target), theirs(x, target))
