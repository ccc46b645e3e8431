"""Tables and curves of the results of `benchmarks.real`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.learning.evidence import over_seeds, table
from benchmarks.real.plan import PARTS, SIDES

LABELS = {"ours": "this project", "trl": "TRL"}
TITLES = {
    "sft": "SFT",
    "reward": "reward model",
    "dpo": "DPO",
    "grpo-instructions": "GRPO, instructions",
    "grpo-arithmetic": "GRPO, arithmetic",
    "ppo-instructions": "PPO, instructions",
    "ppo-arithmetic": "PPO, arithmetic",
}
QUALITY = {
    "perplexity": ("perplexity", 2),
    "rougeL": ("ROUGE-L", 3),
    "accuracy": ("pair accuracy", 3),
    "margin": ("margin", 3),
    "score": ("score, greedy", 3),
    "tokens": ("tokens", 1),
}
"""Numbers of quality with their titles and digits."""
NOT = "not measured"


def read(folder: Path) -> dict[str, Any]:
    """The results of all parts, by name."""
    files = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def quality(run: dict[str, Any]) -> dict[str, float]:
    """The numbers of quality of a run."""
    found: dict[str, float] = {**run.get("numbers", {}), **run.get("held_out", {})}
    return found


def cell(run: dict[str, Any]) -> str:
    """A run in a line."""
    numbers = ", ".join(f"{QUALITY[name][0]} {value:.{QUALITY[name][1]}f}" for name, value in quality(run).items())
    return f"{numbers}; {step_seconds(run):.1f} s per step, {run['peak_gib']:.2f} GiB"


CLOCKS = ("processor_seconds", "seconds")
"""Processor time, and the time that has passed."""


def step_seconds(run: dict[str, Any], clock: str = CLOCKS[0]) -> float:
    """Median seconds of a step by one of `CLOCKS`, without the first step."""
    return statistics.median(run[clock][1:] or run[clock])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    if not values:
        return NOT
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def runs_of(report: dict[str, Any], side: str) -> list[dict[str, Any]]:
    """The runs of a side, in the order of the seeds."""
    return [run for name, run in sorted(report["runs"].items()) if name.startswith(f"{side} ")]


def quality_table(found: dict[str, Any]) -> str:
    """Quality of each part: at the start, and of both sides."""
    rows = []
    for name, report in found.items():
        start = quality(report.get("start", {}))
        sides = {side: [quality(run) for run in runs_of(report, side)] for side in SIDES}
        for key, (title, digits) in QUALITY.items():
            values = {side: [one[key] for one in several if key in one] for side, several in sides.items()}
            if not any(values.values()):
                continue
            before = f"{start[key]:.{digits}f}" if key in start else "–"
            after = [spread(values[side], digits) if side in PARTS[name].sides else "has none" for side in SIDES]
            counts = [len(values[side]) for side in PARTS[name].sides]
            rows.append([TITLES[name], title, before, *after, ", ".join(map(str, dict.fromkeys(counts)))])
    return table(["part", "held-out", "start", *LABELS.values(), "seeds"], rows)


def speed_table(found: dict[str, Any]) -> str:
    """Time and memory of each part."""
    rows = []
    for name, report in found.items():
        cells: list[str] = []
        medians: dict[str, list[float]] = {}
        for side in SIDES:
            runs = runs_of(report, side)
            if not runs:
                cells += ["has none" if side not in PARTS[name].sides else NOT, "–", "–"]
                continue
            medians[side] = [statistics.median(step_seconds(run, clock) for run in runs) for clock in CLOCKS]
            taken = report["choice"].get(side, [{"precision": "32-true", "micro": None}])[0]
            micro = f", micro-batches of {taken['micro']}" if taken["micro"] else ""
            settings = f"{taken['precision'].removesuffix('-true').removesuffix('-mixed').replace('32', 'fp32')}{micro}"
            cells += [
                " / ".join(f"{median:.1f} s" for median in medians[side]),
                settings,
                f"{max(run['peak_gib'] for run in runs):.2f} GiB",
            ]
        both = zip(medians["trl"], medians["ours"], strict=True) if len(medians) == len(SIDES) else ()
        ratio = " / ".join(f"{theirs / ours:.1f}" for theirs, ours in both) or "–"
        rows.append([TITLES[name], report["settings"]["steps"], *cells, ratio])
    head = ["part", "steps"]
    for label in LABELS.values():
        head += [f"{label}, per step", "its fastest", "peak memory"]
    return table([*head, "ratio"], rows)


def linear_line(found: dict[str, Any]) -> str:
    """Accuracy of the linear model of pairs."""
    accuracies = found.get("reward", {}).get("linear", [])
    shown = spread(accuracies, 3)
    return (
        f"The linear model on length and counts has a pair accuracy of {shown} on the same pairs." if accuracies else ""
    )


def where(found: dict[str, Any]) -> str:
    """Machines and versions, each with its parts."""
    parts: dict[str, list[str]] = {}
    for name, report in found.items():
        threads, machine = report["settings"]["threads"], report["machine"]
        line = (
            f"{threads} {'thread' if threads == 1 else 'threads'} of {machine['cpu']}, {report['date']}, "
            f"torch {machine['versions'].get('torch')}, transformers {machine['versions'].get('transformers')}, "
            f"TRL {report['trl']}"
        )
        parts.setdefault(line, []).append(name)
    return "\n".join(f"- {line}: {', '.join(parts[line])}" for line in sorted(parts))


def render(found: dict[str, Any]) -> str:
    """All tables."""
    if not found:
        return f"All parts are {NOT}."
    return "\n\n".join(filter(None, [quality_table(found), linear_line(found), speed_table(found), where(found)]))


def draw(found: dict[str, Any], path: Path) -> None:
    """Curves over the steps: the loss, or in policy RL the reward; mean over seeds and standard deviation."""
    panels = []
    for name, report in found.items():
        series = {}
        for side in SIDES:
            curves = [run["curves"] for run in runs_of(report, side)]
            key = "reward" if curves and "reward" in curves[0] else "loss"
            if curves:
                over = over_seeds([curve[key] for curve in curves])
                series[LABELS[side]] = plots.Series(list(enumerate(over["mean"], 1)), over["deviation"])
        if series:
            panels.append(plots.Panel(f"{TITLES[name]}: {key}", series))
    if panels:
        plots.save(path, panels)
