"""token_logprobs, linear_token_logprobs and entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastlm
from fastlm.dispatch import ready
from fastlm.nn.losses import LinearCrossEntropyLoss, LinearTokenLogprobs
from fastlm.testing import LAYOUTS, check, strided

BACKENDS = ready("row_statistics")
EVERYTHING = {f"return_{name}": True for name in ("entropy", "lse", "argmax", "sum_sq")}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.use_backend(request.param):
        yield request.param


def plain_fields(z, target):
    kept = target != -100
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    found = (
        log_p.gather(-1, target.where(kept, 0)[..., None])[..., 0],
        -(p * log_p).sum(-1),
        z.logsumexp(-1),
        p.square().sum(-1),
    )
    return [torch.where(kept, f, 0.0) for f in found]


def plain(scale=1.0, softcap=None):
    def run(logits, target):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = wide if softcap is None else softcap * torch.tanh(wide / softcap)
        return plain_fields(z * scale, target)

    return run


def plain_linear(input, weight, bias, target):
    """PyTorch with the logits of half-precision inputs in float32, which is what ours promises."""
    wide = torch.promote_types(input.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return plain_fields(F.linear(input.to(wide), weight.to(wide), bias), target)


def fields(found):
    return [found.logprobs, found.entropy, found.lse, found.sum_sq]


def make(*shape, dtype=torch.float32):
    logits = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, shape[-1], shape[:-1])
    if target.dim() and target.shape[0] > 2:
        target[1] = -100
    return logits, target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (4, 33), (3, 2, 65), (2, 10000)])
def test_matches_plain(backend, dtype, shape):
    def ours(x, t):
        return fields(fastlm.token_logprobs(x, t, **EVERYTHING))

    check(ours, plain(), make(*shape, dtype=dtype))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_temperature_scale_softcap(backend, softcap):
    def ours(x, t):
        options = {"temperature": 0.7, "logit_scale": 1.3, "logit_softcapping": softcap}
        return fields(fastlm.token_logprobs(x, t, **options, **EVERYTHING))

    check(ours, plain(1.3 / 0.7, softcap), make(6, 50))


def test_what_is_returned(backend):
    logits, target = make(4, 3, 9)
    alone = fastlm.token_logprobs(logits, target)
    assert isinstance(alone, torch.Tensor) and alone.shape == (4, 3)
    found = fastlm.token_logprobs(logits, target, return_argmax=True)
    assert isinstance(found, fastlm.TokenLogprobs) and torch.equal(found.logprobs, alone)
    assert found.entropy is found.lse is found.sum_sq is None
    kept = target != -100
    assert torch.equal(found.argmax, logits.argmax(-1).where(kept, -1))
    assert not alone[1].any() and (alone <= 0).all()
    assert torch.equal(fastlm.token_logprobs(logits, target.int()), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    logits, target = make(4, 3, 20)
    want = fastlm.token_logprobs(logits, target)
    got = fastlm.token_logprobs(strided(logits, layout), strided(target, layout))
    torch.testing.assert_close(got, want)


def test_probabilities_of_all_tokens_sum_to_one(backend):
    logits = torch.randn(1, 300).expand(300, 300)
    logprobs = fastlm.token_logprobs(logits, torch.arange(300), logit_softcapping=2.0)
    torch.testing.assert_close(logprobs.exp().sum(), torch.ones(()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy(backend, dtype):
    def ours(x):
        return fastlm.entropy(x, temperature=0.5)

    def theirs(x):
        z = x.to(torch.promote_types(x.dtype, torch.float32)) / 0.5
        log_p = z.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    for shape in ((1,), (3, 1), (2, 3, 77), (2, 5000)):
        check(ours, theirs, make(*shape, dtype=dtype)[:1])
    uniform = fastlm.entropy(torch.zeros(2, 1024))
    torch.testing.assert_close(uniform, torch.full((2,), 6.931471805599453))


def test_entropy_of_masked_classes(backend):
    logits = torch.randn(3, 8, requires_grad=True)
    masked = logits.masked_fill(torch.arange(8) > 4, -torch.inf)
    got = fastlm.entropy(masked)
    torch.testing.assert_close(got, fastlm.entropy(logits[:, :5]))
    (grad,) = torch.autograd.grad(got.sum(), logits)
    assert grad.isfinite().all() and not grad[:, 5:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows, features, classes", [(1, 1, 1), (9, 33, 65), (17, 127, 300)])
def test_linear_matches_plain(backend, dtype, bias, rows, features, classes):
    input = torch.randn(rows, features).to(dtype)
    weight = torch.randn(classes, features).to(dtype)
    extra = torch.randn(classes).to(dtype) if bias else None
    target = torch.randint(0, classes, (rows,))
    target[rows // 2] = -100 if rows > 1 else 0
    options = fastlm.LinearCrossEntropyOptions(max_memory_bytes=4 * classes * 4)

    def ours(x, w, *rest):
        b, t = rest if bias else (None, *rest)
        call = {"linear_bias": b, "options": options, **EVERYTHING}
        return fields(fastlm.linear_token_logprobs(x, w, t, **call))

    def theirs(x, w, *rest):
        return plain_linear(x, w, *rest) if bias else plain_linear(x, w, None, *rest)

    args = (input, weight, extra, target) if bias else (input, weight, target)
    check(ours, theirs, args)


def test_linear_chunks_do_not_change_the_results(backend):
    input, weight = torch.randn(3, 7, 5), torch.randn(40, 5)
    target = torch.randint(0, 40, (3, 7))
    want = fastlm.linear_token_logprobs(input, weight, target)
    assert want.shape == (3, 7)
    for rows in (1, 2, 20):
        options = fastlm.LinearCrossEntropyOptions(max_memory_bytes=rows * 40 * 4)
        got = fastlm.linear_token_logprobs(input, weight, target, options=options)
        torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("kernels")
def test_linear_gradcheck():
    input = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, -100, 2])

    def run(*layer):
        call = {"linear_bias": layer[2], "logit_softcapping": 3.0, **EVERYTHING}
        return tuple(fields(fastlm.linear_token_logprobs(layer[0], layer[1], target, **call)))

    assert torch.autograd.gradcheck(run, (input, weight, bias))


@pytest.mark.parametrize("frozen", range(3))
def test_linear_with_a_frozen_part(backend, frozen):
    layer = [torch.randn(6, 4), torch.randn(9, 4), torch.randn(9)]
    target = torch.randint(0, 9, (6,))
    grads = []
    for freeze in (False, True):
        leaves = [
            v.clone().requires_grad_(not (freeze and i == frozen)) for i, v in enumerate(layer)
        ]
        found = fastlm.linear_token_logprobs(leaves[0], leaves[1], target, linear_bias=leaves[2])
        (found * torch.arange(6)).sum().backward()
        grads.append([v.grad for v in leaves])
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert b is None if i == frozen else torch.equal(a, b)


@pytest.mark.parametrize("op", ["token_logprobs", "linear_token_logprobs", "entropy"])
def test_compile(backend, op):
    weight = torch.randn(11, 4, requires_grad=True)

    def run(x, t):
        if op == "entropy":
            return fastlm.entropy(x).sum()
        if op == "token_logprobs":
            found = fastlm.token_logprobs(x, t, **EVERYTHING)
        else:
            found = fastlm.linear_token_logprobs(x, weight, t, **EVERYTHING)
        return found.logprobs.sum() + found.entropy.square().sum() + found.argmax.sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        x = torch.randn(rows, 4 if op.startswith("linear") else 11, requires_grad=True)
        target = torch.randint(0, 11, (rows,))
        want, got = run(x, target), compiled(x, target)
        torch.testing.assert_close(got, want)
        a, b = torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0]
        torch.testing.assert_close(a, b)


def test_opcheck_linear(backend):
    layer = (torch.randn(5, 3), torch.randn(7, 3), torch.randn(7))
    target = torch.tensor([0, 6, -100, 2, 3])
    compared = (target, torch.rand(7), -100, 0.7, 2.0)
    args = (*layer, *compared, True, True, True, True, 60, "test")
    torch.library.opcheck(torch.ops.fastlm.linear_row_statistics.default, args)
    found = torch.ops.fastlm.linear_row_statistics(*args)
    factors = [torch.randn(5) for _ in range(5)]
    args = (*layer, *compared, found[6], found[7], *factors, True, False, True, 60)
    torch.library.opcheck(torch.ops.fastlm.linear_row_statistics_backward.default, args)


@pytest.mark.parametrize("value", [9, -1])
def test_target_out_of_range(backend, value):
    target = torch.zeros(2, 3, dtype=torch.int64)
    target[1, 0] = value
    message = rf"token_logprobs: target must be in \[0, 9\) or -100, got {value} at \[1, 0\]"
    with pytest.raises(IndexError, match="fastlm." + message):
        fastlm.token_logprobs(torch.zeros(2, 3, 9), target)
    with pytest.raises(IndexError, match="fastlm.linear_" + message):
        fastlm.linear_token_logprobs(torch.zeros(2, 3, 4), torch.zeros(9, 4), target)


def test_bad_arguments():
    logits, target = torch.zeros(7, 33), torch.zeros(7, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_logprobs: target must be \[7\].*got \[6\]"):
        fastlm.token_logprobs(logits, target[:6])
    with pytest.raises(TypeError, match="target must be an integer tensor"):
        fastlm.token_logprobs(logits, target.float())
    with pytest.raises(ValueError, match="temperature must be positive"):
        fastlm.token_logprobs(logits, target, temperature=-1.0)
    with pytest.raises(ValueError, match=r"entropy: logits must be \[..., V\]"):
        fastlm.entropy(torch.zeros(()))
    with pytest.raises(ValueError, match=r"linear_weight must be \[\*, 33\]"):
        fastlm.linear_token_logprobs(logits, torch.zeros(5, 32), target)
    with pytest.raises(TypeError, match="linear_weight must be float32"):
        fastlm.linear_token_logprobs(logits, torch.zeros(5, 33).bfloat16(), target)


def test_module_shares_the_state_of_the_loss():
    head, scorer = LinearCrossEntropyLoss(6, 9, bias=True), LinearTokenLogprobs(6, 9, bias=True)
    scorer.load_state_dict(head.state_dict())
    x, target = torch.randn(4, 6), torch.randint(0, 9, (4,))
    torch.testing.assert_close(-scorer(x, target).mean(), head(x, target))
    assert LinearTokenLogprobs(6, 9, return_entropy=True)(x, target).entropy.shape == (4,)
