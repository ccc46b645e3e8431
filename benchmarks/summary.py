"""The table that `benchmarks/README.md` opens with: what the committed results say against TRL.

    python benchmarks/summary.py

Reads `results/`, measures nothing. A test compares the README with it.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import sizes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
STEP = "`python benchmarks/step.py`"
SIZES = "`python benchmarks/sizes.py`"
NAMES = {
    "sft": "SFT step",
    "reward": "reward model step",
    "dpo": "DPO step",
    "rl": "RL step: sample, score, train",
    "generate": "sampling; theirs is `generate`",
}


def read(name: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def where(report: dict[str, Any]) -> str:
    """The machine and the day."""
    return f"{report['threads']} cores, {report['machine']['cpu']} | {report['date']}"


def cells(row: dict[str, Any]) -> str:
    """Seconds of both sides and the ratio, TRL with the micro-batch that is fastest for it."""
    numbers = [f"{row[name]:.2f} s" if row[name] else "out of memory" for name in ("ours", "trl_fastest")]
    return " | ".join([*numbers, f"{row['ratio_fastest']:.1f}" if row["ratio_fastest"] else "–"])


def rows() -> Iterator[str]:
    """The lines below the head."""
    step, along = read("step-5m"), read("sizes")
    for task, row in step["tasks"].items():
        yield f"| {NAMES[task]}, 5M | {cells(row)} | {where(step)} | {STEP} |"
    ours, trl = step["memory_gib"]["ours"], step["memory_gib"]["trl"]
    sizes_of = f"{ours:.2f} GiB | {trl:.2f} GiB | {trl / ours:.1f}"
    yield f"| memory of SFT on 2,000 tokens, vocabulary 151,669 | {sizes_of} | {where(step)} | {STEP} |"
    for name, axis, point in (("11M", "parameters", "11M"), ("11M, vocabulary 151,936", "vocabulary", "151,936")):
        tasks, points = sizes.AXES[axis]
        for task in tasks:
            cell = along["cells"].get(sizes.key(task, sizes.workload(points[point])))
            if cell:
                yield f"| {NAMES[task]}, {name} | {cells(cell)} | {where(along)} | {SIZES} |"
    for task in ("SFT", "reward model", "DPO", "rollouts", "RL step"):
        yield f"| {task}, 0.6B, bf16 | not measured | not measured | – | a CUDA GPU | – | `python -m benchmarks.gpu` |"


def table() -> str:
    """All of it."""
    head = "| task | ours | TRL 1.16.0, its fastest micro-batch | ratio | machine | date | command |"
    return "\n".join([head, "|---" * 7 + "|", *rows()])


if __name__ == "__main__":
    print(table())
