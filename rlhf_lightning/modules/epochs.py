"""Resuming from a checkpoint of the end of an epoch."""

from typing import Any

from lightning.pytorch.loops.loop import _Loop


def end_restored_epoch(trainer: Any) -> None:
    """Complete the epoch that the checkpoint was written at the end of, so that the next one begins.

    With `max_steps`, Lightning 2.6 takes such a checkpoint for one within the epoch (`_FitLoop.restarting` has `or`
    where `and` is meant): it ends the epoch a second time, and every later epoch has the number, and so the order of
    rows, of the one after it. Without `max_steps` it does what is done here.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        # The property of the base class: that of the fit loop is what goes wrong.
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
