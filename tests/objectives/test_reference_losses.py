"""Policy and critic losses, KL, advantages and aggregation against verl, OpenRLHF and polgrad, in float64.

The package polgrad holds loss functions of verl and of OpenRLHF as they stand in their repositories, and formulas of
its own for the rest. Values and gradients agree within 1e-6: verl and OpenRLHF divide by a count + 1e-8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import polgrad
import pytest
import torch
from polgrad import Aggregation, ClipConfig, KLEstimator, PolicyLossConfig, RatioKind, SurrogateKind
from polgrad.conformance import VENDORED
from polgrad.conformance._vendor import openrlhf_loss, verl_core_algos
from torch import Tensor

from rlhf_lightning.objectives import kl, policy
from rlhf_lightning.objectives.advantage import gae, group_centered, leave_one_out, whiten
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.value import value_loss
from rlhf_lightning.rollout.kl import KLPenalty

MODES = {
    # ours: verl's, polgrad's
    "token_mean": ("token-mean", Aggregation.TOKEN_MEAN),
    "sequence_mean": ("seq-mean-token-mean", Aggregation.SEQ_MEAN_TOKEN_MEAN),
    "constant": ("seq-mean-token-sum-norm", Aggregation.TOKEN_SUM_NORM),
}


@dataclass
class Batch:
    """Random inputs; log-probabilities `[B, T]` and values require gradients, and groups have at least two rows."""

    logprobs: Tensor
    values: Tensor
    old: Tensor
    sampler: Tensor
    reference: Tensor
    token_advantages: Tensor
    advantages: Tensor
    """One number for each row."""
    loss_mask: Tensor
    """With gaps, as a tool's tokens leave them, and no row of zeros."""
    padded: Tensor
    """Without gaps."""
    old_values: Tensor
    token_rewards: Tensor
    rewards: Tensor
    groups: Tensor
    low: float
    high: float
    """Widths of the clip."""

    @property
    def length(self) -> int:
        return self.loss_mask.shape[1]

    @property
    def there(self) -> Tensor:
        return self.loss_mask.bool()


def batch(seed: int) -> Batch:
    """Ratios between e^-2 and e^2, on both sides of every clip and within the ±20 at which verl and OpenRLHF clamp."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    sizes = [whole(2, 4) for _ in range(whole(1, 3))]
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    shape = len(groups), whole(1, 12)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    padded = (torch.arange(shape[1]) < lengths).double()
    gaps = uniform(0, 1, *shape) > 0.2
    gaps[:, 0] = True
    logprobs = uniform(-8.0, -0.05, *shape)
    return Batch(
        logprobs=logprobs.clone().requires_grad_(),
        values=uniform(-2, 2, *shape).requires_grad_(),
        old=logprobs + uniform(-2, 2, *shape),
        sampler=logprobs + uniform(-2, 2, *shape),
        reference=logprobs + uniform(-2, 2, *shape),
        token_advantages=uniform(-3, 3, *shape),
        advantages=uniform(-3, 3, shape[0], 1),
        loss_mask=padded * gaps,
        padded=padded,
        old_values=uniform(-2, 2, *shape),
        token_rewards=uniform(-3, 3, *shape),
        rewards=uniform(-3, 3, shape[0]),
        groups=groups,
        low=float(uniform(0.05, 0.5)),
        high=float(uniform(0.05, 0.5)),
    )


Both = tuple[Tensor, Tensor]
Comparison = Callable[[Batch], Both]


def _mean(b: Batch, per_token: Tensor, mode: str, length: int | None = None) -> Tensor:
    total, count = aggregate(per_token, b.loss_mask, mode, length)
    return total / count


def _ours(b: Batch, objective: policy.PolicyObjective, advantages: Tensor, weights: Tensor | None = None) -> Tensor:
    per_token = objective(b.logprobs, b.old, advantages, b.loss_mask)
    return _mean(b, per_token if weights is None else per_token * weights, objective.aggregation, objective.length)


def _polgrad(b: Batch, config: PolicyLossConfig, advantages: Tensor) -> Tensor:
    return polgrad.policy_loss(
        config,
        logprobs=b.logprobs,
        old_logprobs=b.old,
        advantages=advantages.expand_as(b.logprobs),
        response_mask=b.there,
        ref_logprobs=b.reference,
        rollout_logprobs=b.sampler,
    ).loss


# -- verl ---------------------------------------------------------------------------------------------------------


def _verl_ppo(mode: str, length: Callable[[Batch], int | None] = lambda b: None, theirs: str = "") -> Comparison:
    def compare(b: Batch) -> Both:
        ours = policy.ClippedSurrogate(b.low, b.high, dual_clip=1.7, aggregation=mode, length=length(b))
        them = verl_core_algos.compute_policy_loss(
            *(b.old, b.logprobs, b.token_advantages, b.loss_mask),
            cliprange_low=b.low,
            cliprange_high=b.high,
            clip_ratio_c=1.7,
            loss_agg_mode=theirs or MODES[mode][0],
        )[0]
        return _ours(b, ours, b.token_advantages), them

    return compare


def _verl_own(name: str, objective: policy.PolicyObjective) -> Comparison:
    """A function that reads verl's configuration, which polgrad rewrote with verl's defaults."""

    def compare(b: Batch) -> Both:
        advantages = b.advantages.expand_as(b.logprobs)
        theirs = VENDORED["verl", name](
            logprobs=b.logprobs, old_logprobs=b.old, advantages=advantages, response_mask=b.there
        )
        return _ours(b, objective, advantages), theirs

    return compare


def _verl_value(b: Batch) -> Both:
    returns = b.token_rewards
    theirs = verl_core_algos.compute_value_loss(b.values, returns, b.old_values, b.loss_mask, cliprange_value=b.low)[0]
    return _mean(b, value_loss(b.values, b.old_values, returns, b.loss_mask, clip=b.low), "token_mean"), theirs


def _verl_kl(name: str, estimator: Callable[[Tensor, Tensor], Tensor]) -> Comparison:
    return lambda b: (estimator(b.logprobs, b.reference), verl_core_algos.kl_penalty(b.logprobs, b.reference, name))


# -- OpenRLHF -----------------------------------------------------------------------------------------------------


def _openrlhf(tokens: bool, kind: str = "ppo", dual_clip: float | None = None) -> Comparison:
    def compare(b: Batch) -> Both:
        mode = "token_mean" if tokens else "sequence_mean"
        gspo = kind == "gspo"
        ours = (
            policy.SequenceClippedSurrogate(True, b.low, b.high)
            if gspo
            else policy.ClippedSurrogate(b.low, b.high, dual_clip=dual_clip, aggregation=mode)
        )
        theirs = openrlhf_loss.PolicyLoss(b.low, b.high, dual_clip, tokens, kind)
        advantages = b.advantages.expand_as(b.loss_mask) if gspo else b.token_advantages
        return _ours(b, ours, advantages), theirs(b.logprobs, b.old, advantages, b.loss_mask)[0]

    return compare


def _openrlhf_correction(kind: str, mode: str) -> Comparison:
    def compare(b: Batch) -> Both:
        weights = policy.ImportanceWeights("token", mode, 0.5, 1.5)(b.old, b.sampler, b.loss_mask)
        ours = _ours(b, policy.ClippedSurrogate(b.low, b.high), b.token_advantages, weights)
        theirs = openrlhf_loss.PolicyLoss(
            b.low,
            b.high,
            enable_vllm_is_correction=True,
            vllm_is_truncated_threshold=[0.5, 1.5],
            vllm_is_correction_type=kind,
        )
        return ours, theirs(b.logprobs, b.old, b.token_advantages, b.loss_mask, b.sampler)[0]

    return compare


def _openrlhf_value(clipped: bool) -> Comparison:
    def compare(b: Batch) -> Both:
        clip = b.low if clipped else None
        theirs = openrlhf_loss.ValueLoss(clip)(b.values, b.old_values, b.token_rewards, b.loss_mask)
        return _mean(b, value_loss(b.values, b.old_values, b.token_rewards, b.loss_mask, clip), "token_mean"), theirs

    return compare


# -- polgrad's own ------------------------------------------------------------------------------------------------


def _algorithm(name: str, objective: Callable[[Batch], policy.PolicyObjective]) -> Comparison:
    """Ours with defaults against polgrad's settings of a paper; the KL term of GRPO with its coefficient."""

    def compare(b: Batch) -> Both:
        config = polgrad.get_algorithm(name).loss
        if config.aggregation is Aggregation.TOKEN_SUM_NORM:
            config = replace(config, norm_len=b.length)
        made = objective(b)
        ours = _ours(b, made, b.advantages)
        if config.kl:
            penalty = KLPenalty(config.kl.coef, estimator=config.kl.kind.value)
            ours = ours + _mean(
                b, penalty.loss(b.logprobs, b.old, b.reference, b.loss_mask), made.aggregation, made.length
            )
        return ours, _polgrad(b, config, b.advantages)

    return compare


def _surrogate(
    objective: Callable[[Batch], policy.PolicyObjective],
    surrogate: SurrogateKind,
    clip: Callable[[Batch], ClipConfig | None] = lambda b: None,
    ratio: RatioKind = RatioKind.TOKEN,
) -> Comparison:
    def compare(b: Batch) -> Both:
        made = objective(b)
        config = PolicyLossConfig(ratio, surrogate, clip(b), MODES[made.aggregation][1])
        advantages = b.advantages if made.sequence_level else b.token_advantages
        return _ours(b, made, advantages), _polgrad(b, config, advantages)

    return compare


def _clipped(objective: Callable[[Batch], policy.PolicyObjective], cap: float | None, ratio: RatioKind) -> Comparison:
    """The tokens that count as clipped."""

    def compare(b: Batch) -> Both:
        clip = ClipConfig(b.low, b.high, cap)
        advantages = b.advantages.expand_as(b.loss_mask)
        found = polgrad.policy_loss(
            PolicyLossConfig(ratio, SurrogateKind.PG_CLIP, clip, Aggregation.TOKEN_MEAN),
            logprobs=b.logprobs,
            old_logprobs=b.old,
            advantages=advantages,
            response_mask=b.there,
        )
        ours = objective(b).clipped(b.logprobs, b.old, advantages, b.loss_mask)
        return ours, (found.clipped_low | found.clipped_high).double()

    return compare


def _correction(level: str) -> Comparison:
    def compare(b: Batch) -> Both:
        weights = policy.ImportanceWeights(level, "truncate", 0.0, 1.5)(b.old, b.sampler, b.loss_mask)
        config = PolicyLossConfig(
            RatioKind.TOKEN,
            SurrogateKind.PG,
            None,
            Aggregation.TOKEN_MEAN,
            is_correction=polgrad.ISCorrectionConfig(1.5, level),  # type: ignore[arg-type]
        )
        ours = _ours(b, policy.ImportanceSampling(), b.token_advantages, weights)
        return ours, _polgrad(b, config, b.token_advantages)

    return compare


def _kl_in_the_loss(estimator: str) -> Comparison:
    def compare(b: Batch) -> Both:
        ours = KLPenalty(1.0, estimator=estimator).loss(b.logprobs, b.old, b.reference, b.loss_mask)
        kind = KLEstimator[estimator.upper()]
        theirs = polgrad.kl_loss(b.logprobs, b.reference, kind, Aggregation.SEQ_MEAN_TOKEN_MEAN, response_mask=b.there)
        return _mean(b, ours, "sequence_mean"), theirs

    return compare


def _kl_in_the_reward(b: Batch) -> Both:
    ours = KLPenalty(0.3, place="reward").token_rewards(b.old, b.reference, b.loss_mask)
    nothing = torch.zeros_like(ours)
    return ours, polgrad.kl_in_reward(nothing, b.old, b.reference, KLEstimator.K1, 0.3, response_mask=b.there)


def _gae(b: Batch) -> Both:
    values = b.old_values
    theirs = polgrad.gae(b.token_rewards, values, config=polgrad.GAEConfig(0.97, 0.9), response_mask=b.padded.bool())
    return torch.stack(gae(b.token_rewards, values, b.padded, 0.97, 0.9)), torch.stack(theirs)


def _whiten(shift_mean: bool) -> Comparison:
    """Ours divides the variance by n, polgrad's by n - 1."""

    def compare(b: Batch) -> Both:
        loss_mask = b.loss_mask.clone()
        loss_mask[:, 0] = 1.0
        count, x = loss_mask.sum(), b.token_advantages
        mean = 0.0 if shift_mean else (x * loss_mask).sum() / count
        ours = (whiten(x, loss_mask, shift_mean) - mean * loss_mask) * ((count - 1) / count).sqrt() + mean * loss_mask
        return ours, polgrad.whiten(x, loss_mask.bool(), shift_mean=shift_mean)

    return compare


def _reinforce_plus_plus(grouped: bool) -> Comparison:
    """For responses of one token, where both whiten the same numbers; n and n - 1 as above."""

    def compare(b: Batch) -> Both:
        centered = group_centered(b.rewards, b.groups) if grouped else b.rewards
        count = len(centered)
        ours = whiten(centered[:, None], torch.ones(count, 1))[:, 0] * ((count - 1) / count) ** 0.5
        config = polgrad.ReinforcePPConfig(batch_norm=True)
        return ours, polgrad.reinforce_pp_advantages(b.rewards, b.groups if grouped else None, config=config)

    return compare


COMPARISONS: dict[str, Comparison] = {
    "verl: PPO, mean of tokens": _verl_ppo("token_mean"),
    "verl: PPO, mean of sequences": _verl_ppo("sequence_mean"),
    "verl: PPO, constant length": _verl_ppo("constant", lambda b: b.length),
    "verl: PPO, sum of a sequence": _verl_ppo("constant", lambda b: 1, "seq-mean-token-sum"),
    "verl: GSPO": _verl_own("gspo", policy.SequenceClippedSurrogate(True, 0.2, 0.2)),
    "verl: CISPO": _verl_own("cispo", policy.CISPO(0.8, 1.2)),
    "verl: value": _verl_value,
    "verl: k1": _verl_kl("k1", kl.k1),
    "verl: k2": _verl_kl("k2", kl.k2),
    "verl: k3": _verl_kl("k3", kl.k3),
    "OpenRLHF: PPO, mean of tokens": _openrlhf(tokens=True),
    "OpenRLHF: PPO, mean of sequences": _openrlhf(tokens=False),
    "OpenRLHF: PPO, dual clip": _openrlhf(tokens=True, dual_clip=1.7),
    "OpenRLHF: GSPO": _openrlhf(tokens=False, kind="gspo"),
    "OpenRLHF: sampler's weights, truncated": _openrlhf_correction("tis", "truncate"),
    "OpenRLHF: sampler's weights, masked": _openrlhf_correction("icepop", "mask"),
    "OpenRLHF: value": _openrlhf_value(clipped=True),
    "OpenRLHF: value without a clip": _openrlhf_value(clipped=False),
    "GRPO": _algorithm("grpo", lambda b: policy.ClippedSurrogate(aggregation="sequence_mean")),
    "Dr. GRPO": _algorithm("dr_grpo", lambda b: policy.ClippedSurrogate(aggregation="constant", length=b.length)),
    "DAPO": _algorithm("dapo", lambda b: policy.ClippedSurrogate(clip_high=0.28)),
    "GSPO": _algorithm("gspo", lambda b: policy.SequenceClippedSurrogate()),
    "GSPO by token": _algorithm("gspo_token", lambda b: policy.SequenceClippedSurrogate()),
    "GSPO, wide": _surrogate(
        lambda b: policy.SequenceClippedSurrogate(True, b.low, b.high),
        SurrogateKind.PG_CLIP,
        lambda b: ClipConfig(b.low, b.high),
        RatioKind.SEQUENCE,
    ),
    "REINFORCE": _surrogate(lambda b: policy.Reinforce(), SurrogateKind.REINFORCE),
    "importance sampling": _surrogate(lambda b: policy.ImportanceSampling(), SurrogateKind.PG),
    "CISPO": _surrogate(
        lambda b: policy.CISPO(0.0, 1 + b.high), SurrogateKind.CISPO, lambda b: ClipConfig(None, b.high)
    ),
    "clipped tokens of PPO": _clipped(lambda b: policy.ClippedSurrogate(b.low, b.high), None, RatioKind.TOKEN),
    "clipped tokens, dual clip": _clipped(lambda b: policy.ClippedSurrogate(b.low, b.high, 1.7), 1.7, RatioKind.TOKEN),
    "clipped tokens of GSPO": _clipped(
        lambda b: policy.SequenceClippedSurrogate(True, b.low, b.high), None, RatioKind.SEQUENCE
    ),
    "sampler's weights by token": _correction("token"),
    "sampler's weights by sequence": _correction("sequence"),
    "KL in the loss, k2": _kl_in_the_loss("k2"),
    "KL in the loss, k3": _kl_in_the_loss("k3"),
    "KL in the reward": _kl_in_the_reward,
    "advantage of a group": lambda b: (
        group_centered(b.rewards, b.groups),
        polgrad.grpo_advantages(b.rewards, b.groups, polgrad.GroupNormConfig(scale="none")),
    ),
    "advantage of a group, scaled": lambda b: (
        group_centered(b.rewards, b.groups, "std"),
        polgrad.grpo_advantages(b.rewards, b.groups, polgrad.GroupNormConfig()),
    ),
    "leave one out": lambda b: (
        leave_one_out(b.rewards, b.groups),
        polgrad.rloo_advantages(b.rewards, b.groups),
    ),
    "GAE": _gae,
    "whitened": _whiten(shift_mean=True),
    "whitened, the mean kept": _whiten(shift_mean=False),
    "REINFORCE++": _reinforce_plus_plus(grouped=False),
    "REINFORCE++, less the group's mean": _reinforce_plus_plus(grouped=True),
}
FAST = 4


def check(name: str, seed: int) -> None:
    """Compare values, and gradients of log-probabilities and values."""
    b = batch(seed)
    found = COMPARISONS[name](b)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    if any(one.requires_grad for one in found):
        leaves = [b.logprobs, b.values]
        ours, theirs = (torch.autograd.grad(one.sum(), leaves, materialize_grads=True) for one in found)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(FAST))
@pytest.mark.parametrize("name", COMPARISONS)
def test_losses_equal_reference_implementations(name: str, seed: int) -> None:
    check(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARISONS)
def test_losses_equal_reference_implementations_on_many_inputs(name: str) -> None:
    for seed in range(FAST, 60):
        check(name, seed)


@pytest.mark.parametrize("seed", range(FAST))
def test_aggregation_ignores_untrained_rows(seed: int) -> None:
    b = batch(seed)
    b.loss_mask[0] = 0.0
    for mode, (verl, own) in MODES.items():
        length = 100 if mode == "constant" else None
        ours = _mean(b, b.token_rewards, mode, length)
        theirs = [verl_core_algos.agg_loss(b.token_rewards, b.loss_mask, verl, loss_scale_factor=length)]
        # polgrad takes no row without tokens.
        theirs += [polgrad.aggregate(b.token_rewards[1:], b.there[1:], own, norm_len=length)]
        if mode != "constant":
            theirs += [openrlhf_loss.aggregate_loss(b.token_rewards, b.loss_mask, mode == "token_mean")]
        for one in theirs:
            torch.testing.assert_close(ours, one, rtol=1e-6, atol=1e-6)
