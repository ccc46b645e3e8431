"""Credit: from the rewards of a round's episodes to the advantage of every token that was sampled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_lightning.data.batching import pad_right
from rlhf_lightning.distributed import gather
from rlhf_lightning.objectives.value import explained_variance
from rlhf_lightning.rollout.advantages import Advantage
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.types import Episode, TrainingSample


def compute_token_advantages(
    episodes: Sequence[Episode], advantage: Advantage, kl: KLPenalty | None, sequence_level: bool = False
) -> None:
    """Write `advantages` (and `returns`, with a critic) into the rows. All ranks call it together.

    The rows of an episode are one sequence of actions here, whatever stands between them: what a token earns may come
    from a later row. A penalty in the reward comes after the group's baseline and before whitening. Where the objective
    takes the `sequence_level` as one action, that has one advantage, with the penalties of all its tokens.
    """
    unscored = [episode for episode in episodes if episode.advantage is None]
    if unscored:
        rewards = torch.tensor([episode.reward for episode in unscored], dtype=torch.float64)
        groups = torch.tensor([episode.group for episode in unscored])
        for episode, value in zip(unscored, advantage(rewards, groups).tolist(), strict=True):
            episode.advantage = value
    loss_mask = _joined(episodes, "loss_mask")
    scores = torch.tensor([episode.advantage for episode in episodes], dtype=torch.float64)
    in_reward = kl is not None and kl.place == "reward"
    penalties, discount = torch.zeros_like(loss_mask), 1.0
    if kl is not None and in_reward:
        penalties = kl.penalties(_joined(episodes, "old_logprobs"), _joined(episodes, "reference_logprobs"), loss_mask)
        discount = kl.discount
    extra = torch.zeros_like(scores)
    if sequence_level:
        extra, penalties = penalties.sum(-1), torch.zeros_like(loss_mask)
    values = _joined(episodes, "values") if advantage.needs_values else torch.zeros_like(loss_mask)
    advantages, returns = advantage.token_advantages(scores + extra, penalties, values, loss_mask, discount)
    if kl is not None and in_reward and kl.centered and advantage.centers_penalty:
        # The mean over the round's tokens is a baseline: it depends on no action. Taken off before the sum over later
        # tokens, it would pay for each further token.
        added, _ = advantage.token_advantages(extra, penalties, values, loss_mask, discount)
        advantages = advantages - _moments(added, loss_mask)[0] * loss_mask
    if advantage.whiten:
        mean, variance = _moments(advantages, loss_mask)
        # Where all are equal, what is left of them is rounding: no signal to be scaled up.
        scale = (variance + 1e-8) ** -0.5 if variance > (1e-10 * mean) ** 2 else 0.0
        advantages = (advantages - mean) * scale * loss_mask
    _split(episodes, "advantages", advantages)
    if advantage.needs_values:
        _split(episodes, "returns", returns)


def _joined(episodes: Sequence[Episode], name: str) -> Tensor:
    """A column of all rows of each episode, end to end, `[N, T]`; 0 where a row has none."""
    rows = [
        [number for row in episode.training_samples for number in getattr(row, name) or [0.0] * len(row.ids)]
        for episode in episodes
    ]
    return pad_right(rows or [[0.0]], 0.0, torch.float64)[: len(rows)]


def _split(episodes: Sequence[Episode], name: str, table: Tensor) -> None:
    for episode, numbers in zip(episodes, table.tolist(), strict=True):
        start = 0
        for row in episode.training_samples:
            setattr(row, name, numbers[start : start + len(row.ids)])
            start += len(row.ids)


def _moments(x: Tensor, loss_mask: Tensor) -> tuple[float, float]:
    """Mean and variance (over n) at mask 1, over all ranks."""
    count = sum(gather(float(loss_mask.sum()))) or 1.0
    mean = sum(gather(float((x * loss_mask).sum()))) / count
    return mean, sum(gather(float(((x - mean).square() * loss_mask).sum()))) / count


def critic_quality(rows: Sequence[TrainingSample]) -> float:
    """The explained variance of the critic's values over the tokens of a round, of all ranks."""
    sampled = [
        (value, target)
        for row in rows
        for value, target, flag in zip(row.values, row.returns, row.loss_mask, strict=True)
        if flag
    ]
    local = torch.tensor(sampled, dtype=torch.float64).reshape(-1, 2)
    target, residual = local[:, 1], local[:, 1] - local[:, 0]
    sums = [float(s.sum()) for s in (residual, residual.square(), target, target.square())]
    totals = [sum(column) for column in zip(*gather([*sums, float(len(sampled))]), strict=True)]
    return explained_variance((totals[0], totals[1]), (totals[2], totals[3]), totals[4])
