"""Callback that logs the memory that training needs, with advice if it is more than is available."""

import logging

import lightning.pytorch as pl

from rlhf_lightning.checkpointing.deepspeed_strategy import DeepSpeed
from rlhf_lightning.modules.base import RLHFModule

log = logging.getLogger(__name__)


class MemoryEstimate(pl.Callback):
    """Logs an estimate of the required memory before training: one line, or advice if it may not fit.

    With `memory_limit`, the module logs its estimate itself.

    Example:
        >>> callback = MemoryEstimate()
        >>> trainer = Trainer(callbacks=[callback])  # doctest: +SKIP
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, DeepSpeed):
            return  # its shards and buffers are not known here
        if not isinstance(pl_module, RLHFModule) or pl_module.memory_limit is not None:
            return
        if (sizes := pl_module.step_sizes()) is None:
            return
        self.estimate = pl_module.estimate_memory(*sizes)
        if trainer.is_global_zero:
            tell = log.info if self.estimate.fits else log.warning
            tell(self.estimate.text())
