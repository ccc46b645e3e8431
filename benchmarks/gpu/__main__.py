"""Checks correctness on a GPU, measures speed, and profiles steps that miss their target.

python -m benchmarks.gpu                            # everything that fits into nine minutes; run it again for the rest
python -m benchmarks.gpu --pieces check sft         # some pieces
python -m benchmarks.gpu --device cpu --small       # tries the script without a GPU, writes nothing
python -m benchmarks.gpu --readme                   # the table of the results into README.md

Each cell of the table is written to the results when it is finished. Finished cells are not measured again, and neither
are cells that failed or ran out of memory (`--again` repeats those). Ends within `--seconds`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu import plan, suite, table
from benchmarks.gpu.measure import Sides, measure
from benchmarks.gpu.sides import ROOT, Clock, Failed, OutOfTime, Side, Start

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
README = Path(__file__).with_name("README.md")


def run(
    report: dict[str, Any],
    cells: list[plan.Cell],
    clock: Clock,
    root: Path,
    save: Any,
    start: Start = Side,
) -> None:
    """Measure the missing cells of a report until the time is up; `save` is called after each."""
    settings = report["settings"]
    folder = root / "model"
    checks = Sides(root / "checks" / "model", {"device": settings["device"]}, clock, start)
    (root / "checks").mkdir(exist_ok=True)
    report["left"] = [cell.name for cell in cells if cell.name not in report["cells"]]
    try:
        clock.begin(clock.left)
        report["device"] = checks.ask("ours", "device")
        for cell in cells:
            if cell.name in report["cells"] or clock.left < cell.least:
                continue
            clock.begin(cell.most)
            found = _result(cell, settings, folder, clock, checks, start)
            report["cells"][cell.name] = found
            report["left"].remove(cell.name)
            save(report)
            print(cell.name, _short(found), f"({clock.left:.0f} s left)", file=sys.stderr, flush=True)
    except OutOfTime as error:
        print(f"time is up: {error}", file=sys.stderr)
    finally:
        checks.close()
    save(report)


def _result(
    cell: plan.Cell, settings: dict[str, Any], folder: Path, clock: Clock, checks: Sides, start: Start
) -> dict[str, Any]:
    """The result of a cell; a failure is a result too."""
    try:
        if cell.piece == "tests":
            return suite.run(clock) if settings["device"] == "cuda" else {"skipped": "needs CUDA"}
        if cell.piece == "check":
            return checks.ask("ours", "check", name=cell.task)
    except Failed as error:
        checks.drop("ours")
        return {"failed": str(error)}
    sides = Sides(folder, plan.workload(cell, settings), clock, start)
    try:
        return measure(cell, settings, sides)
    except Failed as error:
        return {"failed": str(error)}
    finally:
        sides.close()


def _short(found: dict[str, Any]) -> Any:
    names = ("failed", "skipped", "passed", "best", "ratio", "reached", "target_met")
    return {name: found[name] for name in names if name in found}


def opened(path: Path | None, settings: dict[str, Any], again: bool) -> dict[str, Any]:
    """The existing report; exits if it was made with other settings."""
    if path is None or not path.exists():
        return {"settings": settings, "cells": {}}
    report = json.loads(path.read_text())
    if report["settings"] != settings:
        sys.exit(f"{path} was measured with {report['settings']}, not {settings}: name another file with --out")
    if again:
        report["cells"] = {name: found for name, found in report["cells"].items() if not _came_to_nothing(found)}
    return report


def _came_to_nothing(found: dict[str, Any]) -> bool:
    ways = [found, *(found[name] for name in ("ours", "graphs", "theirs") if name in found)]
    return found.get("passed") is False or any("failed" in way or "skipped" in way for way in ways)


def main() -> None:
    """Check, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", choices=plan.PIECES, default=list(plan.PIECES), metavar="PIECE")
    parser.add_argument("--seconds", type=float, default=540.0, help="time budget of the run (default: 540)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--precision", default="bf16-true", choices=("bf16-true", "bf16-mixed", "32-true"))
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens")
    parser.add_argument(
        "--out", type=Path, help="result file (default: benchmarks/results/gpu.json; with --small none)"
    )
    parser.add_argument("--again", action="store_true", help="repeat cells that failed or were skipped")
    parser.add_argument("--readme", action="store_true", help="only write the table of the results into README.md")
    given = parser.parse_args()
    out = given.out or (None if given.small or given.device == "cpu" else RESULTS)
    if given.readme:
        report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        README.write_text(table.placed(README.read_text(), report))
        return
    settings = {"device": given.device, "precision": given.precision, "small": given.small}
    report = opened(out, settings, given.again)

    def save(report: dict[str, Any]) -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        clock = Clock(given.seconds)
        try:
            run(report, plan.cells(tuple(given.pieces), given.small), clock, Path(scratch), save)
        except Failed as error:  # for a cell it is a result; here the device itself is unknown
            sys.exit(f"nothing can be measured here: {error}")
    print(table.render(report))
    if report["left"]:
        print(f"\nLeft for another run: {', '.join(report['left'])}")
    sys.exit(any(found.get("passed") is False for found in report["cells"].values()))


if __name__ == "__main__":
    main()
