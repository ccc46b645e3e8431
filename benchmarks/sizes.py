"""`step.py` over sizes, one axis at a time.

    python benchmarks/sizes.py [--hours 2]
    python benchmarks/sizes.py --axes vocabulary length

The base has 11M parameters without its embedding, a vocabulary of 16,384, 8 rows (pairs) of about 64 + 64 tokens, and
16 responses to 4 prompts. Finished cells are kept in `benchmarks/results/sizes.json` and skipped; when the hours are
over, the rest is left for the next run. A side may allocate `--gib`; running out of memory is a result. Prints the
tables and writes `plots/sizes.svg`; `--hours 0` only does that.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import plots  # noqa: E402
from benchmarks.quickstart import machine  # noqa: E402
from benchmarks.steps import tables  # noqa: E402
from benchmarks.steps.sides import ROWWISE, Side, compare  # noqa: E402
from benchmarks.steps.workload import Workload  # noqa: E402
from rlhf_lightning.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sizes.json"
ALL = (*ROWWISE, "rl")
LONG = ("sft", "dpo", "rl")
Changes = dict[str, Any]


def decoder(layers: int, hidden: int) -> Changes:
    """A decoder with heads of size 64, two of which share keys, and 12 · hidden² weights per layer."""
    return {
        "layers": layers,
        "hidden": hidden,
        "intermediate": 3 * hidden,
        "heads": hidden // 64,
        "kv_heads": hidden // 128,
    }


def split(tokens: int, share: float) -> Changes:
    """Lengths of prompt and response, for a prompt share of a number of tokens."""
    prompt = round(tokens * share)
    return {"prompt_tokens": prompt, "response_tokens": tokens - prompt, "new_tokens": tokens - prompt}


BASE: Changes = {"vocab": 16_384, **decoder(6, 384), **split(128, 0.5), "batch": 8, "groups": 4, "group_size": 4}
AXES: dict[str, tuple[tuple[str, ...], dict[str, Changes]]] = {
    "vocabulary": (LONG, {f"{v:,}": {"vocab": v} for v in (8_192, 16_384, 49_152, 151_936)}),
    "parameters": (ALL, {"3M": decoder(4, 256), "11M": decoder(6, 384), "40M": decoder(8, 640)}),
    "prompt share": (LONG, {f"{share:.0%}": split(128, share) for share in (0.2, 0.5, 0.8)}),
    "group size": (("rl",), {str(size): {"groups": 16 // size, "group_size": size} for size in (2, 4, 8, 16)}),
    # The tokens per batch stay constant as long as the number of rows can fall; RL keeps its 16 responses.
    "length": (LONG, {f"{n:,}": {**split(n, 0.5), "batch": max(1, 1024 // n)} for n in (128, 256, 512, 1024, 2048)}),
}
"""The steps that an axis is measured on, and the workloads along it."""


def workload(changes: Changes) -> Workload:
    """The base workload with changes."""
    return Workload(**{**BASE, **changes})


def key(task: str, work: Workload) -> str:
    """Name of a cell. The axes share the base's cells."""
    own = asdict(work)
    for name in ("groups", "group_size", "new_tokens") if task != "rl" else ("batch", "response_tokens"):
        del own[name]
    return f"{task} {json.dumps({name: value for name, value in own.items() if value != vars(Workload())[name]})}"


def measure(axis: str, report: dict[str, Any], given: argparse.Namespace, end: float) -> bool:
    """Measure the missing cells of an axis; False if the time was over before all were measured."""
    tasks, along = AXES[axis]
    for name, changes in along.items():
        work = workload({**changes, **given.changes})
        missing = [task for task in tasks if key(task, work) not in report["cells"]]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            work.build(folder)
            start = partial(Side, folder=folder, work=work, threads=given.threads, gib=given.gib)
            with closing(start("ours")) as ours, closing(start("trl")) as theirs:
                for task in missing:
                    if time.monotonic() > end:
                        return False
                    cell = compare(task, ours, theirs, given.repeats, given.steps, work.batch)
                    report["cells"][key(task, work)] = cell
                    write_json(given.out, report)
                    numbers = [cell[number] for number in ("ours", "ratio", "ratio_fastest")]
                    print(axis, name, task, *numbers, file=sys.stderr, flush=True)
    return True


def table(axis: str, report: dict[str, Any]) -> str:
    """The cells of an axis as Markdown."""
    lines = [f"| {axis} | {tables.HEAD}", "|---" * 8 + "|"]
    tasks, along = AXES[axis]
    for task in tasks:
        for name, changes in along.items():
            lines.append(f"| {name} | {tables.line(task, report['cells'].get(key(task, workload(changes))))}")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Ratio of TRL's fastest step to ours, along each axis."""
    panels = []
    for axis, (tasks, along) in AXES.items():
        series = {}
        for task in tasks:
            cells = [(name, report["cells"].get(key(task, workload(changes)))) for name, changes in along.items()]
            points = [(number(name), cell["ratio_fastest"]) for name, cell in cells if cell and cell["ratio_fastest"]]
            if points:
                series[task] = plots.Series(points, color=plots.COLOURS[ALL.index(task)])
        if series:
            panels.append(plots.Panel("times as fast as TRL at its fastest", series, x=axis + UNITS.get(axis, "")))
    if panels:
        plots.save(path, panels)


UNITS = {"parameters": " beside the embedding (M)", "prompt share": " (%)", "length": " (tokens)"}


def number(name: str) -> float:
    """Position of a point on an axis."""
    return float(name.rstrip("M%").replace(",", ""))


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
    """Measure the missing cells, and print."""
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
    draw(report, given.out.with_name("plots") / "sizes.svg")
    print("" if done else "\nThe time limit is reached; the same command continues.")


if __name__ == "__main__":
    main()
