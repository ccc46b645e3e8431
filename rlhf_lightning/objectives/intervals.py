"""How far a measured number may be off, and what best-of-N costs."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""Of a two-sided interval that holds in 95 of 100 cases."""


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95% interval of a rate measured on `count` independent rows. Source: Wilson 1927."""
    if not count:
        return 0.0, 1.0
    center = rate + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by the normal distribution (infinite for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, Z95 * math.sqrt(variance / len(values))


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The part of all pairs of one of ours and one of theirs in which ours is larger, equal ones counted half."""
    wins = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
    return wins / (len(ours) * len(theirs))


def best_of_kl(count: int) -> float:
    """log N - (N - 1) / N: a bound of the KL between best-of-N and the policy, nats. Source: arXiv 2401.01879."""
    return math.log(count) - (count - 1) / count
