"""Progress as plain lines, where the output is no terminal."""

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.files import duration

# What says how a stage goes, before anything else that is logged for the bar.
FIRST = ("nll", "reward", "accuracy", "margin", "kl", "entropy", "truncated", "loss")


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the progress bar: those that matter most first, of training before those of validation."""

    def place(name: str) -> tuple[bool, int]:
        split, _, key = name.rpartition("/")
        return split not in ("", "train"), FIRST.index(key) if key in FIRST else len(FIRST)

    names = sorted((name for name in metrics if name != "v_num"), key=place)
    return {name.removeprefix("train/"): metrics[name] for name in names}


class ConsoleLines(pl.Callback):
    """Prints a line with the numbers of the progress bar every few seconds, and at the end.

    Args:
        seconds: the least time between two lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._printed = time.time()
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if time.time() - self._printed >= self.seconds:
            self._line(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer)

    @rank_zero_only
    def _line(self, trainer: pl.Trainer) -> None:
        self._printed = time.time()
        total, step = trainer.estimated_stepping_batches, trainer.global_step
        shown = "  ".join(
            f"{name} {float(value):.4g}" for name, value in headline(trainer.progress_bar_metrics).items()
        )
        spent = self._printed - self._started
        left = remaining(spent, step - self._first, float(total) - step)
        print(f"step {step}/{total}  {duration(spent)}{left}  {shown}", flush=True)


def remaining(spent: float, done: int, to_do: float) -> str:
    """The time that is left if it goes on as before; nothing where that cannot be said, or it is over."""
    if done < 1 or not 0 < to_do < float("inf"):
        return ""
    return f", {duration(spent / done * to_do)} left"
