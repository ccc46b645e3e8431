"""Seconds a step, of this project and of TRL, side by side: the same model, rows and batch.

    python benchmarks/step.py                          # the 5M model, generated rows
    python benchmarks/step.py --size 17m --data FILE --tokenizer FOLDER --name 17m

Each side runs in a process of its own and waits while the other works; they take turns, several times, and medians
are compared. TRL (extra `benchmark`) is given its fastest settings that compute the same: no gradient checkpointing,
the fused optimizer, and once the whole batch at once, once the micro-batch that was fastest in a trial. Writes
`benchmarks/results/step-NAME.json` and prints the table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from quickstart import machine  # noqa: E402

from benchmarks.steps.workload import Workload  # noqa: E402

TASKS = ["sft", "reward", "dpo", "rl", "generate"]
SIZES: dict[str, dict[str, int]] = {
    "5m": {},
    "600m": {"vocab": 151_936, "hidden": 1024, "intermediate": 3072, "layers": 28, "heads": 16, "kv_heads": 8},
    "17m": {"vocab": 16384, "hidden": 384, "intermediate": 1152, "layers": 6, "heads": 6, "kv_heads": 3},
}
MEMORY = {"vocab": 151_669, "batch": 1, "prompt_tokens": 100, "response_tokens": 1900, "data": ""}


class Side:
    """A worker process."""

    def __init__(self, name: str, folder: Path, work: Workload, threads: int, huge_pages: bool = False) -> None:
        settings = json.dumps({**asdict(work), "threads": threads})
        environment: dict[str, str] = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        if huge_pages:
            environment["THP_MEM_ALLOC_ENABLE"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.steps.worker", name, str(folder), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder.parent / f"{name}.log", "w"),  # noqa: SIM115
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.log = folder.parent / f"{name}.log"

    def ask(self, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{command}: the worker died:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(task: str, ours: Side, theirs: Side, repeats: int, steps: int, batch: int) -> dict[str, Any]:
    """Medians of a task on both sides, taking turns; the first step of every turn warms up."""
    micros: list[int | None] = [None]
    if task in ("sft", "reward", "dpo"):
        trials = {m: min(theirs.ask(task=task, steps=3, micro=m)[1:]) for m in (batch // 4, batch // 16) if m}
        micros = [batch, min(trials, key=lambda m: trials[m])]
    seconds: dict[str, list[float]] = {"ours": [], **{f"trl {m or 'whole'}": [] for m in micros}}
    rates = []
    for _ in range(repeats):
        rates.append(ours.ask(task="matmul"))
        seconds["ours"] += ours.ask(task=task, steps=steps + 1)[1:]
        for m in micros:
            seconds[f"trl {m or 'whole'}"] += theirs.ask(task=task, steps=steps + 1, micro=m)[1:]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    whole, fastest = (medians[f"trl {m or 'whole'}"] for m in (micros[0], micros[-1]))
    needed = ours.ask(task="rows", of=task)
    return {
        "ours": medians["ours"],
        "trl_whole_batch": whole,
        "trl_fastest": min(whole, fastest),
        "trl_fastest_micro_batch": micros[-1] if fastest < whole else micros[0],
        "ratio": whole / medians["ours"],
        "ratio_fastest": min(whole, fastest) / medians["ours"],
        "needed_gflop": needed / 1e9,
        "of_matmul_rate": needed / medians["ours"] / statistics.median(rates),
        "matmul_gflop_per_second": statistics.median(rates) / 1e9,
        "profile": ours.ask(task="profile", of=task),
        "seconds": seconds,
    }


def growth(ours: Side, work: Workload, repeats: int) -> dict[str, float]:
    """How often the time of our RL step fits into that of one with twice as much, medians taken in turns."""
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
    """GiB at the peak of SFT steps on one row of about 2,000 tokens and a vocabulary of 151,669, of each process."""
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


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| step | ours | TRL, whole batch | ratio | TRL, fastest micro-batch | ratio | of the machine's matmul rate |",
        "|---|---|---|---|---|---|---|",
    ]
    roofline = []
    for task, row in report["tasks"].items():
        fastest = f"{row['trl_fastest']:.2f} s ({row['trl_fastest_micro_batch'] or 'whole'})"
        lines.append(
            f"| {task} | {row['ours']:.2f} s | {row['trl_whole_batch']:.2f} s | {row['ratio']:.1f} | {fastest} "
            f"| {row['ratio_fastest']:.1f} | {row['of_matmul_rate']:.0%} |"
        )
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["profile"].items())
        rate = row["matmul_gflop_per_second"]
        roofline.append(
            f"- {task}: {row['needed_gflop']:.0f} GFLOP needed, {rate:.0f} GFLOP/s measured beside it: no less than "
            f"{row['needed_gflop'] / rate:.2f} s; time goes to {shares}"
        )
    cost = report["lightning_seconds_per_step"]
    lines += [
        "",
        "Where our time goes, and the least that it could be at the machine's matmul rate:",
        "",
        *roofline,
        "",
    ]
    lines.append(f"Lightning itself takes {cost * 1e3:.1f} ms a step (an empty module).")
    if "growth" in report:
        doubled = ", ".join(f"{name} {ratio:.2f}" for name, ratio in report["growth"].items())
        lines.append(f"Our RL step takes this many times as long with twice the: {doubled}.")
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
    parser.add_argument("--trl-huge-pages", action="store_true", help="THP_MEM_ALLOC_ENABLE=1 for TRL as well")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--name", help="of the result file; the size by default")
    for option in fields(Workload):
        kind = option.type if isinstance(option.type, type) else {"int": int, "str": str, "bool": bool}[option.type]
        extra: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument(f"--{option.name}", default=None, **extra)
    return parser.parse_args()


def main() -> None:
    """Run, print, write."""
    given = arguments()
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
            print(task, {k: v for k, v in tasks[task].items() if k != "seconds"}, file=sys.stderr, flush=True)
        settings = {**asdict(work), "tokenizer": Path(work.tokenizer).name, "data": Path(work.data).name}
        report: dict[str, Any] = {
            "machine": machine(),
            "threads": given.threads,
            "trl_huge_pages": given.trl_huge_pages,
            "workload": settings,
            "lightning_seconds_per_step": ours.ask(task="lightning"),
            "tasks": tasks,
        }
        if "rl" in given.tasks:
            report["growth"] = growth(ours, work, given.repeats)
        ours.close()
        theirs.close()
        if not given.no_memory:
            report["memory_gib"] = memory(work, given.threads, Path(scratch))
    path = ROOT / "benchmarks" / "results" / f"step-{given.name or given.size}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
