"""Advantages bound to episodes: choices with a name over the functions of `objectives.advantage`."""

from abc import ABC, abstractmethod

from torch import Tensor

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.objectives.advantage import group_centered, leave_one_out


class Advantage(ABC):
    """Rewards `[N]` and group numbers `[N]` to advantages `[N]`."""

    needs_group = False
    """Whether a group of one has no advantage."""

    @abstractmethod
    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantages `[N]`, one for each episode."""


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
