"""Resuming from a checkpoint that was written at the end of an epoch."""

import lightning.pytorch as pl
from lightning.pytorch.loops.loop import _Loop


def end_restored_epoch(trainer: pl.Trainer) -> None:
    """Complete the epoch that ended when the checkpoint was written, so that the next epoch begins.

    With `max_steps`, Lightning 2.6 treats such a checkpoint as one within the epoch (`_FitLoop.restarting` has `or`
    instead of `and`). It then ends the epoch twice, so that every later epoch has the number, and therefore the row
    order, of the epoch after it. Without `max_steps`, Lightning does the same as this function.

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
