"""Confidence intervals of measured rates and means, win rates, and the KL bound of best-of-N sampling."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def wilson(rate: float, count: int) -> tuple[float, float]:
    """95% Wilson score interval of a rate. Source: Wilson 1927.

    Args:
        rate: Observed rate, in [0, 1].
        count: Number of independent rows that the rate was measured on.

    Returns:
        `(lower, upper)`; `(0, 1)` if `count` is 0.

    Example:
        >>> lower, upper = wilson(0.5, 100)
        >>> round(lower, 3), round(upper, 3)
        (0.404, 0.596)
    """
    if not count:
        return 0.0, 1.0
    center = rate + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the values and the half-width of its 95% interval under a normal approximation.

    Args:
        values: At least one number.

    Returns:
        `(mean, half_width)`; the half-width is infinite for a single value.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, Z95 * math.sqrt(variance / len(values))


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Fraction of all (ours, theirs) pairs in which ours is larger; ties count half.

    Args:
        ours: Scores of the first side.
        theirs: Scores of the second side.

    Returns:
        Rate in [0, 1].
    """
    wins = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
    return wins / (len(ours) * len(theirs))


def best_of_kl(count: int) -> float:
    """Upper bound of KL(best-of-N || policy) in nats: log N - (N - 1) / N. Source: arXiv 2401.01879.

    Args:
        count: N, the number of samples that the best is chosen from.

    Returns:
        The bound, in nats.
    """
    return math.log(count) - (count - 1) / count
