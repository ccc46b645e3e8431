"""Progress as plain lines, where the output is no terminal."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only


class ConsoleLines(pl.Callback):
    """Prints a line with the numbers of the progress bar every few seconds, and at the end.

    Args:
        seconds: the least time between two lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._printed = time.time()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if time.time() - self._printed >= self.seconds:
            self._line(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer)

    @rank_zero_only
    def _line(self, trainer: pl.Trainer) -> None:
        self._printed = time.time()
        total = trainer.estimated_stepping_batches
        numbers = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        shown = "  ".join(f"{name} {float(value):.4g}" for name, value in numbers.items())
        print(f"step {trainer.global_step}/{total}  {self._printed - self._started:.0f} s  {shown}", flush=True)
