"""Distillation from a teacher's top k: K tokens and one bucket for the rest."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlm
from fastlm.dispatch import ready
from fastlm.ops.linear_kl_div import loop
from fastlm.testing import check

FLOAT64 = torch.float64
KINDS = ("forward", "jsd")


def chunked(rows: int, classes: int, itemsize: int = 8) -> fastlm.LinearCrossEntropyOptions:
    return fastlm.LinearCrossEntropyOptions(max_memory_bytes=4 * rows * classes * itemsize)


def make(rows: int, features: int, classes: int, k: int, dtype=FLOAT64) -> list[Tensor]:
    """student, weight, bias, the teacher's log-probs and indices."""
    layer = [torch.randn(rows, features), torch.randn(classes, features), torch.randn(classes)]
    scores = torch.randn(rows, classes, dtype=FLOAT64).log_softmax(-1)
    logprobs, indices = scores.topk(k)
    order = torch.rand(rows, k).argsort(-1)
    layer = [x.to(dtype) for x in layer]
    return [*layer, logprobs.gather(-1, order).to(dtype), indices.gather(-1, order)]


def ours(**options):
    def run(student, weight, bias, logprobs, indices):
        args = (student, weight, logprobs, indices)
        return fastlm.linear_topk_kl_div(*args, student_bias=bias, **options)

    return run


def buckets(probability: Tensor, indices: Tensor) -> Tensor:
    """[N, K + 1] of [N, V], token by token."""
    rows = []
    for row, chosen in zip(probability, indices.tolist(), strict=True):
        others = [v for v in range(len(row)) if v not in chosen]
        rows.append(torch.stack([*(row[v] for v in chosen), row[others].sum()]))
    return torch.stack(rows)


def plain(divergence="forward", beta=0.5, temperature=1.0, reduction="mean"):
    def run(student, weight, bias, logprobs, indices):
        q = buckets((F.linear(student, weight, bias) / temperature).softmax(-1), indices)
        p = logprobs.exp()
        p = torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1)
        if divergence == "forward":
            value = F.kl_div(q.log(), p, reduction="none").sum(-1)
        else:
            m = beta * p + (1 - beta) * q
            value = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
        return value if reduction == "none" else getattr(value, reduction)()

    return run


def agree(ours, plain, args):
    results = []
    for run in (ours, plain):
        leaves = [a.clone().requires_grad_() for a in args[:3]]
        value = run(*leaves, *args[3:])
        upstream = torch.linspace(-1, 2, max(1, value.numel()), dtype=FLOAT64)
        results.append((value, *torch.autograd.grad(value, leaves, upstream.view_as(value))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (7, 5, 33, 4), (11, 3, 65, 17)])
def test_is_the_plain_divergence(shape, divergence, reduction):
    options = {"divergence": divergence, "reduction": reduction, "beta": 0.3, "temperature": 1.7}
    for rows in (3, 100):
        chunks = chunked(rows, shape[2])
        agree(ours(**options, options=chunks), plain(**options), make(*shape))


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, divergence):
    """Half-precision inputs are widened before the product, as the definition says; the gradient
    of the logits is rounded, as plain PyTorch's is."""
    *layer, logprobs, indices = make(9, 7, 129, 5, dtype)
    wide = [x.double() for x in (*layer, logprobs)]
    got = ours(divergence=divergence)(*layer, logprobs, indices)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(divergence=divergence)(*wide, indices).float())
    check(
        lambda *leaves: ours(divergence=divergence)(*leaves, logprobs, indices),
        lambda *leaves: plain(divergence=divergence)(*leaves, logprobs, indices),
        layer,
    )


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("chunk", [2, 11])
@pytest.mark.skipif("cpu" not in ready("linear_topk_kl_div"), reason="no compiled kernels")
def test_compiled_rows_are_those_of_the_reference(divergence, chunk):
    """With padding, and with rows of which all classes are chosen."""
    *layer, logprobs, indices = make(11, 3, 6, 6, torch.float32)
    logprobs[4:, 4:] = -math.inf
    indices[6:, 4:] = 0
    budget = fastlm.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    mask = torch.arange(11) != 8
    options = {"divergence": divergence, "options": budget, "temperature": 1.7, "mask": mask}

    def run(*leaves):
        return ours(**options)(*leaves, logprobs.to(leaves[0].dtype), indices)

    def reference(*leaves):
        with fastlm.use_backend("reference"):
            return run(*leaves)

    (step,) = fastlm.explain("linear_topk_kl_div", *layer[:2], logprobs, indices)
    assert step.chosen == "cpu"
    check(run, reference, layer)


@pytest.mark.parametrize("divergence", KINDS)
def test_all_tokens_give_the_whole_divergence(divergence):
    """K = V: no bucket is left; and fewer tokens can only see less of it."""
    student, weight, bias, _, _ = make(6, 3, 9, 1)
    head = torch.randn(9, 4, dtype=FLOAT64)
    teacher = torch.randn(6, 4, dtype=FLOAT64)
    options = {"divergence": divergence, "reduction": "none"}
    whole = fastlm.linear_kl_div(student, weight, teacher, head, student_bias=bias, **options)
    scores = F.linear(teacher, head).log_softmax(-1)
    before = torch.zeros(6, dtype=FLOAT64)
    for k in (1, 2, 5, 8, 9):
        seen = ours(**options)(student, weight, bias, *scores.topk(k))
        assert bool((seen >= before - 1e-12).all())
        before = seen
    torch.testing.assert_close(before, whole)
    float32 = [x.float() for x in (student, weight, bias)]
    every = ours(**options)(*float32, *scores.float().topk(9))
    torch.testing.assert_close(every, whole.float())


@pytest.mark.parametrize("divergence", KINDS)
def test_gradcheck(divergence):
    *layer, logprobs, indices = make(4, 3, 6, 2)
    logprobs[1, 0] = -math.inf
    leaves = [x.requires_grad_() for x in layer]
    for reduction in ("mean", "none"):

        def run(*a, reduction=reduction):
            return ours(divergence=divergence, reduction=reduction)(*a, logprobs, indices)

        assert torch.autograd.gradcheck(run, leaves)


def test_padding_stays_in_the_bucket():
    """Also when its index is that of a chosen token, or none at all."""
    student, weight, bias, logprobs, indices = make(5, 3, 12, 3)
    padded = torch.cat((logprobs, torch.full((5, 2), -math.inf, dtype=FLOAT64)), -1)
    for index in (0, -1, int(indices[0, 0])):
        filled = torch.cat((indices, torch.full((5, 2), index)), -1)
        for divergence in KINDS:
            options = {"divergence": divergence}
            agree(
                lambda *a, f=filled, o=options: ours(**o)(*a[:3], padded, f),
                ours(**options),
                [student, weight, bias, logprobs, indices],
            )
    nothing = torch.full_like(padded, -math.inf)
    value = ours(reduction="none")(student, weight, bias, nothing, filled)
    torch.testing.assert_close(value, torch.zeros(5, dtype=FLOAT64))


def test_a_small_tail_keeps_its_digits():
    """As a difference of float32 the student's bucket would be 0 and the loss infinite."""
    bias = torch.tensor([20.0, 0.0, -3.0, -40.0], requires_grad=True)
    teacher = torch.tensor([[0.9]]).log(), torch.tensor([[0]])
    head = torch.zeros(4, 1)
    loss = fastlm.linear_topk_kl_div(torch.ones(1, 1), head, *teacher, student_bias=bias)
    wide = bias.detach().double().requires_grad_()
    tail = wide[1:].logsumexp(0) - wide.logsumexp(0)
    p = teacher[0][0].double().exp()
    kept = p * (p.log() - wide.log_softmax(0)[0])
    want = kept + (1 - p) * ((1 - p).log() - tail)
    torch.testing.assert_close(loss, want[0].float())
    torch.testing.assert_close(
        torch.autograd.grad(loss, bias)[0], torch.autograd.grad(want.sum(), wide)[0].float()
    )


def test_masses_above_one_by_rounding():
    """Probabilities in half precision: scaled to one, and the loss is not negative."""
    student, weight, bias, logprobs, indices = make(5, 3, 8, 7)
    logprobs = (logprobs - logprobs.logsumexp(-1, keepdim=True)).bfloat16() + 0.01
    assert bool((logprobs.double().exp().sum(-1) > 1).all())
    for divergence in KINDS:
        value = ours(divergence=divergence, reduction="none")(
            student, weight, bias, logprobs, indices
        )
        assert bool((value >= 0).all()) and bool(value.isfinite().all())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_nothing_behind_the_mask_counts(elsewhere, monkeypatch):
    if elsewhere:
        monkeypatch.setattr(loop, "_on_cpu", lambda value: False)
    args = make(6, 3, 10, 2)
    mask = torch.tensor([1, 0, 1, 1, 0, 1]) == 1
    per_token = torch.rand(6, dtype=FLOAT64)
    leaves = [x.clone().requires_grad_() for x in args[:3]]
    each = plain(reduction="none")(*leaves, *args[3:])
    want = (each * per_token)[mask].sum() / 4
    expected = torch.autograd.grad(want, leaves)
    for value in (args[0], args[3], per_token):
        value[~mask] = math.nan
    args[4][~mask] = -100
    for divergence in KINDS:
        leaves = [x.clone().requires_grad_() for x in args[:3]]
        options = {"mask": mask, "token_weight": per_token, "divergence": divergence}
        got = ours(**options)(*leaves, *args[3:])
        found = torch.autograd.grad(got, leaves)
        assert all(bool(g.isfinite().all()) for g in found)
        if divergence == "forward":
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(found, expected)


def test_index_out_of_range():
    args = make(4, 3, 10, 2)
    for bad in (10, -1):
        indices = args[4].clone()
        indices[2, 1] = bad
        with pytest.raises(IndexError, match=rf"teacher_indices must be in .*10\), got {bad} at"):
            ours()(*args[:4], indices)


def test_index_out_of_range_elsewhere_is_nan_in_its_row(monkeypatch):
    """What a device does, where an index is not read back to be checked."""
    monkeypatch.setattr(fastlm.checks, "index_range", lambda *_: None)
    args = make(4, 3, 10, 2)
    args[4][2, 1] = 1000
    value = ours(reduction="none")(*args)
    assert value.isnan().tolist() == [False, False, True, False]


def test_second_backward_and_no_second_derivative():
    args = make(4, 3, 10, 2)
    leaves = [x.requires_grad_() for x in args[:3]]
    args[3].requires_grad_()
    for reduction in ("mean", "none"):
        loss = ours(reduction=reduction)(*leaves, *args[3:]).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves, retain_graph=True), first)
        assert torch.autograd.grad(loss, args[3], allow_unused=True, retain_graph=True) == (None,)
        (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_shapes_and_every_element_is_written(poisoned):
    student, weight, bias, logprobs, indices = make(6, 3, 10, 2, torch.float32)
    want = ours(reduction="none")(student, weight, bias, logprobs, indices)
    cube = [student.view(2, 3, 3), weight, bias, logprobs.view(2, 3, 2), indices.view(2, 3, 2)]
    assert torch.equal(ours(reduction="none")(*cube), want.view(2, 3))
    leaves = [x.requires_grad_() for x in (student, weight, bias)]
    for mask in (None, torch.arange(6) % 2):
        loss = ours(mask=mask, options=chunked(2, 10, 4))(*leaves, logprobs, indices.int())
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, leaves))
    empty = make(0, 3, 10, 2, torch.float32)
    leaves = [x.requires_grad_() for x in empty[:3]]
    loss = ours()(*leaves, *empty[3:])
    assert float(loss.detach()) == 0
    assert not any(bool(g.any()) for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile(reduction):
    _, weight, bias, _, _ = make(1, 4, 11, 3, torch.float32)
    weight.requires_grad_()

    def run(x, logprobs, indices):
        return 3 * ours(reduction=reduction)(x, weight, bias, logprobs, indices).sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        x, *_, logprobs, indices = make(rows, 4, 11, 3, torch.float32)
        x.requires_grad_()
        want, got = run(x, logprobs, indices), compiled(x, logprobs, indices)
        torch.testing.assert_close(got, want)
        found = torch.autograd.grad(got, (x, weight))
        torch.testing.assert_close(found, torch.autograd.grad(want, (x, weight)))


def test_opcheck():
    args = make(5, 3, 7, 2, torch.float32)
    keep = torch.tensor([True, False, True, True, True])
    rest = (keep, torch.randn(5), "jsd", 0.3, 0.7, 400, True, False, True)
    torch.library.opcheck(torch.ops.fastlm.linear_topk_kl_div.default, (*args, *rest))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"teacher_logprobs": torch.zeros(4, 2)},
            ValueError,
            r"teacher_logprobs must be \[5, ",
        ),
        ({"teacher_logprobs": torch.zeros(5, 0)}, ValueError, "must be of at least one token"),
        (
            {"teacher_indices": torch.zeros(5, 3).long()},
            ValueError,
            r"teacher_indices must be \[5, 2\] \(as teacher_logprobs\)",
        ),
        ({"teacher_indices": torch.zeros(5, 2)}, TypeError, "teacher_indices must be an integer"),
        ({"divergence": "reverse"}, ValueError, "divergence must be one of 'forward', 'jsd'"),
        ({"divergence": "jsd", "beta": 1.0}, ValueError, "divergence .of this beta. must be one"),
        ({"student_bias": torch.zeros(8)}, ValueError, r"student_bias must be \[9\]"),
        ({"mask": torch.zeros(4)}, ValueError, r"mask must be \[5\]"),
    ],
)
def test_rejects(change, error, message):
    call = {
        "student": torch.zeros(5, 3),
        "student_weight": torch.zeros(9, 3),
        "teacher_logprobs": torch.full((5, 2), -1.0),
        "teacher_indices": torch.tensor([0, 1]).expand(5, 2),
    }
    with pytest.raises(error, match="fastlm.linear_topk_kl_div: .*" + message):
        fastlm.linear_topk_kl_div(**call | change)
