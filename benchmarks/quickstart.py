"""The quickstart over several seeds: does every one improve, and by how much?

    python benchmarks/quickstart.py [--seeds 0 1 2]

Writes `benchmarks/results/quickstart.json` and prints the table for README. Each seed has its own data, tokenizer,
weights and draws; nothing is picked.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlhf_lightning.callbacks.export import versions

RESULTS = Path(__file__).parent / "results" / "quickstart.json"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"processor": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(), "versions": versions()}


def _cpu() -> str:
    """The model of the processor, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def checks(summary: dict[str, Any]) -> dict[str, bool]:
    """What the quickstart promises."""
    gold = {name: summary[name]["gold_reward"] for name in ("sft", "policy")}
    return {
        "nll below a quarter of its start": summary["sft"]["val_nll"] < summary["sft"]["val_nll_start"] / 4,
        "pair accuracy at least 0.90": summary["preference"]["pair_accuracy"] >= 0.90,
        "half of the remaining distance": gold["policy"] - gold["sft"] >= (1 - gold["sft"]) / 2,
        "at most 4 minutes": summary["seconds"] <= 240,
        "at most 2 GB": summary["peak_memory_gb"] <= 2,
    }


def row(seed: int, summary: dict[str, Any]) -> str:
    """A line of the table."""
    base, sft, policy = (summary[name] for name in ("base", "sft", "policy"))
    gold = " → ".join(f"{part['gold_reward']:.2f}" for part in (base, sft, policy))
    nll = f"{sft['val_nll_start']:.2f} → {sft['val_nll']:.2f}"
    accuracy = f"{summary['preference']['pair_accuracy']:.3f}"
    cells = [
        seed,
        gold,
        nll,
        accuracy,
        f"{policy['kl']:.1f}",
        f"{sft['response_tokens']:.0f} → {policy['response_tokens']:.0f}",
    ]
    cells += [f"{summary['seconds']:.0f} s", f"{summary['peak_memory_gb']:.1f} GB"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs = {}
    lines = [
        "| seed | gold: base → SFT → RL | held-out NLL | pair accuracy | KL (nats) | tokens | time | memory |",
        "|---" * 8 + "|",
    ]
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            # A process of its own, as a user starts it: its memory is then its own as well.
            command = [
                sys.executable,
                "-m",
                "rlhf_lightning",
                "quickstart",
                "--seed",
                str(seed),
                "--root",
                f"{folder}/run",
            ]
            subprocess.run(command, check=True)
            summary = json.loads(Path(folder, "run", "summary.json").read_text())
        runs[seed] = {**summary, "checks": checks(summary)}
        lines.append(row(seed, summary))
    RESULTS.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=2, ensure_ascii=False) + "\n")
    print("\n".join(lines))
    for seed, run in runs.items():
        print(seed, {name: held for name, held in run["checks"].items() if not held} or "every promise is kept")


if __name__ == "__main__":
    main()
