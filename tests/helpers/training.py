"""A Trainer and an optimizer without extras."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch


def trainer(root: Path, **options: Any) -> pl.Trainer:
    """A quiet Trainer, on a CPU unless `accelerator` says otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,  # as much as a validation; runs by commands have it
        "default_root_dir": root,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**defaults, **options})


def sgd(rate: float) -> Any:
    """Plain gradient descent, which unlike Adam does not hide a wrong scale of the loss."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def adamw(rate: float) -> Any:
    """An optimizer with a state."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)
