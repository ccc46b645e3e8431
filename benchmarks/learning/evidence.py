"""Shared by the scripts in this folder: finished cells are kept, and means over seeds get intervals."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
PLOTS = RESULTS / "plots"


def kept(path: Path, settings: dict[str, Any], fresh: bool = False) -> dict[str, Any]:
    """Finished cells of an earlier run with the same settings, by name; empty if settings differ or with `fresh`."""
    if fresh or not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    # Compare as JSON, where a tuple is a list and a number as a key is text.
    same = earlier.get("settings") == json.loads(json.dumps(settings))
    return earlier.get("runs", {}) if same else {}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t over seeds (infinite for a single one).

    Five seeds are too few for the normal distribution: their half width is 2.776 standard errors, not 1.960.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The number that |t| stays below with probability `level`, by bisection of Simpson's integral of the density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    low, high = 0.0, 100.0
    for _ in range(50):
        middle, parts = (low + high) / 2, 2000
        width = middle / parts
        heights = [scale * (1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(parts + 1)]
        weighted = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        low, high = (middle, high) if 2 * weighted * width / 3 < level else (low, middle)
    return (low + high) / 2


def over_seeds(curves: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Mean and standard deviation of each point of curves of equal length."""
    points = list(zip(*curves, strict=True))
    deviations = [statistics.stdev(point) if len(point) > 1 else 0.0 for point in points]
    return {"mean": [statistics.fmean(point) for point in points], "deviation": deviations}


def shown(values: Sequence[float], digits: int = 3) -> str:
    """A mean with its interval as text."""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if math.isfinite(half) else f"{mean:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
