"""Seconds per step of this project and of TRL, with the same model, rows and batch.

    python benchmarks/step.py                          # the 5M model, generated rows
    python benchmarks/step.py --size 17m --data FILE --tokenizer FOLDER --name 17m

Each side runs in its own process and waits while the other works; they alternate several times, and medians
are compared. TRL (extra `benchmark`) gets the fastest settings that compute the same: no gradient checkpointing,
the fused optimizer, once the whole batch at once, and once the micro-batch that was fastest in a trial. Writes
`benchmarks/results/step-NAME.json` and prints the table.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.quickstart import machine  # noqa: E402
from benchmarks.steps import tables  # noqa: E402
from benchmarks.steps.clock import CPU_TIME  # noqa: E402
from benchmarks.steps.sides import ROWWISE, Side, compare  # noqa: E402
from benchmarks.steps.workload import Workload  # noqa: E402

TASKS = ["sft", "reward", "dpo", "rl", "generate"]
SIZES: dict[str, dict[str, int]] = {
    "5m": {},
    "600m": {"vocab": 151_936, "hidden": 1024, "intermediate": 3072, "layers": 28, "heads": 16, "kv_heads": 8},
    "40m": {
        "vocab": 16384,
        "hidden": 640,
        "intermediate": 1920,
        "layers": 8,
        "heads": 10,
        "kv_heads": 5,
        "batch": 8,
        "prompt_tokens": 64,
        "response_tokens": 64,
        "groups": 4,
        "group_size": 4,
        "new_tokens": 64,
    },
    "135m": {
        "vocab": 49152,
        "hidden": 576,
        "intermediate": 1536,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "batch": 8,
        "prompt_tokens": 64,
        "response_tokens": 64,
        "groups": 4,
        "group_size": 4,
        "new_tokens": 64,
        "generate_batch": 16,
    },
    "17m": {"vocab": 16384, "hidden": 384, "intermediate": 1152, "layers": 6, "heads": 6, "kv_heads": 3},
}
MEMORY = {"vocab": 151_669, "batch": 1, "prompt_tokens": 100, "response_tokens": 1900, "data": ""}


def growth(ours: Side, work: Workload, repeats: int) -> dict[str, float]:
    """Ratio of the time of our RL step with one size doubled to that of the base; medians measured in turns."""
    doubled = {
        "prompts": {"groups": 2 * work.groups},
        "group size": {"group_size": 2 * work.group_size},
        "response length": {"new_tokens": 2 * work.new_tokens},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("base", *doubled)}
    for _ in range(repeats):
        for name, values in seconds.items():
            values += ours.ask(task="rl", steps=2, changes=doubled.get(name, {}))[1:]
    base = statistics.median(seconds["base"])
    return {name: statistics.median(seconds[name]) / base for name in doubled}


def memory(work: Workload, threads: int, root: Path) -> dict[str, float]:
    """Peak GiB of each process in SFT steps on one row of about 2,000 tokens, with a vocabulary of 151,669."""
    big = Workload(**{**asdict(work), **MEMORY})
    folder = root / "memory" / "model"
    folder.mkdir(parents=True)
    big.build(folder)
    found = {}
    for name in ("ours", "trl"):
        side = Side(name, folder, big, threads)
        side.ask(task="sft", steps=3)
        found[name] = side.ask(task="memory")
        side.close()
    return found


def peaks(tasks: dict[str, Any], folder: Path, work: Workload, threads: int) -> None:
    """Add `peak_gib` to each task: peak memory of two steps in a new process, above that of the imported libraries.

    TRL has the micro-batch that was fastest.
    """
    for task, row in tasks.items():
        micro = row["trl_fastest_micro_batch"] if task in ROWWISE else None
        found = {}
        for name in ("ours", "trl"):
            side = Side(name, folder, work, threads)
            before = side.ask(task="libraries")
            side.ask(task=task, steps=2, micro=micro if name == "trl" else None)
            found[name] = side.ask(task="memory") - before
            side.close()
        row["peak_gib"] = found


def peak_table(tasks: dict[str, Any]) -> list[str]:
    """Rows of a Markdown table of the peaks that were measured."""
    lines = ["| step | peak memory above the libraries | TRL, fastest micro-batch | part |", "|---" * 4 + "|"]
    for task, row in tasks.items():
        if found := row.get("peak_gib"):
            ours, trl = found["ours"], found["trl"]
            lines.append(f"| {task} | {ours:.2f} GiB | {trl:.2f} GiB | {ours / trl:.0%} |")
    return lines if len(lines) > 2 else []


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"| {tables.HEAD}", "|---" * 7 + "|"]
    roofline = []
    for task, row in report["tasks"].items():
        lines.append(f"| {tables.line(task, row)}")
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["profile"].items())
        rate = row["matmul_gflop_per_second"]
        roofline.append(
            f"- {task}: {row['needed_gflop']:.0f} GFLOP are needed, at least {row['needed_gflop'] / rate:.2f} s at the "
            f"{rate:.0f} GFLOP/s measured at the same time; time is spent on {shares}"
        )
    cost = report["lightning_seconds_per_step"]
    lines += [
        "",
        *peak_table(report["tasks"]),
        "",
        "Where our time is spent, and the lower bound at the machine's matmul rate:",
        "",
        *roofline,
        "",
    ]
    lines.append(f"Lightning itself takes {cost * 1e3:.1f} ms per step (measured with an empty module).")
    if "growth" in report:
        doubled = ", ".join(f"{name} {ratio:.2f}" for name, ratio in report["growth"].items())
        lines.append(f"Growth of the time of our RL step when one size is doubled: {doubled}.")
    if "memory_gib" in report:
        ours, trl = report["memory_gib"]["ours"], report["memory_gib"]["trl"]
        lines.append(
            f"Peak memory, SFT on one row of 2,000 tokens, vocabulary 151,669: {ours:.2f} GiB, TRL {trl:.2f} GiB "
            f"({ours / trl:.0%})."
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line; every field of `Workload` is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trl-huge-pages", action="store_true", help="large pages and kept memory for TRL as well")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of seconds, on a shared machine")
    parser.add_argument("--no-memory", action="store_true", help="leave out SFT on a long row")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the peak memory of each task")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--name", help="of the result file; the size by default")
    for option in fields(Workload):
        kind = option.type if isinstance(option.type, type) else {"int": int, "str": str, "bool": bool}[option.type]
        extra: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(f"--{option.name}", default=None, **extra)
    return parser.parse_args()


def main() -> None:
    """Run, print and write."""
    given = arguments()
    if given.cpu_time:
        os.environ[CPU_TIME] = "1"  # of both sides
    chosen = {f.name: getattr(given, f.name) for f in fields(Workload) if getattr(given, f.name) is not None}
    work = Workload(**{**SIZES[given.size], **chosen})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        work.build(folder)
        ours = Side("ours", folder, work, given.threads)
        theirs = Side("trl", folder, work, given.threads, given.trl_huge_pages)
        tasks = {}
        for task in given.tasks:
            tasks[task] = compare(task, ours, theirs, given.repeats, given.steps, work.batch)
            tasks[task]["profile"] = ours.ask(task="profile", of=task)
            print(task, {k: v for k, v in tasks[task].items() if k != "seconds"}, file=sys.stderr, flush=True)
        settings = {**asdict(work), "tokenizer": Path(work.tokenizer).name, "data": Path(work.data).name}
        report: dict[str, Any] = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "threads": given.threads,
            "clock": "CPU" if given.cpu_time else "wall",
            "trl_huge_pages": given.trl_huge_pages,
            "workload": settings,
            "lightning_seconds_per_step": ours.ask(task="lightning"),
            "tasks": tasks,
        }
        if "rl" in given.tasks and not given.no_growth:
            report["growth"] = growth(ours, work, given.repeats)
        ours.close()
        theirs.close()
        if not given.no_peaks:
            peaks(tasks, folder, work, given.threads)
        if not given.no_memory:
            report["memory_gib"] = memory(work, given.threads, Path(scratch))
    path = ROOT / "benchmarks" / "results" / f"step-{given.name or given.size}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
