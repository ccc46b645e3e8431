"""How cost grows: estimates for 0.6B, 8B and 70B models on 1, 8 and 64 GPUs, and measurements on this machine.

python -m benchmarks.scale                       # estimates and all axes; writes benchmarks/results/scale.json
python -m benchmarks.scale --paper               # only the estimates, a few seconds
python -m benchmarks.scale --axes tokens ranks   # some axes; results of the others are kept
python -m benchmarks.scale --small --no-write    # runs everything at the smallest size
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULTS = Path(__file__).parents[1] / "results" / "scale.json"


def main() -> None:
    """Compute, measure, print and write."""
    from benchmarks.quickstart import machine
    from benchmarks.scale import growth

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="no measurements")
    parser.add_argument("--axes", nargs="+", choices=growth.AXES, default=list(growth.AXES))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    report: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report = {"machine": machine(), "paper": _paper(), "growth": {} if given.small else report.get("growth", {})}
    for axis in [] if given.paper else given.axes:
        report["growth"][axis] = growth.run(axis, given.small)
        print(axis, report["growth"][axis], file=sys.stderr, flush=True)
        if not given.no_write:
            RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    if not given.no_write:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    if report["growth"]:
        print("\n" + growth.table(report["growth"]))


def _paper() -> dict[str, Any]:
    from dataclasses import asdict

    from benchmarks.scale import activations, paper, tables

    load, hardware = paper.Load(), paper.Hardware()
    rows = tables.rows(load, hardware)
    print(tables.table(rows))
    checks = {
        f"{family} {kind}": activations.errors(family, kind) for family in ("Qwen3", "Llama") for kind in paper.SIZE
    }
    print("\nRelative error of the law of activations on shapes that it was not fitted to:")
    for name, errors in checks.items():
        print(f"- {name}: {', '.join(f'{error:+.1%}' for error in errors)}")
    return {"hardware": asdict(hardware), "load": asdict(load), "rows": rows, "activation_errors": checks}


if __name__ == "__main__":
    main()
