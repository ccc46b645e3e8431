"""Rewards of unlike scale on a common one: by running statistics, or by those of reference demonstrations."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.data.columns import refuse_media, refuse_unwanted
from rlhf_lightning.data.containers import settled
from rlhf_lightning.data.conversations import conversation, tool_schemas
from rlhf_lightning.data.records import Reading, RowError, Source, convert_rows, read_rows
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.distributed import gather, run_on_leader
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import Episode, TrainingSample

RUNNING = ("off", "use", "update")
Score = Callable[[Sequence[Episode]], Sequence[float | None]]


class Normalizer(nn.Module):
    """From scores to normalized scores, by a count, a mean and a standard deviation (over n) that a checkpoint keeps.

    The statistics are float64, kept as their bits in an integer buffer: a float buffer would be rounded under
    `bf16-true`, and MPS has no float64.
    """

    bits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bits", torch.zeros(3, dtype=torch.float64).view(torch.int64))

    @property
    def moments(self) -> tuple[float, float, float]:
        """Count, mean, and sum of squared differences from it."""
        count, mean, squares = self.bits.cpu().view(torch.float64).tolist()
        return count, mean, squares

    def merge(self, values: Sequence[float]) -> None:
        """Take further values in. Sums are exact before they are rounded: the order of values does not matter."""
        if not values:
            return
        count, mean, squares = self.moments
        added = len(values)
        theirs = math.fsum(values) / added
        difference = theirs - mean
        total = count + added
        squares += math.fsum((value - theirs) ** 2 for value in values) + difference**2 * count * added / total
        state = torch.tensor([total, mean + difference * added / total, squares], dtype=torch.float64)
        self.bits.copy_(state.view(torch.int64))

    @property
    def deviation(self) -> float:
        """Standard deviation (over n); 1 where all values are equal, which leaves nothing to divide."""
        count, mean, squares = self.moments
        deviation = math.sqrt(squares / count) if count else 0.0
        return deviation if deviation > 1e-8 * max(1.0, abs(mean)) else 1.0

    def bind(self, renderer: Renderer, score: Score) -> None:
        """Called once, with the policy's renderer and the reward's `score`."""

    @abstractmethod
    def normalized(self, values: Sequence[float], running: str) -> list[float]:
        """Values normalized; `running` is what `total_rewards` says."""


class RunningNorm(Normalizer):
    """(score − mean) / deviation of all scores of all rounds up to this one, over all ranks.

    What is held out (`val/`, `test/`) is not normalized: the scale that moves with training would hide progress.

    Args:
        center: subtract the mean.
    """

    def __init__(self, center: bool = True) -> None:
        super().__init__()
        self.center = center

    def normalized(self, values: Sequence[float], running: str) -> list[float]:
        if running == "off":
            return list(values)
        if running == "update":
            self.merge([value for part in gather(list(values)) for value in part])
        mean = self.moments[1] if self.center else 0.0
        deviation = self.deviation
        return [(value - mean) / deviation for value in values]


class ReferenceNorm(Normalizer):
    """score − mean of the scores of reference demonstrations, which then have 0 (and, with `scale`, deviation 1).

    They are scored once, before the first episodes are, where the reward's model then is.

    Args:
        data: the demonstrations: rows of supervised data (a file, a Hub id, or a list of dicts).
        scale: divide by their deviation too.
        limit: use only so many rows, the first.
    """

    def __init__(self, data: Source, scale: bool = False, limit: int | None = None) -> None:
        super().__init__()
        if limit is not None and limit < 2:
            raise ConfigError(f"ReferenceNorm.limit is {limit}; it must be at least 2")
        self.data, self.scale, self.limit = settled(data), scale, limit

    def bind(self, renderer: Renderer, score: Score) -> None:
        self._score = score
        rows = read_rows(self.data)[: self.limit]
        self._episodes = convert_rows(rows, lambda data: [_demonstration(renderer, data)], Reading())
        for index, episode in enumerate(self._episodes):
            episode.group = index

    def normalized(self, values: Sequence[float], running: str) -> list[float]:
        if not self.moments[0]:
            found = run_on_leader(partial(self._score, self._episodes))
            scores = [float(score) for score in found if score is not None]
            if len(scores) < 2:
                raise ConfigError(f"ReferenceNorm: the reward applies to {len(scores)} demonstrations; it needs 2")
            self.merge(scores)
        mean, deviation = self.moments[1], self.deviation if self.scale else 1.0
        return [(value - mean) / deviation for value in values]


def _demonstration(renderer: Renderer, data: dict[str, Any]) -> Episode:
    """A row of supervised data as an episode that the policy might have played."""
    refuse_media(data)
    refuse_unwanted(data)
    messages, tools = conversation(data), tool_schemas(data)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        raise RowError(f"a demonstration ends with an answer; the roles are {[m['role'] for m in messages]}")
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
