"""A curriculum over prompts: those whose responses all succeeded or all failed are sampled less often."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rewards import check_finite
from rlhf_lightning.rollout.statistics import Sums
from rlhf_lightning.settings import plain
from rlhf_lightning.types import Episode


@plain
@dataclass(frozen=True)
class Curriculum:
    """Settings of a curriculum by success rate.

    At the beginning of each epoch, a prompt whose last success rate was 0 or 1 gets the weight `weight`; every other
    prompt, and one that was not sampled yet, gets 1. An epoch has as many prompts as the data, and a prompt occurs in
    it in proportion to its weight, at most once in a round. Without differences between weights, each occurs once.

    Args:
        weight: Relative frequency of prompts at 0 or 1, above 0 and at most 1.
        success: Reward from which on an episode is a success.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> Curriculum(weight=0.1, success=0.5).weight
        0.1
    """

    weight: float = 0.25
    success: float = 1.0

    def __post_init__(self) -> None:
        check_finite("curriculum.weight", self.weight)
        check_finite("curriculum.success", self.success)
        if not 0 < self.weight <= 1:
            raise ConfigError(
                f"curriculum.weight is {self.weight}; it must be above 0, so that every prompt is sampled at times, "
                "and at most 1"
            )


class PromptSamplerState(TypedDict):
    """State of a `PromptSampler` in a checkpoint."""

    epoch: int
    """The epoch that `rates` holds for; -1 before the first one."""
    rates: dict[int, float]
    """Last success rate of prompts, by their index, at the beginning of that epoch."""
    observed: dict[int, float]
    """Success rates in that epoch."""


class PromptSampler:
    """Chooses the prompts of each epoch by their success rates.

    Weights are fixed during an epoch, so that its prompts are known at its beginning: rounds may be sampled ahead, and
    a run that is resumed within the epoch goes on with the same prompts.

    Args:
        settings: The settings.

    Example:
        >>> sampler = PromptSampler(Curriculum(weight=0.5))
        >>> sorted(sampler.order(0, per_round=2, indices=[0, 1, 2, 3], seed=0))
        [0, 1, 2, 3]
    """

    def __init__(self, settings: Curriculum) -> None:
        self.settings = settings
        self.epoch = -1
        self.rates: dict[int, float] = {}
        self.observed: dict[int, float] = {}

    def weight(self, index: int) -> float:
        """Weight of a prompt in this epoch."""
        return self.settings.weight if self.rates.get(index) in (0.0, 1.0) else 1.0

    def order(self, epoch: int, per_round: int, indices: Sequence[int], seed: int) -> list[int]:
        """Positions of an epoch's prompts in `indices`, in order.

        Args:
            epoch: The epoch. When it is another one than before, the success rates observed until now take effect.
            per_round: Number of prompts in a round.
            indices: Index of each prompt of the data.
            seed: Seed of the order.

        Returns:
            `len(indices)` positions. Those of a round are distinct.
        """
        if epoch != self.epoch:
            self.rates |= self.observed
            self.epoch, self.observed = epoch, {}
        generator = torch.Generator().manual_seed(mix_seeds(seed, epoch))
        weights = torch.tensor([self.weight(index) for index in indices], dtype=torch.float64)
        return drawn(weights, per_round, generator)

    def observe(self, episodes: Sequence[Episode]) -> Sums:
        """Note the success rates of a round. All ranks must call this together.

        Args:
            episodes: The rewarded episodes of this rank.

        Returns:
            Statistics of the round's prompts on this rank: their weight, and whether all or none of the responses
            succeeded.
        """
        successes: dict[int, list[bool]] = defaultdict(list)
        for episode in episodes:
            if not episode.failed:
                successes[episode.group].append(episode.reward >= self.settings.success)
        rates = {group: sum(found) / len(found) for group, found in successes.items()}
        for of_rank in gather(rates):
            self.observed |= of_rank
        return {
            "prompt_weight": (sum(self.weight(group) for group in rates), len(rates)),
            "prompts_solved": (float(sum(rate == 1 for rate in rates.values())), len(rates)),
            "prompts_failed": (float(sum(rate == 0 for rate in rates.values())), len(rates)),
        }

    def state_dict(self) -> PromptSamplerState:
        """The success rates."""
        return {"epoch": self.epoch, "rates": dict(self.rates), "observed": dict(self.observed)}

    def load_state_dict(self, state: PromptSamplerState) -> None:
        """Restore a `state_dict`."""
        self.epoch, self.rates, self.observed = state["epoch"], dict(state["rates"]), dict(state["observed"])


def drawn(weights: Tensor, per_round: int, generator: torch.Generator) -> list[int]:
    """Draw as many positions as there are weights, each about in proportion to its weight.

    Systematic sampling (Madow 1949): a position with the expected number e of draws is drawn ⌊e⌋ or ⌈e⌉ times, and so
    are all positions of the smallest weight together.

    Args:
        weights: Weights of the positions, `[N]`, above 0.
        per_round: Number of draws in a round; the last round has the rest.
        generator: Source of the random numbers.

    Returns:
        `N` positions, round by round; those of a round are distinct. With equal weights, a permutation.
    """
    count = len(weights)
    permutation = torch.randperm(count, generator=generator)
    if bool((weights == weights[0]).all()):
        return permutation.tolist()
    rounds = -(-count // per_round)
    # A position is drawn at most once in a round. The last round may have too few places for the one before its end.
    most = rounds if count % per_round == 0 else max(1, rounds - 1)
    # Sorted by weight, and at random among equal ones, so that the number of draws of equal weights varies least.
    permutation = permutation[torch.argsort(weights[permutation], stable=True)]
    edges = _expected(weights, most)[permutation].cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    # Numbers k of 0 to N - 1 with k + offset below each edge; rounding must not lose the last one.
    below = torch.ceil(edges - offset).long().clamp(0, count)
    below[-1] = count
    positions = permutation.repeat_interleave(below.diff(prepend=torch.zeros(1, dtype=torch.long))).tolist()
    # Repeated positions are neighbors; one after another, they go to different rounds.
    sizes = [min(per_round, count - k * per_round) for k in range(rounds)]
    places = [(k, i) for i in range(per_round) for k in range(rounds) if i < sizes[k]]
    by_place = dict(zip(places, positions, strict=True))
    return [by_place[k, i] for k in range(rounds) for i in range(sizes[k])]


def _expected(weights: Tensor, most: int) -> Tensor:
    """Expected numbers of draws, `[N]`: in proportion to the weights, but at most `most`; their sum is N."""
    capped = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        rest = len(weights) - most * int(capped.sum())
        expected = torch.where(capped, float(most), weights * (rest / weights[~capped].sum()))
        over = ~capped & (expected > most)
        if not bool(over.any()):
            return expected
        capped |= over
