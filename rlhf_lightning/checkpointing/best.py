"""The best checkpoint that has not strayed too far."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rlhf_lightning.errors import ConfigError

log = logging.getLogger(__name__)


class BestUnderKL(ModelCheckpoint):
    """Keeps the checkpoint with the highest held-out reward among those whose held-out KL is at most a limit.

    `--export best` exports it. Each validation is a candidate, so `trainer.val_check_interval` says how many there are.

    Args:
        kl_limit: nats a response.
        monitor: what is to be high.
        kl: the metric that is limited; the module logs it where it has a reference (`model.kl`).
        dirpath: where the checkpoint is written; `checkpoints` in the stage's folder by default.
    """

    def __init__(
        self,
        kl_limit: float = 20.0,
        monitor: str = "val/reward_sampled",
        kl: str = "val/kl",
        dirpath: str | Path | None = None,
    ) -> None:
        if not kl_limit > 0:
            raise ConfigError(f"BestUnderKL.kl_limit is {kl_limit}; it must be above 0 nats a response")
        super().__init__(
            dirpath,
            filename="best-{step}",
            monitor=monitor,
            mode="max",
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.kl_limit, self.kl = kl_limit, kl

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and getattr(pl_module, "kl", None) is None:
            raise ConfigError("BestUnderKL needs model.kl, which measures what it limits (coefficient 0 only measures)")
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path and trainer.is_global_zero:
            log.warning("no validation had %s at most %g: there is no best checkpoint", self.kl, self.kl_limit)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether this validation is the best so far of those under the limit."""
        kl = trainer.callback_metrics.get(self.kl)
        if kl is None:
            raise ConfigError(f"BestUnderKL: {self.kl} is not logged; it can have {_logged(trainer)}")
        # Decided on one number of all ranks: the metric is already summed over them.
        return float(kl) <= self.kl_limit and super().check_monitor_top_k(trainer, current)


def _logged(trainer: pl.Trainer) -> str:
    return ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
