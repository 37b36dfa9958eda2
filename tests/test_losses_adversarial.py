"""What breaks losses, against every public loss: sizes, extremes, layouts, modes of autograd."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastlm
from fastlm import checks
from fastlm.dispatch import ready
from fastlm.testing import LAYOUTS, check, strided

DTYPES = [torch.float32, torch.bfloat16]
IGNORED = -100


def wide(value):
    return value.to(torch.promote_types(value.dtype, torch.float32))


def fields(z, t):
    """Log-prob, entropy, lse, sum of squares; of kept rows."""
    kept, log_p = t != IGNORED, z.log_softmax(-1)
    p = log_p.exp()
    found = (
        log_p.gather(-1, t.where(kept, 0)[..., None])[..., 0],
        -(p * log_p).sum(-1),
        z.logsumexp(-1),
        p.square().sum(-1),
    )
    return [torch.where(kept, f, 0.0) for f in found]


def ours_fields(found):
    return [found.logprobs, found.entropy, found.lse, found.sum_sq]


EVERYTHING = {f"return_{name}": True for name in ("entropy", "lse", "sum_sq")}


def waves(shape, step):
    """Numbers of both signs that depend on nothing, under torch.compile too."""
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, size + 1, dtype=torch.float64) * step).view(shape)


def ours_policy(x, w, b, t):
    advantages = waves(t.shape, 1.7).to(wide(x).dtype)
    rest = {"loss_agg_mode": "seq-mean-token-sum", "entropy_coef": 0.1, "linear_bias": b}
    return fastlm.linear_policy_loss(x[None], w, t[None], advantages[None], **rest)


def plain_policy(z, t):
    logprobs, entropy = fields(z, t)[:2]
    return (-waves(t.shape, 1.7).to(z.dtype) * logprobs - 0.1 * entropy).sum()


def ours_kl(x, w, b, t):
    other, its_weight = waves(x.shape, 0.7).to(x.dtype), waves(w.shape, 1.1).to(w.dtype)
    rest = {"student_bias": b, "mask": t != IGNORED, "reduction": "none"}
    return fastlm.linear_kl_div(x, w, other, its_weight, **rest)


def plain_kl(x, w, b, t, teacher=None):
    log_q = linear(x, w, b).log_softmax(-1)
    # the teacher's numbers as they are in the dtype under test, whatever the precision here
    other, its_weight = (
        v.to(teacher or x.dtype) for v in (waves(x.shape, 0.7), waves(w.shape, 1.1))
    )
    log_p = F.linear(other.to(log_q.dtype), its_weight.to(log_q.dtype)).log_softmax(-1)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.where(t != IGNORED, value, 0.0)


def linear(x, w, b):
    return F.linear(wide(x), wide(w), None if b is None else wide(b))


class Case(NamedTuple):
    ours: Callable
    plain: Callable


LOGITS = {
    "cross_entropy": Case(
        lambda z, t: fastlm.cross_entropy(z, t, reduction="none"),
        lambda z, t: F.cross_entropy(wide(z), t, reduction="none"),
    ),
    "token_logprobs": Case(
        lambda z, t: ours_fields(fastlm.token_logprobs(z, t, **EVERYTHING)),
        lambda z, t: fields(wide(z), t),
    ),
    "entropy": Case(lambda z, t: fastlm.entropy(z), lambda z, t: entropy_of(wide(z))),
}
LINEAR = {
    "linear_cross_entropy": Case(
        lambda x, w, b, t: fastlm.linear_cross_entropy(x, w, t, linear_bias=b),
        lambda x, w, b, t: F.cross_entropy(linear(x, w, b), t),
    ),
    "linear_cross_entropy none": Case(
        lambda x, w, b, t: fastlm.linear_cross_entropy(
            x, w, t, linear_bias=b, reduction="none", label_smoothing=0.1
        ),
        lambda x, w, b, t: F.cross_entropy(
            linear(x, w, b), t, reduction="none", label_smoothing=0.1
        ),
    ),
    "linear_token_logprobs": Case(
        lambda x, w, b, t: ours_fields(
            fastlm.linear_token_logprobs(x, w, t, linear_bias=b, **EVERYTHING)
        ),
        lambda x, w, b, t: fields(linear(x, w, b), t),
    ),
    "linear_policy_loss": Case(ours_policy, lambda x, w, b, t: plain_policy(linear(x, w, b), t)),
    "linear_kl_div": Case(ours_kl, plain_kl),
}
# linear_kl_div has one backend
PAIRS = [(name, b) for name in [*LOGITS, *LINEAR] for b in ready("row_statistics")]
PAIRS = [(name, None if name == "linear_kl_div" else b) for name, b in PAIRS]
PAIRS = list(dict.fromkeys(PAIRS))


def entropy_of(z):
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def make(name, rows=5, classes=33, features=7, dtype=torch.float32, spread=1.0, shift=0.0):
    """Arguments of a case: logits and target, or input, weight, bias and target."""
    target = torch.randint(0, classes, (rows,))
    if rows > 3:
        target[1] = IGNORED
    if name in LOGITS:
        logits = torch.randn(rows, classes, dtype=torch.float64) * 3 * spread + shift
        return logits.to(dtype), target
    x = torch.randn(rows, features, dtype=torch.float64) * spread
    w = torch.randn(classes, features, dtype=torch.float64)
    b = torch.randn(classes, dtype=torch.float64) * spread + shift
    return x.to(dtype), w.to(dtype), b.to(dtype), target


def case(name):
    return LOGITS[name] if name in LOGITS else LINEAR[name]


def compare(name, backend, args):
    ours, plain = case(name)
    if name == "linear_kl_div":
        plain = functools.partial(plain, teacher=args[0].dtype)
    with fastlm.use_backend(backend):
        check(ours, plain, args)


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def leaves(args):
    return [
        a.detach().clone().requires_grad_() if a is not None and a.is_floating_point() else a
        for a in args
    ]


def gradients(outputs, args, upstream=None, **kwargs):
    inputs = [a for a in args if a is not None and a.requires_grad]
    upstream = [torch.ones_like(o) for o in outputs] if upstream is None else upstream
    return torch.autograd.grad(outputs, inputs, upstream, **kwargs)


VOCABULARIES = [1, 2, 63, 64, 65, 255, 257, 1000, 32001, 50257, 151936]


@pytest.mark.parametrize("classes", VOCABULARIES)
@pytest.mark.parametrize("name, backend", PAIRS)
def test_vocabulary_of_nearly_equal_logits(name, backend, classes):
    """lse is log V there: a class too many or too few shows."""
    features = 3 if classes > 2000 else 16
    compare(name, backend, make(name, 4, classes, features, spread=1e-3))


@pytest.mark.parametrize("classes", [1, 65, 32001])
@pytest.mark.parametrize("name, backend", PAIRS)
def test_vocabulary_in_bfloat16(name, backend, classes):
    compare(name, backend, make(name, 4, classes, 3, torch.bfloat16, 1e-3))


@pytest.mark.parametrize("features", [1, 33, 127, 129, 513])
@pytest.mark.parametrize("name, backend", [p for p in PAIRS if p[0] in LINEAR])
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_with_bias(name, backend, features, dtype):
    compare(name, backend, make(name, 6, 70, features, dtype, spread=features**-0.5))


@pytest.mark.parametrize("spread, shift", [(1.0, -1000.0), (1e4, 0.0), (1e4, -1e5), (1.0, 1e4)])
@pytest.mark.parametrize("name, backend", PAIRS)
def test_logits_far_from_zero(name, backend, spread, shift):
    args = make(name, 6, 70, spread=spread, shift=shift)
    z = args[0] if name in LOGITS else linear(*args[:3])
    if shift < 0 and spread == 1:
        assert float(z.detach().max()) < -100
    compare(name, backend, args)


@pytest.mark.skipif("cpu" not in ready("row_statistics"), reason="no compiled kernels")
@pytest.mark.parametrize("classes", [2, 50, 4097, 50257])
@pytest.mark.parametrize("loss", [1e-3, 1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("call", ["cross_entropy", "token_logprobs", "linear_token_logprobs"])
def test_confident_targets_keep_relative_accuracy(call, classes, loss):
    """Plain PyTorch gives 0 for a loss of 1e-8: it adds 1 to the others' probabilities first."""
    logits = torch.zeros(1, classes)
    at = classes // 2
    logits[0, at] = torch.tensor((classes - 1) / loss, dtype=torch.float64).log().float()
    target = torch.tensor([at])
    # in float64, and for the others alone
    others = (-logits[0, at].double()).exp() * (classes - 1)
    want = others.log1p()
    leaf = logits.clone().requires_grad_()
    with fastlm.use_backend("cpu"):
        if call == "cross_entropy":
            got = fastlm.cross_entropy(leaf, target)
        elif call == "token_logprobs":
            got = -fastlm.token_logprobs(leaf, target).sum()
        else:
            one = torch.ones(1, 1)
            weight = leaf.reshape(classes, 1)
            got = -fastlm.linear_token_logprobs(one, weight, target).sum()
        got.backward()
    assert abs(float(got.detach()) / float(want) - 1) < 1e-4
    at_target = -others / (1 + others)
    assert abs(float(leaf.grad[0, at]) / float(at_target) - 1) < 1e-4


@pytest.mark.parametrize("name, backend", [p for p in PAIRS if p[0] != "entropy"])
def test_every_row_ignored(name, backend, poisoned):
    args = leaves(make(name))
    args[-1].fill_(IGNORED)
    with fastlm.use_backend(backend):
        outputs = tensors(case(name).ours(*args))
        for value in outputs:
            # the mean of nothing is NaN, as in torch; every other result is 0
            assert value.isnan() if name == "linear_cross_entropy" else not value.any()
        assert not any(g.any() for g in gradients(outputs, args))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("ignore_index", [-1, -7, IGNORED, 0, 8, 9, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignore_index(function, ignore_index, reduction):
    x, w = torch.randn(6, 4), torch.randn(9, 4)
    target = torch.tensor([1, ignore_index, 2, ignore_index, 7, 3])
    options = {"ignore_index": ignore_index, "reduction": reduction}

    def ours(x, w):
        if function == "cross_entropy":
            return fastlm.cross_entropy(F.linear(x, w), target, **options)
        return fastlm.linear_cross_entropy(x, w, target, **options)

    check(ours, lambda x, w: F.cross_entropy(F.linear(x, w), target, **options), (x, w))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("ignore_index", [-1, 0, 8, 1000])
@pytest.mark.parametrize("function", ["token_logprobs", "linear_token_logprobs", "policy"])
def test_ignore_index_of_logprobs(function, ignore_index):
    x, w = torch.randn(6, 4), torch.randn(9, 4)
    target = torch.tensor([1, ignore_index, 2, ignore_index, 7, 3])
    kept = target != ignore_index
    options = {"ignore_index": ignore_index}

    def ours(x, w):
        if function == "token_logprobs":
            return fastlm.token_logprobs(F.linear(x, w), target, **options)
        if function == "linear_token_logprobs":
            return fastlm.linear_token_logprobs(x, w, target, **options)
        rest = {"loss_agg_mode": "seq-mean-token-sum", **options}
        return fastlm.linear_policy_loss(x[None], w, target[None], torch.ones(1), **rest)

    def plain(x, w):
        log_p = F.linear(x, w).log_softmax(-1)
        found = torch.where(kept, log_p.gather(-1, target.where(kept, 0)[:, None])[:, 0], 0.0)
        return -found.sum() if function == "policy" else found

    check(ours, plain, (x, w))


WITH_TARGET = [n for n in [*LOGITS, *LINEAR] if n not in ("entropy", "linear_kl_div")]


@pytest.mark.parametrize("value", [33, -1, 2**31, -(2**40)])
@pytest.mark.parametrize("name", WITH_TARGET)
def test_target_out_of_range_raises_on_a_cpu(name, value):
    args = make(name)
    args[-1][2] = value
    with pytest.raises(IndexError, match=rf"target must be in \[0, 33\) or -100, got {value} at "):
        case(name).ours(*args)


@pytest.mark.parametrize("value", [33, -1, 2**31, -(2**40)])
@pytest.mark.parametrize("name", WITH_TARGET)
def test_target_out_of_range_is_nan_in_its_row_elsewhere(name, value, monkeypatch):
    """Other devices do not look at the values, and run the reference."""
    args = leaves(make(name))
    right = tensors(case(name).ours(*args))
    expected = gradients(right, args)[0]
    args[-1][2] = value
    monkeypatch.setattr(checks, "index_range", lambda *_: None)
    with fastlm.use_backend("reference"):
        outputs = tensors(case(name).ours(*args))
        got = gradients(outputs, args)[0]
    assert outputs[0][..., 2].isnan() if outputs[0].dim() else outputs[0].isnan()
    assert got[2].isnan().all()
    others = [0, 1, 3, 4]
    assert got[others].isfinite().all()
    if outputs[0].dim():
        torch.testing.assert_close(outputs[0][others], right[0][others])
        torch.testing.assert_close(got[others], expected[others])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("name", WITH_TARGET)
def test_integer_targets(name, dtype):
    args = make(name)
    if dtype == torch.uint8:
        args[-1].clamp_(min=0)
    wanted = tensors(case(name).ours(*args))
    got = tensors(case(name).ours(*args[:-1], args[-1].to(dtype)))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "broadcast"])
@pytest.mark.parametrize("name, backend", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_all_arguments(name, backend, layout, dtype):
    args = make(name, dtype=dtype)
    for index in range(len(args)):
        here = list(args)
        if layout == "broadcast":
            # classes of equal weights have no gradient but rounding: equal features instead
            dim = 1 if name in LINEAR and index == 1 else 0
            here[index] = args[index].narrow(dim, 0, 1).expand(args[index].shape)
        else:
            here[index] = strided(args[index], layout)
        compare(name, backend, tuple(here))


@pytest.mark.parametrize("name, backend", PAIRS)
def test_layouts_of_the_upstream_gradient(name, backend):
    args = leaves(make(name))
    with fastlm.use_backend(backend):
        outputs = tensors(case(name).ours(*args))
        upstream = [torch.randn_like(o) for o in outputs]
        want = gradients(outputs, args, upstream, retain_graph=True)
        for layout in ("sliced", "offset"):
            here = [strided(u, layout) for u in upstream]
            for a, b in zip(gradients(outputs, args, here, retain_graph=True), want, strict=True):
                torch.testing.assert_close(a, b)
        flat = [u.flatten()[0].expand(u.shape) for u in upstream]
        want = gradients(outputs, args, [f.contiguous() for f in flat], retain_graph=True)
        for a, b in zip(gradients(outputs, args, flat), want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, backend", PAIRS)
def test_no_rows(name, backend, dtype, poisoned):
    args = leaves(make(name, rows=0, dtype=dtype))
    with fastlm.use_backend(backend):
        outputs = tensors(case(name).ours(*args))
        found = gradients(outputs, args)
    inputs = [a for a in args if a.requires_grad]
    for grad, value in zip(found, inputs, strict=True):
        assert grad.shape == value.shape and grad.dtype == dtype and not grad.any()


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, backend", [p for p in PAIRS if p[0] in LINEAR])
def test_frozen_parts(name, backend, needed, dtype):
    args = make(name, 9, dtype=dtype)
    parts = [leaves(args), leaves(args)]
    for part, need in zip(parts[1], needed, strict=False):
        part.requires_grad_(need)
    with fastlm.use_backend(backend):
        every, some = (tensors(case(name).ours(*p)) for p in parts)
        upstream = [torch.randn_like(o) for o in every]
        for a, b in zip(every, some, strict=True):
            assert a.equal(b) and b.requires_grad == any(needed)
        if not any(needed):
            return
        want = gradients(every, parts[0], upstream)
        got = gradients(some, parts[1], upstream)
    want = [g for g, need in zip(want, needed, strict=True) if need]
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("index", range(4), ids=["logprob", "entropy", "lse", "sum_sq"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
@pytest.mark.parametrize("backend", ready("row_statistics"))
def test_upstream_on_one_output_alone(name, backend, dtype, index):
    ours, plain = case(name)
    with fastlm.use_backend(backend):
        check(lambda *a: ours(*a)[index], lambda *a: plain(*a)[index], make(name, dtype=dtype))


@pytest.mark.parametrize("aux", ["lse", "entropy", "z_loss"])
@pytest.mark.parametrize("linear_form", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_on_an_auxiliary_output_alone(aux, linear_form, reduction):
    x, w, _, target = make("linear")
    options = {"return_aux": (aux,), "reduction": reduction, "z_loss_weight": 0.3}

    def ours(x, w):
        if linear_form:
            return fastlm.linear_cross_entropy(x, w, target, **options)[1][aux]
        return fastlm.cross_entropy(F.linear(x, w), target, **options)[1][aux]

    def plain(x, w):
        _, entropy, lse, _ = fields(F.linear(x, w), target)
        if aux != "z_loss":
            return {"entropy": entropy, "lse": lse}[aux]
        value = 0.3 * lse.square()
        return value if reduction == "none" else value.sum() / (target != IGNORED).sum()

    check(ours, plain, (x, w))


@pytest.mark.parametrize("name, backend", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_again_with_another_upstream(name, backend, dtype):
    args = make(name, 9, dtype=dtype)
    first, second = leaves(args), leaves(args)
    with fastlm.use_backend(backend):
        outputs, fresh = (tensors(case(name).ours(*p)) for p in (first, second))
        a, b = ([torch.randn_like(o) for o in outputs] for _ in range(2))
        gradients(outputs, first, a, retain_graph=True)
        again = gradients(outputs, first, b, retain_graph=True)
        once = gradients(outputs, first, b)
        want = gradients(fresh, second, b)
    eps = 4 * torch.finfo(dtype).eps
    for x, y, z in zip(again, once, want, strict=True):
        assert x.equal(y)
        # a loss whose gradient was taken in the forward scales it there, and rounds once more
        torch.testing.assert_close(x, z, rtol=eps, atol=eps * float(z.abs().max()))


@pytest.mark.parametrize("name", [*LOGITS, *LINEAR])
def test_batch_of_upstream_gradients(name):
    """The first backward too, whose gradients have been there since the forward."""
    args = make(name)
    batched, one = leaves(args), leaves(args)
    outputs = tensors(case(name).ours(*batched))
    upstream = [torch.randn(3, *o.shape) for o in outputs]
    got = gradients(outputs, batched, upstream, is_grads_batched=True)
    outputs = tensors(case(name).ours(*one))
    for i in range(3):
        want = gradients(outputs, one, [u[i] for u in upstream], retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("name", [*LOGITS, *LINEAR])
def test_under_a_checkpoint(name):
    """It hands out each saved tensor once."""
    args = make(name)
    plain, inside = leaves(args), leaves(args)
    outputs = tensors(case(name).ours(*plain))
    again = tensors(checkpoint(case(name).ours, *inside, use_reentrant=False))
    upstream = [torch.randn_like(o) for o in outputs]
    want, got = gradients(outputs, plain, upstream), gradients(again, inside, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name, backend", PAIRS)
def test_more_than_65535_rows(name, backend):
    args = make(name, 65541, 5, 2)
    if name in LOGITS:
        return compare(name, backend, args)
    x, w, b, target = args
    kind = {"teacher": torch.float32} if name == "linear_kl_div" else {}

    def plain(x):
        return case(name).plain(x, w.to(x.dtype), b.to(x.dtype), target, **kind)

    # a weight's gradient sums up all rows, and its error is that of any sum of so many
    with fastlm.use_backend(backend):
        check(lambda x: case(name).ours(x, w, b, target), plain, (x,))


@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif("cpu" not in ready("row_statistics"), reason="no compiled kernels")
def test_more_than_2_to_the_31_logits_and_their_gradient():
    rows, classes = (1 << 15) + 1, (1 << 16) + 5
    row = torch.randn(1, classes).bfloat16()
    target = torch.arange(rows) * 2
    leaf = row.expand(rows, classes).detach().requires_grad_()
    loss = fastlm.cross_entropy(leaf, target, reduction="none")
    loss.sum().backward()
    for at in (0, rows // 2, rows - 1):
        one = row.clone().requires_grad_()
        alone = fastlm.cross_entropy(one, target[at : at + 1], reduction="none")
        alone.sum().backward()
        assert torch.equal(loss[at], alone[0]) and torch.equal(leaf.grad[at], one.grad[0])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", list(LINEAR))
def test_more_than_2_to_the_31_logits_of_a_layer(name):
    """Most rows are dead, so that it takes no time; the products see the whole of the indices."""
    rows, classes = (1 << 16) + 3, (1 << 15) + 7
    x, w, b, _ = make(name, rows, classes, 3)
    target = torch.full((rows,), IGNORED)
    live = torch.tensor([0, 7, rows // 2, rows - 2, rows - 1])
    target[live] = torch.tensor([0, classes - 1, 5, classes // 2, 9])
    args = leaves((x, w, b, target))
    if name in ("linear_policy_loss", "linear_kl_div"):  # they have numbers of their own per row
        got = tensors(case(name).ours(*args))
        grads = gradients(got, args)
        assert all(v.isfinite().all() for v in (*got, *grads))
        assert grads[0][live].any(-1).all() and not grads[0][1:7].any()
        return
    few = leaves((x[live], w, b, target[live]))
    outputs, want = tensors(case(name).ours(*args)), tensors(case(name).ours(*few))
    for a, c in zip(outputs, want, strict=True):
        torch.testing.assert_close(a[live] if a.dim() else a, c)
    a, c = gradients(outputs, args), gradients(want, few)
    torch.testing.assert_close(a[0][live], c[0])
    for p, q in zip(a[1:], c[1:], strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", [n for n in LINEAR if n != "linear_kl_div"])
@pytest.mark.parametrize("backend", ready("row_statistics"))
def test_float16_logits_out_of_range(name, backend):
    """Products are float32, so what overflows float16 is exact here; plain PyTorch has infinity."""
    x, w, b, target = make(name, dtype=torch.float16)
    x = x * 3e3
    w = w * 30
    assert F.linear(x, w).isinf().any()

    def plain(x, w, b):
        return case(name).plain(x, w, b, target)

    def ours(x, w, b):
        return case(name).ours(x, w, b, target)

    truth = tensors(plain(x.double(), w.double(), b.double()))
    with fastlm.use_backend(backend):
        got = tensors(ours(x, w, b))
    for a, c in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5 * float(c.abs().max()))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_policy_loss"])
@pytest.mark.parametrize("budget", [None, 1 << 16])
@pytest.mark.parametrize("factor, reduction", [(2.0**16, "mean"), (2.0**-16, "sum")])
def test_float16_gradients_of_a_scaled_loss(function, budget, factor, reduction):
    """A loss is scaled so that float16 holds the gradients: they must not pass it unscaled."""
    rows, classes = 4096, 60
    # as float16 the mean's gradients would be subnormal, and the sum's infinite
    x = torch.randn(rows, 8).half() + 200 * (reduction == "sum")
    w = (torch.randn(classes, 8) * 1e-4).half()
    target = torch.randint(0, 3, (rows,))
    options = fastlm.LinearCrossEntropyOptions(max_memory_bytes=budget)

    def ours(x, w):
        if function == "linear_cross_entropy":
            rest = {"reduction": reduction, "options": options}
            return fastlm.linear_cross_entropy(x, w, target, **rest) * factor
        mode = "token-mean" if reduction == "mean" else "seq-mean-token-sum"
        rest = {"loss_agg_mode": mode, "options": options}
        loss = fastlm.linear_policy_loss(x[None], w, target[None], torch.ones(1), **rest)
        return loss * factor

    def plain(x, w):
        return F.cross_entropy(linear(x, w, None), target, reduction=reduction) * factor

    check(ours, plain, (x, w))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*LOGITS, *LINEAR])
def test_autocast(name, dtype):
    args = leaves(make(name))
    half = [a.detach().to(dtype) if a.is_floating_point() and name in LINEAR else a for a in args]
    half = leaves(half)
    with torch.autocast("cpu", dtype):
        outputs = tensors(case(name).ours(*args))
        inside = gradients(outputs, args)
    want = tensors(case(name).ours(*half))
    outside = gradients(want, half)
    assert all(o.dtype == torch.float32 and o.equal(v) for o, v in zip(outputs, want, strict=True))
    assert all(g.dtype == torch.float32 for g in inside)
    assert all(g.equal(h.float()) for g, h in zip(inside, outside, strict=True))


@pytest.mark.parametrize("name, backend", PAIRS)
def test_without_gradient(name, backend):
    args = leaves(make(name))
    with fastlm.use_backend(backend):
        want = tensors(case(name).ours(*args))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = tensors(case(name).ours(*args))
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b) and not a.requires_grad
        with torch.inference_mode():
            got = tensors(case(name).ours(*make(name)))
    assert all(a.isfinite().all() for a in got)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_kl_div"])
@pytest.mark.parametrize("upstream", ["constant", "variable"])
def test_second_derivative_is_refused(name, upstream):
    args = leaves(make(name))
    outputs = tensors(case(name).ours(*args))
    weights = [torch.ones_like(o).requires_grad_(upstream == "variable") for o in outputs]
    first = gradients(outputs, args, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first).backward()


@pytest.mark.filterwarnings("error:fastlm")  # outputs of an op that are one tensor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [*LOGITS, *LINEAR])
def test_compile_for_one_shape(name, dtype):
    args = leaves(make(name, dtype=dtype))

    def total(*args):
        return sum((v * (i + 1)).sum() for i, v in enumerate(tensors(case(name).ours(*args))))

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=False, backend="aot_eager")
    got, want = compiled(*args), total(*args)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients([got], args), gradients([want], args), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_opcheck_of_the_dtype_that_gradients_wait_in(dtype):
    x, w, b, target = make("linear", dtype=dtype)
    wide_dtype = torch.promote_types(dtype, torch.float32)
    rows = [torch.randn(5, dtype=wide_dtype) for _ in range(3)]
    args = (x, w, b, target, torch.rand(33, dtype=wide_dtype), IGNORED, 0.7, 2.0)
    args = (*args, True, False, True, True, 0, "test", *rows, True, True, True)
    torch.library.opcheck(torch.ops.fastlm.linear_cross_entropy.default, args)
    found = torch.ops.fastlm.linear_cross_entropy(*args)[9:]
    waits = torch.float32 if dtype == torch.float16 else dtype
    assert all(g.dtype == waits for g in found)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LOGITS, *LINEAR])
def test_same_bits_again(name, dtype):
    args = make(name, 70, 300, 33, dtype)
    runs = []
    for _ in range(2):
        here = leaves(args)
        outputs = tensors(case(name).ours(*here))
        runs.append([*outputs, *gradients(outputs, here)])
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [33, 9001])
@pytest.mark.parametrize("name", list(LOGITS))
@pytest.mark.parametrize("backend", ready("row_statistics"))
def test_a_row_of_logits_does_not_depend_on_the_others(name, classes, dtype, backend):
    if backend == "reference":
        pytest.skip("the library's sums depend on the shape")
    logits, target = make(name, 24, classes, dtype=dtype)
    before = torch.get_num_threads()
    with fastlm.use_backend(backend):
        want = tensors(case(name).ours(logits, target))
        for threads, parts in ((1, 1), (2, 24), (3, 5)):
            torch.set_num_threads(threads)
            try:
                pieces = zip(logits.tensor_split(parts), target.tensor_split(parts), strict=True)
                found = [tensors(case(name).ours(*piece)) for piece in pieces]
            finally:
                torch.set_num_threads(before)
            for a, b in zip(zip(*found, strict=True), want, strict=True):
                assert torch.cat(a).equal(b)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("function", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_weight_of_an_ignored_row_counts(function, bad, reduction):
    """1 / 0 tokens, say."""
    x, w, _, target = make("linear")
    token_weight = torch.rand(5)
    options = {"reduction": reduction, "z_loss_weight": 0.1, "label_smoothing": 0.1}

    def run(weight):
        leaf = weight.clone().requires_grad_()
        rest = {"token_weight": leaf, **options}
        if function == "cross_entropy":
            loss = fastlm.cross_entropy(F.linear(x, w), target, **rest)
        else:
            loss = fastlm.linear_cross_entropy(x, w, target, **rest)
        return loss, torch.autograd.grad(loss.sum(), leaf)[0]

    want = run(token_weight)
    token_weight[1] = bad
    for a, b in zip(run(token_weight), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ready("row_statistics"))
@pytest.mark.parametrize("kind", ["infinite", "overflow"])
def test_argmax_is_the_largest_logit_where_no_sum_exists(backend, kind):
    logits = torch.zeros(2, 10000)
    logits[0, [3, 5000, 9000]] = torch.inf
    logits[1, :] = torch.linspace(-1e38, -2e38, 10000)
    options = {"temperature": 0.01} if kind == "overflow" else {}
    with fastlm.use_backend(backend):
        found = fastlm.token_logprobs(
            logits, torch.tensor([3, 0]), return_argmax=True, return_lse=True, **options
        )
    assert found.argmax.tolist() == [3, 0] and found.logprobs[0].isnan()


@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("learned", [False, True])
def test_probabilities_for_any_number_of_row_dimensions(rows, reduction, learned):
    x, w, b = torch.randn(*rows, 4), torch.randn(7, 4), torch.randn(7)
    target, token_weight = torch.rand(*rows, 7), torch.rand(rows)
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def ours(x, w, b, target, token_weight):
        target = target if learned else target.detach()
        rest = {"linear_bias": b, "return_aux": ("lse",), "token_weight": token_weight}
        loss, aux = fastlm.linear_cross_entropy(x, w, target, **rest, **options)
        return loss, aux["lse"]

    def plain(x, w, b, target, token_weight):
        z = F.linear(x, w, b)
        target = target if learned else target.detach()
        smooth = target * 0.9 + 0.1 / 7
        each = -(smooth * z.log_softmax(-1)).sum(-1) * token_weight
        if reduction != "none":
            each = each.mean() if reduction == "mean" else each.sum()
        return each, z.logsumexp(-1)

    check(ours, plain, (x, w, b, target, token_weight))
