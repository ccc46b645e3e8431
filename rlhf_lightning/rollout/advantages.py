"""Advantages: named baselines over `objectives.advantage`, and the function that gives every sampled token its own.

`Advantage.__call__` subtracts a baseline: one number per episode. `Advantage.token_advantages` spreads it over the
sampled tokens, together with the penalties of single tokens. `compute_token_advantages` calls both and writes the
result into the training samples.
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
    """From rewards to the advantage of every token that was sampled."""

    needs_group = False
    """Whether a group of one has no advantage."""
    needs_values = False
    """Whether a critic is needed."""
    centers_penalty = True
    """Whether the KL penalty's mean may be taken off: something else here has to know how large the reward is."""
    whiten = False
    """Whether the advantages of a round's tokens get mean 0 and variance 1, over all ranks."""

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Rewards `[N]` of episodes, less a baseline; `group_ids` `[N]`."""
        return rewards

    def token_advantages(
        self, scores: Tensor, penalties: Tensor, values: Tensor, loss_mask: Tensor, discount: float
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns, `[N, T]` each, 0 where the mask is 0.

        Args:
            scores: what `__call__` gave, `[N]`. penalties: rewards of single tokens, `[N, T]`. values: the critic's,
                `[N, T]`, zeros without one. discount: of a later token's penalty.
        """
        return scores[:, None] * loss_mask + discounted_future_sum(penalties, loss_mask, discount), torch.zeros_like(
            loss_mask
        )


class GroupCentered(Advantage):
    """Reward minus the mean of its group; `scale: std` divides by the group's deviation as GRPO does."""

    needs_group = True

    def __init__(self, scale: str = "none") -> None:
        if scale not in ("none", "std"):
            raise ConfigError(f"advantage.scale is {scale!r}; 'none' or 'std'")
        self.scale = scale

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """`[N]`."""
        return group_centered(rewards, group_ids, self.scale)


class LeaveOneOut(Advantage):
    """Reward minus the mean of the group's others (RLOO)."""

    needs_group = True

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """`[N]`."""
        return leave_one_out(rewards, group_ids)


class GlobalWhitened(Advantage):
    """The reward and the KL penalties to come, whitened over all tokens of the round (REINFORCE++, arXiv 2501.03262).

    Args:
        baseline: `none`, or `group`: the group's mean is taken off first (REINFORCE++-baseline), which needs groups.
    """

    whiten = True
    centers_penalty = False

    def __init__(self, baseline: str = "none") -> None:
        if baseline not in ("none", "group"):
            raise ConfigError(f"advantage.baseline is {baseline!r}; 'none' or 'group'")
        self.needs_group = baseline == "group"

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """`[N]`."""
        return group_centered(rewards, group_ids) if self.needs_group else rewards


class GAE(Advantage):
    """Generalized advantage estimation with a critic (arXiv 1506.02438): PPO as it was first used on language models.

    The reward comes at the last token that was sampled, KL penalties at their own; the value after the end is 0.

    Args:
        gamma: discount of rewards; 1 for answers of a few hundred tokens.
        lam: weight of later value estimates; 1 leaves the critic as a baseline alone.
        whiten: mean 0 and variance 1 over the tokens of a round.
    """

    needs_values = True
    centers_penalty = False

    def __init__(self, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True) -> None:
        if not (0 <= gamma <= 1 and 0 <= lam <= 1):
            raise ConfigError(f"advantage: gamma ({gamma}) and lam ({lam}) must be in [0, 1]")
        self.gamma, self.lam, self.whiten = gamma, lam, whiten

    def token_advantages(
        self, scores: Tensor, penalties: Tensor, values: Tensor, loss_mask: Tensor, discount: float
    ) -> tuple[Tensor, Tensor]:
        """See `Advantage.token_advantages`; gamma discounts, not `discount`."""
        places = torch.arange(1, loss_mask.shape[1] + 1)
        last = (loss_mask * places).argmax(-1, keepdim=True)
        return gae(penalties.scatter_add(1, last, scores[:, None]), values, loss_mask, self.gamma, self.lam)


def compute_token_advantages(
    episodes: Sequence[Episode], advantage: Advantage, kl: KLPenalty | None, sequence_level: bool = False
) -> None:
    """Write `advantages`, and `returns` with a critic, into the training samples. All ranks must call this together.

    The training samples of an episode form one sequence of actions, whatever lies between them, so a token may earn a
    reward that comes in a later sample. A KL penalty in the reward is added after the group's baseline and before
    whitening.

    Args:
        episodes: of a round, on this rank; those with an `advantage` of their own keep it.
        advantage: the baseline, and how it is spread over tokens.
        kl: a penalty with `place: reward` is added to the rewards of single tokens.
        sequence_level: the objective takes a response as one action, which has one advantage: that of the episode plus
            the penalties of all its tokens.
    """
    unscored = [episode for episode in episodes if episode.advantage is None]
    if unscored:
        rewards = torch.tensor([episode.reward for episode in unscored], dtype=torch.float64)
        groups = torch.tensor([episode.group for episode in unscored])
        for episode, value in zip(unscored, advantage(rewards, groups).tolist(), strict=True):
            episode.advantage = value
    loss_mask = _joined(episodes, lambda sample: sample.loss_mask)
    scores = torch.tensor([episode.advantage for episode in episodes], dtype=torch.float64)
    in_reward = kl is not None and kl.place == "reward"
    penalties, discount = torch.zeros_like(loss_mask), 1.0
    if kl is not None and in_reward:
        old = _joined(episodes, lambda sample: sample.old_logprobs)
        reference = _joined(episodes, lambda sample: sample.reference_logprobs)
        penalties, discount = kl.penalties(old, reference, loss_mask), kl.discount
    extra = torch.zeros_like(scores)
    if sequence_level:
        extra, penalties = penalties.sum(-1), torch.zeros_like(loss_mask)
    values = torch.zeros_like(loss_mask)
    if advantage.needs_values:
        values = _joined(episodes, lambda sample: sample.values)
    advantages, returns = advantage.token_advantages(scores + extra, penalties, values, loss_mask, discount)
    if kl is not None and in_reward and kl.centered and advantage.centers_penalty:
        # The mean over the round's tokens is a baseline: it depends on no action. Centering before the return would
        # reward longer responses, so it is done after it.
        added, _ = advantage.token_advantages(extra, penalties, values, loss_mask, discount)
        advantages = advantages - _moments(added, loss_mask)[0] * loss_mask
    if advantage.whiten:
        mean, variance = _moments(advantages, loss_mask)
        # Where all advantages are equal, what is left of them is rounding error and must not be scaled up.
        scale = (variance + 1e-8) ** -0.5 if variance > (1e-10 * mean) ** 2 else 0.0
        advantages = (advantages - mean) * scale * loss_mask
    for sample, numbers in _separated(episodes, advantages):
        sample.advantages = numbers
    if advantage.needs_values:
        for sample, numbers in _separated(episodes, returns):
            sample.returns = numbers


def _joined(episodes: Sequence[Episode], column: Callable[[TrainingSample], Sequence[float]]) -> Tensor:
    """A column of all training samples of each episode, end to end, `[N, T]`; 0 where a sample has none."""
    rows = [
        [number for sample in episode.training_samples for number in column(sample) or [0.0] * len(sample.ids)]
        for episode in episodes
    ]
    return pad_right(rows or [[0.0]], 0.0, torch.float64)[: len(rows)]


def _separated(episodes: Sequence[Episode], table: Tensor) -> Iterator[tuple[TrainingSample, list[float]]]:
    """The inverse of `_joined`: each training sample with its own part of the table `[N, T]`."""
    for episode, numbers in zip(episodes, table.tolist(), strict=True):
        start = 0
        for sample in episode.training_samples:
            yield sample, numbers[start : start + len(sample.ids)]
            start += len(sample.ids)


def _moments(x: Tensor, loss_mask: Tensor) -> tuple[float, float]:
    """Mean and variance (over n, not n - 1) of the trained tokens of all ranks."""
    count = sum(gather(float(loss_mask.sum()))) or 1.0
    mean = sum(gather(float((x * loss_mask).sum()))) / count
    return mean, sum(gather(float(((x - mean).square() * loss_mask).sum()))) / count


def critic_explained_variance(samples: Sequence[TrainingSample]) -> float:
    """The explained variance of the critic's values over the sampled tokens of a round, of all ranks."""
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
