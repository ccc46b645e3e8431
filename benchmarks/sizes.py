"""`step.py` over sizes, one axis at a time: where is this project faster than TRL, and where is it not?

    python benchmarks/sizes.py [--hours 2]
    python benchmarks/sizes.py --axes vocabulary length

The base has 11M parameters beside its embedding, a vocabulary of 16,384, 8 rows (pairs) of about 128 + 128 tokens, and
16 responses to 4 prompts. Finished cells are kept in `benchmarks/results/sizes.json` and skipped; where the hours are
over the rest is left for the next run. A side may allocate `--gib`; running out of it is a result. Prints the tables.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.quickstart import machine  # noqa: E402
from benchmarks.steps.sides import ROWWISE, Side, compare  # noqa: E402
from benchmarks.steps.workload import Workload  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sizes.json"
ALL = (*ROWWISE, "rl")
Changes = dict[str, Any]


def decoder(layers: int, hidden: int) -> Changes:
    """A decoder with heads of 64, two of which share keys, and 12 · hidden² weights a layer."""
    return {
        "layers": layers,
        "hidden": hidden,
        "intermediate": 3 * hidden,
        "heads": hidden // 64,
        "kv_heads": hidden // 128,
    }


def split(tokens: int, share: float) -> Changes:
    """A prompt that is a share of so many tokens, and the response."""
    prompt = round(tokens * share)
    return {"prompt_tokens": prompt, "response_tokens": tokens - prompt, "new_tokens": tokens - prompt}


BASE: Changes = {"vocab": 16_384, **decoder(6, 384), **split(256, 0.5), "batch": 8, "groups": 4, "group_size": 4}
AXES: dict[str, tuple[tuple[str, ...], dict[str, Changes]]] = {
    "vocabulary": (("sft", "dpo", "rl"), {f"{v:,}": {"vocab": v} for v in (8_192, 16_384, 49_152, 151_936)}),
    "parameters": (ALL, {"3M": decoder(4, 256), "11M": decoder(6, 384), "40M": decoder(8, 640)}),
    "prompt share": (ALL, {f"{share:.0%}": split(256, share) for share in (0.2, 0.5, 0.8)}),
    "group size": (("rl",), {str(size): {"groups": 16 // size, "group_size": size} for size in (2, 4, 8, 16)}),
    # The tokens of a batch stay, its rows grow longer and fewer; RL keeps its 16 responses.
    "length": (ALL, {f"{n:,}": {**split(n, 0.5), "batch": 2048 // n} for n in (128, 256, 512, 1024, 2048)}),
}
"""What an axis is measured on, and the workloads along it."""


def workload(changes: Changes) -> Workload:
    """The base with changes."""
    return Workload(**{**BASE, **changes})


def key(task: str, work: Workload) -> str:
    """The name of a cell: what it was measured on. Axes share their base."""
    own = asdict(work)
    for name in ("groups", "group_size", "new_tokens") if task != "rl" else ("batch", "response_tokens"):
        del own[name]
    return f"{task} {json.dumps({name: value for name, value in own.items() if value != vars(Workload())[name]})}"


def measure(axis: str, report: dict[str, Any], given: argparse.Namespace, end: float) -> bool:
    """Run the cells of an axis that are not there yet; False where the time was over before."""
    tasks, along = AXES[axis]
    for name, changes in along.items():
        work = workload({**changes, **given.changes})
        missing = [task for task in tasks if key(task, work) not in report["cells"]]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            work.build(folder)
            sides = [Side(side, folder, work, given.threads, gib=given.gib) for side in ("ours", "trl")]
            for task in missing:
                if time.monotonic() > end:
                    return False
                cell = compare(task, *sides, given.repeats, given.steps, work.batch)
                report["cells"][key(task, work)] = cell
                given.out.write_text(json.dumps(report, indent=1) + "\n")
                print(axis, name, task, cell["ours"], cell["ratio"], cell["ratio_fastest"], file=sys.stderr, flush=True)
            for side in sides:
                side.close()
    return True


def table(axis: str, report: dict[str, Any]) -> str:
    """The cells of an axis as Markdown; what was not measured says so."""
    lines = [
        f"| {axis} | step | ours | TRL, whole batch | ratio | TRL, fastest micro-batch | ratio | of the matmul rate |",
        "|---" * 8 + "|",
    ]
    tasks, along = AXES[axis]
    for task in tasks:
        for name, changes in along.items():
            cell = report["cells"].get(key(task, workload(changes)))
            lines.append(f"| {name} | {task} | " + " | ".join(_cells(cell, task)) + " |")
    return "\n".join(lines)


def _cells(cell: dict[str, Any] | None, task: str) -> list[str]:
    if cell is None:
        return ["not measured", *["–"] * 5]
    seconds = [f"{cell[n]:.2f} s" if cell[n] else "out of memory" for n in ("ours", "trl_whole_batch", "trl_fastest")]
    ratios = [f"{cell[name]:.1f}" if cell[name] else "–" for name in ("ratio", "ratio_fastest")]
    rate = f"{cell['of_matmul_rate']:.0%}" if cell["of_matmul_rate"] else "–"
    if task not in ROWWISE:
        return [*seconds[:2], ratios[0], "–", "–", rate]
    fastest = f"{seconds[2]} ({cell['trl_fastest_micro_batch']})" if cell["trl_fastest"] else seconds[2]
    return [*seconds[:2], ratios[0], fastest, ratios[1], rate]


def arguments(args: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--gib", type=float, default=16.0, help="memory that a side may allocate")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--changes", type=json.loads, default={}, help="of every workload, as JSON: to try the script")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Measure what is missing, and print."""
    given = arguments(args)
    today = date.today().isoformat()
    report: dict[str, Any] = {
        "machine": machine(),
        "date": today,
        "threads": given.threads,
        "gib": given.gib,
        "cells": {},
    }
    if given.out.exists():
        report = json.loads(given.out.read_text())
    end = time.monotonic() + 3600 * given.hours
    done = all(measure(axis, report, given, end) for axis in given.axes)
    print("\n\n".join(table(axis, report) for axis in given.axes))
    print("" if done else "\nThe hours are over; the same command goes on.")


if __name__ == "__main__":
    main()
