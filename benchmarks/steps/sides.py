"""The two sides of a comparison, as processes that work in turns."""

import json
import os
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.steps.workload import Workload

ROOT = Path(__file__).resolve().parents[2]


OUT_OF_MEMORY = "out of memory"
ROWWISE = ("sft", "reward", "dpo")
"""Tasks for which TRL can use micro-batches."""
WARM_UP = 2
"""Number of steps before the timed ones: the second still needs new memory, beside the first one's optimizer state."""


class OutOfMemory(Exception):
    """A side ran out of memory."""


class Side:
    """A worker process."""

    def __init__(
        self, name: str, folder: Path, work: Workload, threads: int, huge_pages: bool = False, gib: float | None = None
    ) -> None:
        """Start the process; `gib` limits the memory that it may allocate."""
        settings = json.dumps({**asdict(work), "threads": threads, "gib": gib})
        environment: dict[str, str] = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        if huge_pages:
            environment["THP_MEM_ALLOC_ENABLE"] = "1"
            environment["GLIBC_TUNABLES"] = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
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
        answer = json.loads(line)
        if answer == OUT_OF_MEMORY:
            raise OutOfMemory(f"{command}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(task: str, ours: Side, theirs: Side, repeats: int, steps: int, batch: int) -> dict[str, Any]:
    """Median times of a task on both sides, measured in turns; the first steps of every turn are a warm-up.

    A side that runs out of memory has None instead of seconds.
    """
    micros = [None, *_fastest(task, theirs, batch)]
    seconds: dict[str, list[float] | None] = {"ours": [], **{f"trl {m or 'whole'}": [] for m in micros}}
    rates = []
    for _ in range(repeats):
        rates.append(ours.ask(task="matmul"))
        _turn(seconds, "ours", ours, task=task, steps=steps + WARM_UP)
        for m in micros:
            _turn(seconds, f"trl {m or 'whole'}", theirs, task=task, steps=steps + WARM_UP, micro=m)
    needed, rate = ours.ask(task="rows", of=task), statistics.median(rates)
    found = {name: statistics.median(values) if values else None for name, values in seconds.items()}
    mine, whole = found["ours"], found["trl whole"]
    measured = {m: value for m in micros if (value := found[f"trl {m or 'whole'}"])}
    micro = min(measured, key=lambda m: measured[m]) if measured else None
    fastest = measured.get(micro)
    return {
        "ours": mine,
        "trl_whole_batch": whole,
        "trl_fastest": fastest,
        "trl_fastest_micro_batch": micro or (batch if task in ROWWISE else None),
        "ratio": whole / mine if whole and mine else None,
        "ratio_fastest": fastest / mine if fastest and mine else None,
        "needed_gflop": needed / 1e9,
        "of_matmul_rate": needed / mine / rate if mine else None,
        "matmul_gflop_per_second": rate / 1e9,
        "seconds": seconds,
    }


def _fastest(task: str, theirs: Side, batch: int) -> list[int]:
    """TRL's fastest micro-batch in a trial, other than the whole batch; None if no other is possible."""
    trials = {}
    for micro in {max(1, batch // 4), 1} - {batch} if task in ROWWISE else ():
        with suppress(OutOfMemory):
            trials[micro] = min(theirs.ask(task=task, steps=3, micro=micro)[1:])
    return [min(trials, key=lambda m: trials[m])] if trials else []


def _turn(seconds: dict[str, list[float] | None], name: str, side: Side, **command: Any) -> None:
    """Add the steps of a turn; a side that ran out of memory is not run again."""
    if (values := seconds[name]) is None:
        return
    try:
        values += side.ask(**command)[WARM_UP:]
    except OutOfMemory:
        seconds[name] = None
