"""How the fused linear losses run: tiles within a budget, dead rows, a given accumulator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastlm
from fastlm import matmul
from fastlm.dispatch import ready
from fastlm.ops.linear_row_statistics import chunks, rounding, slices
from fastlm.ops.linear_row_statistics.chunks import Layer, chunk_of
from fastlm.testing import check

BACKENDS = ready("linear_cross_entropy")
N, H, V = 23, 6, 41
MIB = 1 << 20


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastlm.use_backend(request.param):
        yield request.param


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 8 by 8 and less, each of them run."""
    monkeypatch.setattr(slices, "_LEAST_SIDE", 8)
    ran = []
    backward, forward = slices.backward, slices.forward
    monkeypatch.setattr(slices, "backward", lambda *a: ran.append("backward") or backward(*a))
    monkeypatch.setattr(slices, "forward", lambda *a: ran.append("forward") or forward(*a))
    yield fastlm.LinearCrossEntropyOptions(max_memory_bytes=1)
    assert "forward" in ran and "backward" in ran


def make(dtype=torch.float32, dead=2):
    target = torch.randint(0, V, (N,))
    target[1 : 1 + dead] = -100
    shapes = ((N, H), (V, H), (V,))
    return (*(torch.randn(*s).to(dtype) for s in shapes), target)


def wide(*values):
    return [v.to(torch.promote_types(v.dtype, torch.float32)) for v in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", [0, 1, 9, N - 1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tiles_are_cross_entropy(backend, tiny_tiles, dtype, dead, reduction):
    options = {"label_smoothing": 0.1, "reduction": reduction}
    class_weight = torch.rand(V)

    def plain(x, w, b, t):
        x, w, b = wide(x, w, b)
        return F.cross_entropy(F.linear(x, w, b), t, class_weight.to(x.dtype), **options)

    def run(x, w, b, t):
        call = {"linear_bias": b, "weight": class_weight, "options": tiny_tiles, **options}
        return fastlm.linear_cross_entropy(x, w, t, **call)

    check(run, plain, make(dtype, dead))


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (-1.5, 2.0)])
def test_tiles_give_every_statistic(backend, tiny_tiles, scale, softcap):
    names = ("return_entropy", "return_lse", "return_argmax", "return_sum_sq")
    call = {"logit_scale": scale, "logit_softcapping": softcap} | dict.fromkeys(names, True)

    def found(x, w, b, t, options):
        result = fastlm.linear_token_logprobs(x, w, t, linear_bias=b, options=options, **call)
        return [v for v in result if v.is_floating_point()], result.argmax

    args = make()
    run = [lambda *a, o=o: found(*a, o)[0] for o in (tiny_tiles, None)]
    for a, b in zip(run[0](*args), run[1](*args), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(found(*args, tiny_tiles)[1], found(*args, None)[1])
    leaves = [v.requires_grad_() for v in args[:3]]
    grads = [
        torch.autograd.grad(sum((i + 1) * v.sin().sum() for i, v in enumerate(r)), leaves)
        for r in (f(*leaves, args[3]) for f in run)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tiles_of_infinite_and_far_logits(tiny_tiles):
    """A slice of classes without any probability, and one far above the others."""
    x, w, b, target = make()
    b[:20] = -torch.inf
    b[30:] = 200.0
    target = torch.randint(20, 41, (N,))
    args = [v.requires_grad_() for v in (x, w, b)]
    for call in ({}, {"reduction": "sum"}):
        results = []
        for options in (tiny_tiles, None):
            loss, aux = fastlm.linear_cross_entropy(
                *args[:2], target, linear_bias=args[2], options=options,
                return_aux=("entropy", "lse", "argmax"), **call,
            )  # fmt: skip
            assert loss.isfinite()
            results.append([loss, *aux.values(), *torch.autograd.grad(loss, args)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    torch.autograd.grad(fastlm.linear_token_logprobs(x, w, target, options=tiny_tiles).sum(), x)


def test_tiles_of_probabilities_and_of_a_policy(backend, tiny_tiles):
    x, w, b, target = make(dead=0)
    probability = torch.rand(N, V, dtype=torch.float64).softmax(-1)
    check(
        lambda x, w, b: fastlm.linear_cross_entropy(
            x, w, probability.to(x.dtype), linear_bias=b, options=tiny_tiles
        ),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), probability.to(x.dtype)),
        (x, w, b),
    )
    leaves, results = [v.requires_grad_() for v in (x, w, b)], []
    advantages, mask = torch.randn(1, N), torch.arange(N)[None] % 3 != 0
    call = {"linear_bias": b, "mask": mask, "loss_type": "ppo", "entropy_coef": 0.1}
    for options in (tiny_tiles, None):
        loss = fastlm.linear_policy_loss(
            x[None], w, target[None], advantages, options=options, **call
        )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


FROZEN = [(True, False, False), (False, True, False), (False, True, True)]


@pytest.mark.parametrize("needed", FROZEN)
def test_tiles_of_a_frozen_part(tiny_tiles, needed):
    *layer, target = make()
    leaves = [v.requires_grad_(n) for v, n in zip(layer, needed, strict=True)]
    needing = [v for v in leaves if v.requires_grad]
    grads = [
        torch.autograd.grad(
            fastlm.linear_cross_entropy(
                *leaves[:2], target, linear_bias=leaves[2], options=options
            ),
            needing,
        )
        for options in (tiny_tiles, None)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_when_tiles_are_taken():
    layer = Layer(torch.empty(2000, 16), torch.empty(10000, 16), None)
    assert chunk_of(layer, 0).tile_bytes == 0
    assert chunk_of(layer, -7).rows == 7
    assert chunk_of(layer, 100 * MIB).tile_bytes == 0
    assert 0 < chunk_of(layer, MIB).tile_bytes < MIB
    assert chunk_of(layer._replace(input=torch.empty(10, 16)), MIB).rows == 10
    assert chunk_of(layer._replace(input=torch.empty(0, 16)), 1).tile_bytes == 0


def products(call: Callable[[], torch.Tensor]) -> float:
    """Operations of the matrix products of a call and its backward."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as recorded:
        call().sum().backward()
    return sum(e.flops for e in recorded.events() if e.name in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "function, options, want",
    [
        ("linear_cross_entropy", {}, 6),
        ("linear_cross_entropy", {"reduction": "none"}, 8),
        ("linear_token_logprobs", {}, 8),
        ("linear_token_logprobs", {"return_entropy": True}, 8),
        ("linear_policy_loss", {"loss_type": "ppo", "entropy_coef": 0.1}, 6),
        ("linear_policy_loss", {"loss_type": "gspo"}, 8),
    ],
)
def test_operations_in_units_of_rows_features_classes(
    backend, function, options, want, frozen, monkeypatch
):
    """A frozen head has no product for its gradient."""
    monkeypatch.setattr(matmul, "own_runs", lambda: False)  # PyTorch's are counted
    rows, features, classes = 2 * 20, 32, 48  # one chunk
    x = torch.randn(2, 20, features, requires_grad=True)
    w = torch.randn(classes, features, requires_grad=not frozen)
    args = [torch.randint(0, classes, (2, 20))]
    if function == "linear_policy_loss":
        args.append(torch.ones(2, 20))

    def call():
        found = getattr(fastlm, function)(x, w, *args, **options)
        return found.entropy if isinstance(found, fastlm.TokenLogprobs) else found

    assert products(call) == (want - 2 * frozen) * rows * features * classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [False, True])
def test_same_bits_again(backend, dtype, tiles):
    *layer, target = make(dtype)
    leaves = [v.requires_grad_() for v in layer]
    size = {"max_memory_bytes": 1} if tiles else {"batch_chunk_size": 7}
    options = fastlm.LinearCrossEntropyOptions(**size)
    first = None
    for _ in range(5):
        call = {"linear_bias": leaves[2], "options": options, "z_loss_weight": 0.1}
        loss = fastlm.linear_cross_entropy(*leaves[:2], target, **call)
        found = [loss, *torch.autograd.grad(loss, leaves)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the reference's kernels hold more")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dead", [0, 500])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [MIB // 4, MIB // 2, MIB, 2 * MIB, 5 * MIB, 9 * MIB])
def test_workspace_stays_within_the_budget(peak_bytes, dtype, dead, weighted, budget):
    rows, classes, features = 1000, 6000, 24
    x = torch.randn(rows, features).to(dtype).requires_grad_()
    w = torch.randn(classes, features).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    target[:dead] = -100
    options = fastlm.LinearCrossEntropyOptions(max_memory_bytes=budget)
    # a third of the rows moves within each chunk
    weight = (torch.arange(rows) % 3 != 0).float() if weighted else None

    def call():
        loss = fastlm.linear_cross_entropy(x, w, target, options=options, token_weight=weight)
        return torch.autograd.grad(loss, (x, w))

    tiles = chunk_of(Layer(x, w, None), budget).tile_bytes > 0
    gradients = (x.numel() + w.numel()) * x.itemsize
    summed = 0 if dtype == torch.float32 else (x if tiles else w).numel() * 4
    assert peak_bytes(call) <= 1.05 * budget + gradients + summed


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dead", [0, 1, 12, N])
def test_ignored_rows_are_left_out(backend, reduction, dead, monkeypatch):
    products = []
    logits = chunks.Products.logits

    def counted(self, span):
        out = logits(self, span)
        products.append(len(out))
        return out

    monkeypatch.setattr(chunks.Products, "logits", counted)
    *layer, target = make(dead=0)
    target[torch.randperm(N)[:dead]] = -100
    names = ("entropy", "lse", "argmax")

    def run(x, w, b):
        options = {"reduction": reduction, "z_loss_weight": 0.1, "return_aux": names}
        return fastlm.linear_cross_entropy(x, w, target, linear_bias=b, **options)

    def plain(x, w, b):
        options = {"reduction": reduction, "z_loss_weight": 0.1, "return_aux": names}
        return fastlm.cross_entropy(F.linear(x, w, b), target, **options)

    leaves = [v.requires_grad_() for v in layer]
    found = []
    for function in (run, plain):
        loss, aux = function(*leaves)
        grads = torch.autograd.grad(loss.sum(), leaves)
        found.append([loss, *aux.values(), *(g.nan_to_num() for g in grads)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
    passes = 2 if reduction == "none" else 1  # the backward computes the logits again
    assert sum(products) == passes * (N - dead if dead > 1 else N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_weight_zero_are_left_out_of_the_gradient(backend, dtype, monkeypatch):
    monkeypatch.setattr(chunks, "_MOVE_COST", 0)
    rows = []
    add = chunks.Gradients.add
    monkeypatch.setattr(
        chunks.Gradients, "add", lambda s, d, span: rows.append(len(d)) or add(s, d, span)
    )
    *layer, target = make(dtype)
    weight = torch.rand(N, dtype=torch.float64) * (torch.arange(N) % 3 == 0)
    small = fastlm.LinearCrossEntropyOptions(batch_chunk_size=5)

    def run(x, w, b):
        call = {"token_weight": weight, "label_smoothing": 0.1, "options": small}
        return fastlm.linear_cross_entropy(x, w, target, linear_bias=b, **call)

    def plain(x, w, b):
        logits = F.linear(*wide(x, w, b))
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
        return (loss * weight.to(loss.dtype)).sum() / (target != -100).sum()

    check(run, plain, layer)
    assert sum(rows) == int((weight[target != -100] != 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_token_logprobs", "policy"])
def test_accumulates_into_a_given_tensor(backend, dtype, tiles, function):
    *layer, target = make(dtype)
    leaves = [v.requires_grad_() for v in layer]

    def loss(options):
        call = {"linear_bias": leaves[2], "options": options}
        if function == "policy":
            x, advantages = leaves[0][None], torch.arange(float(N))[None]
            call |= {"loss_type": "ppo", "mask": target[None] >= 0}
            return fastlm.linear_policy_loss(x, leaves[1], target[None], advantages, **call)
        return getattr(fastlm, function)(*leaves[:2], target, **call).sum()

    want = torch.autograd.grad(-2 * loss(None), leaves)
    start = torch.randn(V, 2 * H)[:, ::2]  # any strides
    into = start.clone()
    size = {"max_memory_bytes": 1} if tiles else {"batch_chunk_size": 7}
    options = fastlm.LinearCrossEntropyOptions(grad_accum_into=into, **size)
    total = loss(options)
    assert torch.equal(into, start)  # nothing before the backward
    for times in (1, 2):
        (-2 * total).backward(retain_graph=True)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {}
        torch.testing.assert_close(into - start, times * want[1].float(), **tolerance)
        assert leaves[1].grad is None
        torch.testing.assert_close(leaves[0].grad, times * want[0], **tolerance)
    before = into.clone()
    leaves[1].requires_grad_(False)
    loss(options).backward()
    assert torch.equal(into, before)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the reference's kernels hold more")
def test_an_accumulator_saves_the_weights_sum(peak_bytes):
    x, w = torch.randn(70, 256).bfloat16(), torch.randn(2000, 256).bfloat16().requires_grad_()
    target, into = torch.randint(0, 2000, (70,)), torch.zeros(2000, 256)
    options = fastlm.LinearCrossEntropyOptions(grad_accum_into=into, max_memory_bytes=3 * MIB)
    peak = peak_bytes(lambda: fastlm.linear_cross_entropy(x, w, target, options=options).backward())
    assert peak <= 1.05 * 3 * MIB


@pytest.mark.parametrize(
    "into, error, message",
    [
        (torch.zeros(V, H + 1), ValueError, r"grad_accum_into must be \[41, 6\]"),
        (torch.zeros(V, H).double(), TypeError, "grad_accum_into must be float32"),
    ],
)
def test_wrong_accumulator(into, error, message):
    x, w, _, target = make()
    options = fastlm.LinearCrossEntropyOptions(grad_accum_into=into)
    with pytest.raises(error, match="fastlm.linear_cross_entropy: options." + message):
        fastlm.linear_cross_entropy(x, w, target, options=options)


@pytest.mark.parametrize(
    "into", [3, torch.zeros(V, H).half(), torch.zeros(1, H).expand(V, H)], ids=["int", "half", "0"]
)
def test_unusable_accumulator(into):
    with pytest.raises((TypeError, ValueError), match="LinearCrossEntropyOptions: grad_accum_into"):
        fastlm.LinearCrossEntropyOptions(grad_accum_into=into)


def test_opcheck_accumulate(backend):
    x, w, b, target = make()
    compared, rows = (target, None, -100, 0.7, 2.0), [torch.rand(N) for _ in range(4)]
    factors = (rows[0], rows[1], None, None, rows[2])
    args = (x, w, b, *compared, rows[3], rows[3], *factors, True, True, True, 600)
    op = torch.ops.fastlm.accumulate_linear_row_statistics.default
    torch.library.opcheck(op, (*args, torch.zeros(V, H)))
    into = torch.ones(V, H)
    op(*args, into)
    want = torch.ops.fastlm.linear_row_statistics_backward(*args)[1]
    torch.testing.assert_close(into - 1, want)


def test_the_weight_gradient_of_one_chunk_is_rounded_in_slices(monkeypatch, peak_bytes):
    """No sum over chunks is held in float32 beside it."""
    rows, features, classes = 9, 16, 300
    target = torch.arange(rows) * 7
    x, w = torch.randn(rows, features).bfloat16(), torch.randn(classes, features).bfloat16()
    monkeypatch.setattr(rounding, "_SLICE_BYTES", 1)  # slices of 64 classes, the last one shorter

    def plain(x, w):
        return F.cross_entropy(F.linear(x, w), target)

    with fastlm.use_backend("reference"):
        check(lambda x, w: fastlm.linear_cross_entropy(x, w, target), plain, (x, w))
    if "cpu" in ready("linear_cross_entropy"):
        with fastlm.use_backend("cpu"):
            check(lambda x, w: fastlm.linear_cross_entropy(x, w, target), plain, (x, w))
    wide = torch.randn(20_000, 128).bfloat16().requires_grad_()
    narrow = torch.randn(4, 128).bfloat16()
    target = target[:4]
    check(
        lambda x, w: fastlm.linear_cross_entropy(x, w, target),
        lambda x, w: F.cross_entropy(F.linear(x, w), target),
        (narrow, wide.detach()),
    )

    def step():
        loss = fastlm.linear_cross_entropy(narrow, wide, target)
        return torch.autograd.grad(loss, wide)

    assert peak_bytes(step) < 1.5 * wide.numel() * 2 + 3 * 4 * 4 * 20_000
