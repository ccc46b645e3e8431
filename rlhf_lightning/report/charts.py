"""Charts as inline SVG, so that a page needs no library, script or network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_lightning.report.html import Html, el, number
from rlhf_lightning.report.records import ReliabilityBin

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34
MOST_POINTS = 300
LARGEST = 1e290


@dataclass
class Frame:
    """The range of values that a chart shows, and its mapping to the page.

    Attributes:
        x: Smallest and largest horizontal value.
        y: Smallest and largest vertical value.

    Example:
        >>> frame = Frame(x=(0.0, 10.0), y=(0.0, 1.0))
        >>> frame.at(0.0, 0.0) == (LEFT, HEIGHT - BOTTOM)
        True
    """

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Position of a point in the SVG, in pixels."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)


def curves(title: str, series: Mapping[str, Points], x: str = "step", note: str = "") -> Html | None:
    """Line chart over steps. A curve with more than 40 points is drawn thin, with its running mean on top.

    Args:
        title: Title of the chart.
        series: Points `(step, value)` by name.
        x: Label of the horizontal axis.
        note: Text below the chart.

    Returns:
        The figure; None if no value is finite.
    """
    drawn = {name: finite(points) for name, points in series.items() if finite(points)}
    if not drawn:
        return None
    frame = frame_of([point for points in drawn.values() for point in points])
    marks = []
    for place, points in enumerate(drawn.values()):
        thin = thinned(points)
        if len(points) == 1:
            marks.append(_dot(frame, points[0], place))
        elif len(points) > 40:
            marks += [_line(frame, thin, place, "raw"), _line(frame, smoothed(thin), place)]
        else:
            marks.append(_line(frame, thin, place))
    legend = {name: change([y for _, y in points]) for name, points in drawn.items()}
    lost = sum(len(points) - len(finite(points)) for points in series.values())
    note = " ".join(filter(None, [note, f"{lost} values are not finite." if lost else ""]))
    return figure(title, [*axes(frame, x), *marks], legend, note)


def path_chart(title: str, points: Points, x: str, y: str, note: str = "") -> Html | None:
    """Scatter chart of one quantity against another over a run; later points are darker.

    Args:
        title: Title of the chart.
        points: Points `(x, y)` in the order of the run.
        x: Label of the horizontal axis.
        y: Name of the vertical quantity.
        note: Text below the chart.

    Returns:
        The figure; None with fewer than two finite points.
    """
    drawn = thinned(finite(points))
    if len(drawn) < 2:
        return None
    frame = frame_of(drawn)
    dots = [_dot(frame, point, 0, 0.2 + 0.8 * i / (len(drawn) - 1)) for i, point in enumerate(drawn)]
    # Both quantities are noisy, so the running mean follows the path, not an axis.
    mean_x = [mean for _, mean in smoothed([(i, x) for i, (x, _) in enumerate(drawn)])]
    mean_y = [mean for _, mean in smoothed([(i, y) for i, (_, y) in enumerate(drawn)])]
    marks = [_line(frame, list(zip(mean_x, mean_y, strict=True)), 1)] if len(drawn) > 10 else []
    legend = {y: change([value for _, value in drawn])}
    return figure(title, [*axes(frame, x), *dots, *marks], legend, note)


def distribution(title: str, values: Mapping[str, Sequence[float]], x: str, bins: int = 20) -> Html | None:
    """Overlaid histograms, each normalized to its own total.

    Args:
        title: Title of the chart.
        values: Values by name.
        x: Label of the horizontal axis.
        bins: Number of bins.

    Returns:
        The figure; None without values.
    """
    drawn = {name: [v for v in given if abs(v) <= LARGEST] for name, given in values.items()}
    drawn = {name: given for name, given in drawn.items() if given}
    if not drawn:
        return None
    low, high = _widened([v for given in drawn.values() for v in given], margin=0.0)
    shares = {}
    for name, given in drawn.items():
        places = [min(bins - 1, int((v - low) / (high - low) * bins)) for v in given]
        shares[name] = [places.count(i) / len(given) for i in range(bins)]
    frame = Frame((low, high), (0.0, 1.1 * max(max(part) for part in shares.values())))
    bars = []
    for place, part in enumerate(shares.values()):
        for i, share in enumerate(part):
            (left, top), (right, floor) = (
                frame.at(low + (high - low) * i / bins, share),
                frame.at(low + (high - low) * (i + 1) / bins, 0.0),
            )
            if share:
                size = {"width": round(right - left, 1), "height": round(floor - top, 1)}
                bars.append(el("rect", x=left, y=top, class_=f"bar c{place}", **size))
    legend = {name: f"mean {number(sum(given) / len(given))}, n {len(given)}" for name, given in drawn.items()}
    return figure(title, [*axes(frame, x), *bars], legend)


def calibration(title: str, curve: Sequence[ReliabilityBin], note: str = "") -> Html | None:
    """Reliability curve: accuracy by confidence; the area of a dot shows its number of pairs.

    Args:
        title: Title of the chart.
        curve: Bins of the reliability curve.
        note: Text below the chart.

    Returns:
        The figure; None without pairs.
    """
    bins = [b for b in curve if b["pairs"] > 0]
    if not bins:
        return None
    frame = Frame((0.5, 1.0), (min(0.5, *(b["accuracy"] for b in bins), 0.5) - 0.02, 1.02))
    most = max(b["pairs"] for b in bins)
    points = [(b["confidence"], b["accuracy"]) for b in bins]
    dots = [
        _dot(frame, point, 0, radius=2 + 7 * math.sqrt(b["pairs"] / most))
        for point, b in zip(points, bins, strict=True)
    ]
    marks = [_line(frame, [(0.5, 0.5), (1.0, 1.0)], 3, "ideal"), *dots]
    legend = {"accuracy of pairs": f"{number(sum(b['pairs'] for b in bins))} pairs"}
    return figure(title, [*axes(frame, "confidence σ(|d|)"), *marks], legend, note)


# -- parts ------------------------------------------------------------------------------------------------------------


def figure(title: str, marks: Sequence[Html], legend: Mapping[str, str], note: str = "") -> Html:
    """A chart with a title above and a legend below.

    Args:
        title: Title of the chart.
        marks: Elements of the SVG.
        legend: Text of each entry by name.
        note: Text below the chart.
    """
    label = f"{title}: " + "; ".join(f"{name} {value}" for name, value in legend.items())
    svg = el("svg", *marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    keys = [
        el("span", el("i", class_=f"key c{place}"), f"{name} ", el("b", value), class_="entry")
        for place, (name, value) in enumerate(legend.items())
    ]
    return el("figure", el("h4", title), svg, el("figcaption", *keys, el("p", note) if note else None))


def axes(frame: Frame, x: str) -> list[Html]:
    """Grid lines and tick labels."""
    marks = []
    for value in ticks(*frame.y):
        left, height = frame.at(frame.x[0], value)
        marks.append(el("path", d=f"M{left} {height}H{WIDTH - RIGHT}", class_="grid"))
        marks.append(el("text", short(value), x=LEFT - 5, y=height + 4, text_anchor="end"))
    for value in ticks(*frame.x, most=5):
        across, floor = frame.at(value, frame.y[0])
        marks.append(el("text", short(value), x=across, y=floor + 15, text_anchor="middle"))
    marks.append(el("text", x, x=(WIDTH + LEFT) / 2, y=HEIGHT - 4, text_anchor="middle", class_="name"))
    return marks


def change(values: Sequence[float], digits: int = 4) -> str:
    """The first and the last value as text. Values that are negligible relative to the largest are shown as 0.

    Args:
        values: At least one value.
        digits: Number of significant digits.
    """
    least = 1e-6 * max(map(abs, values))
    first, last = (number(value if abs(value) > least else 0, digits) for value in (values[0], values[-1]))
    return f"{first} → {last}" if len(values) > 1 else first


def constant(points: Points) -> bool:
    """True if a curve has several points and all values are equal."""
    return len(points) > 1 and all(value == points[0][1] for _, value in points)


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers within a range, about `most` of them.

    Args:
        low: Smallest value.
        high: Largest value.
        most: Approximate number of ticks.
    """
    rough = (high - low) / most
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Label of a tick."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}" if abs(value) > 1e-12 else "0"


def frame_of(points: Points) -> Frame:
    """The range of points, with a margin above and below."""
    return Frame(_widened([x for x, _ in points], margin=0.0), _widened([y for _, y in points]))


def _widened(values: Sequence[float], margin: float = 0.05) -> tuple[float, float]:
    """Smallest and largest value with a margin; a range of positive width even if all are equal."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        room = abs(low) * 0.1
        return (low - room, high + room) if room else (0.0, 1.0)
    return low - margin * (high - low), high + margin * (high - low)


def finite(points: Points) -> list[tuple[float, float]]:
    """The finite points, without values so large that their sum would be infinite."""
    return [(x, y) for x, y in points if abs(x) <= LARGEST and abs(y) <= LARGEST]


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points, each the mean of its neighbors."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Running mean of each point over a tenth of the points around it."""
    reach = max(1, len(points) // 20)
    means = []
    for i, (x, _) in enumerate(points):
        around = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((x, sum(around) / len(around)))
    return means


def _line(frame: Frame, points: Points, place: int, kind: str = "") -> Html:
    path = "M" + "L".join(f"{across} {height}" for across, height in (frame.at(*point) for point in points))
    return el("path", d=path, class_=f"line c{place} {kind}".strip())


def _dot(frame: Frame, point: tuple[float, float], place: int, opacity: float = 1.0, radius: float = 3.0) -> Html:
    across, height = frame.at(*point)
    return el("circle", cx=across, cy=height, r=round(radius, 1), class_=f"dot c{place}", opacity=round(opacity, 2))
