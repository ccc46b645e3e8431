"""Curves over seeds as self-contained SVG files, with the axes of the package's report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_lightning.report.charts import HEIGHT, LEFT, RIGHT, WIDTH, Frame, axes, frame_of
from rlhf_lightning.report.html import Html, el

# Okabe and Ito's colors, which color-blind readers can distinguish, without yellow, which is hard to see on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLE = (
    "text { font: 11px sans-serif; fill: #444; } .title { font-weight: bold; fill: #111; } "
    ".grid { fill: none; stroke: #ddd; } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } "
    ".band { opacity: 0.18; }"
)
TITLE, ENTRY, COLUMNS, GAP = 22, 16, 3, 6
FEW = 6
"""Up to this number of points, each gets a marker, since the line between them was not measured."""


@dataclass
class Series:
    """A curve with its spread."""

    points: Sequence[tuple[float, float]]
    spread: Sequence[float] = field(default_factory=list)
    color: str = ""
    """Color; by default that of `COLOURS` at the series' position in its panel."""

    def around(self) -> list[tuple[float, float]]:
        """The outline of the band, from left to right above and back below; empty without spread."""
        pairs = list(zip(self.points, self.spread, strict=True)) if self.spread else []
        above, below = ([(x, y + s * side) for (x, y), s in pairs] for side in (1, -1))
        return above + below[::-1]


@dataclass
class Panel:
    """One chart of a plot."""

    title: str
    series: Mapping[str, Series]
    x: str = "step"

    def marks(self) -> list[Html]:
        """Title, axes, bands below lines, and the legend below the axes."""
        frame = frame_of([p for one in self.series.values() for p in (*one.points, *one.around())])
        parts = [el("text", self.title, x=LEFT, y=14, class_="title")]
        drawn = [*axes(frame, self.x)]
        for one, color in zip(self.series.values(), self.colors(), strict=True):
            if around := one.around():
                drawn.append(el("path", d=_path(frame, around) + "Z", fill=color, class_="band"))
        for one, color in zip(self.series.values(), self.colors(), strict=True):
            drawn.append(el("path", d=_path(frame, one.points), stroke=color, class_="line"))
            if len(one.points) <= FEW:
                drawn += [el("circle", cx=x, cy=y, r=3, fill=color) for x, y in (frame.at(*p) for p in one.points)]
        parts.append(el("g", *drawn, transform=f"translate(0 {TITLE})"))
        return [*parts, *(mark for i, name in enumerate(self.series) for mark in self._entry(i, name))]

    def _entry(self, place: int, name: str) -> list[Html]:
        """An entry of the legend; there are two per line."""
        across = LEFT + place % 2 * (WIDTH - LEFT - RIGHT) // 2
        down = TITLE + HEIGHT + GAP + ENTRY * (place // 2)
        key = el("rect", x=across, y=down, width=10, height=10, fill=self.colors()[place])
        return [key, el("text", name, x=across + 15, y=down + 9)]

    def colors(self) -> list[str]:
        """Colors of its curves."""
        return [one.color or COLOURS[place] for place, one in enumerate(self.series.values())]

    def height(self) -> int:
        """Height with title and legend."""
        return TITLE + HEIGHT + GAP + ENTRY * math.ceil(len(self.series) / 2) + 8


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{across} {down}" for across, down in (frame.at(*point) for point in points))


def save(path: Path, panels: Sequence[Panel]) -> None:
    """Write the panels, three per row."""
    columns, high = min(COLUMNS, len(panels)), max(panel.height() for panel in panels)
    width, height = columns * WIDTH, math.ceil(len(panels) / columns) * high
    placed = [
        el("g", *panel.marks(), transform=f"translate({i % columns * WIDTH} {i // columns * high})")
        for i, panel in enumerate(panels)
    ]
    page = el("rect", width=width, height=height, fill="#fff")
    size = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = el("svg", el("style", Html(STYLE)), page, *placed, xmlns="http://www.w3.org/2000/svg", **size)
    path.write_text(picture + "\n", encoding="utf-8")
