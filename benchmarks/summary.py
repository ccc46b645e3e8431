"""Tables for READMEs from the committed results; measures nothing.

    python benchmarks/summary.py            # prints them
    python benchmarks/summary.py --readme   # writes them into the pages

A test compares the pages with them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import engines, pages, real_quickstart, sizes, step  # noqa: E402
from benchmarks.real import table as real  # noqa: E402
from benchmarks.scale import growth  # noqa: E402

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
    """The machine and the date."""
    return f"{report['threads']} cores, {report['machine']['cpu']} | {report['date']}"


def cells(row: dict[str, Any]) -> str:
    """Seconds of both sides and their ratio, with TRL's fastest micro-batch."""
    numbers = [f"{row[name]:.2f} s" if row[name] else "out of memory" for name in ("ours", "trl_fastest")]
    return " | ".join([*numbers, f"{row['ratio_fastest']:.1f}" if row["ratio_fastest"] else "–"])


def rows() -> Iterator[str]:
    """The rows below the header."""
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
    """One table of everything measured against TRL."""
    head = "| task | ours | TRL 1.16.0, its fastest micro-batch | ratio | machine | date | command |"
    return "\n".join([head, "|---" * 7 + "|", *rows()])


def along() -> str:
    """The steps over sizes."""
    return "\n\n".join(sizes.table(axis, read("sizes")) for axis in sizes.AXES)


MUST = {"sft": 2.5, "reward": 2.0, "dpo": 3.5, "rl": 3.5, "generate": 2.5}
"""Target of the ratio for each step."""


SETTINGS = ("bf16", "bf16-compiled", "f32")
"""Settings of both sides in which the steps were measured by CPU time."""


def best() -> str:
    """Each side in its fastest setting and micro-batch, among those measured by CPU time, with its peak memory."""
    head = "| model, settings measured | step | ours | TRL | ratio | target | of the matmul rate | peak memory | TRL |"
    lines = [head, "|---" * 9 + "|"]
    for size in ("5m", "40m", "135m"):
        found = {name.replace("-", ", "): RESULTS / f"step-{size}-{name}.json" for name in SETTINGS}
        of_size = {name: read(path.stem)["tasks"] for name, path in found.items() if path.is_file()}
        for task, target in MUST.items():
            reports = {name: tasks for name, tasks in of_size.items() if task in tasks}
            if not reports:
                continue
            model = f"{size.upper()}, {'; '.join(reports)}"
            ours, theirs = (
                min((tasks[task][key], name) for name, tasks in reports.items() for key in keys if tasks[task][key])
                for keys in (("ours",), ("trl_whole_batch", "trl_fastest"))
            )
            times = " | ".join(f"{seconds:.2f} s ({name})" for seconds, name in (ours, theirs))
            rate = reports[ours[1]][task]["of_matmul_rate"]
            peaks = [
                f"{reports[name][task]['peak_gib'][side]:.2f} GiB" if "peak_gib" in reports[name][task] else "–"
                for side, name in (("ours", ours[1]), ("trl", theirs[1]))
            ]
            cells = [model, task, times, f"{theirs[0] / ours[0]:.1f}", str(target), f"{rate:.0%}", *peaks]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


ROWS = {
    "sft": "SFT, 16 conversations",
    "reward": "reward model, 16 pairs",
    "dpo": "DPO, 16 pairs",
    "rl": "RL, 4 prompts × 8 responses of 128 tokens, KL on",
    "generate": "sampling, 32 × 128 tokens; theirs is `generate`",
}


def speed() -> str:
    """A short table of the steps at 5M parameters, each side in its fastest micro-batch."""
    head = [f"{side}, {name}" for name in ("bf16-mixed", "float32") for side in ("ours", "TRL")]
    lines = [f"| | {' | '.join(head)} |", "|---" * 5 + "|"]
    reports = [read("step-5m-bf16")["tasks"], read("step-5m-f32")["tasks"]]
    for task, title in ROWS.items():
        cells = []
        for row in (tasks[task] for tasks in reports):
            cells += [f"{row['ours']:.2f} s", f"{row['trl_fastest']:.2f} s ({row['ratio_fastest']:.1f} times)"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "benchmarks" / "README.md": {
        "summary": table,
        "steps": lambda: step.table(read("step-5m")),
        "best": best,
        "low precision": lambda: step.table(read("step-5m-bf16")),
        "sizes": along,
    },
    ROOT / "benchmarks" / "scale" / "README.md": {"growth": lambda: growth.table(read("scale")["growth"])},
    ROOT / "benchmarks" / "real" / "README.md": {"real": lambda: real.render(real.read(RESULTS / "real"))},
    ROOT / "README.md": {"quickstart": lambda: real_quickstart.figures(read("real_quickstart")), "speed": speed},
    ROOT / "docs" / "performance.md": {"sampling": lambda: engines.speed_table(read("engines"))},
    ROOT / "docs" / "quickstart.md": {
        "figures": lambda: real_quickstart.figures(read("real_quickstart")),
        "kinds": lambda: real_quickstart.kinds(read("real_quickstart")),
        "answers": lambda: real_quickstart.answers(read("real_quickstart")),
    },
}
"""The tables of each page, by the name in their markers."""


def page(path: Path) -> str:
    """A page with its tables updated from the results."""
    text = path.read_text(encoding="utf-8")
    for name, make in PAGES[path].items():
        text = pages.placed(text, f"<!-- {name}: benchmarks/summary.py -->", f"<!-- end of {name} -->", make())
    return text


def main() -> None:
    """Print the tables, or write them into the pages."""
    for path, tables in PAGES.items():
        if "--readme" in sys.argv[1:]:
            path.write_text(page(path), encoding="utf-8")
        else:
            print("\n\n".join(make() for make in tables.values()), end="\n\n")


if __name__ == "__main__":
    main()
