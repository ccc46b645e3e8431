"""Measures a cell: starts both sides, alternates between them, and compares them."""

import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Cell, data_sheet, workload
from benchmarks.gpu.sides import Clock, Failed, Side, Start

Ask = Callable[..., Any]
TRL = "1.16.0"


def trl_missing() -> str | None:
    """Why TRL cannot be measured; None if it can."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        return "TRL not installed"
    return None if found == TRL else f"TRL {found} is installed, not {TRL}"


class Sides:
    """The processes of a cell: each is started by its first command, and all end together."""

    def __init__(self, folder: Path, work: dict[str, Any], clock: Clock, start: Start = Side) -> None:
        self._start = lambda name: start(name, folder, work, clock)
        self._open: dict[str, Any] = {}

    def ask(self, side: str, do: str, **options: Any) -> Any:
        """Send a command to a side and return its answer, see `Side.ask`."""
        self.open(side)
        return self._open[side].ask(do, **options)

    def open(self, *sides: str) -> None:
        """Start the given sides, so that they import their packages at the same time."""
        for side in sides:
            if side not in self._open:
                self._open[side] = self._start(side)

    def drop(self, side: str) -> None:
        """End a side that failed, since its state is unknown."""
        if side in self._open:
            self._open.pop(side).close()

    def close(self) -> None:
        """End all sides."""
        for side in list(self._open):
            self.drop(side)


def measure(cell: Cell, settings: dict[str, Any], sides: Sides) -> dict[str, Any]:
    """Median times of a cell's steps on all sides, measured in turns, and the derived figures."""
    work = workload(cell, settings)
    ways: dict[str, dict[str, Any]] = {}
    for variant in cell.variants:
        if variant == "graphs" and settings["device"] != "cuda":
            ways["graphs"] = {"failed": "needs CUDA"}
        else:
            ways["ours" if variant == "eager" else "graphs"] = {"side": "ours", "graphs": variant == "graphs"}
    other = cell.sides[1]
    missing = trl_missing() if other == "trl" else None
    ways["theirs"] = {"failed": missing} if missing else {"side": other, "micro": None}
    sides.open("ours", *(() if missing else (other,)))
    sides.ask("ours", "build")
    _warm_up(cell, ways, sides, work["batch"] if other == "trl" and cell.task != "rl" else 0)
    for _ in range(cell.turns):
        for way in ways.values():
            _turn(cell, way, sides)
    needed = sides.ask("ours", "needed", task=cell.task)
    peak = _peak(settings, sides)
    result = {"work": work, **needed, **peak, "other": f"TRL {TRL}" if other == "trl" else "generate"}
    for name, way in ways.items():
        result[name] = _figures(way, needed, peak["peak_rate"])
    result |= _compared(cell, result)
    if cell.task == "rl":
        result["split"] = _split(cell, ways, sides)
    if result.get("target_met") is False:
        best = result["best"]
        result["profile"] = _try(sides, "ours", "profile", task=cell.task, graphs=best == "graphs")
    return result


def _warm_up(cell: Cell, ways: dict[str, dict[str, Any]], sides: Sides, batch: int) -> None:
    """A discarded turn for compilation, kernel selection and allocations. TRL falls back to micro-batches here."""
    for way in ways.values():
        _turn(cell, way, sides)
        if batch >= 4 and way.get("micro", 0) is None and "out of memory" in way.get("failed", ""):
            way["whole_batch"] = way.pop("failed")
            way["micro"] = batch // 4
            _turn(cell, way, sides)
        way.pop("seconds", None)


def _turn(cell: Cell, way: dict[str, Any], sides: Sides) -> None:
    """Times of some steps of one variant, without the first, in which the Trainer starts."""
    if "failed" in way:
        return
    side, options = way["side"], {name: way[name] for name in ("graphs", "micro") if name in way}
    try:
        found = sides.ask(side, "steps", task=cell.task, steps=cell.timed + 1, **options)
    except Failed as error:
        way["failed"] = str(error)
        if "out of memory" not in way["failed"]:
            sides.drop(side)
        return
    way.setdefault("seconds", []).extend(found["seconds"][1:])
    way["packs"] = found["packs"]
    if found["peak_gib"] is not None:
        way["peak_gib"] = max(way.get("peak_gib", 0.0), found["peak_gib"])


def _peak(settings: dict[str, Any], sides: Sides) -> dict[str, Any]:
    """Operations per second that count as 100%: the data sheet's bf16 rate, or else that of a large product."""
    name, rate = sides.ask("ours", "device")["name"], sides.ask("ours", "matmul")
    known = data_sheet(name) if settings["precision"] != "32-true" else None
    source = "data sheet, dense bf16" if known else "a large product, measured"
    return {"matmul_rate": rate, "peak_rate": known or rate, "peak_from": source}


def _figures(way: dict[str, Any], needed: dict[str, float], rate: float) -> dict[str, Any]:
    """Median time of one variant, and tokens and operations per second."""
    if not way.get("seconds"):
        return {"failed": way["failed"]}
    median = statistics.median(way["seconds"])
    figures = {name: value for name, value in way.items() if name not in ("side", "failed", "seconds", "graphs")}
    return {
        "seconds": median,
        "tokens_per_second": needed["tokens"] / median,
        "mfu": needed["operations"] / median / rate,
        **figures,
        "all_seconds": way["seconds"],
        **({"stopped": way["failed"]} if "failed" in way else {}),
    }


def _compared(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """The faster of our variants, its ratio to the other side, and the target."""
    own = {name: result[name]["seconds"] for name in ("ours", "graphs") if "seconds" in result.get(name, {})}
    if not own:
        return {}
    best = min(own, key=lambda name: own[name])
    found: dict[str, Any] = {"best": best}
    if "seconds" in result["theirs"]:
        found["ratio"] = result["theirs"]["seconds"] / own[best]
    if cell.target:
        reached = result[best]["mfu"] if cell.target.figure == "mfu" else found.get("ratio")
        found |= {"reached": reached, "target_met": None if reached is None else reached >= cell.target.least}
    return found


def _split(cell: Cell, ways: dict[str, dict[str, Any]], sides: Sides) -> dict[str, Any]:
    """Fraction of a step spent on sampling, for each variant that ran."""
    found = {}
    for name, way in ways.items():
        if way.get("seconds"):
            options = {"graphs": way["graphs"]} if "graphs" in way else {}
            found[name] = _try(sides, way["side"], "split", steps=cell.timed + 1, **options)
    return found


def _try(sides: Sides, side: str, do: str, **options: Any) -> dict[str, Any]:
    """An answer, or the reason why there is none, so that the figures of the cell are kept."""
    try:
        return sides.ask(side, do, **options)
    except Failed as error:
        return {"failed": str(error)}
