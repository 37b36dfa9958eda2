"""fastlm.linear_policy_loss: policy_loss of the log-probs of logits it never holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm.dispatch import ready
from fastlm.ops.linear_policy_loss.terms import Terms
from fastlm.ops.linear_row_statistics import chunks
from fastlm.ops.policy_loss import reference
from fastlm.ops.policy_loss.op import AGGREGATION, MODES
from fastlm.testing import check

BACKENDS = ready("linear_policy_loss")
B, T, H, V = 3, 7, 5, 23


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.use_backend(request.param):
        yield request.param


def small():
    """Chunks of four rows."""
    return fastlm.LinearCrossEntropyOptions(batch_chunk_size=4)


def layer(dtype=torch.float64) -> list[Tensor]:
    shapes = ((B, T, H), (V, H), (V,))
    return [torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def batch(values: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Target, advantages and the rest; ratios on both sides of the clip range, row 1 empty,
    nonsense behind the mask."""
    input, weight, bias = (v.detach() for v in values)
    target = torch.randint(0, V, (B, T))
    log_p = torch.nn.functional.linear(input, weight, bias).log_softmax(-1)
    found = log_p.gather(-1, target[..., None])[..., 0]
    mask = torch.rand(B, T) < 0.7
    mask[1], mask[0, :2] = False, True
    rest = {
        "old_logprobs": found + 0.3 * torch.randn(B, T).to(found),
        "ref_logprobs": found + 0.3 * torch.randn(B, T).to(found),
        "is_ratio": 2 * torch.rand(B, T).to(found),
    }
    for value in rest.values():
        value[~mask] = torch.nan
    target[~mask] = V + 5
    return target, torch.randn(B, T).to(found), rest | {"mask": mask}


def composed(values, target, advantages, *, entropy_coef=0.0, options=None, **call):
    """Two passes, with the gradient by autograd."""
    input, weight, bias = values
    target = torch.where(call["mask"], target, -100) if "mask" in call else target
    z = torch.nn.functional.linear(input, weight, bias)
    if (cap := call.pop("logit_softcapping", None)) is not None:
        z = cap * torch.tanh(z / cap)
    log_p = (z / call.pop("temperature", 1.0)).log_softmax(-1)
    logprobs = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return fastlm.policy_loss(
        logprobs, advantages, entropy=entropy, entropy_coef=entropy_coef, **call
    )


def ours(values, target, advantages, **call):
    input, weight, bias = values
    call = {"options": small(), **call}
    return fastlm.linear_policy_loss(input, weight, target, advantages, linear_bias=bias, **call)


def agree(values, target, advantages, **call):
    got, want = (
        ours(values, target, advantages, **call),
        composed(values, target, advantages, **call),
    )
    torch.testing.assert_close(got, want)
    needed = [v for v in values if v.requires_grad]
    grads = torch.autograd.grad(want, needed)
    for a, b in zip(torch.autograd.grad(got, needed), grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("loss_type", AGGREGATION)
def test_is_policy_loss_of_the_logprobs(loss_type, mode):
    values = layer()
    target, advantages, rest = batch(values)
    agree(
        values,
        target,
        advantages,
        loss_type=loss_type,
        loss_agg_mode=mode,
        clip_eps_high=0.28,
        kl_coef=0.1,
        entropy_coef=0.05,
        is_cap=1.5,
        **rest,
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("is_mode", ["truncate", "mask"])
@pytest.mark.parametrize("loss_type", ["ppo", "cispo", "gspo"])
def test_options(loss_type, is_mode, estimator):
    values = layer()
    target, advantages, rest = batch(values)
    agree(
        values,
        target,
        advantages,
        loss_type=loss_type,
        is_mode=is_mode,
        is_cap=1.2,
        kl_coef=0.3,
        kl_estimator=estimator,
        dual_clip=1.5 if loss_type == "ppo" else None,
        max_length=11,
        loss_agg_mode="seq-mean-token-sum-norm",
        temperature=0.7,
        logit_softcapping=3.0,
        **rest,
    )


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("loss_type", ["reinforce", "ppo", "gspo"])
def test_without_options(loss_type):
    values = layer()
    target, advantages, _ = batch(values)
    agree(values, target.clamp(max=V - 1), advantages[:, 0], loss_type=loss_type)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", MODES)
def test_weights_of_the_aggregation(mode):
    values, keep = torch.randn(B, T).double(), torch.rand(B, T) < 0.5
    for mask in (keep, torch.zeros_like(keep)):
        kept = torch.where(mask, values, 0.0)
        weights = reference.token_weights(mask, mode, 9, torch.float64)
        torch.testing.assert_close((weights * kept).sum(), reference.aggregate(kept, mask, mode, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", ["reinforce", "grpo"])
def test_dtypes(backend, dtype, loss_type):
    values = [v.detach() for v in layer(dtype)]
    target, advantages, rest = batch([v.double() for v in values])

    def with_(function, wide):
        def run(*args):
            if wide:
                args = [a.to(torch.promote_types(a.dtype, torch.float32)) for a in args]
            extra = {k: v if v.dtype == torch.bool else v.to(args[0].dtype) for k, v in fixed}
            a = advantages.to(args[0].dtype)
            return function(args, target, a, entropy_coef=0.1, loss_type=loss_type, **extra)

        return run

    fixed = [(k, v) for k, v in rest.items() if k != "is_ratio"]
    fixed = [(k, v.to(dtype) if v.is_floating_point() else v) for k, v in fixed]
    advantages = advantages.to(dtype)
    check(with_(ours, False), with_(composed, True), values)


@pytest.mark.parametrize("what", ["advantages", "clipped", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_without_gradient_are_left_out(backend, what, bias, monkeypatch):
    rows = []
    add = chunks.Gradients.add

    def counted(self, dlogits, span):
        rows.append(len(dlogits))
        add(self, dlogits, span)

    monkeypatch.setattr(chunks.Gradients, "add", counted)
    monkeypatch.setattr(chunks, "_MOVE_COST", 0)  # worth it however short a row of the input is
    values = layer(torch.float32)
    values[2] = values[2] if bias else None
    dtype = torch.float64 if backend == "reference" else torch.float32
    values = [None if v is None else v.detach().to(dtype).requires_grad_() for v in values]
    zero = torch.zeros(V, dtype=dtype)
    target, advantages, rest = batch([values[0], values[1], values[2] if bias else zero])
    kept = int(rest["mask"].sum())
    rest["old_logprobs"] = rest["old_logprobs"].nan_to_num() + 0
    if what == "advantages":
        advantages[:, ::2] = 0
        kept = int(rest["mask"][:, 1::2].sum())
    if what == "clipped":  # a ratio far above 1 with a positive advantage has no gradient
        advantages = advantages.abs()
        rest["old_logprobs"][:, 1:] = -50.0
        kept = int(rest["mask"][:, 0].sum())
    call = {"loss_type": "ppo", "options": None, "clip_eps_low": 0.99, "clip_eps_high": 10.0}
    call |= {k: rest[k] for k in ("old_logprobs", "mask")}
    needed = [v for v in values if v is not None]
    got = torch.autograd.grad(ours(values, target, advantages, **call), needed)
    assert sum(rows) == kept
    want = torch.autograd.grad(composed(values, target, advantages, **call), needed)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_frozen_parts(needed):
    values = [v.detach().requires_grad_(n) for v, n in zip(layer(), needed, strict=True)]
    target, advantages, rest = batch(values)
    if any(needed):
        agree(values, target, advantages, loss_type="grpo", **rest)
    else:
        assert not ours(values, target, advantages, **rest).requires_grad


def test_backward_again_and_scaled(backend):
    values = layer(torch.float32)
    target, advantages, rest = batch(values)
    call = {"loss_type": "ppo", "entropy_coef": 0.1, **rest}
    want = torch.autograd.grad(composed(values, target, advantages, **call), values)
    loss = ours(values, target, advantages, **call)
    first = torch.autograd.grad(loss, values, torch.tensor(-3.0), retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, values, retain_graph=True)
    third = torch.autograd.grad(loss, values)
    for a, copy, b, c, w in zip(first, copies, second, third, want, strict=True):
        assert torch.equal(a, copy)
        for got, scale in ((a, -3), (b, 2), (c, 1)):
            torch.testing.assert_close(got, scale * w, rtol=1e-4, atol=1e-5)


def my_loss(log_p, entropy, weight):
    return (log_p * weight).square() + torch.sin(log_p) * entropy - 0.1 * entropy.square()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [True, False])
def test_row_loss(mode, masked):
    values = layer()
    target, advantages, rest = batch(values)
    call = {"mask": rest["mask"]} if masked else {}
    target = target if masked else target.clamp(max=V - 1)
    keep = rest["mask"] if masked else torch.ones(B, T, dtype=torch.bool)
    weight, seen = advantages.flatten(), []

    def row_loss(logprobs, entropy, rows):
        seen.append(rows)
        return my_loss(logprobs, entropy, weight[rows])

    log_p = torch.nn.functional.linear(*values).log_softmax(-1)
    chosen = log_p.gather(-1, target.clamp(max=V - 1)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    each = torch.where(keep, my_loss(chosen, entropy, advantages), 0.0)
    want = reference.aggregate(each, keep, mode, None)
    got = ours(values, target, None, row_loss=row_loss, loss_agg_mode=mode, **call)
    torch.testing.assert_close(got, want)
    assert torch.equal(torch.cat(seen).sort()[0], keep.flatten().nonzero()[:, 0])
    grads = torch.autograd.grad(want, values)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(got, values, retain_graph=True), grads, strict=True):
            torch.testing.assert_close(a, b)
    with torch.inference_mode():
        again = ours(values, target, None, row_loss=row_loss, loss_agg_mode=mode, **call)
    torch.testing.assert_close(again, want)


def test_row_loss_may_ignore_what_it_is_given(backend):
    values = layer(torch.float32)
    target, advantages, _ = batch(values)
    target = target.clamp(max=V - 1)
    constant = ours(values, target, None, row_loss=lambda p, s, rows: torch.ones_like(p))
    assert constant.item() == pytest.approx(1)
    for grad in torch.autograd.grad(constant, values):
        assert not grad.any()
    loss = ours(values, target, advantages, row_loss=lambda p, s, rows: -p)
    want = composed(values, target, torch.ones(B, T))
    for a, b in zip(
        torch.autograd.grad(loss, values), torch.autograd.grad(want, values), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("kernels")
def test_gradcheck():
    values = layer()
    target, advantages, rest = batch(values)
    for loss_type in ("reinforce", "rloo"):
        call = {"loss_type": loss_type, "entropy_coef": 0.2, "kl_coef": 0.1, **rest}
        assert torch.autograd.gradcheck(
            lambda *v, call=call: ours(v, target, advantages, **call), values
        )


@pytest.mark.parametrize("mask", ["all", "none", "no rows"])
def test_nothing_left(backend, mask):
    values = layer(torch.float32)
    target, advantages, _ = batch(values)
    keep = torch.zeros(B, T, dtype=torch.bool)
    if mask == "no rows":
        values[0] = torch.randn(B, 0, H, requires_grad=True)
        target, advantages, keep = target[:, :0], advantages[:, :0], keep[:, :0]
    if mask == "none":
        target = torch.full_like(target, -100)
        keep = None
    for loss_type in ("ppo", "gspo"):
        loss = ours(values, target, advantages, mask=keep, loss_type=loss_type)
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, values):
            assert not grad.any()


def test_every_element_is_written(backend, poisoned):
    for dtype in (torch.float32, torch.bfloat16):
        values = layer(dtype)
        target, advantages, rest = batch(values)
        loss = ours(values, target, advantages, loss_type="grpo", entropy_coef=0.1, **rest)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, values))


def test_compile(backend):
    _, weight, bias = layer(torch.float32)

    def run(x, target, advantages, old, mask):
        call = {"old_logprobs": old, "mask": mask, "loss_type": "ppo", "entropy_coef": 0.1}
        return 3 * ours((x, weight, bias), target, advantages, **call)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (4, 6):
        x = torch.randn(2, length, H, requires_grad=True)
        target, mask = torch.randint(0, V, (2, length)), torch.rand(2, length) < 0.7
        args = (x, target, torch.randn(2), -torch.rand(2, length) - 2, mask)
        want, got = run(*args), compiled(*args)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got, (x, weight, bias)),
            torch.autograd.grad(want, (x, weight, bias)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("needs", [(True, False, True), (False, False, False)])
def test_opcheck(backend, needs, entropy_coef):
    rows = [torch.rand(5) for _ in range(5)]
    terms = Terms(*rows, "ppo", 0.2, 0.3, 2.0, 0.1, "k3", entropy_coef)
    target = torch.tensor([0, 6, -100, 2, 3])
    args = (torch.randn(5, 3), torch.randn(7, 3), torch.randn(7), target, -100, 0.7, 2.0, *terms)
    torch.library.opcheck(torch.ops.fastlm.linear_policy_loss.default, (*args, 60, "test", *needs))


def test_autocast(backend):
    values = layer(torch.float32)
    target, advantages, rest = batch(values)
    want = ours(values, target, advantages, **rest)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(values, target, advantages, **rest)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    got.backward()
    assert values[1].grad.dtype == torch.float32


@pytest.mark.usefixtures("kernels")
def test_second_derivative_raises():
    values = layer()
    target, advantages, rest = batch(values)
    loss = ours(values, target, advantages, **rest)
    (grad,) = torch.autograd.grad(loss, values[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"input": torch.zeros(6, 3)}, ValueError, r"input must be \[\*, \*, \*\] \(\[B, T, H\]\)"),
        ({"target": torch.zeros(2, 3)}, TypeError, "target must be an integer"),
        ({"target": torch.zeros(2, 4).long()}, ValueError, r"target must be \[2, 3\].*\[2, 4\]"),
        ({"target": torch.full((2, 3), 9)}, IndexError, r"target must be in \[0, 9\).*9 at"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages must be \[2\]"),
        ({"advantages": None}, TypeError, "advantages must be a tensor"),
        ({"mask": torch.zeros(2, 4)}, ValueError, r"mask must be \[2, 3\] \(as target\)"),
        ({"old_logprobs": torch.zeros(2)}, ValueError, r"old_logprobs must be \[2, 3\]"),
        ({"loss_type": "vpg"}, ValueError, "loss_type must be one of"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs must be given"),
        ({"dual_clip": 2.0}, ValueError, "dual_clip must be None"),
        ({"linear_weight": torch.zeros(9, 2)}, ValueError, r"linear_weight must be \[\*, 3\]"),
        ({"entropy_coef": torch.zeros(())}, TypeError, "entropy_coef must be a number"),
        ({"row_loss": lambda p, s, r: p, "loss_type": "ppo"}, ValueError, "loss_type must be left"),
        ({"row_loss": lambda p, s, r: p.sum()}, ValueError, "what row_loss returns must be"),
        ({"row_loss": lambda p, s, r: 0.0}, TypeError, "what row_loss returns must be a tensor"),
        ({"options": 3}, TypeError, "options must be LinearCrossEntropyOptions"),
    ],
)  # fmt: skip
def test_bad_arguments(kwargs, error, message):
    call = {
        "input": torch.zeros(2, 3, 3),
        "linear_weight": torch.zeros(9, 3),
        "target": torch.zeros(2, 3, dtype=torch.int64),
        "advantages": torch.zeros(2),
        **kwargs,
    }
    with pytest.raises(error, match=message) as caught:
        fastlm.linear_policy_loss(**call)
    assert str(caught.value).startswith("fastlm.linear_policy_loss: ")


def test_row_loss_does_not_compile():
    def run(x, weight, target):
        return fastlm.linear_policy_loss(x, weight, target, None, row_loss=lambda p, s, r: -p)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="row_loss must be None under torch.compile"):
        compiled(torch.zeros(2, 3, 3), torch.zeros(9, 3), torch.zeros(2, 3, dtype=torch.int64))
