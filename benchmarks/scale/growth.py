"""How the cost of a step grows along one axis at a time; each point runs in its own process."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 384, "vocab": 4096, "batch": 8}
"""The settings that an axis does not change; `--small` uses smaller ones."""


def _point(x: float, task: str = "sft", ranks: int = 1, **work: Any) -> dict[str, Any]:
    return {"x": x, "task": task, "ranks": ranks, "work": work}


AXES: dict[str, list[dict[str, Any]]] = {
    # Number of rows per batch: more tokens in rows of the same length.
    "tokens": [_point(n, batch=n) for n in (4, 8, 16, 32)],
    "length": [_point(n, batch=2, prompt_tokens=n // 2, response_tokens=n // 2) for n in (512, 1024, 2048, 4096, 8192)],
    "parameters (layers)": [_point(n, layers=n) for n in (2, 4, 8)],
    "vocabulary": [_point(n, vocab=n, prompt_tokens=16, response_tokens=112) for n in (8192, 32768, 151936)],
    # The same number of responses.
    "group size": [
        _point(n, task="rl", groups=16 // n, group_size=n, prompt_tokens=128, new_tokens=32) for n in (2, 4, 8, 16)
    ],
    # The same rows in total; each rank has one thread.
    "ranks": [_point(n, ranks=n, batch=16 // n) for n in (1, 2)],
    # Rounds of policy RL: the cost of a round must not grow with earlier ones; x is the number of the round.
    "rounds": [_point(n, task="rl", groups=2, group_size=4, new_tokens=32) for n in (4, 16)],
}


def run(axis: str, small: bool = False, steps: int = 5) -> list[dict[str, Any]]:
    """Measure an axis.

    Returns:
        For each point the median seconds of the steps after the first, the seconds that its operations take at the rate
        of a matrix product, measured by the same process, and the increase of memory at the peak.
    """
    return [_measure(axis, point, small, steps) for point in AXES[axis]]


def _measure(axis: str, point: dict[str, Any], small: bool, steps: int) -> dict[str, Any]:
    work = {**BASE, "prompt_tokens": 64, "response_tokens": 64, **point["work"]}
    if small:
        work |= {"hidden": 16, "intermediate": 32, "heads": 2, "kv_heads": 1}
        for name, least in (("prompt_tokens", 4), ("response_tokens", 4), ("vocab", 600), ("new_tokens", 4)):
            if name in work:
                work[name] = max(least, work[name] // 16)
    steps = int(point["x"]) + 1 if axis == "rounds" else 2 if small else steps
    asked = {**point, "work": work, "steps": steps}
    command = [sys.executable, "-m"]
    if point["ranks"] > 1:
        command += ["torch.distributed.run", f"--nproc_per_node={point['ranks']}", "--standalone", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command += ["benchmarks.scale.worker", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(f"{axis}, {point}: the worker failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["seconds"][1:]
    value = statistics.median(seconds[-3:] if axis == "rounds" else seconds)
    return {"x": point["x"], "seconds": value, **{name: found[name] for name in ("limit_seconds", "peak_gib")}}


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """Slope of a least-squares line through logarithms; 1 if the cost grows proportionally."""
    xs, ys = ([math.log(row[key]) for row in rows] for key in ("x", name))
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A table of all points, and the growth of time and memory."""
    lines = [
        "| axis | | seconds per step | at the matmul rate | memory, peak above the start | time grows as "
        "| the limit | memory |",
        "|---" * 8 + "|",
    ]
    for axis, rows in found.items():
        for i, row in enumerate(rows):
            names = ("seconds", "limit_seconds", "peak_gib")
            powers = [f"x^{exponent(rows, name):.2f}" if not i else "" for name in names]
            size = f"{row['x']:g} | {row['seconds']:.4f} s | {row['limit_seconds']:.4f} s | {row['peak_gib']:.3f} GiB"
            lines.append(f"| {axis if not i else ''} | {size} | {' | '.join(powers)} |")
    return "\n".join(lines)
