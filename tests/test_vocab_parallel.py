"""Losses with the vocabulary in parts against the same call on the whole, over gloo on loopback.

This file is also the program of the ranks: each world size is started once and runs every case.
"""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import WORLDS, Collectives, Part, gathered, results_of, run_world

import fastlm
from fastlm.testing import check

KINDS = ("equal", "unequal", "reversed")
FLOATS = (torch.float64, torch.float32, torch.bfloat16)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def make(rows, classes, dtype=torch.float64, ignored=-100):
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, classes, (rows,))
    if rows > 2:
        target[1] = ignored
    return logits, target


def values(result):
    """A tensor, a loss with its dict, or a named tuple as a tuple of tensors."""
    if isinstance(result, torch.Tensor):
        return (result,)
    flat = []
    for item in result:
        flat += item.values() if isinstance(item, dict) else [item]
    return tuple(flat)


AUX = ("lse", "z_loss", "entropy", "argmax", "accuracy")
LOSS_OPTIONS = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "z_loss_weight": 0.1},
    {"label_smoothing": 0.2, "return_aux": AUX},
    {"reduction": "none", "label_smoothing": 1.0, "z_loss_weight": 0.01, "return_aux": AUX},
    {"logit_softcapping": 5.0, "temperature": 0.7, "return_aux": ("entropy", "lse")},
    {"logit_scale": -1.5, "return_aux": AUX},
    {"ignore_index": 3, "return_aux": AUX},
]


@case
def cross_entropy():
    for kind in KINDS:
        part = Part(36, kind)
        for dtype in FLOATS if kind == "unequal" else FLOATS[:1]:
            for options in LOSS_OPTIONS:
                logits, target = make(7, 36, dtype, options.get("ignore_index", -100))
                for weight in (None, torch.rand(36, dtype=torch.float64) + 0.1):
                    whole = None if weight is None else weight.to(dtype)

                    def ours(x, t, w, whole=whole, part=part, options=options):
                        given = part.of(x), t, part.of(whole)
                        given_options = {**part.options, **options, "token_weight": w}
                        return values(fastlm.cross_entropy(*given, **given_options))

                    def theirs(x, t, w, weight=weight, options=options):
                        weight = None if weight is None else weight.to(x.dtype)
                        return values(fastlm.cross_entropy(x, t, weight, token_weight=w, **options))

                    check(ours, theirs, (logits, target, torch.rand(7).to(dtype)))


@case
def probabilities():
    for kind in KINDS:
        part = Part(24, kind)
        for smoothing, weighted in ((0.0, False), (0.1, False), (0.3, True)):
            options = {"label_smoothing": smoothing, "return_aux": AUX}
            weight = torch.rand(24, dtype=torch.float64) if weighted else None

            def ours(x, y, weight=weight, part=part, options=options):
                given = part.of(x), part.of(y), part.of(weight)
                return values(fastlm.cross_entropy(*given, **options, **part.options))

            def theirs(x, y, weight=weight, options=options):
                return values(fastlm.cross_entropy(x, y, weight, **options))

            for dtype in (torch.float64, torch.float32):
                logits = torch.randn(5, 24).to(dtype)
                check(ours, theirs, (logits, torch.rand(5, 24).softmax(-1).to(dtype)))


@case
def classes_in_dimension_1():
    part = Part(20, "unequal")

    def ours(x, t):
        return fastlm.cross_entropy(part.of(x, 1), t, reduction="none", **part.options)

    def theirs(x, t):
        return fastlm.cross_entropy(x, t, reduction="none")

    check(ours, theirs, (torch.randn(2, 20, 3), torch.randint(0, 20, (2, 3))))


RETURNS = {f"return_{name}": True for name in ("entropy", "lse", "argmax", "sum_sq")}


@case
def token_logprobs():
    for kind in KINDS:
        part = Part(36, kind)
        for dtype in FLOATS:
            for options in ({}, RETURNS, {**RETURNS, "temperature": 2.0, "logit_softcapping": 4.0}):
                logits, target = make(6, 36, dtype)
                shape = (2, 3)

                def ours(x, t, part=part, options=options):
                    return values(fastlm.token_logprobs(part.of(x), t, **options, **part.options))

                def theirs(x, t, options=options):
                    return values(fastlm.token_logprobs(x, t, **options))

                check(ours, theirs, (logits.view(*shape, 36), target.view(shape)))


@case
def no_target_in_a_shard():
    part = Part(40, "equal")
    logits, target = torch.randn(5, 40), torch.full((5,), 2)

    def ours(x, t):
        return values(fastlm.token_logprobs(part.of(x), t, **RETURNS, **part.options))

    check(ours, lambda x, t: values(fastlm.token_logprobs(x, t, **RETURNS)), (logits, target))


def linear_arguments(dtype, classes=36):
    input = torch.randn(2, 4, 5).to(dtype)
    weight, bias = torch.randn(classes, 5).to(dtype), torch.randn(classes).to(dtype)
    target = torch.randint(0, classes, (2, 4))
    target[0, 1] = -100
    return input, weight, bias, target


@case
def linear_cross_entropy():
    small = fastlm.LinearCrossEntropyOptions(max_memory_bytes=200)
    for kind in KINDS:
        part = Part(36, kind)
        for options in ({"shift": 1}, {"options": small, "shift": 2}, *LOSS_OPTIONS[1:7]):
            for dtype in FLOATS if kind == "unequal" else FLOATS[:1]:

                def ours(x, w, b, t, part=part, options=options):
                    given = {"linear_bias": part.of(b), **part.options, **options}
                    return values(fastlm.linear_cross_entropy(x, part.of(w, 0), t, **given))

                def theirs(x, w, b, t, options=options):
                    given = {"linear_bias": b, **options}
                    return values(fastlm.linear_cross_entropy(x, w, t, **given))

                check(ours, theirs, linear_arguments(dtype))


@case
def linear_cross_entropy_of_probabilities():
    part = Part(24, "unequal")
    target = torch.rand(8, 24).softmax(-1)
    weight = torch.rand(24)
    options = {"label_smoothing": 0.1, "return_aux": AUX}

    def ours(x, w):
        given = {"weight": part.of(weight).to(x.dtype), **options, **part.options}
        return values(
            fastlm.linear_cross_entropy(x, part.of(w, 0), part.of(target).to(x.dtype), **given)
        )

    def theirs(x, w):
        given = {"weight": weight.to(x.dtype), **options}
        return values(fastlm.linear_cross_entropy(x, w, target.to(x.dtype), **given))

    check(ours, theirs, (torch.randn(8, 5), torch.randn(24, 5)))


@case
def linear_token_logprobs():
    for kind in KINDS:
        part = Part(36, kind)
        for options in ({}, {**RETURNS, "logit_scale": 0.5, "logit_softcapping": 6.0}):
            for dtype in FLOATS:

                def ours(x, w, b, t, part=part, options=options):
                    given = {"linear_bias": part.of(b), **part.options, **options}
                    return values(fastlm.linear_token_logprobs(x, part.of(w, 0), t, **given))

                def theirs(x, w, b, t, options=options):
                    given = {"linear_bias": b, **options}
                    return values(fastlm.linear_token_logprobs(x, w, t, **given))

                check(ours, theirs, linear_arguments(dtype))


@case
def entropy():
    for kind in KINDS:
        part = Part(36, kind)
        for dtype in FLOATS:
            for temperature in (1.0, 0.6):
                logits, _ = make(6, 36, dtype)
                logits[1, : 36 // 2] = -math.inf

                def ours(x, part=part, temperature=temperature):
                    return fastlm.entropy(part.of(x), temperature=temperature, **part.options)

                def theirs(x, temperature=temperature):
                    return fastlm.entropy(x, temperature=temperature)

                check(ours, theirs, (logits.view(2, 3, 36),))


def policy_batch(layer=None):
    """Advantages and options of tokens [2, 4], nonsense behind the mask."""
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]]).bool()
    old = 0.3 * torch.randn(2, 4)
    if layer is not None:  # ratios on both sides of the clip range
        input, weight, bias, target = (v.float() if v.is_floating_point() else v for v in layer)
        old += fastlm.linear_token_logprobs(input, weight, target, linear_bias=bias)
    rest = {"old_logprobs": old, "ref_logprobs": old + 0.1, "is_ratio": 2 * torch.rand(2, 4)}
    for value in rest.values():
        value[~mask] = math.nan
    return torch.randn(2, 4), {"mask": mask, **rest}


POLICIES = [
    {"loss_type": "reinforce", "entropy_coef": 0.1},
    {"loss_type": "ppo", "kl_coef": 0.1, "temperature": 0.7, "logit_softcapping": 5.0},
    {"loss_type": "gspo", "loss_agg_mode": None, "entropy_coef": 0.01, "logit_scale": 0.5},
]


@case
def linear_policy_loss():
    small = fastlm.LinearCrossEntropyOptions(max_memory_bytes=200)
    for kind in KINDS:
        part = Part(36, kind)
        for options in (*POLICIES, {"loss_type": "cispo", "options": small}):
            # in float64 the truth of a sum that nearly cancels would be no better
            for dtype in FLOATS[1:] if kind == "unequal" else FLOATS[1:2]:
                layer = linear_arguments(dtype)
                advantages, rest = policy_batch(layer)
                layer[3][~rest["mask"]] = 99
                whole = {**options, **rest}

                def ours(x, w, b, t, part=part, a=advantages, whole=whole):
                    given = {"linear_bias": part.of(b), **part.options, **whole}
                    return fastlm.linear_policy_loss(x, part.of(w, 0), t, a, **given)

                def theirs(x, w, b, t, a=advantages, whole=whole):
                    return fastlm.linear_policy_loss(x, w, t, a, linear_bias=b, **whole)

                check(ours, theirs, layer)


@case
def row_loss_of_a_policy():
    part, mask = Part(36, "unequal"), policy_batch()[1]["mask"]
    factor = torch.randn(8)
    factor[~mask.flatten()] = math.nan

    def row_loss(logprobs, entropy, rows):
        return factor[rows].to(logprobs) * logprobs.square() - entropy.sin()

    for dtype in FLOATS[1:]:

        def ours(x, w, t):
            options = {"row_loss": row_loss, "mask": mask, **part.options}
            return fastlm.linear_policy_loss(x, part.of(w, 0), t, None, **options)

        def theirs(x, w, t):
            return fastlm.linear_policy_loss(x, w, t, None, row_loss=row_loss, mask=mask)

        input, weight, _, target = linear_arguments(dtype)
        check(ours, theirs, (input, weight, target))
    input, weight, _, target = linear_arguments(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(input, weight, target), theirs(input, weight, target))


@case
def accumulates_into_a_tensor_of_its_part():
    part = Part(36, "unequal")
    input, weight, bias, target = linear_arguments(torch.float32)
    calls = [
        (fastlm.linear_cross_entropy, (target,)),
        (fastlm.linear_token_logprobs, (target,)),
        (fastlm.linear_policy_loss, (target, torch.randn(2, 4))),
    ]
    for function, args in calls:
        leaves = [v.clone().requires_grad_() for v in (input, weight)]
        function(*leaves, *args).sum().backward()
        mine = [input.clone().requires_grad_(), part.of(weight, 0).clone().requires_grad_()]
        into = torch.ones_like(mine[1])
        options = fastlm.LinearCrossEntropyOptions(grad_accum_into=into)
        function(*mine, *args, options=options, **part.options).sum().backward()
        assert mine[1].grad is None
        torch.testing.assert_close(into - 1, part.of(leaves[1].grad, 0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine[0].grad, leaves[0].grad)


@case
def modules():
    # all numbers first: below the ranks draw different amounts
    part, tokens, logits = Part(36, "unequal"), torch.rand(8), torch.randn(8, 36)
    input, weight, bias, target = linear_arguments(torch.float32)
    class_weight, size = torch.rand(36), part.end - part.start
    loss = {"label_smoothing": 0.1, "return_aux": AUX}
    shared = {"bias": True, "logit_softcapping": 5.0}
    heads = [
        (fastlm.nn.LinearCrossEntropyLoss, {"weight": class_weight, "shift": 1, **shared, **loss}),
        (fastlm.nn.LinearTokenLogprobs, {**shared, **RETURNS}),
    ]
    for kind, options in heads:
        whole = kind(5, 36, **options)
        whole.load_state_dict({"linear.weight": weight, "linear.bias": bias}, strict=False)
        held = {k: part.of(v) for k, v in options.items() if isinstance(v, torch.Tensor)}
        mine = kind(5, size, **{**options, **held, **part.options})
        state = {k: part.of(v, 0) for k, v in whole.state_dict().items()}
        assert mine.state_dict().keys() == state.keys()
        mine.load_state_dict(state)
        for module in (mine, copy.deepcopy(mine)):
            leaves = [input.clone().requires_grad_() for _ in range(2)]
            results = [values(m(x, target)) for m, x in zip((whole, module), leaves, strict=True)]
            torch.testing.assert_close(*results)
            for result in results:
                whole.zero_grad()
                sum(v.sum() for v in result if v.requires_grad).backward()
                if result is results[0]:
                    want = {k: part.of(p.grad, 0) for k, p in whole.named_parameters()}
            torch.testing.assert_close({k: p.grad for k, p in module.named_parameters()}, want)
            torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    whole = fastlm.nn.CrossEntropyLoss(class_weight, **loss)
    mine = fastlm.nn.CrossEntropyLoss(part.of(class_weight), **loss, **part.options)
    call = {"token_weight": tokens}
    got = values(mine(part.of(logits), target.flatten(), **call))
    torch.testing.assert_close(got, values(whole(logits, target.flatten(), **call)))


@case
def large_logits_and_certain_rows():
    part = Part(24, "unequal")
    for factor in (1e3, 1e5):
        logits = torch.randn(6, 24) * factor
        target = torch.randint(0, 24, (6,))
        target[:3] = logits[:3].argmax(-1)

        def ours(x, t):
            return values(fastlm.token_logprobs(part.of(x), t, **RETURNS, **part.options))

        check(ours, lambda x, t: values(fastlm.token_logprobs(x, t, **RETURNS)), (logits, target))


@case
def the_rest_of_a_certain_row_is_not_lost():
    logits, size = torch.zeros(1, 24), 24 // dist.get_world_size()
    logits[0, :size] = -math.inf  # within a part the kernel sums in float32
    logits[0, 0] = 20.0
    part, target = Part(24, "equal"), torch.tensor([0])
    logprob = fastlm.token_logprobs(part.of(logits), target, **part.options)
    rest = (24 - size) * math.exp(-20.0)  # less than the spacing of float32 at 1
    assert abs(float(logprob) + rest) < 1e-6 * rest


@case
def nan_in_a_weight_is_the_argmax():
    part = Part(24, "equal")
    input, weight, _, target = linear_arguments(torch.float32, 24)
    weight[20] = math.nan
    options = {"return_argmax": True, **part.options}
    got = fastlm.linear_token_logprobs(input, part.of(weight, 0), target, **options)
    want = fastlm.linear_token_logprobs(input, weight, target, return_argmax=True)
    assert torch.equal(got.argmax, want.argmax) and got.argmax.max() == 20


@case
def infinities_and_nan():
    part = Part(24, "equal")
    size = 24 // dist.get_world_size()
    logits = torch.randn(8, 24)
    logits[0, :size] = -math.inf  # a shard, without and with the target
    logits[1, :size] = -math.inf
    logits[2] = -math.inf
    logits[3, 20] = math.nan
    logits[4, 1] = math.inf
    logits[5, ::2] = -math.inf
    logits[6, 3] = math.nan
    logits[6, 22] = math.nan
    target = torch.tensor([23, 0, 5, 3, 2, 1, 3, 4])
    for dtype in (torch.float32, torch.float64):
        whole, mine = logits.to(dtype), part.of(logits.to(dtype))
        want = fastlm.token_logprobs(whole, target, **RETURNS)
        got = fastlm.token_logprobs(mine, target, **RETURNS, **part.options)
        for name in want._fields:
            a, b = getattr(got, name), getattr(want, name)
            torch.testing.assert_close(a, b, equal_nan=True, msg=f"{name} {dtype}: {a} {b}")
        options = {"label_smoothing": 0.1, "reduction": "none"}
        want = fastlm.cross_entropy(whole, target, **options)
        got = fastlm.cross_entropy(mine, target, **options, **part.options)
        torch.testing.assert_close(got, want, equal_nan=True)
        eye = torch.eye(24, dtype=dtype)
        # the product makes NaN of an infinity: only the rows without
        rows = torch.tensor([3, 6, 7])
        held = torch.where(logits[rows].isfinite(), logits[rows], math.nan).to(dtype)
        want = fastlm.linear_token_logprobs(held, eye, target[rows], **RETURNS)
        got = fastlm.linear_token_logprobs(
            held, part.of(eye, 0), target[rows], **RETURNS, **part.options
        )
        torch.testing.assert_close(tuple(got), tuple(want), equal_nan=True)


@case
def argmax_is_the_first_of_equals():
    for kind in KINDS:
        part = Part(24, kind)
        logits = torch.zeros(4, 24)
        logits[1, 5:] = 1.0
        logits[2, 23] = 1.0
        target = torch.tensor([0, 1, 2, -100])
        got = fastlm.token_logprobs(part.of(logits), target, return_argmax=True, **part.options)
        assert got.argmax.tolist() == [0, 5, 23, -1]
        eye = part.of(torch.eye(24), 0)
        options = {"return_argmax": True, **part.options}
        got = fastlm.linear_token_logprobs(logits, eye, target, **options)
        assert got.argmax.tolist() == [0, 5, 23, -1]


@case
def few_rows_and_few_classes():
    world = dist.get_world_size()
    for rows, classes in ((0, 4 * world), (0, world), (1, world), (3, world)):
        part = Part(classes, "equal")
        for reduction in ("sum", "none"):

            def ours(x, t, part=part, reduction=reduction):
                return fastlm.cross_entropy(part.of(x), t, reduction=reduction, **part.options)

            def theirs(x, t, reduction=reduction):
                return fastlm.cross_entropy(x, t, reduction=reduction)

            check(ours, theirs, make(rows, classes, torch.float32))
    part = Part(world, "equal")
    logits = part.of(torch.randn(2, world))
    ignored = torch.full((2,), -100)
    assert fastlm.cross_entropy(logits, ignored, **part.options).isnan()
    assert fastlm.cross_entropy(logits, ignored, reduction="sum", **part.options) == 0


@case
def every_rank_has_the_same_bits():
    part = Part(1000, "unequal")
    logits, target = make(33, 1000, torch.float32)
    found = fastlm.token_logprobs(part.of(logits), target, **RETURNS, **part.options)
    for value in found:
        assert all(torch.equal(value, other) for other in gathered(value))
    again = fastlm.token_logprobs(part.of(logits), target, **RETURNS, **part.options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


# bytes of a row: max, log-sum and log-prob; what else has been asked for
ROW, FLOAT, INDEX = 3 * 4, 4, 8 + 4
SPAN = 16  # first class and number of classes, once


def exchanges(part):
    """Of each function its call of a layer's [input, weight] and the bytes a row gives."""
    advantages, rest = policy_batch()
    target, class_weight = torch.tensor([[0, 9, 23, -100], [1, 2, 3, 22]]), part.of(torch.rand(24))
    head = fastlm.nn.LinearCrossEntropyLoss(5, 6, reduction="sum", **part.options)

    def logits(x, w):
        return (x @ w.T).flatten(0, 1)

    def module(x, w):
        return torch.func.functional_call(head, {"linear.weight": w}, (x, target))

    flat, smooth = target.flatten(), {"weight": class_weight, "label_smoothing": 0.1}
    on_logits = [
        (fastlm.cross_entropy, (flat,), {}, ROW),
        (fastlm.cross_entropy, (flat,), smooth, ROW + 3 * FLOAT),
        (fastlm.cross_entropy, (flat,), {"return_aux": AUX}, ROW + FLOAT + INDEX),
        (fastlm.token_logprobs, (flat,), {}, ROW),
        (fastlm.token_logprobs, (flat,), RETURNS, ROW + 2 * FLOAT + INDEX),
        (fastlm.entropy, (), {}, ROW),
    ]
    for function, args, options, size in on_logits:
        options = {**options, **part.options}
        yield lambda x, w, f=function, a=args, o=options: f(logits(x, w), *a, **o), size, False
    policy = {"loss_type": "ppo", "entropy_coef": 0.1, **rest}
    on_layer = [
        (fastlm.linear_cross_entropy, (target,), {}, ROW),
        (fastlm.linear_cross_entropy, (target,), {"reduction": "none", **smooth}, ROW + 3 * FLOAT),
        (fastlm.linear_token_logprobs, (target,), {}, ROW),
        (fastlm.linear_token_logprobs, (target,), RETURNS, ROW + 2 * FLOAT + INDEX),
        (fastlm.linear_policy_loss, (target, advantages), policy, ROW + FLOAT),
        (fastlm.linear_policy_loss, (target, advantages), rest, ROW),
    ]
    for function, args, options, size in on_layer:
        options = {**options, **part.options}
        yield lambda x, w, f=function, a=args, o=options: f(x, w, *a, **o), size, True
    if dist.get_world_size() == 4:  # of which the module holds 6 classes of 24
        yield module, ROW, True


@case
def one_exchange_of_row_statistics_and_no_weight_is_sent():
    part, rows = Part(24, "equal"), 8
    for call, size, linear in exchanges(part):
        for frozen in (False, True):
            x = torch.randn(2, 4, 5, requires_grad=not frozen)
            w = part.of(torch.randn(24, 5), 0).clone().requires_grad_()
            with Collectives() as mode:
                result = values(call(x, w))
            assert mode.calls == {"allgather_": 1}, mode.calls
            assert mode.bytes == SPAN + size * rows, (mode.bytes, size)
            with Collectives() as mode:
                sum(value.sum() for value in result if value.requires_grad).backward()
            sums_input = linear and not frozen
            assert mode.calls == ({"allreduce_": 1} if sums_input else {}), mode.calls
            assert mode.bytes == (x.nbytes if sums_input else 0)


@case
def second_and_double_backward():
    part = Part(24, "equal")
    input, weight, _, target = linear_arguments(torch.float32, 24)
    weight = part.of(weight, 0).clone().requires_grad_()
    input.requires_grad_()
    loss = fastlm.linear_cross_entropy(input, weight, target, **part.options)
    first = torch.autograd.grad(loss, (input, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (input, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)
    logits = part.of(torch.randn(4, 24)).clone().requires_grad_()
    loss = fastlm.cross_entropy(logits, torch.tensor([1, 2, 3, 4]), **part.options)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@case
def without_grad_and_with_autocast():
    part = Part(24, "unequal")
    input, weight, bias, target = linear_arguments(torch.float32, 24)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            given = {"linear_bias": part.of(bias), **part.options}
            got = fastlm.linear_cross_entropy(input, part.of(weight, 0), target, **given)
            want = fastlm.linear_cross_entropy(input, weight, target, linear_bias=bias)
        torch.testing.assert_close(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        got = fastlm.linear_token_logprobs(input, part.of(weight, 0), target, **part.options)
        want = fastlm.linear_token_logprobs(input, weight, target)
    torch.testing.assert_close(got, want)


@case
def dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def spread(value, dim):
        return distribute_tensor(value, mesh, [Replicate() if dim is None else Shard(dim)])

    def whole(value):
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    input, weight, bias, target = linear_arguments(torch.float64, 22)  # parts of 6, 6, 6 and 4
    logits = torch.randn(8, 22, dtype=torch.float64)
    head = fastlm.nn.LinearCrossEntropyLoss(5, 22, bias=True)
    calls = [
        (lambda x, t: fastlm.cross_entropy(x, t.flatten()), (logits, target), (1, None)),
        (fastlm.token_logprobs, (logits.view(2, 4, 22), target), (2, None)),
        (
            lambda x, w, b, t: fastlm.linear_cross_entropy(x, w, t, linear_bias=b),
            (input, weight, bias, target),
            (None, 0, 0, None),
        ),
        (fastlm.linear_token_logprobs, (input, weight, target), (None, 0, None)),
        (fastlm.entropy, (logits,), (1,)),
        (
            lambda x, w, t, a: fastlm.linear_policy_loss(x, w, t, a, loss_type="ppo"),
            (input, weight, target, torch.randn(2, 4)),
            (None, 0, None, None),
        ),
        (
            lambda x, w, b, t: torch.func.functional_call(
                head, {"linear.weight": w, "linear.bias": b}, (x, t)
            ),
            (input, weight, bias, target),
            (None, 0, 0, None),
        ),
        (
            lambda x, t: fastlm.nn.CrossEntropyLoss()(x, t.flatten()),
            (logits, target),
            (1, None),
        ),
    ]
    for call, args, dims in calls:
        leaves = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
        parts = [spread(a, dim) for a, dim in zip(args, dims, strict=True)]
        for part in parts:
            part.requires_grad_(part.is_floating_point())
        want, got = call(*leaves), call(*parts)
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, want)
        want.sum().backward()
        got.sum().backward()
        for a, b in zip(parts, leaves, strict=True):
            if b.grad is not None:
                torch.testing.assert_close(whole(a.grad), b.grad)
    for wrong in (spread(logits, None), spread(logits, 0)):
        with pytest.raises(ValueError, match=r"input must be a DTensor with Shard\(1\)"):
            fastlm.cross_entropy(wrong, target.flatten())
    with pytest.raises(ValueError, match="must be None with a DTensor"):
        fastlm.cross_entropy(spread(logits, 1), target.flatten(), group=dist.group.WORLD)
    with pytest.raises(ValueError, match="a class for each process at least"):
        fastlm.cross_entropy(spread(logits[:, :1], 1), target.flatten())


@case
def compiled():
    if dist.get_world_size() > WORLDS[0]:  # the traced graph is the same, and slow to make
        return
    part = Part(24, "equal")
    input, weight, _, target = linear_arguments(torch.float32, 24)
    leaves = [input.requires_grad_(), part.of(weight, 0).clone().requires_grad_()]

    def loss(x, w, t):
        head = fastlm.linear_cross_entropy(x, w, t, label_smoothing=0.1, **part.options)
        return head + fastlm.token_logprobs(x.detach() @ w.T, t, **part.options).sum()

    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for call in (loss, run):
        found = call(*leaves, target)
        results.append((found, *torch.autograd.grad(found, leaves)))
    torch.testing.assert_close(*results)


@case
def a_part_of_the_world_as_group():
    members = [0, 1]
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        with pytest.raises(TypeError, match="group must be a ProcessGroup"):
            fastlm.cross_entropy(torch.zeros(1, 4), torch.zeros(1).long(), group=group)
        return
    logits, target = make(5, 16)
    mine = logits[:, 8 * dist.get_rank() :][:, :8]
    got = fastlm.cross_entropy(mine, target, group=group)
    torch.testing.assert_close(got, fastlm.cross_entropy(logits, target))


@case
def errors_are_the_same_on_every_rank():
    part = Part(24, "equal")
    logits = part.of(torch.randn(3, 24))
    target = torch.tensor([0, -100, 24])
    with pytest.raises(IndexError, match=r"target must be in \[0, 24\) or -100, got 24 at \[2\]"):
        fastlm.cross_entropy(logits, target, **part.options)
    with pytest.raises(IndexError, match="token_logprobs: target must be in"):
        fastlm.linear_token_logprobs(
            torch.randn(3, 4), torch.randn(logits.shape[1], 4), target, **part.options
        )
    target[2] = 1
    unequal = part.of(torch.randn(3, 24))[:, : 2 + dist.get_rank()]
    with pytest.raises(ValueError, match=r"cover the vocabulary once, got \[0, 2\), \[3, 6\)"):
        fastlm.cross_entropy(unequal, target, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="cover the vocabulary once"):
        fastlm.cross_entropy(logits, target, group=dist.group.WORLD, vocab_start_index=0)
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match="vocab_start_index must be an integer"):
            fastlm.cross_entropy(logits, target, group=dist.group.WORLD, vocab_start_index=wrong)
    weight = torch.rand(logits.shape[1], requires_grad=True)
    with pytest.raises(ValueError, match="weight must be a constant"):
        fastlm.cross_entropy(logits, target, weight, **part.options)
    soft = torch.rand(3, logits.shape[1], requires_grad=True)
    with pytest.raises(ValueError, match="target must be without gradient with group"):
        layer = torch.randn(3, 4), torch.randn(logits.shape[1], 4)
        fastlm.linear_cross_entropy(*layer, soft, **part.options)


@pytest.fixture(scope="module", params=WORLDS)
def results(request, tmp_path_factory):
    return results_of(__file__, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_parts_are_as_the_whole(results, name):
    found = [of.get(name, "not run, because an earlier case failed") for of in results]
    assert not any(found), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(found))


LOGITS, TARGET = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
CALLS = [
    lambda **k: fastlm.cross_entropy(LOGITS, TARGET, **k),
    lambda **k: fastlm.token_logprobs(LOGITS, TARGET, **k),
    lambda **k: fastlm.linear_cross_entropy(LOGITS, torch.zeros(3, 4), TARGET, **k),
    lambda **k: fastlm.linear_token_logprobs(LOGITS, torch.zeros(3, 4), TARGET, **k),
    lambda **k: fastlm.linear_policy_loss(
        LOGITS[None], torch.zeros(3, 4), TARGET[None], torch.zeros(1), **k
    ),
    lambda **k: fastlm.entropy(LOGITS, **k),
    lambda **k: fastlm.nn.CrossEntropyLoss(**k)(LOGITS, TARGET),
    lambda **k: fastlm.nn.LinearCrossEntropyLoss(4, 3, **k)(LOGITS, TARGET),
    lambda **k: fastlm.nn.LinearTokenLogprobs(4, 3, **k)(LOGITS, TARGET),
]


@pytest.mark.parametrize("call", CALLS)
def test_start_needs_a_group(call):
    with pytest.raises(ValueError, match="vocab_start_index must be None without group, got 0"):
        call(vocab_start_index=0)
    with pytest.raises(TypeError, match="group must be a ProcessGroup, got str"):
        call(group="tensor")


@pytest.mark.parametrize("call", CALLS)
def test_torch_without_distributed(call, monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="group needs torch.distributed"):
        call(group=object())
    call()


if __name__ == "__main__":
    sys.exit(run_world(CASES, int(sys.argv[1]), sys.argv[2]))
