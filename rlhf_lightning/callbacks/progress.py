"""Progress bars in a terminal: Lightning's bar with the most important metrics first, and a bar for rollouts."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from rlhf_lightning.callbacks.console import ConsoleLines, headline, watch_sampling
from rlhf_lightning.generation.local_engine import Watch

if TYPE_CHECKING:
    from rich.progress import TaskID


class StageProgress(RichProgressBar):
    """Lightning's Rich progress bar. While responses are sampled, a second bar counts them and their tokens.

    Example:
        >>> trainer = Trainer(callbacks=[StageProgress()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, theme=RichProgressBarTheme(metrics_format=".4g", metrics_text_delimiter="  "))

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Metrics to show, with short names, in order of importance."""
        return headline(super().get_metrics(trainer, pl_module))

    def _init_progress(self, trainer: pl.Trainer) -> None:
        """Create the bars. Lightning calls this at the start of every command, when the module has its engine."""
        super()._init_progress(trainer)
        if self.is_enabled:
            watch_sampling(trainer.lightning_module, RolloutProgress(self))

    def _reset_progress_bar_ids(self) -> None:
        super()._reset_progress_bar_ids()
        self.rollout_id: TaskID | None = None


class RolloutProgress(Watch):
    """The progress bar of rollouts. It covers one engine call at a time, which is one turn of all episodes of a rank.

    Args:
        bar: The progress bar that this one is added to.
        seconds: Minimum time between two updates.

    Example:
        >>> engine.watch = RolloutProgress(bar)  # doctest: +SKIP
    """

    def __init__(self, bar: StageProgress, seconds: float = 0.2) -> None:
        self.bar, self.seconds = bar, seconds
        self.rows = self.ended = self.tokens = 0
        self._shown = 0.0

    def begin(self, rows: int) -> None:
        self.rows, self.ended, self.tokens, self._shown = rows, 0, 0, time.monotonic()
        progress = self.bar.progress
        if progress is None or self.bar.is_disabled:
            return
        if self.bar.rollout_id is None:
            self.bar.rollout_id = progress.add_task(self._text(), total=rows)
        else:
            progress.reset(self.bar.rollout_id, total=rows, visible=True, description=self._text())

    def on_token(self, row: int, token: int, ended: bool) -> None:
        self.tokens += 1
        self.ended += ended
        if time.monotonic() - self._shown >= self.seconds:
            self._shown = time.monotonic()
            self._update(visible=True)

    def end(self) -> None:
        self._update(visible=False)

    def _text(self) -> str:
        return f"Rollout, {self.tokens} tokens"

    def _update(self, visible: bool) -> None:
        progress, task = self.bar.progress, self.bar.rollout_id
        if progress is not None and task is not None:
            progress.update(task, completed=self.ended, description=self._text(), visible=visible)
            self.bar.refresh()


def progress_callbacks(bar: bool, own: Sequence[type]) -> list[pl.Callback]:
    """Callbacks that show progress: plain lines if bars are disabled; none if the user has added a progress bar.

    Args:
        bar: True if progress bars are enabled.
        own: Classes of the user's callbacks.
    """
    if not bar:
        return [ConsoleLines()]
    has_bar = any(issubclass(callback, ProgressBar) for callback in own)
    # Rich draws nothing if the output is a file. Lightning adds its plain bar if there is no other.
    return [] if has_bar or not sys.stdout.isatty() else [StageProgress()]
