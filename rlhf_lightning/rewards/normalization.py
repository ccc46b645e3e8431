"""Normalization of scores by running statistics, or by the statistics of reference demonstrations."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from rlhf_lightning.data.columns import refuse_media, refuse_unwanted
from rlhf_lightning.data.containers import settled
from rlhf_lightning.data.conversations import conversation, tool_schemas
from rlhf_lightning.data.records import Reading, RowError, Source, convert_rows, read_rows
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import gather, run_on_leader
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import Episode, Row, TrainingSample

RUNNING = ("off", "use", "update")
ScoreFunction = Callable[[Sequence[Episode]], Sequence[float | None]]


class Normalizer(Settings, ABC):
    """Base class of normalizers: settings, from which `build` creates the statistics.

    Example:
        >>> class HalfScale(Normalizer):
        ...     def build(self, renderer, score):
        ...         return HalfScores()  # see ScoreStatistics
    """

    @abstractmethod
    def build(self, renderer: Renderer, score: ScoreFunction) -> "ScoreStatistics":
        """Create the statistics. Called once, before the first episode.

        Args:
            renderer: The policy's renderer.
            score: Scores episodes, as the reward does.
        """


class RunningNorm(Normalizer):
    """(score − mean) / deviation over all scores of all rounds so far, on all ranks.

    Held-out scores (`val/`, `test/`) are not normalized, because a scale that changes with training would hide
    progress.

    Args:
        center: Subtract the mean.

    Example:
        >>> RunningNorm().center
        True
    """

    def __init__(self, center: bool = True) -> None:
        self.center = center

    def build(self, renderer: Renderer, score: ScoreFunction) -> "ScoreStatistics":
        return RunningStatistics(self.center)


class ReferenceNorm(Normalizer):
    """score − mean score of reference demonstrations, so that they have mean 0 (and, with `scale`, deviation 1).

    The demonstrations are scored once, before the first episodes, on the device of the reward at that time.

    Args:
        data: The demonstrations: rows of supervised data (a file, a Hub id, or a list of dicts).
        scale: Also divide by the standard deviation of their scores.
        limit: Use only the first `limit` rows.

    Raises:
        ConfigError: If `limit` is below 2.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        >>> norm = ReferenceNorm([{"messages": messages}] * 2, scale=True)
    """

    def __init__(self, data: Source, scale: bool = False, limit: int | None = None) -> None:
        if limit is not None and limit < 2:
            raise ConfigError(f"ReferenceNorm.limit is {limit}; it must be at least 2")
        self.data, self.scale, self.limit = settled(data), scale, limit

    def build(self, renderer: Renderer, score: ScoreFunction) -> "ScoreStatistics":
        rows = read_rows(self.data)[: self.limit]
        episodes = convert_rows(rows, lambda data: [_demonstration(renderer, data)], Reading())
        for index, episode in enumerate(episodes):
            episode.group = index
        return ReferenceStatistics(episodes, score, self.scale)


class ScoreStatistics(nn.Module):
    """Count, mean and standard deviation (over n) of scores, which normalize scores and are saved in checkpoints.

    The statistics are float64, stored bit by bit in an integer buffer, because a float buffer would be rounded under
    `bf16-true`, and MPS has no float64.

    Example:
        >>> class HalfScores(ScoreStatistics):
        ...     def normalized(self, values, running_normalization):
        ...         return [value / 2 for value in values]
        >>> HalfScores().normalized([1.0, 3.0], running_normalization="off")
        [0.5, 1.5]
    """

    bits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bits", torch.zeros(3, dtype=torch.float64).view(torch.int64))

    @property
    def moments(self) -> tuple[float, float, float]:
        """Count, mean, and sum of squared deviations from the mean."""
        count, mean, squares = self.bits.cpu().view(torch.float64).tolist()
        return count, mean, squares

    def merge(self, values: Sequence[float]) -> None:
        """Add values to the statistics. Sums are exact before rounding, so the order of the values does not matter."""
        if not values:
            return
        count, mean, squares = self.moments
        added = len(values)
        added_mean = math.fsum(values) / added
        difference = added_mean - mean
        total = count + added
        squares += math.fsum((value - added_mean) ** 2 for value in values) + difference**2 * count * added / total
        state = torch.tensor([total, mean + difference * added / total, squares], dtype=torch.float64)
        self.bits.copy_(state.view(torch.int64))

    @property
    def deviation(self) -> float:
        """Standard deviation (over n); 1 if all values are equal, so that division is safe."""
        count, mean, squares = self.moments
        deviation = math.sqrt(squares / count) if count else 0.0
        return deviation if deviation > 1e-8 * max(1.0, abs(mean)) else 1.0

    @abstractmethod
    def normalized(self, values: Sequence[float], running_normalization: str) -> list[float]:
        """Normalize values.

        Args:
            values: Scores.
            running_normalization: See `total_rewards`.
        """


class RunningStatistics(ScoreStatistics):
    """The statistics of `RunningNorm`.

    Args:
        center: Subtract the mean.

    Example:
        >>> RunningStatistics().normalized([0.0, 2.0], running_normalization="update")
        [-1.0, 1.0]
    """

    def __init__(self, center: bool = True) -> None:
        super().__init__()
        self.center = center

    def normalized(self, values: Sequence[float], running_normalization: str) -> list[float]:
        if running_normalization == "off":
            return list(values)
        if running_normalization == "update":
            self.merge([value for part in gather(list(values)) for value in part])
        mean = self.moments[1] if self.center else 0.0
        deviation = self.deviation
        return [(value - mean) / deviation for value in values]


class ReferenceStatistics(ScoreStatistics):
    """The statistics of `ReferenceNorm`.

    Args:
        episodes: The demonstrations.
        score: Scores episodes.
        scale: Also divide by the standard deviation of the scores.
    """

    def __init__(self, episodes: Sequence[Episode], score: ScoreFunction, scale: bool) -> None:
        super().__init__()
        self._episodes, self._score, self.scale = episodes, score, scale

    def normalized(self, values: Sequence[float], running_normalization: str) -> list[float]:
        if not self.moments[0]:
            found = run_on_leader(partial(self._score, self._episodes))
            scores = [float(score) for score in found if score is not None]
            if len(scores) < 2:
                raise ConfigError(
                    f"ReferenceNorm: the reward applies to only {len(scores)} demonstrations; at least 2 are needed"
                )
            self.merge(scores)
        mean, deviation = self.moments[1], self.deviation if self.scale else 1.0
        return [(value - mean) / deviation for value in values]


def _demonstration(renderer: Renderer, data: Row) -> Episode:
    """A row of supervised data as an episode, as if the policy had sampled its last message."""
    refuse_media(data)
    refuse_unwanted(data)
    messages, tools = conversation(data), tool_schemas(data)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        raise RowError(
            "a demonstration must end with an assistant message after a prompt; its roles are "
            f"{[m['role'] for m in messages]}"
        )
    renderer.refuse_lost(messages, tools)
    row = renderer.exchange(messages[:-1], messages[-1:], tools)
    training_sample = TrainingSample(row.ids, row.loss_mask, [0.0] * len(row.ids))
    return Episode(
        messages[:-1],
        data,
        0,
        tools=tools,
        responses=messages[-1:],
        training_samples=[training_sample],
        stop_reason="stop",
    )
