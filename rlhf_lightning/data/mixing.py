"""Weighted mixing of several sources: which source gives the next row, and when an epoch ends.

The choice is not random. The next row comes from the source with the smallest `(n + 1) / weight`, where n is the number
of rows that it has given in this epoch. Every stretch of an epoch therefore has each source in proportion to its
weight, up to a row, and the number of rows in an epoch does not depend on the seed. The order within a source is
shuffled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.errors import ConfigError

STOPPING = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
"""What happens when a source has no rows left, named as in `datasets.interleave_datasets`."""


@dataclass(frozen=True)
class WeightedSource:
    """A named source of a mixture.

    Attributes:
        name: Name of the source, for counts.
        source: The rows, in any form that `data.train` takes.
        weight: Share of the mixture, relative to the weights of the other sources.

    Example:
        >>> WeightedSource("math", "math.jsonl", 2.0).weight
        2.0
    """

    name: str
    source: Any
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Several sources, mixed by weight.

    Attributes:
        sources: The sources.
        stopping: What happens when a source has no rows left; see `STOPPING`.

    Example:
        >>> Mixture.of({"chat": {"source": "chat.jsonl", "weight": 3}, "math": {"source": "math.jsonl"}}).weights
        [3, 1.0]
    """

    sources: list[WeightedSource]
    stopping: str = STOPPING[0]

    @classmethod
    def of(cls, source: Any, stopping: str = STOPPING[0]) -> "Mixture | None":
        """The mixture that a value of `data.train` describes, which is one of

        - a mapping `{name: {source: FILE, weight: 2}}`,
        - a list `[{name: …, source: FILE, weight: 2}]`,
        - a list of `WeightedSource`.

        A weight is 1 if it is left out of a mapping; in a list, whose items could also be rows, it is required.

        Args:
            source: The value.
            stopping: See `STOPPING`.

        Returns:
            The mixture; None if the value is something else.

        Raises:
            ConfigError: If a weight is not a positive number, or a name occurs twice.
        """
        found: list[WeightedSource] = []
        if isinstance(source, Mapping) and all(_is_entry(value, {"source"}) for value in source.values()):
            found = [WeightedSource(str(name), one["source"], one.get("weight", 1.0)) for name, one in source.items()]
        elif isinstance(source, list | tuple):
            if all(isinstance(item, WeightedSource) for item in source):
                found = list(source)
            elif all(_is_entry(item, {"name", "source", "weight"}) for item in source):
                found = [WeightedSource(str(item["name"]), item["source"], item["weight"]) for item in source]
        names = [one.name for one in found]
        for name, weight in ((one.name, one.weight) for one in found):
            if names.count(name) > 1:
                raise ConfigError(f"data.train: two sources have the name {name!r}; rename one")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ConfigError(
                    f"data.train: the weight of {name} is {weight!r}; it must be a number above 0. To leave the source "
                    "out, remove it"
                )
        return cls(found, stopping) if found else None

    @property
    def weights(self) -> list[float]:
        """Weight of each source."""
        return [one.weight for one in self.sources]


def _is_entry(value: Any, required: set[str]) -> bool:
    """True for a mapping with the keys of a `WeightedSource`; a table's columns are lists, and so is not one."""
    if not isinstance(value, Mapping) or not required <= value.keys() <= {"name", "source", "weight"}:
        return False
    return not isinstance(value.get("weight"), list)


def inner_sources(source: Any) -> list[Any]:
    """The sources of a mixture, or the source itself."""
    mixture = Mixture.of(source)
    return [source] if mixture is None else [one.source for one in mixture.sources]


class Mixer:
    """Chooses the source of each row of an epoch.

    Args:
        mixture: The sources and their weights.

    Example:
        >>> mixer = Mixer(Mixture([WeightedSource("a", "a.jsonl", 2.0), WeightedSource("b", "b.jsonl")]))
        >>> order = []
        >>> for _ in range(6):
        ...     order.append(mixer.choose())
        ...     mixer.counts[order[-1]] += 1
        >>> order
        [0, 0, 1, 0, 0, 1]
    """

    def __init__(self, mixture: Mixture) -> None:
        self.weights, self.stopping = mixture.weights, mixture.stopping
        self.counts = [0] * len(self.weights)
        """Number of rows that each source has given in this epoch."""
        self.ended = [False] * len(self.weights)
        """True for each source that has given all of its rows."""

    @property
    def over(self) -> bool:
        """True once the epoch has ended."""
        return any(self.ended) if self.stopping == "first_exhausted" else all(self.ended)

    def choose(self) -> int | None:
        """Index of the source of the next row; None at the end of the epoch."""
        if self.over:
            return None
        left = [i for i, ended in enumerate(self.ended) if not ended or self.stopping == "all_exhausted"]
        return min(left, key=lambda i: (self.counts[i] + 1) / self.weights[i])

    def end(self, source: int) -> bool:
        """Note that a source has no rows left; True if it starts over."""
        self.ended[source] = True
        return self.stopping == "all_exhausted" and not self.over


def epoch_sources(sizes: Sequence[int], mixture: Mixture) -> list[int]:
    """The source of each row of an epoch.

    Args:
        sizes: Number of rows of each source.
        mixture: The sources and their weights.

    Example:
        >>> mixture = Mixture([WeightedSource("a", "a.jsonl"), WeightedSource("b", "b.jsonl", 2.0)])
        >>> epoch_sources([2, 9], mixture)
        [1, 0, 1, 1, 0, 1, 1]
    """
    mixer, left, order = Mixer(mixture), list(sizes), list[int]()
    while (source := mixer.choose()) is not None:
        if not left[source]:
            if not mixer.end(source):
                continue
            left[source] = sizes[source]
        left[source] -= 1
        mixer.counts[source] += 1
        order.append(source)
    return order
