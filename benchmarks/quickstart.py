"""One run of the quickstart's toy, its requirements, and a description of the machine.

The script is `python -m benchmarks.learning.quickstart_curves`, over several seeds.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_lightning.checkpointing.provenance import processor, versions

HEAD = ["seed", "gold: base → SFT → RL", "held-out NLL", "pair accuracy", "KL (nats)", "tokens", "time", "memory"]


def machine() -> dict[str, Any]:
    """Description of the machine and versions."""
    return {
        "processor": platform.machine(),
        "cpu": processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions(),
    }


def run(seed: int, root: Path) -> dict[str, Any]:
    """Run it in a folder and return its `summary.json`.

    It runs in its own process, as for a user, so that its memory can be measured.
    """
    command = [sys.executable, "-m", "rlhf_lightning", "quickstart", "--toy", "--seed", str(seed), "--root", str(root)]
    subprocess.run(command, check=True)
    return json.loads((root / "summary.json").read_text())


def checks(summary: dict[str, Any]) -> dict[str, bool]:
    """Whether each requirement of the quickstart is met."""
    gold = {name: summary[name]["gold_reward"] for name in ("sft", "policy")}
    return {
        "nll below a quarter of its start": summary["sft"]["val_nll"] < summary["sft"]["val_nll_start"] / 4,
        "pair accuracy at least 0.90": summary["preference"]["pair_accuracy"] >= 0.90,
        "half of the remaining distance": gold["policy"] - gold["sft"] >= (1 - gold["sft"]) / 2,
        "at most 4 minutes": summary["seconds"] <= 240,
        "at most 2 GB": summary["peak_memory_gb"] <= 2,
    }


def row(seed: str, summary: dict[str, Any]) -> list[str]:
    """A row of the table with the columns of `HEAD`."""
    base, sft, policy = (summary[name] for name in ("base", "sft", "policy"))
    return [
        seed,
        " → ".join(f"{part['gold_reward']:.2f}" for part in (base, sft, policy)),
        f"{sft['val_nll_start']:.2f} → {sft['val_nll']:.2f}",
        f"{summary['preference']['pair_accuracy']:.3f}",
        f"{policy['kl']:.1f}",
        f"{sft['response_tokens']:.0f} → {policy['response_tokens']:.0f}",
        f"{summary['seconds']:.0f} s",
        f"{summary['peak_memory_gb']:.1f} GB",
    ]
