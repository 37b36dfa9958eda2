"""Preference losses against their formulas written out, one completion at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastlm

B = 5
PAIRED = {
    "dpo_loss": ("chosen", "rejected", "ref_chosen", "ref_rejected"),
    "cpo_loss": ("chosen", "rejected"),
    "simpo_loss": ("chosen", "rejected"),
    "orpo_loss": ("chosen", "rejected"),
    "reward_loss": ("chosen_reward", "rejected_reward"),
}
ALL = {**PAIRED, "kto_loss": PAIRED["dpo_loss"]}


def scores(rows: int = B, dtype: torch.dtype = torch.float64) -> Tensor:
    return -(3 * torch.rand(rows, dtype=torch.float64) + 0.01).to(dtype)


def batch(name: str, rows: int = B, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [scores(rows, dtype) for _ in ALL[name]]


def call(name: str, args: list[Tensor], **options: object) -> Tensor:
    needed = {"kl": 0.3} if name == "kto_loss" else {}
    return getattr(fastlm, name)(*args, **needed | options)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def odds(logprob: float) -> float:
    return math.log(math.exp(logprob) / (1 - math.exp(logprob)))


def one(name: str, row: list[float], **given: float) -> float:
    """Loss of one pair."""
    o = {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "gamma": 0.5, "margin": 0.0} | given
    beta, e = o["beta"], o["label_smoothing"]
    c, r = row[:2]
    if name == "reward_loss":
        return softplus(r - c + o["margin"]) + o.get("center_rewards_coefficient", 0.0) * (
            (c + r) ** 2
        )
    if name == "orpo_loss":
        return -c + beta * softplus(odds(r) - odds(c))
    shift = row[2] - row[3] if name == "dpo_loss" else 0.0
    x = beta * (c - r - shift) - (o["gamma"] if name == "simpo_loss" else 0.0)
    extra = -o["cpo_alpha"] * c if name == "cpo_loss" else 0.0
    return (1 - e) * softplus(-x) + e * softplus(x) + extra


CASES = [
    ("dpo_loss", {}),
    ("dpo_loss", {"beta": 0.7, "label_smoothing": 0.2}),
    ("cpo_loss", {}),
    ("cpo_loss", {"beta": 0.3, "cpo_alpha": 0.4, "label_smoothing": 0.1}),
    ("cpo_loss", {"cpo_alpha": 0.0}),
    ("simpo_loss", {"beta": 2.0}),
    ("simpo_loss", {"beta": 10.0, "gamma": 3.0, "label_smoothing": 0.1}),
    ("orpo_loss", {}),
    ("orpo_loss", {"beta": 1.5}),
    ("reward_loss", {}),
    ("reward_loss", {"margin": 0.7, "center_rewards_coefficient": 0.01}),
]


@pytest.mark.parametrize("name, options", CASES)
def test_matches_the_formula(name, options):
    args = batch(name)
    want = [one(name, [float(a[i]) for a in args], **options) for i in range(B)]
    each = call(name, args, **options, reduction="none")
    assert each.tolist() == pytest.approx(want, rel=1e-12)
    assert float(call(name, args, **options)) == pytest.approx(sum(want) / B, rel=1e-12)
    total = call(name, args, **options, reduction="sum")
    assert float(total) == pytest.approx(sum(want), rel=1e-12)


def test_defaults_of_simpo():
    args = batch("simpo_loss")
    assert torch.equal(call("simpo_loss", args), call("simpo_loss", args, beta=2.0, gamma=0.5))


def test_other_types_of_dpo():
    args = batch("dpo_loss")
    margin = (args[0] - args[1]) - (args[2] - args[3])
    beta, e = 0.4, 0.1
    want = {
        "hinge": (1 - beta * margin).clamp(min=0),
        "ipo": (margin - 1 / (2 * beta)) ** 2,
    }
    for kind, values in want.items():
        got = call("dpo_loss", args, beta=beta, loss_type=kind)
        torch.testing.assert_close(got, values.mean())
    right, wrong = (torch.sigmoid(s * beta * margin).log() for s in (1, -1))
    robust = call("dpo_loss", args, beta=beta, loss_type="robust", label_smoothing=e)
    torch.testing.assert_close(robust, ((e * wrong - (1 - e) * right) / (1 - 2 * e)).mean())
    plain = call("dpo_loss", args)
    torch.testing.assert_close(call("dpo_loss", args, loss_type="robust"), plain)


def test_robust_is_unbiased():
    """The mean over flipped labels, with their probability, is the loss of the true labels."""
    c, r, rc, rr = batch("dpo_loss")
    options = {"loss_type": "robust", "label_smoothing": 0.2}
    seen = fastlm.dpo_loss(c, r, rc, rr, **options)
    flipped = fastlm.dpo_loss(r, c, rr, rc, **options)
    torch.testing.assert_close(0.8 * seen + 0.2 * flipped, fastlm.dpo_loss(c, r, rc, rr))


@pytest.mark.parametrize("kl", [-1.0, 0.4, "tensor", "ratios"])
def test_kto(kl):
    good, ref_good = scores(3), scores(3)
    bad, ref_bad = scores(4), scores(4)
    ratios = torch.tensor([0.9, -0.2, 0.3], dtype=torch.float64)
    given = {"tensor": torch.tensor(0.4), "ratios": ratios}.get(kl, kl)
    baseline = {"tensor": 0.4, "ratios": 1 / 3}.get(kl, kl)
    baseline = max(0.0, baseline)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    pairs = zip(good.tolist(), ref_good.tolist(), strict=True)
    want = [1.5 * (1 - sigmoid(0.3 * (a - b - baseline))) for a, b in pairs]
    pairs = zip(bad.tolist(), ref_bad.tolist(), strict=True)
    want += [0.5 * (1 - sigmoid(0.3 * (baseline - (a - b)))) for a, b in pairs]
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, "kl": given}
    each = fastlm.kto_loss(good, bad, ref_good, ref_bad, **options, reduction="none")
    assert each.tolist() == pytest.approx(want, rel=1e-7 if kl == "tensor" else 1e-12)
    mean = fastlm.kto_loss(good, bad, ref_good, ref_bad, **options)
    torch.testing.assert_close(mean, each.mean())


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_kto_of_one_kind_only(sizes):
    good, bad = (torch.randn(n, requires_grad=True) for n in sizes)
    loss = fastlm.kto_loss(good, bad, torch.zeros(sizes[0]), torch.zeros(sizes[1]), kl=0.1)
    loss.backward()
    assert bool(loss.isfinite()) and (float(loss.detach()) == 0) == (sizes == (0, 0))
    assert good.grad.shape == good.shape and bad.grad.shape == bad.shape


def test_kto_needs_a_baseline():
    """A missing one would be another method."""
    with pytest.raises(TypeError, match="kl"):
        fastlm.kto_loss(*batch("kto_loss"))


@pytest.mark.parametrize("name", ALL)
def test_gradcheck_and_second_derivative(name):
    args = batch(name)
    for leaf in args[:2]:
        leaf.requires_grad_()
    rest = args[2:]
    assert torch.autograd.gradcheck(lambda *a: call(name, [*a, *rest]), args[:2])
    assert torch.autograd.gradgradcheck(lambda *a: call(name, [*a, *rest]), args[:2])


@pytest.mark.parametrize("name", ["dpo_loss", "kto_loss"])
def test_no_gradient_for_the_reference(name):
    args = [a.requires_grad_() for a in batch(name)]
    call(name, args).backward()
    assert [a.grad is not None for a in args] == [True, True, False, False]


def test_reward_margin_per_pair_has_no_gradient():
    chosen, rejected, margin = (torch.randn(B, requires_grad=True) for _ in range(3))
    loss = fastlm.reward_loss(chosen, rejected, margin=margin)
    want = -torch.sigmoid(chosen - rejected - margin).log().mean()
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert margin.grad is None


@pytest.mark.parametrize("name", ["cpo_loss", "orpo_loss"])
def test_likelihood_term(name):
    args = batch(name)
    per_row = call(name, args, nll=-args[0], reduction="none")
    assert torch.equal(per_row, call(name, args, reduction="none"))
    one_number = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = call(name, args, nll=one_number)
    without = call(name, args, nll=torch.zeros(()))
    torch.testing.assert_close(loss, without + 0.7)
    loss.backward()
    assert float(one_number.grad) == 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_margins(name, size):
    """Value and gradient are finite on both sides, and the wrong side is linear, not clipped."""
    low, high = torch.tensor([-size, -0.5, -0.5]), torch.tensor([-0.5, -size, -0.5])
    leaves = [low.requires_grad_(), high.requires_grad_()]
    rest = [torch.full((3,), -0.5)] * (len(ALL[name]) - 2)
    each = call(name, [*leaves, *rest], reduction="none")
    each.sum().backward()
    assert bool(each.isfinite().all())
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)
    assert float(each[0].detach()) > float(each[1].detach())
    if name == "reward_loss":
        assert leaves[0].grad.tolist() == [-1, 0, -0.5]


def test_orpo_of_a_certain_completion():
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.tensor([0.0, -1.0])
    loss = fastlm.orpo_loss(chosen, rejected, reduction="none")
    assert bool(loss.isfinite().all()) and float(loss[0].detach()) == pytest.approx(
        0.1 * math.log(2)
    )
    loss.sum().backward()
    assert bool(chosen.grad.isfinite().all())


def test_orpo_odds_are_exact_near_one():
    """log1p(-exp(x)) loses all digits there; the truth is float64 with expm1."""
    chosen = torch.tensor([-1e-6, -1e-4, -0.5, -30.0])
    got = fastlm.orpo_loss(chosen, torch.full((4,), -0.7), reduction="none")
    wide = chosen.double()
    odds_of = wide - torch.log(-torch.expm1(wide))
    other = odds(float(torch.tensor(-0.7)))
    want = -wide - 0.1 * torch.nn.functional.logsigmoid(odds_of - other)
    torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_widened_first(name, dtype):
    args = [a - 700 for a in batch(name, dtype=torch.float32)]  # sums of many tokens
    args = [a.to(dtype) for a in args]
    got = call(name, args)
    assert got.dtype == torch.float32
    assert torch.equal(got, call(name, [a.float() for a in args]))
    mixed = [args[0].double(), *args[1:]]
    assert call(name, mixed).dtype == torch.float64


@pytest.mark.parametrize("name", ALL)
def test_empty_batch(name):
    args = [a.requires_grad_() for a in batch(name, 0)]
    loss = call(name, args)
    loss.backward()
    assert float(loss.detach()) == 0 and args[0].grad.shape == (0,)
    assert call(name, args, reduction="none").shape == (0,)
    assert float(call(name, args, reduction="sum").detach()) == 0


@pytest.mark.parametrize("name", ALL)
def test_compile_and_layouts(name):
    compiled = torch.compile(
        lambda args: call(name, args), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (3, 6):
        args = batch(name, rows, torch.float32)
        strided = [torch.stack((a, a), 1)[:, 0] for a in args]
        assert torch.equal(call(name, strided), call(name, args))
        torch.testing.assert_close(compiled(args), call(name, args))


@pytest.mark.parametrize("name", ALL)
def test_rejects_arguments(name):
    first, second = ALL[name][:2]
    args = batch(name)
    with pytest.raises(ValueError, match=rf"fastlm.{name}: {first} must be \[\*\] \(\[B\]\)"):
        call(name, [args[0][:, None], *args[1:]])
    if name != "kto_loss":
        message = rf"fastlm.{name}: {second} must be \[5\] \(as {first}\), got \[1\]"
        with pytest.raises(ValueError, match=message):
            call(name, [args[0], args[1][:1], *args[2:]])
    with pytest.raises(TypeError, match=f"fastlm.{name}: {second} must be float64"):
        call(name, [args[0], args[1].long(), *args[2:]])
    with pytest.raises(TypeError, match=f"{first} must be a tensor, got float"):
        call(name, [1.0, *args[1:]])
    with pytest.raises(ValueError, match="reduction must be one of"):
        call(name, args, reduction="batchmean")
    if name != "reward_loss":
        for beta in (0, -0.1, math.nan):
            with pytest.raises(ValueError, match="beta must be"):
                call(name, args, beta=beta)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dpo_loss", {"label_smoothing": 0.6}, r"label_smoothing must be in \[0, 0.5\], got 0.6"),
        ("dpo_loss", {"loss_type": "kto"}, "loss_type must be one of 'sigmoid'"),
        (
            "dpo_loss",
            {"loss_type": "robust", "label_smoothing": 0.5},
            "label_smoothing must be below 0.5 for 'robust'",
        ),
        ("dpo_loss", {"loss_type": "ipo", "label_smoothing": 0.1}, "must be 0 for 'ipo', got 0.1"),
        ("cpo_loss", {"nll": torch.zeros(4)}, r"nll must be \[5\] \(or \[\], as chosen\)"),
        ("kto_loss", {"kl": torch.zeros(0)}, r"kl must be \[\] or \[n\], n > 0, got \[0\]"),
        ("kto_loss", {"kl": math.inf}, "kl must be finite"),
        ("reward_loss", {"margin": torch.zeros(4)}, r"margin must be \[5\]"),
        ("simpo_loss", {"gamma": math.nan}, "gamma must be finite"),
    ],
)
def test_rejects_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, batch(name), **options)
    with pytest.raises(ValueError, match=r"ref_rejected must be \[5\] \(as rejected\)"):
        fastlm.kto_loss(*batch("kto_loss")[:3], torch.zeros(4), kl=0.0)
