"""Rewards for length, in tokens that the policy sampled, including the stop token."""

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rewards.base import Reward, check_finite
from rlhf_lightning.types import Episode


class LengthReward(Reward):
    """Linear penalty on length n: −slope · |n − target|, or −slope · its excess over a maximum or lack of a minimum.

    It is never below −limit. Set exactly one of `target`, `maximum` and `minimum`.

    Args:
        target: Desired length in tokens.
        maximum: Length in tokens above which the penalty starts.
        minimum: Length in tokens below which the penalty starts, so that a reward for form cannot empty the responses.
        slope: Penalty per token.
        limit: Largest penalty.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.

    Raises:
        ConfigError: If not exactly one of `target`, `maximum` and `minimum` is set, or a number is out of range.

    Example:
        >>> reward = LengthReward(target=100)
        >>> reward.score([Episode(prompt=[], row={}, group=0)])  # an episode without tokens
        [-1.0]
    """

    def __init__(
        self,
        target: int | None = None,
        maximum: int | None = None,
        slope: float = 0.01,
        limit: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
        minimum: int | None = None,
    ) -> None:
        super().__init__(weight, name)
        bounds = {"target": target, "maximum": maximum, "minimum": minimum}
        if sum(value is not None for value in bounds.values()) != 1:
            raise ConfigError(f"the reward {self.name} needs a target, a maximum or a minimum, exactly one of them")
        for setting, value in bounds.items():
            if value is not None and value < 1:
                raise ConfigError(f"the {setting} of the reward {self.name} is {value}; it must be at least 1")
        for setting, number in (("slope", slope), ("limit", limit)):
            check_finite(f"the {setting} of the reward {self.name}", number)
            if number <= 0:
                raise ConfigError(f"the {setting} of the reward {self.name} is {number}; it must be above 0")
        self.target, self.maximum, self.minimum = target, maximum, minimum
        self.slope, self.limit = slope, limit

    def score_one(self, episode: Episode) -> float:
        return -min(self.limit, self.slope * self._outside(episode.response_tokens))

    def _outside(self, length: int) -> int:
        """Number of tokens that are penalized."""
        if self.target is not None:
            return abs(length - self.target)
        if self.minimum is not None:
            return max(0, self.minimum - length)
        return max(0, length - (self.maximum or 0))


class OverlongPenalty(Reward):
    """DAPO's soft overlong punishment of length n (arXiv 2503.14476 eq. 13).

    0 for n ≤ maximum − buffer, then ((maximum − buffer) − n) / buffer up to `maximum`, and −1 above it.

    Args:
        maximum: Length in tokens at which the penalty reaches −1, usually the sampler's `max_tokens`.
        buffer: Number of tokens below `maximum` over which the penalty grows.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.

    Raises:
        ConfigError: If `buffer` is not between 1 and `maximum`.

    Example:
        >>> reward = OverlongPenalty(maximum=1024, buffer=256)
    """

    def __init__(self, maximum: int, buffer: int, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        if not 1 <= buffer <= maximum:
            raise ConfigError(
                f"the buffer of the reward {self.name} is {buffer}; it must be from 1 to the maximum, {maximum}"
            )
        self.maximum, self.buffer = maximum, buffer

    def score_one(self, episode: Episode) -> float:
        return max(-1.0, min(0.0, (self.maximum - self.buffer - episode.response_tokens) / self.buffer))
