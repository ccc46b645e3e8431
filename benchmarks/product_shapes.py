"""Memory and CPU seconds of bfloat16 products of ever new sizes, without and with the limit of the `rlhf` command.

    python -m benchmarks.product_shapes

oneDNN and PyTorch keep the code of the last 1,024 products each, one for every size. Rows of different lengths give
new sizes in each step. Writes `benchmarks/results/product_shapes.json` and the table in docs/performance.md.
"""

import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.pages import placed
from benchmarks.quickstart import machine
from rlhf_lightning.cli.main import CACHED_PRODUCTS, prepare_environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "product_shapes.json"
BEGIN, END = "<!-- begin: python -m benchmarks.product_shapes -->", "<!-- end: python -m benchmarks.product_shapes -->"
SIZES, HIDDEN, INTERMEDIATE = 1500, 576, 1536
"""Numbers of rows, and the width of a layer's input and output: those of SmolLM2-135M."""
LIMITS = {"1,024 (their default)": 1024, f"{CACHED_PRODUCTS} (the `rlhf` command)": CACHED_PRODUCTS}
TURNS = 2


def worker() -> dict[str, float]:
    """Run products of new sizes, then of sizes that return every 40 products, in this process."""
    prepare_environment()
    import torch

    torch.set_num_threads(1)
    weight = torch.randn(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16)
    states = torch.randn(SIZES, HIDDEN, dtype=torch.bfloat16)

    def seconds(numbers: list[int]) -> float:
        start = time.process_time()
        for number in numbers:
            torch.nn.functional.linear(states[:number], weight)
        return time.process_time() - start

    seconds([SIZES])
    before = _resident()
    new = seconds(list(range(1, SIZES)))
    grown = _resident() - before
    return {"grown_mib": grown / 2**20, "new_seconds": new, "again_seconds": seconds(list(range(1, 1001, 25)) * 25)}


def _resident() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| products kept | memory grows by | new sizes | sizes that return |", "|---" * 4 + "|"]
    for name, found in report["limits"].items():
        times = [f"{found[key]:.1f} s" for key in ("new_seconds", "again_seconds")]
        lines.append(f"| {name} | {found['grown_mib']:.0f} MiB | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    if sys.argv[1:] == ["worker"]:
        print(json.dumps(worker()))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LIMITS}
    for _ in range(TURNS):
        for name, limit in LIMITS.items():
            variables = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(limit))
            command = [sys.executable, "-m", "benchmarks.product_shapes", "worker"]
            run = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, check=True, cwd=ROOT)
            found[name].append(json.loads(run.stdout))
    least = {name: {key: min(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()}
    report = {"machine": machine(), "date": date.today().isoformat(), "threads": 1, "limits": least}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    page = ROOT / "docs" / "performance.md"
    page.write_text(placed(page.read_text(encoding="utf-8"), BEGIN, END, table(report)), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
