"""cross_entropy against torch.nn.functional.cross_entropy, and what is added to it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.dispatch import ready
from fastlm.nn.losses import CrossEntropyLoss
from fastlm.testing import check

BACKENDS = ready("row_statistics")
FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "mean", "sum"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.use_backend(request.param):
        yield request.param


def make(rows, classes, dtype=torch.float32, ignored=True):
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, classes, (rows,))
    if ignored and rows > 2:
        target[1] = -100
    return logits, target


def torch_ce(**options):
    """PyTorch's, in float32 as ours is: its half-precision sums lose digits that ours keeps."""

    def run(logits, target, *rest):
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), target, *rest, **options)

    return run


def ours(**options):
    return lambda logits, target, *rest: fastlm.cross_entropy(logits, target, *rest, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_torchs_function(backend, reduction, label_smoothing, weighted):
    logits, target = make(9, 37)
    weight = torch.rand(37, dtype=torch.float64) if weighted else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    for ignore_index in (-100, 3, int(target[0])):
        options["ignore_index"] = ignore_index
        if ignore_index != -100:
            target = target.where(target >= 0, ignore_index)

        def theirs(x, t):
            return torch_ce(**options)(x, t, weight if weight is None else weight.to(x.dtype))

        check(lambda x, t: fastlm.cross_entropy(x, t, weight, **options), theirs, (logits, target))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("rows, classes", [(1, 1), (3, 2), (7, 33), (64, 257), (3, 50257)])
def test_dtypes_and_sizes(backend, dtype, rows, classes):
    check(ours(), torch_ce(), make(rows, classes, dtype))
    check(ours(reduction="none"), torch_ce(reduction="none"), make(rows, classes, dtype))


@pytest.mark.parametrize("shape", [(5,), (4, 5, 3), (2, 5, 3, 1), (2, 5, 1, 2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True])
def test_torchs_layouts(backend, shape, reduction, soft):
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = torch.randn(shape)
    rest = [s for d, s in enumerate(shape) if d != (0 if len(shape) == 1 else 1)]
    if soft:
        target = torch.rand(shape).softmax(0 if len(shape) == 1 else 1)
    else:
        target = torch.randint(0, classes, rest)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    check(ours(**options), torch_ce(**options), (logits, target))
    got = fastlm.cross_entropy(logits, target, reduction=reduction)
    assert got.shape == F.cross_entropy(logits, target, reduction=reduction).shape


def test_one_row_with_target_of_shape_1(backend):
    logits, target = torch.randn(5), torch.tensor([2])
    got = fastlm.cross_entropy(logits, target, reduction="none")
    assert got.shape == F.cross_entropy(logits, target, reduction="none").shape == ()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities(backend, reduction, label_smoothing, weighted):
    logits = torch.randn(6, 29)
    target = torch.rand(6, 29).softmax(-1)  # and its gradient
    weight = torch.rand(29, dtype=torch.float64) if weighted else None
    options = {"reduction": reduction, "label_smoothing": label_smoothing}

    def theirs(x, t):
        return F.cross_entropy(x, t, weight if weight is None else weight.to(x.dtype), **options)

    check(lambda x, t: fastlm.cross_entropy(x, t, weight, **options), theirs, (logits, target))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_targets(backend, dtype):
    logits, target = make(5, 40, ignored=False)
    assert torch.equal(
        fastlm.cross_entropy(logits, target.to(dtype)), fastlm.cross_entropy(logits, target)
    )
    if dtype == torch.uint8:
        target[0] = 255
        got = fastlm.cross_entropy(logits, target.to(dtype), ignore_index=255)
        torch.testing.assert_close(got, F.cross_entropy(logits, target, ignore_index=255))


def composed(x, t, *, scale, softcap, z_weight, token_weight, reduction):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    z = z * scale
    kept = t != -100
    loss = F.cross_entropy(z, t, reduction="none", label_smoothing=0.1)
    loss = loss + torch.where(kept, z_weight * z.logsumexp(-1).square(), 0.0)
    loss = loss * token_weight.to(z.dtype)
    if reduction == "none":
        return loss
    return loss.sum() / (kept.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_is_added(backend, reduction, softcap):
    logits, target = make(8, 50)
    token_weight = torch.randn(8)  # both signs, and its gradient

    def run(x, t, w):
        return fastlm.cross_entropy(
            x,
            t,
            reduction=reduction,
            label_smoothing=0.1,
            z_loss_weight=0.01,
            logit_softcapping=softcap,
            logit_scale=1.5,
            temperature=0.8,
            token_weight=w,
        )

    def theirs(x, t, w):
        return composed(
            x, t, scale=1.5 / 0.8, softcap=softcap, z_weight=0.01, token_weight=w,
            reduction=reduction,
        )  # fmt: skip

    check(run, theirs, (logits, target, token_weight))


def test_z_loss_is_a_mean_over_rows_beside_class_weights(backend):
    logits, target = make(6, 11)
    weight = torch.rand(11)
    got = fastlm.cross_entropy(logits, target, weight, z_loss_weight=0.1)
    lse = logits.logsumexp(-1)[target >= 0]
    want = F.cross_entropy(logits, target, weight) + 0.1 * lse.square().mean()
    torch.testing.assert_close(got, want)


def test_auxiliary_results(backend):
    logits, target = make(7, 13)
    logits[3, 5], target[3] = 20.0, 5
    kept = target >= 0
    names = ("lse", "z_loss", "entropy", "argmax", "accuracy")
    leaf = logits.clone().requires_grad_()
    loss, aux = fastlm.cross_entropy(leaf, target, z_loss_weight=0.1, return_aux=names)
    assert set(aux) == set(names)
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(aux["lse"], logits.logsumexp(-1).where(kept, 0.0))
    entropy = -(log_p.exp() * log_p).sum(-1).where(kept, torch.zeros(()))
    torch.testing.assert_close(aux["entropy"], entropy)
    assert torch.equal(aux["argmax"], logits.argmax(-1).where(kept, -1))
    hits = (logits.argmax(-1) == target)[kept].float().mean()
    torch.testing.assert_close(aux["accuracy"], hits)
    want = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss - aux["z_loss"], want)
    aux["entropy"].sum().backward()
    assert leaf.grad[kept].any() and not leaf.grad[~kept].any()


def test_mean_over_targets_that_weigh_nothing():
    """It divides by the weight of the targets, also what label smoothing gives to other classes."""
    logits, target, weight = torch.randn(3, 5), torch.tensor([1, 2, 1]), torch.eye(5)[0]
    options = {"weight": weight, "label_smoothing": 0.1}
    assert F.cross_entropy(logits, target, **options).isnan()
    assert fastlm.cross_entropy(logits, target, **options).isnan()
    assert fastlm.linear_cross_entropy(logits, torch.eye(5), target, **options).isnan()


def test_no_kept_row_and_no_row(backend):
    logits = torch.randn(3, 5, requires_grad=True)
    target = torch.full((3,), -100)
    assert fastlm.cross_entropy(logits, target).isnan()
    loss = fastlm.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
    assert loss == 0
    (fastlm.cross_entropy(logits, target) + loss).backward()
    assert not logits.grad.any()
    for reduction in REDUCTIONS:
        got = fastlm.cross_entropy(logits[:0], target[:0], reduction=reduction)
        want = F.cross_entropy(logits[:0], target[:0], reduction=reduction)
        torch.testing.assert_close(got, want, equal_nan=True)


def test_invariance_to_a_shift_of_the_logits(backend):
    logits, target = make(5, 100)
    got = fastlm.cross_entropy(logits + 64, target)
    torch.testing.assert_close(got, fastlm.cross_entropy(logits, target), rtol=1e-5, atol=1e-5)


def test_confident_targets(backend):
    logits = torch.zeros(4, 50)
    target = torch.arange(4)
    logits[target, target] = torch.tensor([10.0, 15.0, 20.0, 100.0])
    check(ours(reduction="none"), torch_ce(reduction="none"), (logits, target))


def test_backward_twice_and_a_gradient_that_is_not_1(backend):
    logits, target = make(4, 9)
    leaf = logits.requires_grad_()
    loss = fastlm.cross_entropy(leaf, target)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(-3.0))
    torch.testing.assert_close(second, -3 * first)


@pytest.mark.usefixtures("kernels")
def test_gradcheck():
    logits, target = make(4, 7, torch.float64)
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def run(x, w):
        return fastlm.cross_entropy(
            x, target, label_smoothing=0.1, z_loss_weight=0.1, logit_softcapping=4.0, token_weight=w
        )

    assert torch.autograd.gradcheck(run, (logits.requires_grad_(), weight))


@pytest.mark.parametrize("target_kind", ["index", "soft"])
def test_compile(backend, target_kind):
    def run(x, t):
        loss, aux = fastlm.cross_entropy(
            x, t, label_smoothing=0.1, z_loss_weight=0.1, return_aux=("entropy", "accuracy")
        )
        return loss + aux["entropy"].mean() + aux["accuracy"]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        logits, target = make(rows, 11)
        if target_kind == "soft":
            target = torch.rand(rows, 11).softmax(-1)
        x = logits.requires_grad_()
        want, got = run(x, target), compiled(x, target)
        torch.testing.assert_close(got, want)
        a, b = torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0]
        torch.testing.assert_close(a, b)


def test_autocast_inference_no_grad_and_frozen(backend):
    layer = torch.nn.Linear(6, 10)
    x, target = torch.randn(5, 6), torch.randint(0, 10, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastlm.cross_entropy(layer(x), target)
    assert loss.dtype == torch.float32
    loss.backward()
    logits = layer(x).detach()
    want = F.cross_entropy(logits, target)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(fastlm.cross_entropy(logits, target), want)
    assert not fastlm.cross_entropy(logits, target).requires_grad


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"target": torch.zeros(8, dtype=torch.int64)}, ValueError, r"target must be \[7\].*\[8\]"),
        ({"target": torch.zeros(7)}, TypeError, "target must be an integer tensor, got float32"),
        ({"target": torch.zeros(7, 33, dtype=torch.int64)}, TypeError, "probabilities"),
        ({"target": torch.rand(7, 33), "ignore_index": 3}, ValueError, "ignore_index must be neg"),
        ({"input": torch.zeros(7, 33, dtype=torch.int64)}, TypeError, "input must be float64"),
        ({"input": torch.zeros(7, 0)}, ValueError, "at least one class"),
        ({"input": torch.zeros(7, 4, 33), "target": torch.zeros(7, 4, dtype=torch.int64)},
         ValueError, "flatten"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must be \[33\]"),
        ({"weight": torch.ones(33, requires_grad=True)}, ValueError, "detach it"),
        ({"token_weight": torch.ones(33)}, ValueError, r"token_weight must be \[7\]"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(())}, TypeError, "temperature must be a number"),
        ({"logit_softcapping": -1.0}, ValueError, "logit_softcapping must be positive"),
        ({"return_aux": "lse"}, TypeError, "write a tuple"),
        ({"return_aux": ("foo",)}, ValueError, "return_aux must be one of"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    call = {"input": torch.zeros(7, 33), "target": torch.zeros(7, dtype=torch.int64), **kwargs}
    with pytest.raises(error, match=message) as caught:
        fastlm.cross_entropy(**call)
    assert str(caught.value).startswith("fastlm.cross_entropy: ")


@pytest.mark.parametrize("value", [5, -1, 2**40])
def test_target_out_of_range(backend, value):
    target = torch.zeros(2, 3, dtype=torch.int64)
    target[1, 2] = value
    message = rf"fastlm.cross_entropy: target must be in \[0, 5\) or -100, got {value} at \[1, 2\]"
    with pytest.raises(IndexError, match=message):
        fastlm.cross_entropy(torch.zeros(2, 5, 3), target)
    with pytest.raises(IndexError, match=message):
        fastlm.cross_entropy(torch.zeros(2, 5, 3), target, torch.ones(5))


@pytest.mark.parametrize("reduction, smoothing", list(itertools.product(REDUCTIONS, [0.0, 0.1])))
def test_module(reduction, smoothing):
    logits, target = make(6, 8)
    args = (torch.rand(8), None, 2, None, reduction, smoothing)
    mine, theirs = CrossEntropyLoss(*args), torch.nn.CrossEntropyLoss(*args)
    mine.load_state_dict(theirs.state_dict())
    target = target.clamp(min=0)
    torch.testing.assert_close(mine(logits, target), theirs(logits, target))
    loss, aux = CrossEntropyLoss(z_loss_weight=0.1, return_aux=("lse",))(logits, target)
    assert loss > F.cross_entropy(logits, target) and aux["lse"].shape == (6,)
