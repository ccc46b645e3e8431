"""Every objective against values computed by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.objectives import advantage, kl, policy, preference
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.supervised import nll
from tests.helpers.numbers import LOGP, MASK, OLD, close, t

torch.set_default_dtype(torch.float32)


RATIOS = [math.exp(0.2), math.exp(-0.5)]


def test_importance_sampling() -> None:
    close(policy.importance_sampling(LOGP, OLD, t([2.0]), MASK), [-2 * RATIOS[0], -2 * RATIOS[1], 0.0])


def test_importance_sampling_gradient_is_reinforce_on_policy() -> None:
    logp = LOGP.clone().requires_grad_()
    policy.importance_sampling(logp, LOGP, t([3.0]), MASK).sum().backward()
    close(logp.grad, [-3.0, -3.0, 0.0])


def test_ppo_clips_only_where_the_objective_would_improve() -> None:
    close(policy.clipped_surrogate(LOGP, OLD, t([1.0, 1.0, 1.0]), MASK), [-1.2, -RATIOS[1], 0.0])
    close(policy.clipped_surrogate(LOGP, OLD, t([-1.0, -1.0, -1.0]), MASK), [RATIOS[0], 0.8, 0.0])
    close(policy.clipped_surrogate(LOGP, OLD, t([1.0]), MASK, clip_high=0.1), [-1.1, -RATIOS[1], 0.0])


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    logp = LOGP.clone().requires_grad_()
    loss = policy.cispo(logp, OLD, t([2.0]), MASK, ratio_max=1.1)
    close(loss.detach(), [-1.1 * 2 * -1.0, -RATIOS[1] * 2 * -2.0, 0.0])
    loss.sum().backward()
    close(logp.grad, [-2.2, -2 * RATIOS[1], 0.0])


def test_dro() -> None:
    expected = [-(-1.0 * 2 - 0.5 * 0.3 * 0.04), -(-2.0 * 2 - 0.5 * 0.3 * 0.25), 0.0]
    close(policy.dro(LOGP, OLD, t([2.0]), MASK, beta=0.3), expected)


def test_gspo_uses_the_geometric_mean_ratio() -> None:
    ratio = math.exp((0.2 - 0.5) / 2)
    close(
        policy.sequence_clipped_surrogate(LOGP, OLD, t([-1.0]), MASK, clip_low=0.5, clip_high=0.5), [ratio, ratio, 0.0]
    )
    close(policy.sequence_clipped_surrogate(LOGP, OLD, t([-1.0]), MASK), [1 - 3e-4, 1 - 3e-4, 0.0])


def test_sapo_equals_the_plain_gradient_at_ratio_one() -> None:
    logp = LOGP.clone().requires_grad_()
    policy.sapo(logp, LOGP, t([2.0]), MASK).sum().backward()
    close(logp.grad, [-2.0, -2.0, 0.0])
    sigmoid = 1 / (1 + math.exp(-1.05 * (RATIOS[0] - 1)))
    close(policy.sapo(LOGP, OLD, t([-1.0]), MASK)[:, :1], [4 / 1.05 * sigmoid])


@pytest.mark.parametrize(
    "name", ["importance_sampling", "clipped_surrogate", "cispo", "sequence_clipped_surrogate", "sapo"]
)
def test_masked_positions_have_no_loss_and_no_gradient(name: str, device: torch.device) -> None:
    logp = t([-1.0, -2.0, 900.0]).to(device).requires_grad_()
    old, advantages, loss_mask = (tensor.to(device) for tensor in (t([-1.2, -1.5, -900.0]), t([1.0]), MASK))
    loss = getattr(policy, name)(logp, old, advantages, loss_mask)
    loss.sum().backward()
    assert loss[0, 2] == 0
    assert torch.isfinite(loss).all()
    assert logp.grad is not None
    assert torch.isfinite(logp.grad).all()
    assert logp.grad[0, 2] == 0


def test_kl_estimators() -> None:
    logp, ref = t([-1.0]), t([-1.2])
    close(kl.k1(logp, ref), [0.2])
    close(kl.k2(logp, ref), [0.02])
    close(kl.k3(logp, ref), [math.exp(-0.2) + 0.2 - 1])
    assert math.isclose(float(kl.k3(logp, ref)), 0.018731, abs_tol=1e-6)


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=6), st.lists(st.floats(-3, 3), min_size=3, max_size=6))
@settings(max_examples=30, deadline=None)
def test_k1_and_k3_are_unbiased(a: list[float], b: list[float]) -> None:
    size = min(len(a), len(b))
    p, q = t(a[:size]).log_softmax(-1), t(b[:size]).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for estimator in (kl.k1, kl.k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), exact, rtol=1e-9, atol=1e-12)
    assert (kl.k3(p, q) >= -1e-12).all()


def test_bradley_terry() -> None:
    c, r = t(1.0, 0.0), t(0.0, 2.0)
    close(preference.bradley_terry(c, r), math.log(1 + math.exp(-1)), math.log(1 + math.exp(2)))
    close(preference.bradley_terry(c, r, margin=0.5)[:1], math.log(1 + math.exp(-0.5)))
    smooth = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    close(preference.bradley_terry(c, r, label_smoothing=0.1)[:1], smooth)
    close(preference.BradleyTerry(centering=0.01)(c, r)[:1], math.log(1 + math.exp(-1)) + 0.01)


def test_other_pair_losses() -> None:
    c, r = t(1.0, 0.0), t(0.5, 2.0)
    close(preference.hinge(c, r), 0.5, 3.0)
    close(preference.ipo(c, r, beta=0.1), 0.0, 2.5**2 / 0.01)
    sigma = 1 / (1 + math.exp(-0.8))
    close(preference.kto(t(1.0, -0.6), t(1.0, 0.0), kl=0.2), 1 - sigma, 1 - sigma)
    close(preference.kto(t(1.0), t(1.0), kl=0.2, desirable_weight=2.0), 2 * (1 - sigma))


def test_group_advantages() -> None:
    rewards, groups = t(1.0, 0.0, 0.0, 1.0), torch.tensor([7, 7, 7, 7])
    close(advantage.leave_one_out(rewards, groups), 2 / 3, -2 / 3, -2 / 3, 2 / 3)
    close(advantage.group_centered(rewards, groups), 0.5, -0.5, -0.5, 0.5)
    mixed = torch.tensor([3, 9, 3, 9])
    close(advantage.group_centered(t(1.0, 5.0, 3.0, 5.0), mixed), -1.0, 0.0, 1.0, 0.0)
    std = math.sqrt(2.0) + 1e-4
    close(advantage.group_centered(t(1.0, 5.0, 3.0, 5.0), mixed, scale="std"), -1 / std, 0.0, 1 / std, 0.0)
    close(advantage.leave_one_out(t(4.0), torch.tensor([0])), 0.0)


def test_gae_with_skipped_positions() -> None:
    rewards, values = t([0.0, 0.0, 1.0]), t([0.5, 0.5, 0.5])
    advantages, returns = advantage.gae(rewards, values, torch.ones_like(rewards), 1.0, 0.95)
    close(advantages, [0.45125, 0.475, 0.5])
    close(returns, [0.95125, 0.975, 1.0])
    gap = advantage.gae(t([0.0, 9.0, 0.0, 1.0]), t([0.5, 9.0, 0.5, 0.5]), t([1.0, 0.0, 1.0, 1.0]), gamma=1.0, lam=0.95)
    close(gap[0], [0.45125, 0.0, 0.475, 0.5])


def test_whiten_and_discounted_sum() -> None:
    x, loss_mask = t([1.0, 3.0, 100.0]), t([1.0, 1.0, 0.0])
    close(advantage.whiten(x, loss_mask, eps=0.0), [-1.0, 1.0, 0.0])
    close(advantage.whiten(x, loss_mask, shift_mean=False, eps=0.0), [1.0, 3.0, 0.0])
    close(advantage.discounted_future_sum(t([1.0, 5.0, 2.0]), t([1.0, 0.0, 1.0]), 0.5), [2.0, 0.0, 2.0])


def test_aggregate() -> None:
    losses, loss_mask = t([1.0, 2.0, 9.0], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0]), t([1, 1, 0], [1, 0, 0], [0, 0, 0])
    for mode, total, count in (
        ("token_sum", 6.0, 1.0),
        ("token_mean", 6.0, 3.0),
        ("sequence_mean", 4.5, 2.0),
        ("constant", 6.0, 20.0),
    ):
        actual = aggregate(losses, loss_mask, mode, length=10)
        close(torch.stack(actual), total, count)
    with pytest.raises(ValueError, match="length"):
        aggregate(losses, loss_mask, "constant")
    with pytest.raises(ValueError, match="unknown aggregation"):
        aggregate(losses, loss_mask, "mean")


def test_nll() -> None:
    close(nll(LOGP, MASK), [1.0, 2.0, 0.0])
