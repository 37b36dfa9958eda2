"""Calls of few logits are PyTorch's own operations: same meaning, same errors, no more time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm import dispatch
from fastlm.testing import FLOATS, LAYOUTS, check, strided

N, V, H = 7, 33, 12


@pytest.fixture(autouse=True)
def _usual_order() -> Iterator[None]:
    """A backend that is asked for takes calls of every size."""
    with fastlm.use_backend(None):
        yield


def logits(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (3 * torch.randn(*(shape or (N, V)), generator=generator)).to(dtype)


def layer(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return logits(dtype, N, H), logits(dtype, V, H)


TARGET = torch.arange(N) * 4
PADDED = torch.where(torch.arange(N) % 3 == 1, -100, TARGET)
TEACHER = layer()


def _nll(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores, target, reduction="none")


def _linear(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda h, w, target: call(h, w, target, **options)


# ours, plain, of (logits, target) or of (input, weight, target)
ON_LOGITS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cross_entropy": (fastlm.cross_entropy, F.cross_entropy),
    "smoothed": (
        lambda x, t: fastlm.cross_entropy(x, t, label_smoothing=0.1, reduction="sum"),
        lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1, reduction="sum"),
    ),
    "token_logprobs": (fastlm.token_logprobs, lambda x, t: -_nll(x, t)),
    "warm": (
        lambda x, t: fastlm.token_logprobs(x, t, temperature=0.7),
        lambda x, t: -_nll(x / 0.7, t),
    ),
}
ON_LAYER: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear_cross_entropy": (
        fastlm.linear_cross_entropy,
        lambda h, w, t: F.cross_entropy(F.linear(h, w), t),
    ),
    "linear_none": (
        _linear(fastlm.linear_cross_entropy, reduction="none"),
        lambda h, w, t: _nll(F.linear(h, w), t),
    ),
    "linear_token_logprobs": (
        fastlm.linear_token_logprobs,
        lambda h, w, t: -_nll(F.linear(h, w), t),
    ),
    "linear_policy_loss": (
        lambda h, w, t: fastlm.linear_policy_loss(h[None], w, t[None], torch.ones(1)),
        lambda h, w, t: F.cross_entropy(F.linear(h, w), t),
    ),
}


def runs_torch(op: str, *args: Any, **options: Any) -> bool:
    steps = fastlm.explain(op, *args, **options)
    return [(step.op, step.chosen) for step in steps] == [(op, "torch")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize("target", [TARGET, PADDED], ids=["all", "padded"])
@pytest.mark.parametrize("name", ON_LOGITS)
def test_logits(name: str, target: Tensor, dtype: torch.dtype, layout: str) -> None:
    ours, plain = ON_LOGITS[name]
    check(lambda x: ours(x, target), lambda x: plain(x, target), (strided(logits(dtype), layout),))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize("target", [TARGET, PADDED], ids=["all", "padded"])
@pytest.mark.parametrize("name", ON_LAYER)
def test_layers(name: str, target: Tensor, dtype: torch.dtype) -> None:
    ours, plain = ON_LAYER[name]
    check(lambda h, w: ours(h, w, target), lambda h, w: plain(h, w, target), layer(dtype))


def _divergence(q: Tensor, p: Tensor, kind: str, beta: float) -> Tensor:
    """[N] of log-probs, as `linear_kl_div` defines it."""
    if kind == "forward":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "reverse":
        return (q.exp() * (q - p)).sum(-1)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_divergences(kind: str, reduction: str) -> None:
    student = tuple(x.flip(0) / 4 for x in layer())

    def ours(h: Tensor, w: Tensor) -> Tensor:
        theirs = [x.to(h.dtype) / 4 for x in TEACHER]
        options: Any = {"divergence": kind, "beta": 0.3, "temperature": 2.0}
        return fastlm.linear_kl_div(h, w, *theirs, **options, reduction=reduction)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        h2, w2 = (x.to(h.dtype) / 4 for x in TEACHER)
        log_q, log_p = (F.linear(a, b).div(2).log_softmax(-1) for a, b in ((h, w), (h2, w2)))
        value = _divergence(log_q, log_p, kind, 0.3)
        return value if reduction == "none" else getattr(value, reduction)()

    check(ours, plain, student)


def test_entropy_with_classes_taken_out() -> None:
    scores = logits()
    scores[:, ::5] = -math.inf
    scores[2, 1:] = -math.inf  # one class left

    def plain(x: Tensor) -> Tensor:
        log_p = x.log_softmax(-1).clamp(min=-1e30)
        return -(log_p.exp() * log_p).sum(-1)

    check(fastlm.entropy, plain, (scores,))
    assert runs_torch("entropy", scores)


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_LAYER])
def test_nothing_of_an_ignored_row_is_in_a_gradient(name: str) -> None:
    ours = {**ON_LOGITS, **ON_LAYER}[name][0]
    inputs = [logits()] if name in ON_LOGITS else list(layer())
    inputs[0][PADDED == -100] = math.nan
    leaves = [x.requires_grad_() for x in inputs]
    value = ours(*leaves, PADDED)
    grads = torch.autograd.grad(value, leaves, torch.ones_like(value))
    assert bool(value.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)
    assert not bool(grads[0][PADDED == -100].any())
    zeros = value if value.dim() == 0 else value[PADDED == -100]
    assert value.dim() == 0 or not bool(zeros.signbit().any())


@pytest.mark.parametrize("name", [*ON_LOGITS, *ON_LAYER])
@pytest.mark.parametrize("index", [V, -1])
def test_a_target_out_of_range_is_named(name: str, index: int) -> None:
    ours = {**ON_LOGITS, **ON_LAYER}[name][0]
    target = TARGET.clone()
    target[3] = index
    inputs = [logits()] if name in ON_LOGITS else layer()
    with pytest.raises(IndexError, match=rf"fastlm.*target must be in \[0, {V}\).* got {index} at"):
        ours(*inputs, target)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": True},
        {"logit_scale": torch.tensor(1.0)},
        {"label_smoothing": 2.0},
        {"reduction": "median"},
        {"ignore_index": 1.5},
    ],
    ids=str,
)
def test_options_are_checked_as_always(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"fastlm.*{next(iter(options))} must be"):
        fastlm.cross_entropy(logits(), TARGET, **options)
    with pytest.raises((TypeError, ValueError), match=f"fastlm.*{next(iter(options))} must be"):
        fastlm.linear_cross_entropy(*layer(), TARGET, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_without_the_op_are_those_of_the_op(dtype: torch.dtype) -> None:
    scores, (h, w) = logits(dtype), layer(dtype)
    calls: list[tuple[Callable[..., Any], list[Tensor]]] = [
        (lambda x: fastlm.token_logprobs(x, PADDED, temperature=0.7), [scores]),
    ]
    if dtype == torch.float32:
        # no ignored row, which the op leaves out: MKL rounds by the number of rows
        calls.append((lambda a, b: fastlm.linear_token_logprobs(a, b, TARGET), [h, w]))
    for call, inputs in calls:
        results = []
        for ask in (False, True):  # who asks what runs gets the op
            leaves = [x.clone().requires_grad_() for x in inputs]
            dispatch._here.trace = [] if ask else None
            try:
                value = call(*leaves)
            finally:
                dispatch._here.trace = None
            upstream = torch.linspace(-1, 2, N)
            results.append((value, *torch.autograd.grad(value, leaves, upstream)))
            assert torch.equal(call(*inputs), value)  # without a gradient
        (plain, *grads), (traced, *others) = results
        assert torch.equal(plain, traced)
        assert torch.equal(grads[0], others[0])


def test_classes_second_and_their_weights() -> None:
    scores, target = logits(torch.float32, 3, V, 2, 2), torch.randint(0, V, (3, 2, 2))
    weight = torch.rand(V)
    assert runs_torch("cross_entropy", scores, target, weight)
    check(
        lambda x: fastlm.cross_entropy(x, target, weight.to(x.dtype)),
        lambda x: F.cross_entropy(x, target, weight.to(x.dtype)),
        (scores,),
    )


def test_which_calls_are_torch_and_which_are_not() -> None:
    wide = torch.float64
    cases = [
        ("cross_entropy", logits(), TARGET),
        ("entropy", logits()),
        ("linear_cross_entropy", *layer(), TARGET),
        ("linear_kl_div", *layer(), *TEACHER),
        ("token_logprobs", logits(wide), TARGET),
        ("linear_token_logprobs", *layer(wide), TARGET),
    ]
    for name, *args in cases:
        assert runs_torch(name, *args), name
        with fastlm.use_backend("reference"):
            assert not runs_torch(name, *args), name
    # these agree to the bit with what `sample` and `generate` report
    assert not runs_torch("token_logprobs", logits(), TARGET)
    assert not runs_torch("linear_token_logprobs", *layer(), TARGET)
    large = logits(torch.float32, 512, 1024)
    assert not runs_torch("entropy", large)
    assert not runs_torch("cross_entropy", large, torch.zeros(512, dtype=torch.int64))
    assert not runs_torch("cross_entropy", logits(), TARGET, z_loss_weight=1e-4)
