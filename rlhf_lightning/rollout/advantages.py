"""Advantages bound to episodes: choices with a name over the functions of `objectives.advantage`.

`__call__` sets a baseline: one number for each episode. `token_advantages` spreads it over what was sampled, together with the
penalties of single tokens. `credit.compute_token_advantages` calls both and writes the result into the rows.
"""

import torch
from torch import Tensor

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.objectives.advantage import discounted_future_sum, gae, group_centered, leave_one_out


class Advantage:
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
