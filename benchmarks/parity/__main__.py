"""Parity with TRL: whole training runs on the same model, rows and settings, without a network.

    python -m benchmarks.parity [--only NAME …] [--no-write]

Needs the extra `benchmark`. Writes `benchmarks/results/parity.json` and `parity.md`.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RESULTS = Path(__file__).parents[1] / "results"


def measure(only: list[str] | None = None) -> dict[str, Any]:
    """All cases and differences, or those whose name contains one of `only`."""
    from benchmarks.parity import cases, differences, setup
    from benchmarks.quickstart import machine

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    report: dict[str, Any] = {"machine": machine(), "cases": {}, "differences": []}
    report["machine"]["versions"]["trl"] = version("trl")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folders = setup.make_folders(root)
        for name in filter(wanted, cases.names()):
            ours, theirs = cases.run(name, folders, root)
            report["cases"][name] = [_step(name, *both) for both in zip(ours, theirs, strict=True)]
            print(name, report["cases"][name], file=sys.stderr, flush=True)
        for one in differences.ALL:
            if wanted(one.name):
                numbers = one.show(folders, root)
                report["differences"].append({"name": one.name, "right": one.right, "why": one.why, "numbers": numbers})
                print(one.name, numbers, file=sys.stderr, flush=True)
    ranked = sorted(
        (
            {"case": name, "difference": max(step["difference"] for step in steps)}
            for name, steps in report["cases"].items()
        ),
        key=lambda row: -row["difference"],
    )
    nothing = {"case": "", "difference": 0.0}
    report["largest"], report["second"] = [*ranked, nothing, nothing][:2]
    return report


def _step(name: str, ours: Any, theirs: Any) -> dict[str, Any]:
    return {
        "ours": ours.loss,
        "trl": theirs.loss,
        "norm": theirs.norm,
        "difference": ours.distance(theirs),
        "same_tokens": [ids for ids, _ in ours.rows] == [ids for ids, _ in theirs.rows],
        # A reward is read at one token, so TRL's batch has no mask.
        "same_mask": None if name.startswith("reward") else ours.rows == theirs.rows,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of cases and differences, or parts of them")
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args()
    import torch

    from benchmarks.parity.report import table

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "transformers", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    report = measure(given.only)
    print(table(report))
    if not given.no_write and not given.only:
        (RESULTS / "parity.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        (RESULTS / "parity.md").write_text(table(report))


if __name__ == "__main__":
    main()
