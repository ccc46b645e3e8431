"""Policy losses, advantages, KL control and critic losses against values computed by hand."""

import math
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.objectives import policy
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.kl import adapted_coefficient, k3
from rlhf_lightning.objectives.policy.importance import token_ratio
from rlhf_lightning.objectives.preference.pair_losses import discopop
from rlhf_lightning.objectives.value import explained_variance, value_loss
from rlhf_lightning.rollout.advantages import (
    GAE,
    GlobalWhitened,
    GroupCentered,
    LeaveOneOut,
    compute_token_advantages,
    critic_explained_variance,
)
from rlhf_lightning.rollout.kl import KLController, KLPenalty
from rlhf_lightning.types import Episode, TrainingSample
from tests.helpers.numbers import LOGP, MASK, OLD, close, t

OBJECTIVES: dict[str, Any] = {
    "reinforce": policy.Reinforce(),
    "importance_sampling": policy.ImportanceSampling(),
    "ppo": policy.ClippedSurrogate(),
    "grpo": policy.ClippedSurrogate(aggregation="sequence_mean"),
    "dr_grpo": policy.ClippedSurrogate(aggregation="constant", length=8),
    "dapo": policy.ClippedSurrogate(clip_high=0.28),
    "bnpo": policy.ClippedSurrogate(),
    "reinforce_plus_plus": policy.ClippedSurrogate(),
    "rloo": policy.SequenceClippedSurrogate(normalized=False),
    "gspo": policy.SequenceClippedSurrogate(),
    "cispo": policy.CISPO(),
    "dro": policy.DRO(),
    "sapo": policy.SAPO(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_reinforce_gradient_on_policy(name: str, device: torch.device) -> None:
    logp, old, loss_mask = LOGP.to(device, copy=True).requires_grad_(), LOGP.to(device), MASK.to(device)
    for advantage in (2.0, -3.0):
        OBJECTIVES[name](logp, old, t([advantage]).to(device), loss_mask).sum().backward()
        assert logp.grad is not None
        # The response's ratio moves with all its tokens: at each of 2 tokens the sum has the gradient twice (RLOO), and
        # the mean once.
        factor = 2 if name == "rloo" else 1
        close(logp.grad.cpu(), [-advantage * factor, -advantage * factor, 0.0])
        logp.grad = None
    assert not OBJECTIVES[name].clipped(old, old, t([2.0]).to(device), loss_mask).any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_log_ratios_do_not_overflow(name: str, gap: float) -> None:
    """Clamped at ±20 as in verl: the losses are finite, and the ratio has no gradient."""
    for advantage in (2.0, -3.0):
        old, loss_mask = t([-gap - 1.0, -gap - 1.0, 0.0]), t([1.0, 1.0, 0.0])
        logp = t([-1.0, -1.0, 0.0]).requires_grad_()
        loss = OBJECTIVES[name](logp, old, t([advantage]), loss_mask)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logp.grad is not None
        assert logp.grad.isfinite().all()
        clamped = torch.tensor(gap).clamp(-20, 20)
        at_limit = OBJECTIVES[name](logp.detach(), logp.detach() - clamped, t([advantage]), loss_mask)
        if name not in ("reinforce", "dro", "cispo"):  # no ratio, none, and none with a gradient
            close(logp.grad, [0.0, 0.0, 0.0])
            torch.testing.assert_close(loss, at_limit)
        assert OBJECTIVES[name].clamped(logp.detach(), old, loss_mask).tolist() == [[True, True, False]]
        assert not OBJECTIVES[name].clamped(logp.detach(), logp.detach() - clamped / 2, loss_mask).any()


def test_ratios_below_the_limit_equal_exp_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    gap = torch.empty(1, 1000).uniform_(-20, 20, generator=generator)
    old, loss_mask = torch.zeros_like(gap), torch.ones_like(gap)
    leaf, plain = gap.clone().requires_grad_(), gap.clone().requires_grad_()
    ratio = token_ratio(leaf, old, loss_mask)
    assert torch.equal(ratio, plain.exp())
    ratio.sum().backward(), plain.exp().sum().backward()
    assert torch.equal(leaf.grad, plain.grad)  # type: ignore[arg-type]
    assert torch.equal(k3(gap, old), (-gap).exp() + gap - 1)


@pytest.mark.parametrize("estimator", ["weighted_k3", "k3", "k2"])
@pytest.mark.parametrize("gap", [-1e3, 1e3])
def test_kl_to_a_distant_reference_does_not_overflow(estimator: str, gap: float) -> None:
    logp = t([-1.0, -1.0]).requires_grad_()
    loss_mask = t([1.0, 0.0])
    loss = KLPenalty(1.0, estimator=estimator).loss(logp, t([-1.0 - gap, 0.0]), t([-1.0 - gap, 0.0]), loss_mask)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
    close(logp.grad, [gap if estimator == "k2" else 0.0, 0.0])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_importance_weights_do_not_overflow(level: str) -> None:
    wild = policy.ImportanceWeights(level, "truncate", 0.0, float("inf"))(t([1e3, 0.0]), t([0.0, 0.0]), t([1.0, 1.0]))
    close(wild / math.exp(20.0), [1.0, math.exp(-20.0) if level == "token" else 1.0])


def test_discopop_does_not_overflow_at_any_temperature() -> None:
    for temperature in (0.05, 1.0, 3.0):
        d = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4]).requires_grad_()
        loss = discopop(d, torch.zeros_like(d), temperature)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert d.grad is not None
        assert d.grad.isfinite().all()


def test_reinforce() -> None:
    close(policy.reinforce(LOGP, OLD, t([2.0]), MASK), [2.0, 4.0, 0.0])


def test_dual_clip_bounds_the_loss_at_negative_advantage() -> None:
    logp, old = t([0.0, -1.0]), t([-3.0, -1.0])
    loss_mask = t([1.0, 1.0])
    ratio = math.exp(3)
    close(policy.clipped_surrogate(logp, old, t([-2.0]), loss_mask), [2 * ratio, 2.0])
    close(policy.clipped_surrogate(logp, old, t([-2.0]), loss_mask, dual_clip=3.0), [6.0, 2.0])
    close(policy.clipped_surrogate(logp, old, t([2.0]), loss_mask, dual_clip=3.0), [-2.4, -2.0])
    leaf = logp.clone().requires_grad_()
    policy.clipped_surrogate(leaf, old, t([-2.0]), loss_mask, dual_clip=3.0).sum().backward()
    close(leaf.grad, [0.0, 2.0])


def test_rloo_treats_the_response_as_one_action() -> None:
    ratio = math.exp(0.2 - 0.5)
    close(policy.sequence_clipped_surrogate(LOGP, OLD, t([1.0]), MASK, False, 0.2, 0.2), [-ratio, -ratio, 0.0])
    close(policy.sequence_clipped_surrogate(LOGP, OLD, t([-1.0]), MASK, False, 0.2, 0.2), [0.8, 0.8, 0.0])
    logp = LOGP.clone().requires_grad_()
    total, count = aggregate(
        policy.sequence_clipped_surrogate(logp, OLD, t([1.0]), MASK, False, 0.2, 0.2), MASK, "sequence_mean"
    )
    (total / count).backward()
    close(logp.grad, [-ratio, -ratio, 0.0])


def test_clipped_counts_tokens_by_the_sign_of_the_advantage() -> None:
    ppo = policy.ClippedSurrogate()
    close(ppo.clipped(LOGP, OLD, t([1.0]), MASK), [1.0, 0.0, 0.0])
    close(ppo.clipped(LOGP, OLD, t([-1.0]), MASK), [0.0, 1.0, 0.0])
    close(policy.SequenceClippedSurrogate().clipped(LOGP, OLD, t([-1.0]), MASK), [1.0, 1.0, 0.0])
    close(policy.ImportanceSampling().clipped(LOGP, OLD, t([-1.0]), MASK), [0.0, 0.0, 0.0])


def test_clipped_counts_tokens_of_the_dual_clip() -> None:
    logp, old, loss_mask = t([0.0, -1.0]), t([-2.0, -1.0]), t([1.0, 1.0])
    close(policy.ClippedSurrogate(dual_clip=3.0).clipped(logp, old, t([-1.0]), loss_mask), [1.0, 0.0])
    close(policy.ClippedSurrogate().clipped(logp, old, t([-1.0]), loss_mask), [0.0, 0.0])


def test_importance_weights() -> None:
    sampler, loss_mask = t([-3.0, -1.6, -900.0]), MASK
    ratios = [math.exp(1.8), math.exp(0.1), math.exp(1.9)]
    close(policy.importance_weights(OLD, sampler, loss_mask), [2.0, ratios[1], 0.0])
    close(policy.importance_weights(OLD, sampler, loss_mask, mode="mask"), [0.0, ratios[1], 0.0])
    close(policy.importance_weights(OLD, sampler, loss_mask, level="sequence"), [2.0, 2.0, 0.0])
    close(policy.importance_weights(OLD, sampler, loss_mask, level="sequence", high=9.0), [ratios[2], ratios[2], 0.0])
    close(policy.importance_weights(OLD, sampler, loss_mask, low=1.5, high=9.0), [ratios[0], 1.5, 0.0])
    assert not policy.ImportanceWeights()(OLD.clone().requires_grad_(), sampler, loss_mask).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy.ClippedSurrogate(clip_low=1.5), "clip_low must be in \\[0, 1\\]"),
        (lambda: policy.ClippedSurrogate(clip_high=-0.1), "clip_high at least 0"),
        (lambda: policy.ClippedSurrogate(dual_clip=1.1), "above 1 \\+ clip_high"),
        (lambda: policy.CISPO(ratio_max=0.5), "must contain 1"),
        (lambda: policy.DRO(beta=0), "above 0"),
        (lambda: policy.SAPO(temperature_positive=0), "above 0"),
        (lambda: policy.ClippedSurrogate(aggregation="mean"), "one of"),
        (lambda: policy.ClippedSurrogate(length=8), "only for aggregation 'constant'"),
        (lambda: policy.ImportanceWeights(level="word"), "'token' or 'sequence'"),
        (lambda: policy.ImportanceWeights(high=0.5), "must contain 1"),
        (lambda: GAE(gamma=1.5), "in \\[0, 1\\]"),
        (lambda: GroupCentered("variance"), "'none' or 'std'"),
        (lambda: GlobalWhitened("mean"), "'none' or 'group'"),
        (lambda: KLPenalty(estimator="k1"), "expected on-policy gradient of k1 is zero"),
        (lambda: KLPenalty(target=0.0), "above 0"),
        (lambda: KLPenalty(coefficient=0.0, target=1.0), "above 0"),
        (lambda: KLPenalty(coefficient=float("nan")), "negative"),
        (lambda: KLPenalty(discount=2.0), "in \\[0, 1\\]"),
        (lambda: KLPenalty(refresh_every=0), "at least 1"),
        (lambda: KLPenalty(place="reward", estimator="k2"), "Remove kl.estimator"),
        (lambda: KLPenalty(horizon=100), "Set kl.target"),
        (lambda: KLPenalty(reference="base", refresh_every=2), "Set only one"),
    ],
)
def test_invalid_options_are_rejected(make: Any, message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make()


def test_adaptive_coefficient() -> None:
    assert adapted_coefficient(0.1, kl=7.0, target=6.0, episodes=100, horizon=1000) == pytest.approx(
        0.1 * (1 + (1 / 6) * 0.1)
    )
    assert adapted_coefficient(0.1, kl=60.0, target=6.0, episodes=100, horizon=1000) == pytest.approx(0.1 * 1.02)
    assert adapted_coefficient(0.1, kl=-1.0, target=6.0, episodes=100, horizon=1000) == pytest.approx(0.1 * 0.98)
    control = KLController(KLPenalty(0.1, target=6.0, horizon=1000))
    control.observe(60.0, 100)
    assert control.penalty.coefficient == 0.1
    control.adapt()
    control.adapt()
    assert control.penalty.coefficient == pytest.approx(0.102)
    control.observe(60.0, 100)
    again = KLController(KLPenalty(0.1, target=6.0, horizon=1000))
    again.load_state_dict(control.state_dict())
    again.adapt()
    assert again.penalty.coefficient == pytest.approx(0.102 * 1.02)
    fixed = KLController(KLPenalty(0.1))
    fixed.observe(60.0, 100)
    fixed.adapt()
    assert fixed.penalty.coefficient == 0.1


def test_value_loss_clips_around_the_old_value() -> None:
    values, old, returns = t([0.5, 1.0, 5.0]), t([0.0, 0.9, 0.0]), t([1.0, 0.0, 0.0])
    # 0.5 moved by 0.5, clipped to 0.2: (0.2 - 1)² is the larger; 1.0 moved by 0.1: not clipped.
    close(value_loss(values, old, returns, MASK), [0.5 * 0.64, 0.5, 0.0])
    close(value_loss(values, old, returns, MASK, clip=None), [0.5 * 0.25, 0.5, 0.0])


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])

    def of(values: list[float]) -> float:
        residual = returns - torch.tensor(values)
        sums = [(float(x.sum()), float(x.square().sum())) for x in (residual, returns)]
        return explained_variance(sums[0], sums[1], 4)

    assert of([1.0, 2.0, 3.0, 6.0]) == pytest.approx(1.0)
    assert of([0.0, 0.0, 0.0, 0.0]) == pytest.approx(0.0)
    assert of([6.0, 3.0, 2.0, 1.0]) < 0
    assert explained_variance((0.0, 0.0), (4.0, 4.0), 4) == 0.0


def episode(group: int, reward: float, *rows: tuple[list[int], list[float], list[float], list[float]]) -> Episode:
    """An episode whose rows are (mask, sampler's log-probabilities, reference's, values)."""
    training_samples = [TrainingSample([0] * len(m), m, p, reference_logprobs=r, values=v) for m, p, r, v in rows]
    found = Episode([], {}, group, training_samples=training_samples, stop_reason="stop")
    found.reward = reward
    return found


def advantages(episodes: list[Episode]) -> list[list[float]]:
    return [[round(x, 9) for x in row.advantages] for one in episodes for row in one.training_samples]


def test_group_baseline_applies_to_every_sampled_token() -> None:
    row = ([0, 1, 0, 1], [0.0, -1.0, 0.0, -2.0], [0.0, -1.5, 0.0, -1.0], [])
    episodes = [episode(0, 1.0, row), episode(0, 0.0, row), episode(1, 5.0, row), episode(1, 5.0, row)]
    compute_token_advantages(episodes, GroupCentered(), None)
    assert advantages(episodes) == [[0, 0.5, 0, 0.5], [0, -0.5, 0, -0.5], [0.0] * 4, [0.0] * 4]
    for one in episodes:
        one.advantage = None
    compute_token_advantages(episodes, LeaveOneOut(), None)
    assert advantages(episodes)[:2] == [[0, 1.0, 0, 1.0], [0, -1.0, 0, -1.0]]


@pytest.mark.parametrize(
    ("discount", "centered", "first", "second"),
    [
        # k1 is 0.5 and -1: rewards of -0.1 and +0.2 at the two sampled tokens.
        (0.0, False, -0.1, 0.2),
        (1.0, False, 0.1, 0.2),
        (0.5, False, 0.0, 0.2),
        (0.0, True, -0.15, 0.15),
        (1.0, True, -0.05, 0.05),
    ],
)
def test_kl_penalty_in_the_reward(discount: float, centered: bool, first: float, second: float) -> None:
    row = ([0, 1, 0, 1], [0.0, -1.0, 0.0, -2.0], [0.0, -1.5, 0.0, -1.0], [])
    episodes = [episode(0, 3.0, row), episode(0, 3.0, row)]
    compute_token_advantages(episodes, GroupCentered(), KLPenalty(0.2, "reward", discount=discount, centered=centered))
    assert advantages(episodes) == [[0.0, first, 0.0, second]] * 2


def test_centered_penalty_does_not_reward_longer_responses() -> None:
    """Two responses equally far from the reference at every token, one twice as long: no position may gain."""
    short, long = ([0, 1], [0.0, -1.0], [0.0, -2.0], []), ([0, 1, 1], [0.0, -1.0, -1.0], [0.0, -2.0, -2.0], [])
    episodes = [episode(0, 0.0, short), episode(0, 0.0, long)]
    compute_token_advantages(episodes, GroupCentered(), KLPenalty(1.0, "reward", discount=1.0))
    # Future sums are -1; -2, -1: their mean is -4/3.
    assert advantages(episodes) == [[0.0, round(1 / 3, 9)], [0.0, round(-2 / 3, 9), round(1 / 3, 9)]]


def test_sequence_level_objective_gets_one_advantage_per_response() -> None:
    # k1 is 0.5 and -1: -0.1 and +0.2 at the two sampled tokens, 0.1 in all.
    row = ([0, 1, 0, 1], [0.0, -1.0, 0.0, -2.0], [0.0, -1.5, 0.0, -1.0], [])
    episodes = [episode(0, 4.0, row), episode(0, 2.0, row)]
    compute_token_advantages(episodes, LeaveOneOut(), KLPenalty(0.2, "reward", centered=False), sequence_level=True)
    assert advantages(episodes) == [[0.0, 2.1, 0.0, 2.1], [0.0, -1.9, 0.0, -1.9]]


def test_kl_penalty_uses_recomputed_logprobs() -> None:
    row = ([0, 1], [0.0, -1.0], [0.0, -1.0], [])
    episodes = [episode(0, 1.0, row), episode(0, 1.0, row)]
    episodes[0].training_samples[0].recomputed_logprobs = [0.0, -0.5]
    compute_token_advantages(episodes, GroupCentered(), KLPenalty(0.2, "reward", centered=False))
    assert advantages(episodes) == [[0.0, -0.1], [0.0, 0.0]]


def test_gae_gives_the_reward_at_the_last_sampled_token() -> None:
    worked = ([0, 1, 1, 0], [0.0] * 4, [0.0] * 4, [0.0, 0.5, 0.5, 0.0])
    rest = ([0, 1, 0], [0.0] * 3, [0.0] * 3, [0.0, 0.5, 0.0])
    episodes = [episode(0, 1.0, worked, rest)]
    compute_token_advantages(episodes, GAE(1.0, 0.95, whiten=False), None)
    assert advantages(episodes) == [[0.0, 0.45125, 0.475, 0.0], [0.0, 0.5, 0.0]]
    rows = episodes[0].training_samples
    assert [round(x, 9) for row in rows for x in row.returns] == [0.0, 0.95125, 0.975, 0.0, 0.0, 1.0, 0.0]
    assert critic_explained_variance(rows) == pytest.approx(0.0, abs=1e-9)


def test_gae_with_a_penalty_and_whitening() -> None:
    row = ([0, 1, 1], [0.0, -1.0, -1.0], [0.0, -1.5, -1.0], [0.0, 0.25, 0.5])
    episodes = [episode(0, 1.0, row)]
    # Rewards -0.5 and 1, values 0.25 and 0.5: deltas -0.25 and 0.5.
    compute_token_advantages(episodes, GAE(1.0, 1.0, whiten=False), KLPenalty(1.0, "reward"))
    assert advantages(episodes) == [[0.0, 0.25, 0.5]]
    episodes[0].advantage = None
    compute_token_advantages(episodes, GAE(1.0, 1.0), KLPenalty(1.0, "reward"))
    assert advantages(episodes)[0] == pytest.approx([0.0, -1.0, 1.0], abs=1e-5)
    assert episodes[0].training_samples[0].returns == pytest.approx([0.0, 0.5, 1.0])


def test_global_whitening() -> None:
    row = ([0, 1], [0.0, -1.0], [0.0, -1.0], [])
    episodes = [episode(0, 1.0, row), episode(0, 3.0, row), episode(1, 5.0, row), episode(1, 7.0, row)]
    compute_token_advantages(episodes, GlobalWhitened(), None)
    scale = 5**-0.5
    assert [row[1] for row in advantages(episodes)] == pytest.approx([-3 * scale, -scale, scale, 3 * scale], abs=1e-6)
    for one in episodes:
        one.advantage = None
    compute_token_advantages(episodes, GlobalWhitened("group"), None)
    assert [row[1] for row in advantages(episodes)] == pytest.approx([-1, 1, -1, 1], abs=1e-6)


def test_rank_without_episodes() -> None:
    for advantage in (GroupCentered(), GAE(), GlobalWhitened()):
        compute_token_advantages([], advantage, KLPenalty(0.1, "reward"))
    assert critic_explained_variance([]) == 0.0
