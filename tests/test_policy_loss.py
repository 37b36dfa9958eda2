"""fastlm.policy_loss and the advantages: against loops over tokens, written from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch
from fastlm.ops.policy_loss.op import AGGREGATION, CLIPPED, MODES

B, T = 4, 6


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Ratios on both sides of the clip range; row 2 has no token; NaN and inf behind the mask."""
    mask = torch.rand(B, T) < 0.7
    mask[2] = False
    mask[0, :2] = True
    data = {
        "logprobs": -torch.rand(B, T, dtype=dtype) * 2 - 0.1,
        "advantages": torch.randn(B, T, dtype=dtype),
        "ref_logprobs": -torch.rand(B, T, dtype=dtype) * 2,
        "entropy": torch.rand(B, T, dtype=dtype),
        "is_ratio": torch.rand(B, T, dtype=dtype) * 3,
    }
    data["old_logprobs"] = data["logprobs"] + 0.5 * torch.randn(B, T, dtype=dtype)
    for name, value in data.items():
        value[~mask] = math.inf if name == "is_ratio" else math.nan
    return data | {"mask": mask}


def loop(
    data: dict[str, Tensor],
    loss_type: str,
    mode: str,
    low: float,
    high: float,
    dual_clip: float | None = None,
    kl: tuple[float, str] = (0.0, "k3"),
    entropy_coef: float = 0.0,
    importance: tuple[str, float | None] | None = None,
    max_length: int = T,
) -> float:
    """Token by token in Python floats."""
    sequences = []
    for b in range(B):
        tokens = [t for t in range(T) if data["mask"][b, t]]

        def at(name: str, t: int, b: int = b) -> float:
            value = data[name]
            return float(value[b] if value.dim() == 1 else value[b, t])

        mean = sum(at("logprobs", t) - at("old_logprobs", t) for t in tokens) / max(1, len(tokens))
        losses = []
        for t in tokens:
            logprob, advantage = at("logprobs", t), at("advantages", t)
            ratio = math.exp(mean if loss_type == "gspo" else logprob - at("old_logprobs", t))
            inside = min(max(ratio, 1 - low), 1 + high)
            if loss_type in ("reinforce", "rloo"):
                loss = -advantage * logprob
            elif loss_type == "cispo":
                loss = -inside * advantage * logprob
            else:
                loss = max(-ratio * advantage, -inside * advantage)
                if dual_clip is not None and advantage < 0:
                    loss = min(loss, -dual_clip * advantage)
            if importance is not None:
                weight, (how, cap) = at("is_ratio", t), importance
                if cap is not None and weight > cap:
                    weight = cap if how == "truncate" else 0.0
                loss *= weight
            d = at("ref_logprobs", t) - logprob
            estimates = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}
            losses.append(loss + kl[0] * estimates[kl[1]] - entropy_coef * at("entropy", t))
        sequences.append(losses)
    total = sum(map(sum, sequences))
    full = [s for s in sequences if s]
    return {
        "token-mean": total / sum(map(len, sequences)),
        "seq-mean-token-sum": total / len(full),
        "seq-mean-token-mean": sum(sum(s) / len(s) for s in full) / len(full),
        "seq-mean-token-sum-norm": total / (B * max_length),
    }[mode]


def call(data: dict[str, Tensor], **options: object) -> Tensor:
    names = ("logprobs", "advantages")
    # each type with the aggregation of its paper, unless the test says otherwise
    rest = {"loss_agg_mode": None} | {k: v for k, v in data.items() if k not in names} | options
    return fastlm.policy_loss(*(data[n] for n in names), **rest)


def test_default_aggregation_is_the_token_mean():
    logprobs, advantages = -torch.rand(B, T), torch.randn(B)
    for loss_type in AGGREGATION:
        default = fastlm.policy_loss(logprobs, advantages, loss_type=loss_type)
        named = fastlm.policy_loss(
            logprobs, advantages, loss_type=loss_type, loss_agg_mode="token-mean"
        )
        assert torch.equal(default, named)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("loss_type", AGGREGATION)
def test_matches_the_loop(loss_type, mode):
    data = batch()
    del data["is_ratio"]
    want = loop(data, loss_type, mode or AGGREGATION[loss_type], 0.2, 0.3)
    got = call(data, loss_type=loss_type, loss_agg_mode=mode, clip_eps_high=0.3)
    assert float(got) == pytest.approx(want, rel=1e-12)


def test_aggregation_of_each_type():
    """The papers: GRPO and GSPO mean per sequence, Dr. GRPO a constant, RLOO the sequence sum."""
    assert {k: v for k, v in AGGREGATION.items() if v != "token-mean"} == {
        "rloo": "seq-mean-token-sum",
        "grpo": "seq-mean-token-mean",
        "gspo": "seq-mean-token-mean",
        "dr_grpo": "seq-mean-token-sum-norm",
    }


@pytest.mark.parametrize("loss_type", CLIPPED)
def test_dual_clip(loss_type):
    data = batch()
    del data["is_ratio"]
    data["old_logprobs"] -= 1
    data["advantages"] = -data["advantages"].abs()
    mode = AGGREGATION[loss_type]
    want = loop(data, loss_type, mode, 0.2, 0.2, dual_clip=2.0)
    assert want != pytest.approx(loop(data, loss_type, mode, 0.2, 0.2))
    got = call(data, loss_type=loss_type, dual_clip=2.0)
    assert float(got) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type", ["reinforce", "grpo"])
def test_kl_and_entropy(loss_type, estimator):
    data = batch()
    del data["is_ratio"]
    options = {"kl": (0.3, estimator), "entropy_coef": 0.2}
    want = loop(data, loss_type, AGGREGATION[loss_type], 0.2, 0.2, **options)
    got = call(data, loss_type=loss_type, kl_coef=0.3, kl_estimator=estimator, entropy_coef=0.2)
    assert float(got) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("is_mode", ["truncate", "mask"])
def test_importance_ratio_leaves_the_penalty_alone(is_mode, cap):
    data = batch()
    want = loop(data, "ppo", "token-mean", 0.2, 0.2, kl=(0.5, "k3"), importance=(is_mode, cap))
    got = call(data, loss_type="ppo", kl_coef=0.5, is_mode=is_mode, is_cap=cap)
    assert float(got) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("loss_type", AGGREGATION)
def test_one_advantage_per_sequence(loss_type):
    data = batch()
    per_sequence = torch.randn(B, dtype=torch.float64)
    ratio = torch.rand(B, dtype=torch.float64) + 0.5
    spread = {
        "advantages": per_sequence[:, None].expand(B, T),
        "is_ratio": ratio[:, None].expand(B, T),
    }
    short = call(data | {"advantages": per_sequence, "is_ratio": ratio}, loss_type=loss_type)
    torch.testing.assert_close(short, call(data | spread, loss_type=loss_type))


def test_max_length():
    data = batch()
    got = call(data, loss_type="dr_grpo", max_length=100)
    torch.testing.assert_close(got * 100 / T, call(data, loss_type="dr_grpo"))


def test_bandit_gradient_is_reward_times_score():
    """One state, softmax policy: d loss / d logits = -A * (onehot - p), and its mean over the
    policy is minus the gradient of the expected reward."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(5, dtype=torch.float64)
    p = logits.softmax(-1).detach()
    mean = torch.zeros(5, dtype=torch.float64)
    for action in range(5):
        for kind in AGGREGATION:
            logprob = logits.log_softmax(-1)[action].view(1, 1)
            loss = fastlm.policy_loss(logprob, rewards[action : action + 1], loss_type=kind)
            (grad,) = torch.autograd.grad(loss, logits)
            want = -rewards[action] * (torch.nn.functional.one_hot(torch.tensor(action), 5) - p)
            torch.testing.assert_close(grad, want)
        mean += p[action] * grad
    expected = (logits.softmax(-1) * rewards).sum()
    torch.testing.assert_close(mean, -torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("loss_type", [t for t in AGGREGATION if t != "cispo"])
def test_gradcheck(loss_type):
    """GSPO has the gradient of its value when the weights are one number per sequence."""
    data = batch()
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5], dtype=torch.float64)
    data["is_ratio"] = torch.tensor([0.7, 1.2, 1.0, 0.9], dtype=torch.float64)
    inputs = [data.pop(n).nan_to_num().requires_grad_() for n in ("logprobs", "entropy")]

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        options = {"kl_coef": 0.2, "entropy_coef": 0.1, "dual_clip": None}
        changed = data | {"logprobs": logprobs, "entropy": entropy, "advantages": advantages}
        return call(changed, loss_type=loss_type, **options)

    assert torch.autograd.gradcheck(loss, inputs)


def test_cispo_gradient_keeps_clipped_tokens():
    data = batch()
    logprobs = data["logprobs"].nan_to_num().requires_grad_()
    loss = fastlm.policy_loss(
        logprobs,
        data["advantages"],
        old_logprobs=data["old_logprobs"],
        mask=data["mask"],
        loss_type="cispo",
    )
    ratio = (logprobs - data["old_logprobs"]).exp().detach().clamp(0.8, 1.2)
    want = torch.where(data["mask"], -ratio * data["advantages"], 0.0) / data["mask"].sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], want)


def test_gspo_gradient_goes_token_by_token():
    """With advantages per token: d loss / d logprob_t = -s * A_t / |y|, where s is not clipped."""
    logprobs = (-torch.rand(1, 3, dtype=torch.float64)).requires_grad_()
    old = logprobs.detach() + torch.tensor([[0.1, -0.2, 0.05]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    loss = fastlm.policy_loss(logprobs, advantages, old_logprobs=old, loss_type="gspo")
    s = (logprobs - old).mean().exp().detach()
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], -s * advantages / 3)


@pytest.mark.parametrize("loss_type", AGGREGATION)
def test_nothing_behind_the_mask_reaches_the_gradient(loss_type):
    data = batch()
    leaves = {n: data[n].clone().requires_grad_() for n in ("logprobs", "entropy")}
    loss = call(data | leaves, loss_type=loss_type, kl_coef=0.1, entropy_coef=0.1, is_cap=2.0)
    loss.backward()
    for leaf in leaves.values():
        assert bool((leaf.grad[~data["mask"]] == 0).all())
        assert bool(leaf.grad.isfinite().all()) and bool((leaf.grad[data["mask"]] != 0).any())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_token_at_all(mode, rows):
    logprobs = torch.full((rows, 4), math.nan, requires_grad=True)
    mask = torch.zeros(rows, 4, dtype=torch.int64)
    loss = fastlm.policy_loss(logprobs, torch.ones(rows), mask=mask, loss_agg_mode=mode)
    loss.backward()
    assert float(loss.detach()) == 0 and bool((logprobs.grad == 0).all())


def test_extreme_ratios_stay_finite():
    logprobs = torch.tensor([[-1.0, -1e4, -1.0]], requires_grad=True)
    old = torch.tensor([[-1e4, -1.0, -1e4]])
    advantages = torch.tensor([[0.0, 1.0, -1.0]])
    for loss_type in AGGREGATION:
        loss = fastlm.policy_loss(
            logprobs,
            advantages,
            old_logprobs=old,
            ref_logprobs=old,
            kl_coef=0.1,
            loss_type=loss_type,
        )
        (grad,) = torch.autograd.grad(loss, logprobs)
        assert bool(loss.isfinite()) and bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_constant_does_not_widen_the_result(dtype):
    logprobs, advantages = torch.zeros(1, 2, dtype=dtype), torch.ones(1, 2, dtype=torch.float64)
    assert fastlm.policy_loss(logprobs, advantages).dtype == dtype


def test_dtypes_and_compile():
    data = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch().items()}
    got = call(data, loss_type="grpo", kl_coef=0.1)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, call(wide, loss_type="grpo", kl_coef=0.1))
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(wide, loss_type="grpo", kl_coef=0.1), got)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"advantages": torch.ones(3)},
            r"advantages must be \[4\] \(or \[B, T\] as logprobs\), got",
        ),
        ({"advantages": torch.ones(B, 1)}, r"advantages must be \[4, 6\] \(as logprobs\)"),
        ({"mask": torch.ones(B)}, r"mask must be \[4, 6\]"),
        ({"old_logprobs": torch.ones(B, T + 1)}, r"old_logprobs must be \[4, 6\]"),
        ({"logprobs": torch.ones(T)}, r"logprobs must be \[\*, \*\] \(\[B, T\]\), got \[6\]"),
        ({"loss_type": "dpo"}, "loss_type must be one of 'reinforce'"),
        ({"loss_agg_mode": "mean"}, "loss_agg_mode must be one of"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        ({"is_mode": "clip"}, "is_mode must be one of"),
        ({"clip_eps_low": -0.1}, "clip_eps_low must be >= 0, got -0.1"),
        ({"dual_clip": 3.0}, "dual_clip must be None for loss_type 'reinforce', got 3.0"),
        ({"dual_clip": 1.0, "loss_type": "ppo"}, "dual_clip must be > 1, got 1.0"),
        ({"kl_coef": 0.1}, "ref_logprobs must be given with kl_coef, got None"),
        ({"entropy_coef": 0.1}, "entropy must be given with entropy_coef, got None"),
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
    ],
)
def test_rejects(change, message):
    data = {"logprobs": torch.zeros(B, T), "advantages": torch.zeros(B, T)}
    with pytest.raises(ValueError, match=message):
        call(data | change)


def test_rejects_types():
    with pytest.raises(TypeError, match="advantages must be float64"):
        fastlm.policy_loss(torch.zeros(B, T), torch.zeros(B, dtype=torch.int64))


def test_kl_estimates_average_to_the_divergence():
    """Over the whole vocabulary, weighted by the policy, k1 and k3 give the KL itself."""
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    want = torch.nn.functional.kl_div(reference, policy, reduction="sum", log_target=True)
    for estimator in ("k1", "k3"):
        each = fastlm.kl_estimate(policy, reference, estimator=estimator)
        torch.testing.assert_close((policy.exp() * each).sum(), want)
    assert bool((fastlm.kl_estimate(policy, reference) >= 0).all())
    assert torch.equal(fastlm.kl_estimate(policy, policy), torch.zeros(50, dtype=torch.float64))


def test_gae_matches_the_sum_of_deltas():
    rewards, values = torch.randn(2, 3, 7, dtype=torch.float64)
    mask = torch.rand(3, 7) < 0.6
    mask[1] = False
    last = torch.randn(3, dtype=torch.float64)
    gamma, lam = 0.9, 0.8
    want = torch.zeros(3, 7, dtype=torch.float64)
    for b in range(3):
        steps = [t for t in range(7) if mask[b, t]]
        chain = [float(values[b, t]) for t in steps] + [float(last[b])]
        deltas = [
            float(rewards[b, t]) + gamma * chain[i + 1] - chain[i] for i, t in enumerate(steps)
        ]
        for i, t in enumerate(steps):
            want[b, t] = sum((gamma * lam) ** (j - i) * d for j, d in enumerate(deltas) if j >= i)
    rewards[~mask] = values[~mask] = math.nan
    got, returns = fastlm.gae(rewards, values, mask=mask, gamma=gamma, lam=lam, last_value=last)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(returns, torch.where(mask, want + values, 0.0))


def test_gae_with_lambda_one_is_return_minus_value():
    rewards, values = torch.randn(2, 2, 5, dtype=torch.float64)
    advantages, returns = fastlm.gae(rewards, values, lam=1.0)
    want = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, want)
    torch.testing.assert_close(advantages, want - values)
    assert fastlm.gae(torch.zeros(2, 0), torch.zeros(2, 0))[0].shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
def test_group_advantages(normalize, dtype):
    rewards = torch.randn(12, dtype=dtype)
    rewards[4:8] = 0.1
    groups = rewards.view(3, 4).double()
    want = groups - groups.mean(1, keepdim=True)
    if normalize:
        want = want / (groups.std(1, keepdim=True) + 1e-6)
    want[1] = 0
    got = fastlm.group_advantages(rewards, group_size=4, normalize=normalize)
    torch.testing.assert_close(got, want.view(-1).to(dtype))
    assert bool((got[4:8] == 0).all())
    assert bool((fastlm.group_advantages(rewards, group_size=1) == 0).all())
    endless = torch.full((4,), math.inf, dtype=dtype)
    assert bool((fastlm.group_advantages(endless, group_size=4) == 0).all())
    order = torch.randperm(12)
    ids = torch.tensor([70, -3, 5]).repeat_interleave(4)
    mixed = fastlm.group_advantages(rewards[order], group_ids=ids[order], normalize=normalize)
    torch.testing.assert_close(mixed, got[order])


def test_leave_one_out_advantages():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0])
    ids = torch.tensor([8, 8, 8, 2], dtype=torch.int32)
    got = fastlm.leave_one_out_advantages(rewards, group_ids=ids)
    torch.testing.assert_close(got, torch.tensor([-3.0, -1.5, 4.5, 5.0]))
    pairs = fastlm.leave_one_out_advantages(rewards, group_size=2)
    torch.testing.assert_close(pairs, torch.tensor([-1.0, 1.0, 1.0, -1.0]))
    for size in (2, 3, 7):  # seven times 0.1 less 0.1 is not six times 0.1
        equal = torch.full((2 * size,), 0.1, dtype=torch.float64)
        assert not fastlm.leave_one_out_advantages(equal, group_size=size).any()


@pytest.mark.parametrize("function", [fastlm.group_advantages, fastlm.leave_one_out_advantages])
def test_groups_are_checked(function):
    rewards = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match=r"rewards must be free of NaN, got NaN at \[1\]"):
        function(rewards, group_size=3)
    with pytest.raises(ValueError, match="group_size must be a divisor of the 3 rewards, got 2"):
        function(torch.zeros(3), group_size=2)
    with pytest.raises(
        ValueError, match="one of group_size and group_ids must be given, got neither"
    ):
        function(torch.zeros(3))
    with pytest.raises(ValueError, match=r"group_ids must be \[3\] \(as rewards\), got \[2\]"):
        function(torch.zeros(3), group_ids=torch.zeros(2, dtype=torch.int64))
    assert function(torch.zeros(0), group_size=4).shape == (0,)


@pytest.mark.parametrize("loss_type", ["reinforce", "ppo", "cispo", "gspo"])
@pytest.mark.parametrize("masked", [True, False])
def test_derivatives_are_those_of_the_composition(loss_type, masked, monkeypatch):
    """Where the gradient is computed beside the value, and of that gradient."""
    leaves = [(torch.randn(3, 5, dtype=torch.float64) / 4).requires_grad_() for _ in range(2)]
    constants = [torch.randn(3, 5, dtype=torch.float64) / 4 for _ in range(3)]
    mask = torch.rand(3, 5) < 0.7 if masked else None

    def derivatives():
        loss = fastlm.policy_loss(
            leaves[0],
            constants[0],
            old_logprobs=None if loss_type == "reinforce" else constants[1],
            ref_logprobs=constants[2],
            mask=mask,
            loss_type=loss_type,
            kl_coef=0.1,
            entropy=leaves[1].square(),
            entropy_coef=0.2,
        )
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return loss, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    got = derivatives()
    monkeypatch.setattr(dispatch, "direct", lambda *_: False)
    for a, b in zip(got, derivatives(), strict=True):
        torch.testing.assert_close(a, b)
