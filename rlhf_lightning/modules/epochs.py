"""Resuming from a checkpoint that was written at the end of an epoch."""

import lightning.pytorch as pl
from lightning.pytorch.loops.loop import _Loop


def end_restored_epoch(trainer: pl.Trainer) -> None:
    """Complete the epoch that ended when the checkpoint was written, so that the next epoch begins.

    With `max_steps`, Lightning 2.6 treats such a checkpoint as one within the epoch (`_FitLoop.restarting` has `or`
    instead of `and`). It then ends the epoch twice, so that every later epoch has the number, and therefore the row
    order, of the epoch after it. Without `max_steps`, Lightning does the same as this function.

    A checkpoint that was written in `on_train_batch_end` of the last batch of a loader without a length is also treated
    as one within the epoch, because Lightning compares the number of batches with the length. It then counts the
    batches of the next epoch from there.

    Args:
        trainer: The Trainer.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        # Use the property of the base class, because the fit loop's override has the bug.
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
    batches = loop.epoch_loop
    unsized = trainer.num_training_batches == float("inf")
    if unsized and batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch:
        batches.batch_progress.reset_on_run()
        batches.batch_progress.current.completed = -1  # Lightning's `reset`, which follows, adds 1
        batches.scheduler_progress.reset_on_run()
        batches.automatic_optimization.optim_progress.reset_on_run()
        batches.val_loop.batch_progress.total.reset()
