"""Recorded curves, a number a round, and what can be said of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

FIRST, RECENT, SMOOTH = 10, 40, 5


@dataclass
class Curve:
    """A number a round, as much of it as the checks look at: its start, its last rounds, and its peak."""

    first: list[float] = field(default_factory=list)
    """The first finite values."""
    recent: list[float | None] = field(default_factory=list)
    """The last rounds; None where a round had no such number."""
    peak: float = -math.inf
    """The highest that the median of 5 rounds has been."""

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Curve":
        """The curve of these rounds."""
        curve = cls()
        for value in values:
            curve.add(value)
        return curve

    def add(self, value: float | None) -> None:
        """Add a round."""
        self.recent = [*self.recent[1 - RECENT :], value]
        if value is not None and math.isfinite(value) and len(self.first) < FIRST:
            self.first.append(value)
        level = self.level(SMOOTH)
        self.peak = self.peak if level is None else max(self.peak, level)

    def last(self, rounds: int) -> list[float]:
        """The finite values of the last rounds."""
        return [value for value in self.recent[-rounds:] if value is not None and math.isfinite(value)]

    def level(self, rounds: int) -> float | None:
        """The median of the last rounds; None before there are so many."""
        values = self.last(rounds)
        return median(values) if len(values) == rounds else None

    def start(self, rounds: int) -> float | None:
        """The mean of the first rounds; None before there are so many."""
        return fmean(self.first[:rounds]) if len(self.first) >= rounds else None


class Curves(dict[str, Curve]):
    """The curves of some numbers, all of the same rounds."""

    def record(self, numbers: Mapping[str, float], names: Iterable[str]) -> None:
        """Add a round."""
        for name in names:
            if name in self or name in numbers:
                self.setdefault(name, Curve()).add(numbers.get(name))

    @classmethod
    def of(cls, **values: Iterable[float | None]) -> "Curves":
        """These curves, each a list of numbers a round."""
        return cls({name: Curve.of(numbers) for name, numbers in values.items()})

    def level(self, name: str, rounds: int) -> float | None:
        """See `Curve.level`; None where there is no such curve."""
        return self[name].level(rounds) if name in self else None

    def start(self, name: str, rounds: int) -> float | None:
        """See `Curve.start`; None where there is no such curve."""
        return self[name].start(rounds) if name in self else None

    def last(self, name: str, rounds: int) -> list[float]:
        """See `Curve.last`; empty where there is no such curve."""
        return self[name].last(rounds) if name in self else []

    @property
    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {name: asdict(curve) for name, curve in self.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the curves of a checkpoint."""
        self.clear()
        self.update({name: Curve(**values) for name, values in state.items()})


def together(one: Curve, other: Curve, rounds: int) -> tuple[list[float], list[float]]:
    """The last rounds of two curves, those in which both have a finite number."""
    pairs = [
        (a, b)
        for a, b in zip(one.recent[-rounds:][::-1], other.recent[-rounds:][::-1], strict=False)
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    return [a for a, _ in reversed(pairs)], [b for _, b in reversed(pairs)]


def trend(values: Sequence[float]) -> float:
    """t of the slope of the least-squares line: how many of its standard errors it lies above 0."""
    n = len(values)
    if n < 3:
        return 0.0
    middle, mean = (n - 1) / 2, fmean(values)
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread
    residual = sum((value - mean - slope * (i - middle)) ** 2 for i, value in enumerate(values))
    error = math.sqrt(residual / (n - 2) / spread)
    # A change within rounding is none.
    if abs(slope) * n <= 1e-9 * max(abs(value) for value in values):
        return 0.0
    return slope / error if error else math.copysign(math.inf, slope)


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's r; None where one of them is constant."""
    from statistics import StatisticsError
    from statistics import correlation as pearson

    try:
        return pearson(one, other)
    except StatisticsError:
        return None
