"""Advantages of episodes and tokens, as settings over the functions of `objectives.advantage`.

`Advantage.__call__` subtracts a baseline from the reward, which gives one number per episode.
`Advantage.token_advantages` distributes it over the sampled tokens, and adds a KL penalty in the reward, which is a
(mostly negative) reward of each token: -coefficient · k1. `compute_token_advantages` calls both and writes the result
into the training samples.

Shapes: N episodes of this rank; T columns, in which the training samples of an episode follow one another, padded on
the right.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rlhf_lightning.data.batching import pad_right
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.objectives.advantage import discounted_future_sum, gae, group_centered, leave_one_out
from rlhf_lightning.objectives.value import explained_variance
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import Episode, TrainingSample


class Advantage(Settings):
    """Base class of advantages. Used directly, the advantage of each token is the reward of its episode.

    A subclass overrides `__call__` to subtract a baseline, or `token_advantages` to change how advantages are
    distributed over tokens. Each rank calls it with its own episodes. A baseline over the round must therefore be
    computed over all ranks, as here:

    Example:
        >>> class RoundCentered(Advantage):
        ...     def __call__(self, rewards, group_ids):
        ...         sums = gather((float(rewards.sum()), len(rewards)))  # of each rank
        ...         return rewards - sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))
        >>> RoundCentered()(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
        tensor([-1.,  1.])
    """

    needs_group = False
    """True if the baseline compares the episodes of a group, so that a group of one episode has no advantage."""
    needs_values = False
    """True if a critic is required."""
    centers_penalty = True
    """True if `KLPenalty(centered=True)` takes effect: the part of the advantages that comes from KL is centered, that
    is, its mean over the round's tokens is subtracted. That part is what `token_advantages` returns for the penalties
    alone, so it must be linear in `episode_advantages` and `token_rewards`. False if a critic or whitening is the
    baseline already."""
    whiten = False
    """True to scale the advantages of a round's tokens to mean 0 and variance 1, over all ranks."""

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Subtract a baseline from the rewards.

        All ranks call it once per round, each with its own episodes: whole groups, without failed episodes, perhaps
        none. A baseline over the round must be computed over all ranks (`distributed.gather`).

        Args:
            rewards: Reward of each episode of this rank, `[N]`.
            group_ids: Group of each of these episodes, `[N]`.

        Returns:
            Advantage of each episode, `[N]`.
        """
        return rewards

    def token_advantages(
        self, episode_advantages: Tensor, token_rewards: Tensor, values: Tensor, loss_mask: Tensor, discount: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the advantage, and with a critic the return, of each token.

        Args:
            episode_advantages: What `__call__` returned (for a sequence-level objective, less the KL penalties of the
                whole episode), in reward units, `[N]`.
            token_rewards: KL penalty of each token as a reward, -coefficient · k1, negative on average; in reward
                units, `[N, T]`.
            values: The critic's values, `[N, T]`; zeros without a critic.
            loss_mask: 1 at sampled tokens, 0 elsewhere, `[N, T]`.
            discount: Discount factor for the rewards of later tokens.

        Returns:
            Advantages and returns, `[N, T]` each, 0 where the mask is 0. Returns are all 0 without a critic.
        """
        later = discounted_future_sum(token_rewards, loss_mask, discount)
        return episode_advantages[:, None] * loss_mask + later, torch.zeros_like(loss_mask)


class GroupCentered(Advantage):
    """Reward minus the mean reward of its group (GRPO, arXiv 2402.03300).

    Args:
        scale: `none`, or `std` to divide by the group's standard deviation, as GRPO does.

    Raises:
        ConfigError: If `scale` is unknown.

    Example:
        >>> GroupCentered()(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor([ 0.5000, -0.5000])
    """

    needs_group = True

    def __init__(self, scale: str = "none") -> None:
        if scale not in ("none", "std"):
            raise ConfigError(f"advantage.scale is {scale!r}; it must be 'none' or 'std'")
        self.scale = scale

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantage of each episode, `[N]`; see `Advantage.__call__`."""
        return group_centered(rewards, group_ids, self.scale)


class LeaveOneOut(Advantage):
    """Reward minus the mean reward of the other episodes of its group (RLOO, arXiv 2402.14740).

    Example:
        >>> LeaveOneOut()(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
        tensor([ 1., -1.])
    """

    needs_group = True

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantage of each episode, `[N]`; see `Advantage.__call__`."""
        return leave_one_out(rewards, group_ids)


class GlobalWhitened(Advantage):
    """Reward less the KL penalties of this and later tokens, whitened over a round (REINFORCE++, arXiv 2501.03262).

    Args:
        baseline: `none`, or `group` to subtract the group's mean first (REINFORCE++-baseline), which needs groups.

    Raises:
        ConfigError: If `baseline` is unknown.

    Example:
        >>> GlobalWhitened(baseline="group").needs_group
        True
    """

    whiten = True
    centers_penalty = False

    def __init__(self, baseline: str = "none") -> None:
        if baseline not in ("none", "group"):
            raise ConfigError(f"advantage.baseline is {baseline!r}; it must be 'none' or 'group'")
        self.needs_group = baseline == "group"

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantage of each episode before whitening, `[N]`; see `Advantage.__call__`."""
        return group_centered(rewards, group_ids) if self.needs_group else rewards


class GAE(Advantage):
    """Generalized advantage estimation with a critic (arXiv 1506.02438), as in PPO.

    The reward of an episode is given at its last sampled token, each KL penalty (as a negative reward) at its own
    token. The value after the last token is 0.

    Args:
        gamma: Discount factor of rewards; 1 is usual for responses of a few hundred tokens.
        lam: λ, the weight of longer-horizon estimates; at 1 the critic only serves as a baseline.
        whiten: True to scale the advantages to mean 0 and variance 1 over the tokens of a round.

    Raises:
        ConfigError: If `gamma` or `lam` is not in [0, 1].

    Example:
        >>> GAE(lam=1.0).needs_values
        True
    """

    needs_values = True
    centers_penalty = False

    def __init__(self, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True) -> None:
        if not (0 <= gamma <= 1 and 0 <= lam <= 1):
            raise ConfigError(f"advantage: gamma ({gamma}) and lam ({lam}) must be in [0, 1]")
        self.gamma, self.lam, self.whiten = gamma, lam, whiten

    def token_advantages(
        self, episode_advantages: Tensor, token_rewards: Tensor, values: Tensor, loss_mask: Tensor, discount: float
    ) -> tuple[Tensor, Tensor]:
        """See `Advantage.token_advantages`. Uses `gamma` instead of `discount`."""
        positions = torch.arange(1, loss_mask.shape[1] + 1)
        last = (loss_mask * positions).argmax(-1, keepdim=True)
        rewards = token_rewards.scatter_add(1, last, episode_advantages[:, None])
        return gae(rewards, values, loss_mask, self.gamma, self.lam)


def compute_token_advantages(
    episodes: Sequence[Episode], advantage: Advantage, kl: KLPenalty | None, sequence_level: bool = False
) -> None:
    """Write `advantages`, and with a critic `returns`, into the training samples. All ranks must call this together.

    An episode has several training samples if the chat template re-renders earlier turns. Together they are one
    sequence of actions, so a penalty in a later sample also counts for the tokens of earlier ones. A KL penalty in the
    reward is subtracted after the group's baseline and before whitening.

    Args:
        episodes: Episodes of a round, on this rank. Episodes that already have an `advantage` keep it.
        advantage: Computes the advantages.
        kl: The KL penalty; with `place: reward` it enters the rewards of individual tokens.
        sequence_level: True if the objective treats a sequence (a training sample) as one action. All tokens of an
            episode then share one advantage: that of the episode, less the KL penalties of all its tokens.
    """
    _compute_episode_advantages(episodes, advantage)
    episode_advantages = torch.tensor([episode.advantage for episode in episodes], dtype=torch.float64)  # [N]
    loss_mask = _concatenate(episodes, lambda sample: sample.loss_mask)
    values = torch.zeros_like(loss_mask)
    if advantage.needs_values:
        values = _concatenate(episodes, lambda sample: sample.values)

    penalty = kl if kl is not None and kl.place == "reward" else None
    # KL penalties as rewards, [N, T]: negative on average, and added.
    token_rewards, discount = torch.zeros_like(loss_mask), 1.0
    if penalty is not None:
        old = _concatenate(episodes, lambda sample: sample.old_logprobs)
        reference = _concatenate(episodes, lambda sample: sample.reference_logprobs)
        token_rewards, discount = penalty.token_rewards(old, reference, loss_mask), penalty.discount
    penalty_sums = torch.zeros_like(episode_advantages)  # over all tokens of an episode, [N]
    if sequence_level:
        penalty_sums, token_rewards = token_rewards.sum(-1), torch.zeros_like(loss_mask)

    advantages, returns = advantage.token_advantages(
        episode_advantages + penalty_sums, token_rewards, values, loss_mask, discount
    )
    if penalty is not None and penalty.centered and advantage.centers_penalty:
        # The part of the advantages that comes from penalties: `token_advantages` of these alone, since it is linear.
        # Its mean over the round's tokens is a baseline that hardly depends on a single action. Center after
        # summing over later tokens: centering each penalty before would reward longer responses.
        from_penalties, _ = advantage.token_advantages(penalty_sums, token_rewards, values, loss_mask, discount)
        advantages = advantages - _mean_and_variance(from_penalties, loss_mask)[0] * loss_mask
    if advantage.whiten:
        mean, variance = _mean_and_variance(advantages, loss_mask)
        # If all advantages are equal, the centered ones are rounding errors, which must not be scaled up.
        scale = (variance + 1e-8) ** -0.5 if variance > (1e-10 * mean) ** 2 else 0.0
        advantages = (advantages - mean) * scale * loss_mask

    for sample, row in _split(episodes, advantages):
        sample.advantages = row
    if advantage.needs_values:
        for sample, row in _split(episodes, returns):
            sample.returns = row


def _compute_episode_advantages(episodes: Sequence[Episode], advantage: Advantage) -> None:
    """Write `Episode.advantage` where it is None."""
    pending = [episode for episode in episodes if episode.advantage is None]
    # Called without episodes, too, because it may gather over ranks.
    rewards = torch.tensor([episode.reward for episode in pending], dtype=torch.float64)
    groups = torch.tensor([episode.group for episode in pending], dtype=torch.int64)
    for episode, value in zip(pending, advantage(rewards, groups).tolist(), strict=True):
        episode.advantage = value


def _concatenate(episodes: Sequence[Episode], column: Callable[[TrainingSample], Sequence[float]]) -> Tensor:
    """Concatenate a column of each episode's training samples, `[N, T]`; 0 where a sample lacks the column."""
    rows = [
        [value for sample in episode.training_samples for value in column(sample) or [0.0] * len(sample.ids)]
        for episode in episodes
    ]
    return pad_right(rows or [[0.0]], 0.0, torch.float64)[: len(rows)]


def _split(episodes: Sequence[Episode], table: Tensor) -> Iterator[tuple[TrainingSample, list[float]]]:
    """The inverse of `_concatenate`: each training sample with its part of a table `[N, T]`."""
    for episode, row in zip(episodes, table.tolist(), strict=True):
        start = 0
        for sample in episode.training_samples:
            yield sample, row[start : start + len(sample.ids)]
            start += len(sample.ids)


def _mean_and_variance(x: Tensor, loss_mask: Tensor) -> tuple[float, float]:
    """Mean and variance (divided by n, not n - 1) over the sampled tokens of all ranks."""
    count = sum(gather(float(loss_mask.sum()))) or 1.0
    mean = sum(gather(float((x * loss_mask).sum()))) / count
    return mean, sum(gather(float(((x - mean).square() * loss_mask).sum()))) / count


def critic_explained_variance(samples: Sequence[TrainingSample]) -> float:
    """Explained variance of the critic's values over the sampled tokens of a round, on all ranks."""
    pairs = [
        (value, target)
        for sample in samples
        for value, target, flag in zip(sample.values, sample.returns, sample.loss_mask, strict=True)
        if flag
    ]
    local = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    target, residual = local[:, 1], local[:, 1] - local[:, 0]
    sums = [float(s.sum()) for s in (residual, residual.square(), target, target.square())]
    totals = [sum(column) for column in zip(*gather([*sums, float(len(pairs))]), strict=True)]
    return explained_variance((totals[0], totals[1]), (totals[2], totals[3]), totals[4])
