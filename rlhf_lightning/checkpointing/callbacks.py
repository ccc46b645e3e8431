"""Writes checkpoints to resume a run from, and stops a run so that it can be resumed."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.progress import _ProcessedTracker

from rlhf_lightning.checkpointing.io import remove, saved_steps
from rlhf_lightning.checkpointing.last_step import (
    LastStep,
    can_leave_rounds,
    can_leave_steps,
    can_leave_validation,
    rollout_loaders,
)
from rlhf_lightning.checkpointing.logged import StoredLogs, logged_state, restore_last_values, restore_logged, shared
from rlhf_lightning.checkpointing.metrics_csv import MetricsCSV
from rlhf_lightning.checkpointing.nonfinite import require_finite
from rlhf_lightning.checkpointing.provenance import differences, environment
from rlhf_lightning.checkpointing.signals import StopSignals
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.modules.trainer_state import is_trial
from rlhf_lightning.rollout.dataloader import Interruption

if TYPE_CHECKING:
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.utilities.types import STEP_OUTPUT

    from rlhf_lightning.types import StateDict, StepBatch

log = logging.getLogger(__name__)


class RunCheckpoints(Checkpoint):
    """Writes `step=N.ckpt`, from which a run resumes bit for bit as if it had not been interrupted.

    A checkpoint is written at the end of an optimizer step. If a validation or the end of the epoch or the run follows,
    it is written after that, since Lightning does not repeat them on resume.

    Ctrl-C, SIGTERM and SIGHUP write the checkpoint of the last optimizer step as soon as the current piece of work (a
    micro-batch, a step of sampling, a validation batch) is done. An incomplete step, round or validation is restarted
    on resume. Then all ranks raise `KeyboardInterrupt` together. A second Ctrl-C is raised at once.

    It must come after other checkpoint callbacks, because it saves their state; the `rlhf` command ensures this.

    Args:
        dirpath: Folder of the checkpoints; `checkpoints` in `trainer.default_root_dir` by default.
        every: Number of optimizer steps between checkpoints; 0 to write none by steps.
        minutes: Number of minutes between checkpoints, in addition to `every`.
        keep: Number of checkpoints to keep. With 1, a run cannot resume if that checkpoint is damaged.
        signals: Handle Ctrl-C, SIGTERM and SIGHUP.

    Raises:
        ConfigError: If `every`, `minutes` or `keep` is out of range.

    Example:
        >>> RunCheckpoints(every=100, keep=3).every
        100
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every: int = 50,
        minutes: float | None = None,
        keep: int = 2,
        signals: bool = True,
    ) -> None:
        if every < 0 or keep < 1 or (minutes is not None and not minutes > 0):
            raise ConfigError(
                f"RunCheckpoints: every is {every} (must be at least 0), minutes is {minutes} (must be above 0), keep "
                f"is {keep} (must be at least 1)"
            )
        self.dirpath, self.every, self.minutes, self.keep = dirpath, every, minutes, keep
        self.signals = StopSignals() if signals else None
        self.inexact: list[str] = []
        """What had changed at each resume that was not bit-exact."""
        self._step = self._saved = 0
        self._due = self._boundary = self._stopping = False
        self._first: bool | None = None
        self._last: LastStep | None = None
        self._leaving = self._leaves_steps = self._leaves_rounds = self._leaves_validation = False
        self._changed = ""
        self._logged: StoredLogs | None = None
        self._rows: list[int] | None = None

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> "StateDict":
        return {"inexact": self.inexact}

    def load_state_dict(self, state_dict: "StateDict") -> None:
        self.inexact = list(state_dict["inexact"])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: "StateDict") -> None:
        checkpoint["environment"] = environment(trainer)
        checkpoint["stopped"] = _stops_early(trainer)
        if self._leaving and self._last:
            self._last.put_into(checkpoint)
        else:
            checkpoint["logged"] = shared(logged_state(trainer, pl_module, self._first))

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: "StateDict") -> None:
        changed = differences(checkpoint.get("environment") or {}, environment(trainer))
        if changed and trainer.state.fn == "fit":
            self._changed = f"step {checkpoint['global_step']}: {', '.join(changed)}"
            log.warning(
                "this resume will not be bit-exact, because the environment has changed: %s", ", ".join(changed)
            )
        self._logged, self._rows = checkpoint.get("logged"), checkpoint.get("metrics_rows")
        if trainer.state.fn == "fit":
            trainer.fit_loop.run = partial(_run, trainer.fit_loop)  # type: ignore[method-assign]
        # Lightning does not restore this, so a run that had stopped early would continue.
        trainer.should_stop = trainer.state.fn == "fit" and bool(checkpoint.get("stopped"))

    # -- hooks ----------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in on_load_checkpoint: after it, Lightning restores the state of callbacks and resets logged values.
        if self._changed:
            self.inexact.append(self._changed)
            self._changed = ""
        if self._logged:
            restore_last_values(trainer, self._logged)
            trainer.num_sanity_val_steps = 0  # the run has passed this check before; it would reset the logged values

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)  # again, because some strategies load the checkpoint only after it
        if self._logged:
            restore_logged(trainer, pl_module, self._logged)
            files = [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
            for logger, rows in zip(files, self._rows or [], strict=False):
                logger.keep(rows)
        self._first = self._logged["first"] if self._logged else None
        self._logged = self._rows = None
        self._step = self._saved = trainer.global_step
        self._due = self._boundary = self._stopping = self._leaving = False
        self._last = None
        self._time = time.monotonic()
        self.folder = Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        if trainer.is_global_zero and not is_trial(trainer):
            # Checkpoints of later steps are damaged or left over from another run; this run repeats those steps.
            for step, path in saved_steps(self.folder):
                if step > trainer.global_step:
                    remove(path)
            for path in self.folder.glob(".*.partial"):
                remove(path)
        if self.signals:
            self.signals.on()
            heard = self.signals.heard
            self._leaves_steps = can_leave_steps(trainer, pl_module)
            self._leaves_rounds = can_leave_rounds(trainer, pl_module)
            for loader in rollout_loaders(trainer) if self._leaves_rounds else []:
                loader.interruption = Interruption(heard, lambda: self._leave(trainer, pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: "StepBatch", batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._leave_if_asked(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: "STEP_OUTPUT",
        batch: "StepBatch",
        batch_idx: int,
    ) -> None:
        self._first = trainer._logger_connector._first_loop_iter
        self._boundary = trainer.global_step != self._step
        if not self._boundary:
            self._leave_if_asked(trainer, pl_module)
            return  # within an optimizer step: a checkpoint does not contain accumulated gradients
        self._step = trainer.global_step
        self._due = self._due or self._wanted(trainer)
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if self._due and not _epoch_ends(trainer) and not loop._should_check_val_fx(fetcher):
            # Lightning logs the step only after this hook; if the run were killed in between, the row would be lost.
            with MetricsCSV.early(trainer):
                trainer._logger_connector.update_train_step_metrics()
            self._save(trainer, pl_module)
        self._keep(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking and bool(self.signals)
        # For a validation at the start of a resumed run, the checkpoint exists already.
        known = self._boundary or self._saved == trainer.global_step
        self._leaves_validation = fitting and known and can_leave_validation(trainer, pl_module)
        if self._leaves_validation and self._boundary:
            self._last = LastStep(trainer, pl_module, self._first, validates=True)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: "StepBatch",
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._leaves_validation and self._all_heard(trainer):
            self._leave(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._boundary:
            return
        if not _epoch_ends(trainer):
            if self._asked(trainer) or self._due:
                self._save(trainer, pl_module)
            self._keep(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop, connector = trainer.fit_loop, trainer._logger_connector
        progress = loop.epoch_progress.current
        assert isinstance(progress, _ProcessedTracker)
        if loop.max_epochs not in (None, -1) and progress.processed >= loop.max_epochs:
            self._due = self._due or self._saved != trainer.global_step
        if self._boundary and (self._asked(trainer) or self._due):
            with MetricsCSV.early(trainer):
                # Lightning does the same after this hook.
                loop.epoch_loop._batches_that_stepped -= 1
                connector.log_metrics(connector.metrics["log"])
                loop.epoch_loop._batches_that_stepped += 1
            with _unless_complete(loop):
                self._save(trainer, pl_module)
        self._keep(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        self._last = None
        if self.signals:
            self.signals.off()
            if self._leaves_rounds:
                for loader in rollout_loaders(trainer):
                    loader.interruption = None

    # -- interrupting the current work ----------------------------------------------------------------------------

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the state at the end of this step, if the work that follows may be interrupted."""
        steps = self._leaves_steps and trainer.accumulate_grad_batches > 1
        if steps or (self._leaves_rounds and any(loader.at_round_start for loader in rollout_loaders(trainer))):
            self._last = LastStep(trainer, pl_module, self._first)

    def _leave_if_asked(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before or between micro-batches of an optimizer step. All ranks must call this equally often."""
        if not self._leaves_steps or trainer.accumulate_grad_batches == 1 or not self._all_heard(trainer):
            return
        if self._saved == trainer.global_step or (self._last and self._last.step == trainer.global_step):
            self._leave(trainer, pl_module)

    def _all_heard(self, trainer: pl.Trainer) -> bool:
        """True if the run should stop. Rank 0 decides without waiting for the others, and broadcasts its decision."""
        heard = bool(self.signals and self.signals.heard())
        if trainer.world_size > 1:
            flag = torch.tensor(int(heard), device=trainer.strategy.root_device)
            torch.distributed.broadcast(flag, src=0)
            heard = bool(flag)
        return heard

    def _leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discard what has been done since the last optimizer step, and stop. All ranks must call this together."""
        self._stopping = self._leaving = True
        if self._last and self._saved != trainer.global_step:
            self._last.go_back(trainer, pl_module)
        self._save(trainer, pl_module)

    # -- saving ---------------------------------------------------------------------------------------------------

    def _wanted(self, trainer: pl.Trainer) -> bool:
        step, agree = trainer.global_step, trainer.strategy.reduce_boolean_decision
        late = self.minutes is not None and time.monotonic() - self._time >= 60 * self.minutes
        self._asked(trainer)
        if self.minutes is not None:
            late = agree(late, all=False)
        last = trainer.should_stop or 0 < trainer.max_steps <= step
        return bool(self._stopping or late or last or (self.every and step % self.every == 0))

    def _asked(self, trainer: pl.Trainer) -> bool:
        """True if any rank was asked to stop; a signal may reach only one of them."""
        if self.signals:
            self._stopping = trainer.strategy.reduce_boolean_decision(self.signals.heard(), all=False)
        return self._stopping

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = False
        if is_trial(trainer):
            return
        if self._saved != trainer.global_step:
            require_finite(pl_module, f"after step {trainer.global_step}", "no checkpoint is written")
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt", weights_only=False)
            self._saved, self._time = trainer.global_step, time.monotonic()
            if trainer.is_global_zero:
                for _, path in saved_steps(self.folder)[self.keep :]:
                    remove(path)
        if self._stopping:
            if trainer.global_step:
                log.warning("stopped after step %d; the same command resumes from there", trainer.global_step)
            else:
                log.warning("stopped before the first optimizer step; the same command starts over")
            raise KeyboardInterrupt


def _run(loop: "_FitLoop") -> None:
    """Run a resumed fit; if no step is left, only begin and end it.

    Lightning would return at once. A run that was killed after its last checkpoint would then lack what callbacks do at
    its end: averaged weights would not be put in place, and held-out prompts not be answered.
    """
    del loop.run  # back to that of the class
    loop.setup_data()
    if not loop.done:
        loop.run()
        return
    loop.on_run_start()
    loop.on_run_end()


def _epoch_ends(trainer: pl.Trainer) -> bool:
    """True if the epoch ends with the last step, because of its length or because the run ends."""
    loop = trainer.fit_loop
    stops = 0 < trainer.max_steps <= trainer.global_step or _stops_early(trainer)
    return stops or loop.epoch_loop._num_ready_batches_reached()


def _stops_early(trainer: pl.Trainer) -> bool:
    """True if a callback, such as early stopping, has ended the run."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


@contextmanager
def _unless_complete(loop: "_FitLoop") -> Iterator[None]:
    """Save an epoch that the end of the run cuts short as unfinished, so that a run with more steps continues it."""
    cut_off = not loop.epoch_loop._num_ready_batches_reached()
    trackers = [t for t in (loop.epoch_progress.current, loop.epoch_progress.total) if isinstance(t, _ProcessedTracker)]
    for progress in trackers:
        progress.processed -= cut_off
    try:
        yield
    finally:
        for progress in trackers:
            progress.processed += cut_off
