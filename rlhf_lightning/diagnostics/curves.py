"""Curves of metrics with one value per round, and their statistics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import TypedDict

FIRST, RECENT, SMOOTH = 10, 40, 5


class CurveState(TypedDict):
    """State of a `Curve` in a checkpoint."""

    first: list[float]
    recent: list[float | None]
    peak: float


@dataclass
class Curve:
    """A metric with one value per round, reduced to what the checks need: its start, its last rounds, and its peak.

    Example:
        >>> Curve.of([1.0, 2.0, 9.0]).level(3)
        2.0
    """

    first: list[float] = field(default_factory=list)
    """The first finite values."""
    recent: list[float | None] = field(default_factory=list)
    """Values of the last rounds; None for a round without a value."""
    peak: float = -math.inf
    """The highest median of 5 consecutive rounds so far."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Curve":
        """Create a curve from the values of rounds."""
        curve = cls()
        for value in values:
            curve.add(value)
        return curve

    def add(self, value: float | None) -> None:
        """Add the value of a round; None if the round has no value."""
        self.recent = [*self.recent[1 - RECENT :], value]
        if value is not None and math.isfinite(value) and len(self.first) < FIRST:
            self.first.append(value)
        level = self.level(SMOOTH)
        self.peak = self.peak if level is None else max(self.peak, level)

    def last(self, rounds: int) -> list[float]:
        """The finite values of the last rounds."""
        return [value for value in self.recent[-rounds:] if value is not None and math.isfinite(value)]

    def level(self, rounds: int) -> float | None:
        """Median of the last rounds; None if they do not all have a finite value."""
        values = self.last(rounds)
        return median(values) if len(values) == rounds else None

    def start(self, rounds: int) -> float | None:
        """Mean of the first finite values; None if there are fewer than `rounds`."""
        return fmean(self.first[:rounds]) if len(self.first) >= rounds else None


class Curves(dict[str, Curve]):
    """Curves of several metrics over the same rounds, by name.

    Example:
        >>> Curves.of(kl=[1.0, 3.0]).start("kl", 2)
        2.0
    """

    def record(self, numbers: Mapping[str, float], names: Iterable[str]) -> None:
        """Add a round.

        Args:
            numbers: Metrics of the round.
            names: Metrics to record.
        """
        for name in names:
            if name in self or name in numbers:
                self.setdefault(name, Curve()).add(numbers.get(name))

    @classmethod
    def of(cls, **values: Iterable[float | None]) -> "Curves":
        """Create curves from lists with one value per round."""
        return cls({name: Curve.of(numbers) for name, numbers in values.items()})

    def level(self, name: str, rounds: int) -> float | None:
        """See `Curve.level`; None if there is no such curve."""
        return self[name].level(rounds) if name in self else None

    def start(self, name: str, rounds: int) -> float | None:
        """See `Curve.start`; None if there is no such curve."""
        return self[name].start(rounds) if name in self else None

    def last(self, name: str, rounds: int) -> list[float]:
        """See `Curve.last`; empty if there is no such curve."""
        return self[name].last(rounds) if name in self else []

    @property
    def state(self) -> dict[str, CurveState]:
        """The curves as plain values, for the checkpoint."""
        return {
            name: {"first": list(curve.first), "recent": list(curve.recent), "peak": curve.peak}
            for name, curve in self.items()
        }

    def load(self, state: Mapping[str, CurveState]) -> None:
        """Restore a `state`."""
        self.clear()
        self.update({name: Curve(**values) for name, values in state.items()})


def together(one: Curve, other: Curve, rounds: int) -> tuple[list[float], list[float]]:
    """The last rounds of two curves, restricted to rounds in which both have a finite value.

    Args:
        one: A curve.
        other: Another curve.
        rounds: Number of rounds to consider.

    Returns:
        The values of both curves in these rounds.
    """
    pairs = [
        (a, b)
        for a, b in zip(one.recent[-rounds:][::-1], other.recent[-rounds:][::-1], strict=False)
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    return [a for a, _ in reversed(pairs)], [b for _, b in reversed(pairs)]


def noise(values: Sequence[float]) -> float:
    """Standard deviation of the values around their trend, from differences of consecutive ones; 0 for a single value.

    √(Σ (x_{i+1} - x_i)² / (2 (n - 1))), after von Neumann 1941 ("Distribution of the ratio of the mean square
    successive difference to the variance"). Unlike the standard deviation, it hardly changes if the values have a
    trend.
    """
    return math.sqrt(sum((b - a) ** 2 for a, b in pairwise(values)) / (2 * max(1, len(values) - 1)))


def trend(values: Sequence[float]) -> float:
    """t-statistic of the slope of the least-squares line: the slope divided by its standard error."""
    n = len(values)
    if n < 3:
        return 0.0
    middle, mean = (n - 1) / 2, fmean(values)
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread
    residual = sum((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(values))
    error = math.sqrt(residual / (n - 2) / spread)
    # Changes within rounding error count as none.
    if abs(slope) * n <= 1e-9 * max(abs(value) for value in values):
        return 0.0
    return slope / error if error else math.copysign(math.inf, slope)


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's r; None if one of the sequences is constant.

    Args:
        one: Values.
        other: As many values.
    """
    from statistics import StatisticsError
    from statistics import correlation as pearson

    try:
        return pearson(one, other)
    except StatisticsError:
        return None
