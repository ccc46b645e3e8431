"""Keeps the best checkpoint within a limit on the KL."""

import logging
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rlhf_lightning.errors import ConfigError

log = logging.getLogger(__name__)


class BestUnderKL(ModelCheckpoint):
    """Keeps the checkpoint with the highest held-out reward among those whose held-out KL is at most a limit.

    `--export best` exports it. Each validation is a candidate, so `trainer.val_check_interval` determines their number.

    Args:
        kl_limit: Largest KL, in nats per episode.
        monitor: Metric to maximize.
        kl: Metric to limit; the module logs it if `model.kl` is set.
        dirpath: Folder of the checkpoint; `checkpoints` in the stage's folder by default.

    Raises:
        ConfigError: If the limit is not positive, or `model.kl` is not set.

    Example:
        >>> BestUnderKL(kl_limit=10.0).monitor
        'val/reward_sampled'
    """

    def __init__(
        self,
        kl_limit: float = 20.0,
        monitor: str = "val/reward_sampled",
        kl: str = "val/kl",
        dirpath: str | Path | None = None,
    ) -> None:
        if not kl_limit > 0:
            raise ConfigError(f"BestUnderKL.kl_limit is {kl_limit}; it must be above 0 nats per episode")
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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and getattr(pl_module, "kl", None) is None:
            raise ConfigError(
                "BestUnderKL needs the KL that model.kl measures: set model.kl (coefficient: 0 measures KL without a "
                "penalty)"
            )
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path and trainer.is_global_zero:
            log.warning("no best checkpoint: no validation had %s of at most %g", self.kl, self.kl_limit)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """True if this validation is the best so far among those within the limit.

        Args:
            trainer: The Trainer.
            current: Current value of `monitor`.

        Raises:
            ConfigError: If the metric `kl` is not logged.
        """
        kl = trainer.callback_metrics.get(self.kl)
        if kl is None:
            raise ConfigError(f"BestUnderKL.kl is {self.kl!r}, which is not logged; logged metrics: {_logged(trainer)}")
        # All ranks decide the same, because the metric is already reduced over the ranks.
        return float(kl) <= self.kl_limit and super().check_monitor_top_k(trainer, current)


def _logged(trainer: pl.Trainer) -> str:
    return ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
