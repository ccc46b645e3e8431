"""The end of a stage: its model folder and `stage.json`."""

import logging
import platform
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.callbacks.best import BestUnderKL
from rlhf_lightning.callbacks.collapse import StopOnCollapse
from rlhf_lightning.data.templates import TEMPLATE_DATE
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import hash_folder, write_json
from rlhf_lightning.models.saving import relative_base

log = logging.getLogger(__name__)


class ExportModel(pl.Callback):
    """Writes `model/` and `stage.json` into the stage's folder when `fit` is done.

    Args:
        which: `last` weights, or those of the `best` checkpoint by the monitored metric of a ModelCheckpoint.
    """

    def __init__(self, which: str = "last") -> None:
        if which not in ("last", "best"):
            raise ConfigError(f"ExportModel.which is {which!r}; 'last' or 'best'")
        self.which = which

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._started = time.time()
        monitored = any(getattr(saver, "monitor", None) for saver in trainer.checkpoint_callbacks)
        if stage == "fit" and self.which == "best" and not monitored:
            raise ConfigError(
                "--export best needs a ModelCheckpoint that monitors a metric: add one to trainer.callbacks, "
                "for example with monitor: val/nll"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the folder, unless the run was stopped before its end or is a trial run."""
        if trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.which == "best":
            self._load_best(trainer, pl_module)
        trainer.strategy.barrier("export")
        self._write(trainer, pl_module)
        trainer.strategy.barrier("exported")

    def _load_best(self, trainer: pl.Trainer, pl_module: Any) -> None:
        saver: Any = next(saver for saver in trainer.checkpoint_callbacks if getattr(saver, "monitor", None))
        path = saver.best_model_path
        if not path:
            limit = f" with {saver.kl} at most {saver.kl_limit:g}" if isinstance(saver, BestUnderKL) else ""
            raise UserError(
                f"--export best: no checkpoint was saved by {saver.monitor}{limit}; validate at least once{limit}. "
                "The run is there: the same command with --export last exports its last weights."
            )
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        pl_module.load_state_dict(state, strict=False)
        log.info("exporting the best checkpoint, %s", path)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, pl_module: Any) -> None:
        root = Path(trainer.default_root_dir)
        folder = root / "model"
        pl_module.save_pretrained(folder)
        data = trainer.datamodule  # type: ignore[attr-defined]
        facts = {
            **pl_module.stage_facts(),
            "base": relative_base(folder),
            "steps": trainer.global_step,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "data": data.fingerprints() if hasattr(data, "fingerprints") else {},
            "template_date": TEMPLATE_DATE,
            "seed": _seed(),
            "seconds": round(time.time() - self._started, 2),
            "versions": versions(),
            "model_hash": hash_folder(folder),
        }
        if stopped := [callback.stopped for callback in _stoppers(trainer) if callback.stopped]:
            facts["stopped"] = stopped[0]
        write_json(folder / "stage.json", facts)
        write_json(root / "stage.json", facts)
        log.info("model folder: %s", folder)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    names = ("rlhf-lightning", "torch", "lightning", "transformers", "peft", "torchmetrics")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _stoppers(trainer: pl.Trainer) -> list[StopOnCollapse]:
    return [callback for callback in trainer.callbacks if isinstance(callback, StopOnCollapse)]  # type: ignore[attr-defined]


def _seed() -> int | None:
    import os

    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else None
