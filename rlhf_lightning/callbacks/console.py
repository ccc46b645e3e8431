"""Progress as plain lines, for output that is not a terminal."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT

from rlhf_lightning.files import duration
from rlhf_lightning.generation.local_engine import LocalEngine, Watch
from rlhf_lightning.modules.policy_rl import PolicyRLModule

if TYPE_CHECKING:
    from rlhf_lightning.types import StepBatch

# The most important metrics, which are shown before the other metrics of the progress bar.
FIRST = ("nll", "reward", "accuracy", "margin", "kl", "entropy", "truncated", "loss")


T = TypeVar("T")


def headline(metrics: Mapping[str, T]) -> dict[str, T]:
    """Metrics of the progress bar in order: training before validation, the most important metrics first."""

    def order(name: str) -> tuple[bool, int]:
        split, _, key = name.rpartition("/")
        return split not in ("", "train"), FIRST.index(key) if key in FIRST else len(FIRST)

    names = sorted((name for name in metrics if name != "v_num"), key=order)
    return {name.removeprefix("train/"): metrics[name] for name in names}


class SamplingLines(Watch):
    """Prints the progress of sampling if it takes longer than a few seconds.

    Args:
        seconds: Shortest time between two lines.

    Example:
        >>> engine.watch = SamplingLines(seconds=10.0)  # doctest: +SKIP
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin(0)

    def begin(self, rows: int) -> None:
        self.rows, self.ended, self.tokens = rows, 0, 0
        self._started = self._printed = time.time()

    def on_token(self, row: int, token: int, ended: bool) -> None:
        self.tokens += 1
        self.ended += ended
        if time.time() - self._printed >= self.seconds:
            self._printed = time.time()
            spent = duration(self._printed - self._started)
            print(f"sampling: {self.ended} of {self.rows} responses, {self.tokens} tokens, {spent}", flush=True)


class ConsoleLines(pl.Callback):
    """Prints a line with the metrics of the progress bar every few seconds, and at the end.

    A line is printed only after an optimizer step, not after a micro-batch within a step, where the metrics of the
    progress bar may already belong to the next step. Sampling that takes longer has its own lines.

    Args:
        seconds: Shortest time between two lines.

    Example:
        >>> ConsoleLines(seconds=60.0).seconds
        60.0
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._sampling = SamplingLines(seconds)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._printed = time.time()
        self._first = trainer.global_step
        self._last: tuple[int, str] | None = None

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            watch_sampling(pl_module, self._sampling)

    # Not `setup`, which comes before the model is loaded.
    on_fit_start = on_validation_start = on_test_start = on_predict_start = _watch

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
            return  # at the end of the run, if the line of the last step was printed already and nothing has changed
        self._printed, self._last = time.time(), (step, shown)
        spent = self._printed - self._started
        left = remaining(spent, step - self._first, float(total) - step)
        known = f"/{total}" if 0 <= total < float("inf") else ""  # unknown of a stream
        print(f"step {step}{known}  {duration(spent)}{left}  {shown}", flush=True)


def watch_sampling(module: pl.LightningModule, watch: Watch) -> None:
    """Report the progress of a policy's built-in sampling engine to `watch`."""
    if isinstance(module, PolicyRLModule) and isinstance(module.model_sampler.engine, LocalEngine):
        module.model_sampler.engine.watch = watch


def remaining(spent: float, done: int, to_do: float) -> str:
    """The remaining time at the current pace as text; empty if it is unknown or zero.

    Args:
        spent: Seconds spent so far.
        done: Number of steps completed in that time.
        to_do: Number of remaining steps.
    """
    if done < 1 or not 0 < to_do < float("inf"):
        return ""
    return f", {duration(spent / done * to_do)} left"
