"""Records what results depend on besides the settings: versions, threads, ranks and device."""

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from rlhf_lightning import __version__
from rlhf_lightning.data.shards import data_ranks

if TYPE_CHECKING:
    from rlhf_lightning.types import JSON

DECIDES = ("torch", "lightning", "transformers", "peft", "rlhf-lightning")
"""Packages that must keep their version for a bit-exact resume."""


def versions() -> "dict[str, JSON]":
    """Versions of the packages that results depend on."""
    from importlib.metadata import version

    names = ("torch", "lightning", "transformers", "peft", "torchmetrics")
    # Not read from the package's metadata, which do not exist when it runs from a source tree.
    ours = {"python": platform.python_version(), "rlhf-lightning": __version__}
    return {**ours, **{name: version(name) for name in names}}


def environment(trainer: pl.Trainer) -> "dict[str, JSON]":
    """Environment of the run as plain values, for checkpoints and `stage.json`."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        **{name: value for name, value in versions().items() if name in DECIDES},
        "threads": torch.get_num_threads(),
        "ranks": trainer.world_size,
        "data_ranks": data_ranks(trainer)[1],
        "device": f"{device.type} ({name})",
        "machine": f"{platform.system()} {platform.machine()}, {processor()}",
        "precision": str(trainer.precision),
    }


def processor() -> str:
    """Name of the processor. It determines the kernels, and thereby the order of summation."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def commit() -> "dict[str, JSON] | None":
    """The git commit of the current folder, and whether files differ from it; None outside a repository."""

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=False)

    try:
        found = git("rev-parse", "HEAD")
        changed = found.returncode == 0 and git("diff", "--quiet", "HEAD").returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"commit": found.stdout.strip(), "changed": changed} if found.returncode == 0 else None


def differences(before: "Mapping[str, JSON]", now: "Mapping[str, JSON]") -> list[str]:
    """The differences between two environments, each as `name before → now`."""
    return [f"{name} {before[name]} → {now[name]}" for name in now if name in before and before[name] != now[name]]
