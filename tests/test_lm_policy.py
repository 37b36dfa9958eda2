"""Reward model and policy gradient: learning, checks of rewards, stop rules, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import dispatch
from fastlm.lm import checkpoint, judging, policy, preferences, reward, rollouts, store
from fastlm.lm.data import Document
from fastlm.lm.errors import CheckpointError, InputError, TrainingError, UsageError
from fastlm.lm.model import GRULM
from fastlm.lm.preferences import Preference
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.transformer import TransformerLM

TOKENIZER = ByteTokenizer()
TEXT = "the cat sat on the mat and the dog ran to the cat. " * 40


@pytest.fixture
def tokens(tmp_path: Path) -> store.TokenStore:
    folder = tmp_path / "store"
    folder.mkdir()
    documents = {"train": [Document("a", TEXT)], "held": [Document("b", TEXT[7:900])]}
    store.write(folder, TOKENIZER, documents)
    return store.TokenStore(folder)


def gru() -> GRULM:
    torch.manual_seed(0)
    return GRULM(TOKENIZER.vocab_size, 16)


def transformer() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(
        TOKENIZER.vocab_size, hidden_size=16, num_layers=1, num_heads=2, context=32, end=256
    )


MODELS = [gru, transformer]


def trainer(tokens: store.TokenStore, made: Any, judge: Any = None, **options: Any) -> Any:
    out, on_iteration = options.pop("out", None), options.pop("on_iteration", None)
    config = policy.PolicyConfig(
        **{"batch": 8, "group": 4, "prompt": 4, "length": 6, "budget": "3steps", **options}
    )
    judge = judge or (lambda prompts, texts: [sum(map(ord, t)) % 17.0 for t in texts])
    return policy.PolicyGradient(
        made, TOKENIZER, tokens, judge, config, out=out, on_iteration=on_iteration
    )


# ---- rollouts ------------------------------------------------------------------------------------


def test_contexts_stay_in_documents_and_come_again(tokens: store.TokenStore) -> None:
    places = rollouts.contexts(tokens, "held", 50, 5, 7, seed=3)
    text = TEXT[7:900].encode()
    for place in places:
        both = bytes(torch.cat([place.prompt, place.following]).tolist())
        assert len(both) == 12 and both in text
    again = rollouts.contexts(tokens, "held", 50, 5, 7, seed=3)
    assert all(torch.equal(a.prompt, b.prompt) for a, b in zip(places, again, strict=True))
    other = rollouts.contexts(tokens, "held", 50, 5, 7, seed=4)
    assert any(not torch.equal(a.prompt, b.prompt) for a, b in zip(places, other, strict=True))
    with pytest.raises(InputError, match="no document of the held part has 900 tokens"):
        rollouts.contexts(tokens, "held", 1, 400, 500, seed=0)


@pytest.mark.parametrize("make", MODELS)
def test_logprobs_of_a_rollout_are_those_of_scoring_it(make: Any, tokens: store.TokenStore) -> None:
    model = make()
    prompts = torch.stack([p.prompt for p in rollouts.contexts(tokens, "train", 5, 6, 1, 0)])
    made = rollouts.rollout(model, prompts, 8, end=TOKENIZER.end, seed=1, gradient=True)
    assert made.logprobs.requires_grad and model.training
    again = rollouts.logprobs_of(model, prompts, made.tokens)
    if make is gru:  # exactly 1 is the ratio of an on-policy step
        assert torch.equal(made.logprobs, again)
    torch.testing.assert_close(made.logprobs, again)
    logits = model.eval()(torch.cat([prompts, made.tokens.clamp(min=0)], 1)[:, :-1])[0]
    want = logits.log_softmax(-1)[:, 5:].gather(-1, made.tokens.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(made.logprobs[made.mask], want[made.mask])


def test_human_over_model_is_called_that(tokens: store.TokenStore) -> None:
    found = rollouts.human_over_model(
        gru(), TOKENIZER, tokens, split="train", count=5, prompt=4, length=9
    )
    assert preferences.origins(found) == {"human-over-model": 5}
    assert all(p.prompt + p.chosen in TEXT and p.chosen != p.rejected for p in found)


# ---- the reward model ----------------------------------------------------------------------------


def words(good: bool, seed: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    kinds = ["cat ", "dog ", "sun "] if good else ["cta ", "dgo ", "sun "]
    return "".join(kinds[i] for i in torch.randint(3, (8,), generator=draw))


def pairs(count: int, first: int = 0) -> list[Preference]:
    return [
        Preference(
            "see: ", words(True, first + i), words(False, first + i + 5000), "synthetic:test"
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["ngrams", "gru"])
def test_learns_what_is_preferred(kind: str, tmp_path: Path) -> None:
    steps = {"ngrams": "40steps", "gru": "150steps"}[kind]
    config = reward.RewardConfig(kind, steps, hidden=32, batch=16, dropout=0.0)
    losses: list[float] = []
    model = reward.fit(pairs(64), TOKENIZER, config, record=lambda r: losses.append(r["loss"]))
    assert losses[-1] < 0.3 < 0.6 < losses[0]
    report = reward.evaluate(model, pairs(40, 900), TOKENIZER)
    assert report.auc.value > 0.9 and report.accuracy.value > 0.9 and report.pairs == 40
    assert "40 synthetic" in report.lines()[0]
    reward.save(tmp_path / "rm", model, TOKENIZER, report)
    judge, before = reward.load(tmp_path / "rm"), reward.Judge(model, TOKENIZER)
    prompts, texts = ["see: "] * 2, [words(True, 1), words(False, 2)]
    assert judge(prompts, texts) == before(prompts, texts)
    assert judge(prompts, texts)[0] > judge(prompts, texts)[1]


@pytest.mark.parametrize("kind", ["ngrams", "gru"])
def test_score_is_of_the_continuation_and_not_of_the_padding(kind: str) -> None:
    torch.manual_seed(0)
    model = reward.RewardModel(TOKENIZER.vocab_size, kind, 8).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    rows = [([1, 2, 3], [4, 5]), ([], [4, 5, 6, 7, 8, 9]), ([7], []), ([], [])]
    together = reward.scores(model, rows)
    alone = [reward.scores(model, [row])[0] for row in rows]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))
    assert all(map(math.isfinite, together))
    other = reward.scores(model, [([1, 2, 3], [4, 6])])[0]
    assert abs(other - together[0]) > 1e-4


def test_reward_models_are_told_apart_from_others(tmp_path: Path) -> None:
    model = reward.RewardModel(TOKENIZER.vocab_size, "gru", 8)
    reward.save(tmp_path / "rm", model, TOKENIZER, None)
    assert reward.load(tmp_path / "rm").model.settings == model.settings
    state = {"config": {"model": {"kind": "GRULM", "vocab_size": 257}}}
    checkpoint.write(tmp_path / "lm", gru().state_dict(), {}, state, TOKENIZER)
    with pytest.raises(CheckpointError, match="no reward model"):
        reward.load(tmp_path / "lm")
    with pytest.raises(InputError, match="no preference"):
        reward.fit([], TOKENIZER)
    with pytest.raises(UsageError, match="kind must be one of"):
        reward.RewardConfig("tree")


# ---- policy gradient -----------------------------------------------------------------------------


def test_the_gradient_is_reward_times_grad_log_pi() -> None:
    """Two arms, closed form: d/dtheta E[r] = p (1 - p) (r0 - r1), for every algorithm's loss summed
    over both arms with their probabilities."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logprobs = theta.log_softmax(0)
    rewards = torch.tensor([3.0, 1.0], dtype=torch.float64)
    weights = logprobs.detach().exp()
    loss = sum(
        fastlm.policy_loss(logprobs[i].view(1, 1), rewards[i].view(1)) * weights[i] for i in (0, 1)
    )
    loss.backward()
    torch.testing.assert_close(-theta.grad, torch.tensor([0.5, -0.5], dtype=torch.float64))


@pytest.mark.parametrize("algorithm", policy.ALGORITHMS)
@pytest.mark.parametrize("make", MODELS)
def test_reward_rises(make: Any, algorithm: str, tokens: store.TokenStore) -> None:
    run = trainer(
        tokens, make(), lambda prompts, texts: [sum(c < "n" for c in t) / 1.0 for t in texts],
        algorithm=algorithm, budget="25steps", lr=3e-2, kl_coef=0.0,
        batch=32, length=8, updates=2 if algorithm in ("ppo", "grpo") else 1,
    )  # fmt: skip
    history = run.fit().history
    first, last = history[0].reward, sum(i.reward for i in history[-3:]) / 3
    assert last > first + 0.5
    assert history[0].kl == pytest.approx(0.0, abs=1e-5) and history[-1].kl > 0.1


def test_penalty_keeps_the_model_near_its_start(tokens: store.TokenStore) -> None:
    apart = []
    for coefficient in (0.0, 5.0):
        run = trainer(tokens, gru(), budget="20steps", lr=2e-2, kl_coef=coefficient, batch=32)
        apart.append(run.fit().history[-1].kl)
    assert apart[1] < apart[0] / 2


@pytest.mark.parametrize(
    "judge, message",
    [
        (lambda p, t: [1.0], "1 rewards for 8 texts"),
        (lambda p, t: [1.0] * 7 + [math.nan], r"reward of text 7 must be .* got nan; text 7 is '"),
        (lambda p, t: 1 / 0, r"raised ZeroDivisionError.*; text 0 is ['\"]"),
        (lambda p, t: [1.0] * 9, "9 rewards for 8 texts$"),
        (lambda p, t: torch.full((8, 1), -math.inf), r"reward of text 0 must be .*got \[-inf\]"),
    ],
)
def test_unusable_rewards_are_named(judge: Any, message: str, tokens: store.TokenStore) -> None:
    model = gru()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        trainer(tokens, model, judge).fit()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_text_that_makes_a_reward_raise_is_named() -> None:
    texts = ["one", "two", "three", "four"]
    with pytest.raises(judging.RewardError, match=r"list index.*; text 2 is 'three'") as caught:
        judging.judged(lambda p, t: [[1.0][len(x) > 4] for x in t], ["p"] * 4, texts)
    assert (caught.value.sample, caught.value.prompt, caught.value.text) == (2, "p", "three")

    def only_together(prompts: Any, texts: Any) -> list[float]:
        if len(texts) > 1:
            raise ValueError("one\nat a time")
        return [1.0]

    with pytest.raises(
        judging.RewardError,
        match="one at a time [(]test_lm_policy.py, line [0-9]+[)]; text 0 is 'one'",
    ):
        judging.judged(only_together, ["p"] * 4, texts)
    assert judging.judged(lambda p, t: torch.arange(4), [""] * 4, texts).tolist() == [0, 1, 2, 3]
    assert judging.judged(lambda p, t: iter([True]), ["p"], ["t"]).tolist() == [1.0]


@pytest.mark.parametrize("backend", dispatch.ready("generation"))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("algorithm", policy.ALGORITHMS)
@pytest.mark.parametrize("make", MODELS)
def test_the_ratio_of_the_first_update_is_one_without_another_pass(
    make: Any, algorithm: str, temperature: float, backend: str, tokens: store.TokenStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """To the bit, against the pass that is left out; and it is left out."""
    loss, scored = fastlm.policy_loss, rollouts.logprobs_of
    passes: list[Any] = []
    ratios: list[bool] = []

    def watched(model: Any, *arguments: Any) -> Tensor:
        passes.append(model)
        return scored(model, *arguments)

    def checked(now: Tensor, advantages: Tensor, **how: Any) -> Tensor:
        old = how["old_logprobs"]
        if len(ratios) % updates == 0:
            prompts, made, kept = written[-1]
            with torch.no_grad():
                assert torch.equal(scored(run.model, prompts, made, temperature), now)
                assert torch.equal(kept, now)
        if old is not None:
            ratios.append(bool(((now - old).exp() == 1).all()))
        else:
            ratios.append(True)
        return loss(now, advantages, **how)

    roll, written = rollouts.rollout, []

    def kept(*arguments: Any, **how: Any) -> Any:
        passes.append("rollout")
        found = roll(*arguments, **how)
        written.append((found.prompts, found.tokens, found.logprobs.detach().clone()))
        return found

    updates = 2 if algorithm in ("ppo", "grpo") else 1
    options = {"temperature": temperature, "updates": updates, "lr": 1e-2}
    run = trainer(tokens, make(), algorithm=algorithm, budget="2steps", **options)
    monkeypatch.setattr(fastlm, "policy_loss", checked)
    monkeypatch.setattr(rollouts, "logprobs_of", watched)
    monkeypatch.setattr(rollouts, "rollout", kept)
    with fastlm.use_backend(backend):
        run.fit()
    assert ratios == ([True, False] if updates == 2 else [True]) * 2
    # of the reference, and of the second update; a Transformer's rollout has that of its gradient
    own = [run.model] * (updates - 1)
    forward = [run.model] if make is transformer else []
    assert ("a pass over" in policy.passes_of(run.model)) == bool(forward)
    assert passes == ["rollout", *forward, run.reference, *own] * 2


def test_texts_that_do_not_fit_into_the_context(tokens: store.TokenStore) -> None:
    with pytest.raises(UsageError, match="context of 32 tokens, got 20 [+] 13"):
        trainer(tokens, transformer(), prompt=20, length=13)
    assert trainer(tokens, transformer(), prompt=20, length=12, budget="1steps").fit().history


def test_groups_of_equal_rewards_are_told_as_such(tokens: store.TokenStore) -> None:
    def judge(prompts: Any, texts: Any) -> list[float]:
        return [float(prompt == prompts[0]) for prompt in prompts]

    with pytest.warns(UserWarning, match="the texts of each prompt have equal rewards"):
        trainer(tokens, gru(), judge, algorithm="rloo", budget="1steps").fit()


@pytest.mark.parametrize("algorithm", policy.ALGORITHMS)
def test_equal_rewards_warn_once_and_change_nothing(
    algorithm: str, tokens: store.TokenStore
) -> None:
    model = gru()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = trainer(tokens, model, lambda p, t: [2.0] * len(t), algorithm=algorithm, kl_coef=0.0)
    with pytest.warns(UserWarning, match="all 8 rewards are 2") as caught:
        run.fit()
    assert len(caught) == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_stop_rules(tokens: store.TokenStore) -> None:
    assert trainer(tokens, gru(), until=-1.0).fit().stopped == "reward"
    far = trainer(tokens, gru(), largest_kl=1e-3, lr=0.1, budget="30steps").fit()
    assert far.stopped == "kl" and far.iterations < 30
    assert trainer(tokens, gru()).fit().stopped == "budget"


def test_gradient_that_is_not_finite(tokens: store.TokenStore) -> None:
    model = gru()

    def poison(grad: Tensor) -> Tensor:
        return grad * math.nan

    model.head.weight.register_hook(poison)
    with pytest.raises(TrainingError, match="not finite in iteration 1"):
        trainer(tokens, model).fit()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("algorithm", ["reinforce", "grpo"])
def test_resuming_is_to_the_bit(
    make: Any, algorithm: str, tokens: store.TokenStore, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"algorithm": algorithm, "lr": 1e-2}
    whole = make()
    trainer(tokens, whole, budget="5steps", **options).fit()
    first = trainer(tokens, make(), budget="2steps", out=tmp_path / "run", **options)
    first.fit()
    torch.manual_seed(99)
    second = make()
    run = trainer(tokens, second, budget="5steps", out=tmp_path / "run", **options)
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None
    with pytest.raises(UsageError, match="policy.budget: 2steps -> 5steps"):
        run.resume(saved)
    run.resume(saved, allow=("budget",))
    assert len(run.fit().history) == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_run_that_was_stopped_stays_stopped(tokens: store.TokenStore, tmp_path: Path) -> None:
    first = trainer(tokens, gru(), until=-1.0, out=tmp_path)
    assert first.fit().stopped == "reward"
    again = trainer(tokens, gru(), until=-1.0, out=tmp_path)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    again.resume(saved)
    assert (again.fit().stopped, again.iterations) == ("reward", first.iterations)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"algorithm": "dqn"}, "algorithm must be one of"),
        ({"batch": 6, "group": 4}, "multiple of group"),
        ({"algorithm": "rloo", "group": 1}, "group must be above 1"),
        ({"updates": 2}, "on-policy"),
        ({"lr": 0.0}, "above 0"),
        ({"clip": 0.0}, "above 0"),  # which would make every gradient zero
        ({"clip_eps": -0.1}, "clip_eps must be finite and not negative"),
    ],
)
def test_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        policy.PolicyConfig(**options)


def test_reward_of_ones_own() -> None:
    assert judging.reward_function("builtins:zip") is zip
    for name in ("missing_module:f", "builtins:nothing", "builtins", ""):
        with pytest.raises(UsageError, match="--reward"):
            judging.reward_function(name)
