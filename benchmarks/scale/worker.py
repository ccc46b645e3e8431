"""One measurement in its own process (or one process per rank): seconds of each step, and memory. Linux only.

    python -m benchmarks.scale.worker '{"task": "sft", "steps": 3, "ranks": 1, "work": {…}}'

Prints a line of JSON; with several ranks, the first one does.
"""

import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


def _status(name: str) -> int:
    """Bytes from a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(point: dict[str, Any], root: Path) -> dict[str, Any]:
    """Run steps of a task on the model and rows of a `Workload`.

    Returns:
        `seconds` of each step; `limit_seconds`, which its operations take at the rate of a matrix product; and
        `peak_gib`, the increase of memory at the peak.

    The peak counts this program only; that of `getrusage` starts with the parent's.
    """
    import lightning.pytorch as pl

    from benchmarks.steps.ours import StepTimes, operations, parts
    from benchmarks.steps.worker import matmul_rate
    from benchmarks.steps.workload import Workload

    work, ranks = Workload(**point["work"]), point["ranks"]
    folder = root / f"model-{os.environ.get('RANK', '0')}"
    work.build(folder)
    module, data = parts(point["task"], str(folder), work)
    times = StepTimes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=point["steps"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        num_sanity_val_steps=0,
        callbacks=[times],
    ).fit(module, data)
    peak = (_status("VmHWM") - before) / 2**30
    limit = operations(point["task"], folder, work) / matmul_rate(work)
    return {"seconds": times.seconds, "limit_seconds": limit, "peak_gib": peak}


def main() -> None:
    """Measure the given point."""
    from rlhf_lightning.cli.main import prepare_environment

    prepare_environment()
    import torch

    point = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(point.get("threads", 1))
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(point, Path(scratch))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
