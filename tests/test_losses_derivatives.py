"""Derivatives of the losses and log-probs beyond the first, forward mode and torch.func."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastlm
from fastlm.dispatch import ready
from fastlm.testing import check

D = torch.float64
TARGET = torch.tensor([1, -100, 4])
FIELDS = {f"return_{name}": True for name in ("entropy", "lse", "sum_sq")}
AUX = {"return_aux": ("entropy", "lse", "z_loss"), "z_loss_weight": 0.1}


def scores(**others):
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5], dtype=D)
    return {
        "logit_softcapping": 3.0, "temperature": 0.7, "label_smoothing": 0.1,
        "z_loss_weight": 0.1, "weight": weight, **others,
    }  # fmt: skip


def fields(found):
    return found.logprobs, found.entropy, found.lse, found.sum_sq


def flat(found):
    return found[0], *found[1].values()


LOGITS = {
    "cross_entropy": lambda z: fastlm.cross_entropy(z, TARGET),
    "options": lambda z: fastlm.cross_entropy(z, TARGET, **scores(reduction="none")),
    "auxiliary": lambda z: flat(fastlm.cross_entropy(z, TARGET, **AUX)),
    "token_logprobs": lambda z: fields(fastlm.token_logprobs(z, TARGET, **FIELDS)),
    "entropy": fastlm.entropy,
    "probabilities": lambda z: fastlm.cross_entropy(z, torch.eye(5, dtype=D)[1:4] / 2),
}
LINEAR = {
    "cross_entropy": lambda x, w, b: fastlm.linear_cross_entropy(x, w, TARGET, linear_bias=b),
    "options": lambda x, w, b: fastlm.linear_cross_entropy(x, w, TARGET, linear_bias=b, **scores()),
    "none": lambda x, w, b: fastlm.linear_cross_entropy(
        x, w, TARGET, linear_bias=b, reduction="none"
    ),
    "auxiliary": lambda x, w, b: flat(
        fastlm.linear_cross_entropy(x, w, TARGET, linear_bias=b, **AUX)
    ),
    "token_logprobs": lambda x, w, b: fields(
        fastlm.linear_token_logprobs(x, w, TARGET, linear_bias=b, **FIELDS)
    ),
}


def layer(dtype=D):
    return tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))


@pytest.mark.parametrize("name", LOGITS)
def test_of_logits(name):
    logits = torch.randn(3, 5, dtype=D, requires_grad=True)
    assert gradcheck(LOGITS[name], logits, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(LOGITS[name], logits)


@pytest.mark.parametrize("name", LINEAR)
def test_of_a_layer(name):
    assert gradcheck(LINEAR[name], layer(), check_forward_ad=True)
    assert gradgradcheck(LINEAR[name], layer())


def test_of_probabilities():
    logits, target = (torch.rand(3, 5, dtype=D, requires_grad=True) for _ in range(2))
    assert gradgradcheck(
        lambda z, t: fastlm.cross_entropy(z, t, label_smoothing=0.1), (logits, target)
    )


def second(loss):
    """The first derivatives, and one of these."""

    def run(*leaves):
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for v in leaves]
            first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
            return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    return run


@pytest.mark.parametrize("backend", ready("row_statistics"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_derivatives_are_the_kernels(backend, dtype):
    def plain(x, w):
        return F.cross_entropy(
            F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)), TARGET
        )

    x, w, _ = layer(dtype)
    with fastlm.use_backend(backend):
        linear = lambda x, w: fastlm.linear_cross_entropy(x, w, TARGET)  # noqa: E731
        check(second(linear), second(plain), (x, w))
        logits = lambda x, w: fastlm.cross_entropy(F.linear(x, w), TARGET)  # noqa: E731
        check(second(logits), second(plain), (x, w))


FUNCTIONS = {
    "logits": (lambda z, w, t: fastlm.cross_entropy(z @ w.t(), t)),
    "layer": fastlm.linear_cross_entropy,
    "logprobs": lambda x, w, t: -fastlm.linear_token_logprobs(x, w, t).sum() / (t >= 0).sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_transforms(name):
    ours, plain = FUNCTIONS[name], lambda x, w, t: F.cross_entropy(F.linear(x, w), t)
    w = torch.randn(5, 4, dtype=D)
    x, targets = torch.randn(2, 3, 4, dtype=D), torch.tensor([[1, -100, 4], [0, 2, 2]])
    func = torch.func
    for call in (
        lambda f: func.vmap(f, (0, None, 0))(x, w, targets),
        lambda f: func.vmap(func.grad(f, 1), (0, None, 0))(x, w, targets),  # per sample
        lambda f: func.jvp(lambda w: f(x[0], w, TARGET), (w,), (w,)),
        *(  # every order of two, and forward mode in forward mode in forward mode
            lambda f, a=a, b=b: a(b(f))(x[0], w, TARGET)
            for a in (func.jacrev, func.jacfwd)
            for b in (func.jacrev, func.jacfwd, lambda f: func.jacfwd(func.jacfwd(f)))
        ),
    ):
        torch.testing.assert_close(call(ours), call(plain))


def test_results_may_be_written_to():
    """The backward has its own copies."""
    x, w, b = layer()
    for call, inputs in (
        (lambda z: fastlm.entropy(z), (torch.randn(3, 5, dtype=D, requires_grad=True),)),
        (LINEAR["token_logprobs"], (x, w, b)),
        (lambda *a: flat(fastlm.linear_cross_entropy(*a[:2], TARGET, **AUX))[:3], (x, w)),
    ):
        found = call(*inputs)
        found = [found] if isinstance(found, torch.Tensor) else found
        want = torch.autograd.grad(sum(v.sum() for v in found), inputs, retain_graph=True)
        for value in found:
            value.mul_(2)
        got = torch.autograd.grad(sum(v.sum() for v in found), inputs)
        for a, c in zip(got, want, strict=True):
            torch.testing.assert_close(a, 2 * c)
