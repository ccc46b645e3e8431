"""Compare two result files of `step.py`, or of any script whose JSON has ratios, and report ratios that fell.

    python benchmarks/compare.py OLD NEW

Prints a table of every ratio for which higher is better. A ratio that fell by more than 15%, or that
is missing in the new file, is flagged, and the exit code is 1. Seconds are not compared: they depend on the machine.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 0.15
NAMES = ("ratio", "ratio_fastest", "of_matmul_rate", "mfu")


@dataclass
class Row:
    """A ratio in both files; None if a file does not have it."""

    name: str
    old: float | None
    new: float | None

    @property
    def fell(self) -> bool:
        """True if it fell by more than the limit, or is missing in the new file."""
        return self.old is not None and (self.new is None or self.new < (1 - LIMIT) * self.old)

    def text(self) -> str:
        """The row of the table."""
        if self.old is None or self.new is None:
            change = "new" if self.old is None else "GONE"
        else:
            change = f"{self.new / self.old - 1:+.0%}" + (" FELL" if self.fell else "")
        return f"| {self.name} | {_number(self.old)} | {_number(self.new)} | {change} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def ratios(report: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """The finite ratios above 0 in a report, by their path in it."""
    items = report.items() if isinstance(report, dict) else enumerate(report) if isinstance(report, list) else ()
    for key, value in items:
        if key in NAMES and isinstance(value, int | float) and math.isfinite(value) and value > 0:
            yield ".".join((*path, key)), float(value)
        else:
            yield from ratios(value, (*path, str(key)))


def compare(old: Any, new: Any) -> list[Row]:
    """Every ratio of either report, in the order of the old one."""
    before, after = dict(ratios(old)), dict(ratios(new))
    return [Row(name, before.get(name), after.get(name)) for name in {**before, **after}]


def read(path: str) -> Any:
    """Read a result file; exits if it does not exist or has no ratio."""
    try:
        report = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    if not any(True for _ in ratios(report)):
        raise SystemExit(f"{path} has no ratio to compare ({', '.join(NAMES)})")
    return report


def main(args: list[str] | None = None) -> int:
    """Print the table; returns 1 if a ratio fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    given = parser.parse_args(args)
    old, new = read(given.old), read(given.new)
    rows = compare(old, new)
    print("\n".join(["| ratio | old | new | change |", "|---|---|---|---|", *(row.text() for row in rows)]))
    if old.get("machine") != new.get("machine") or old.get("workload") != new.get("workload"):
        print("\nThe two were not measured on the same machine, versions and workload.")
    fallen = [row.name for row in rows if row.fell]
    print(
        f"\n{len(fallen)} of {len(rows)} fell by more than {LIMIT:.0%}" + (f": {', '.join(fallen)}" if fallen else "")
    )
    return int(bool(fallen))


if __name__ == "__main__":
    raise SystemExit(main())
