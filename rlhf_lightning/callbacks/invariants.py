"""What must hold at the first update after a rollout, checked while the run goes on."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch

from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)


class FirstStepInvariants(pl.Callback):
    """Before the first update on fresh episodes, trainer and sampler hold the same weights: the importance ratio is 1.

    In float32 the largest |log ratio| must be at most 1e-4, in lower precision the mean at most 0.02.

    Args:
        strict: raise instead of warning, once.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._warned = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        fresh = isinstance(batch, dict) and batch.get("first") and getattr(pl_module, "drew_itself", False)
        if self._warned or not fresh or not isinstance(outputs, dict) or "log_ratio_max" not in outputs:
            return
        largest, mean = float(outputs["log_ratio_max"]), float(outputs["log_ratio_mean"])
        dtype = next(pl_module.parameters()).dtype
        full = dtype in (torch.float32, torch.float64) and "16" not in str(trainer.precision)
        if (largest <= 1e-4) if full else (mean <= 0.02):
            return
        self._warned = True
        message = (
            f"step {trainer.global_step}: sampler and trainer disagree on fresh episodes, |log ratio| is {largest:.2e} "
            f"at most and {mean:.2e} in the mean (precision {trainer.precision}). Their log-probabilities should be "
            "equal within rounding; look for dropout, padding or a model whose cache is not exact."
        )
        if self.strict:
            raise UserError(message)
        log.warning(message)
