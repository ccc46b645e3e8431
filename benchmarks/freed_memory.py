"""CPU seconds and peak memory of steps without and with `keep_freed_memory`, in processes that take turns.

    python -m benchmarks.freed_memory

Writes `benchmarks/results/freed_memory.json` and the table in docs/performance.md.
"""

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.pages import placed
from benchmarks.quickstart import machine
from benchmarks.steps.clock import CPU_TIME
from rlhf_lightning.cli.main import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "freed_memory.json"
BEGIN, END = "<!-- begin: python -m benchmarks.freed_memory -->", "<!-- end: python -m benchmarks.freed_memory -->"
CASES = ("5m sft", "40m sft")
TURNS, STEPS = 2, 3


def worker(size: str, task: str, keeps: bool) -> dict[str, float]:
    """Run steps in this process; the least CPU seconds of one, page faults per step, and peak GiB."""
    os.environ.update({"THP_MEM_ALLOC_ENABLE": "1", CPU_TIME: "1"})
    if keeps:
        keep_freed_memory()
    import torch

    from benchmarks.step import SIZES
    from benchmarks.steps.ours import Training
    from benchmarks.steps.workload import Workload

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder, work = Path(scratch) / "model", Workload(**SIZES[size], bf16=True)
        work.build(folder)
        run = Training(task, folder, work)
        run(2)
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = run(STEPS)[1:]
        after = resource.getrusage(resource.RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / STEPS
    return {"cpu_seconds": min(seconds), "page_faults": faults, "peak_gib": after.ru_maxrss / 2**20}


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| step | without | with | ratio | peak memory without | with |", "|---" * 6 + "|"]
    for case, (without, kept) in report["cases"].items():
        size, task = case.split()
        seconds = [f"{way['cpu_seconds']:.2f} s" for way in (without, kept)]
        peaks = [f"{way['peak_gib']:.2f} GiB" for way in (without, kept)]
        ratio = without["cpu_seconds"] / kept["cpu_seconds"]
        lines.append(f"| {task}, {size.upper()} | {' | '.join(seconds)} | {ratio:.2f} | {' | '.join(peaks)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    if len(sys.argv) > 1:
        size, task, keeps = sys.argv[1:]
        print(json.dumps(worker(size, task, keeps == "1")))
        return
    cases = {}
    for case in CASES:
        found: list[list[dict[str, float]]] = [[], []]
        for turn in range(2 * TURNS):
            command = [sys.executable, "-m", "benchmarks.freed_memory", *case.split(), str(turn % 2)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            found[turn % 2].append(json.loads(run.stdout.splitlines()[-1]))
        cases[case] = [min(turns, key=lambda turn: turn["cpu_seconds"]) for turns in found]
        print(case, cases[case], flush=True)
        report = {"machine": machine(), "date": date.today().isoformat(), "threads": 1, "cases": cases}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        page = ROOT / "docs" / "performance.md"
        page.write_text(placed(page.read_text(encoding="utf-8"), BEGIN, END, table(report)), encoding="utf-8")


if __name__ == "__main__":
    main()
