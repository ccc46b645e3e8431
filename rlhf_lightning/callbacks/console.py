"""Progress as plain lines, for output that is not a terminal."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT

from rlhf_lightning.files import duration

if TYPE_CHECKING:
    from rlhf_lightning.types import StepBatch

# The metrics that matter most, shown before all others that are logged for the progress bar.
FIRST = ("nll", "reward", "accuracy", "margin", "kl", "entropy", "truncated", "loss")


T = TypeVar("T")


def headline(metrics: Mapping[str, T]) -> dict[str, T]:
    """Metrics of the progress bar, ordered: the most important ones first, training before validation."""

    def place(name: str) -> tuple[bool, int]:
        split, _, key = name.rpartition("/")
        return split not in ("", "train"), FIRST.index(key) if key in FIRST else len(FIRST)

    names = sorted((name for name in metrics if name != "v_num"), key=place)
    return {name.removeprefix("train/"): metrics[name] for name in names}


class ConsoleLines(pl.Callback):
    """Prints a line with the metrics of the progress bar every few seconds, and at the end.

    A line follows an optimizer step, never a micro-batch within one: by then the bar's metrics may already be those of
    the next step.

    Args:
        seconds: Shortest time between two lines.

    Example:
        >>> ConsoleLines(seconds=60.0).seconds
        60.0
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._printed = time.time()
        self._first = trainer.global_step
        self._last: tuple[int, str] | None = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: STEP_OUTPUT,
        batch: "StepBatch",
        batch_idx: int,
    ) -> None:
        if time.time() - self._printed >= self.seconds and not trainer.fit_loop._should_accumulate():
            self._line(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer)

    @rank_zero_only
    def _line(self, trainer: pl.Trainer) -> None:
        total, step = trainer.estimated_stepping_batches, trainer.global_step
        shown = "  ".join(
            f"{name} {float(value):.4g}" for name, value in headline(trainer.progress_bar_metrics).items()
        )
        if (step, shown) == self._last:
            return  # the last step's line, at the end of the run, without a validation in between
        self._printed, self._last = time.time(), (step, shown)
        spent = self._printed - self._started
        left = remaining(spent, step - self._first, float(total) - step)
        print(f"step {step}/{total}  {duration(spent)}{left}  {shown}", flush=True)


def remaining(spent: float, done: int, to_do: float) -> str:
    """Text about the remaining time at the current pace; empty if it is unknown or zero.

    Args:
        spent: Seconds spent so far.
        done: Number of steps done in that time.
        to_do: Number of steps left.
    """
    if done < 1 or not 0 < to_do < float("inf"):
        return ""
    return f", {duration(spent / done * to_do)} left"
