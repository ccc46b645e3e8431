"""Export of the model folder and `stage.json` at the end of a stage."""

import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError

from rlhf_lightning.checkpointing.best import BestUnderKL
from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
from rlhf_lightning.checkpointing.deepspeed_strategy import DeepSpeed
from rlhf_lightning.checkpointing.nonfinite import NonFiniteGuard, require_finite
from rlhf_lightning.checkpointing.provenance import commit, environment, versions
from rlhf_lightning.checkpointing.strategies import FSDP2
from rlhf_lightning.data.templates import TEMPLATE_DATE
from rlhf_lightning.diagnostics.collapse import StopOnCollapse
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import hash_file, hash_folder, scratch_of, write_json
from rlhf_lightning.models.model_card import write_card
from rlhf_lightning.models.saving import relative_base
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.step import StepEnd
from rlhf_lightning.modules.trainer_state import callbacks_of, is_trial, row_data_of
from rlhf_lightning.yaml_files import read_mapping

if TYPE_CHECKING:
    from rlhf_lightning.types import JSON

log = logging.getLogger(__name__)


class ExportModel(pl.Callback):
    """Writes `model/` and `stage.json` into the stage's folder at the end of `fit`.

    Args:
        which: `last` for the last weights, `best` for the best checkpoint by the metric of a ModelCheckpoint.

    Raises:
        ConfigError: If `which` is unknown, or no ModelCheckpoint monitors a metric for `best`.

    Example:
        >>> ExportModel("best").which
        'best'
    """

    def __init__(self, which: str = "last") -> None:
        if which not in ("last", "best"):
            raise ConfigError(f"ExportModel.which is {which!r}; it must be 'last' or 'best'")
        self.which = which

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._started = time.time()
        monitored = any(isinstance(one, ModelCheckpoint) and one.monitor for one in trainer.checkpoint_callbacks)
        if stage == "fit" and self.which == "best" and not monitored:
            raise ConfigError(
                "--export best needs a metric to compare checkpoints. Set --monitor, for example --monitor val/nll, or "
                "add a ModelCheckpoint with a monitor to trainer.callbacks"
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the folder, unless the run was interrupted or is a `fast_dev_run`."""
        if not isinstance(pl_module, RLHFModule):
            raise ConfigError(
                f"ExportModel supports only modules of rlhf_lightning, but the module is a {type(pl_module).__name__}"
            )
        if trainer.interrupted or is_trial(trainer):
            return
        if not trainer.global_step:
            raise UserError(
                "the run ended before its first optimizer step (trainer.max_time, or a callback that stopped it), so "
                "model/ would be a copy of the start model. Raise max_time and run the same command again"
            )
        if self.which == "best":
            self._load_best(trainer, pl_module)
        require_finite(pl_module, "at the end", "they are not saved as a model")
        trainer.strategy.barrier("export")
        folder = Path(trainer.default_root_dir) / "model"
        if trainer.is_global_zero or is_sharded(pl_module.model):
            _save(pl_module, folder)
        self._describe(trainer, pl_module, folder)
        trainer.strategy.barrier("exported")

    def _load_best(self, trainer: pl.Trainer, pl_module: RLHFModule) -> None:
        saver = next(one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.monitor)
        path = saver.best_model_path
        if not path:
            limit = f" with {saver.kl} at most {saver.kl_limit:g}" if isinstance(saver, BestUnderKL) else ""
            raise UserError(
                f"--export best: no checkpoint was saved for {saver.monitor}{limit}; validate at least once{limit}. "
                "The run itself is intact: the same command with --export last exports its last weights."
            )
        if isinstance(trainer.strategy, FSDP2 | DeepSpeed):
            trainer.strategy.load_weights(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(state, strict=False)
        log.info("exporting the best checkpoint, %s", path)

    @rank_zero_only
    def _describe(self, trainer: pl.Trainer, pl_module: RLHFModule, folder: Path) -> None:
        data = row_data_of(trainer)
        facts: dict[str, JSON] = {
            **pl_module.stage_facts(),
            "base": relative_base(folder),
            "steps": trainer.global_step,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "data": {**data.fingerprints()} if data else {},
            "template_date": TEMPLATE_DATE,
            "seed": _seed(),
            "seconds": round(time.time() - self._started, 2),
            "versions": versions(),
            "environment": environment(trainer),
            "command": [*sys.argv],
            "config_hash": hash_file(config) if (config := folder.parent / "config.yaml").is_file() else None,
            "git": commit(),
            "rows": {**data.row_counts()} if data else {},
        }
        if stopped := [callback.stopped for callback in _stoppers(trainer) if callback.stopped]:
            facts["stopped"] = stopped[0]
        facts |= _history(trainer)
        write_card(folder, facts, _settings(trainer, pl_module))
        facts["model_hash"] = hash_folder(folder)
        write_json(folder / "stage.json", facts)
        write_json(folder.parent / "stage.json", facts)
        log.info("model folder: %s", folder)


def _save(pl_module: RLHFModule, folder: Path) -> None:
    try:
        pl_module.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch_of(folder), ignore_errors=True)
        raise UserError(
            f"{folder}: the model cannot be written ({error}). Free disk space, or fix the permissions of the folder, "
            "and run the same command again; it writes the model without training again."
        ) from error


def _settings(trainer: pl.Trainer, pl_module: RLHFModule) -> "dict[str, JSON]":
    """Settings of the run: from `config.yaml` for a command, or the module's hyperparameters for a script."""
    config = Path(trainer.default_root_dir) / "config.yaml"
    if not config.is_file():
        return {"model": {**pl_module.hparams}}
    found = read_mapping(config)
    return {name: found[name] for name in ("model", "data", "trainer") if name in found}


def _history(trainer: pl.Trainer) -> "dict[str, JSON]":
    """Irregularities of the run, if any: skipped steps, empty steps, inexact resumes."""
    facts: dict[str, JSON] = {}
    for callback in callbacks_of(trainer):
        if isinstance(callback, NonFiniteGuard) and callback.skipped:
            facts["skipped_steps"] = callback.skipped
        if isinstance(callback, StepEnd) and callback.empty:
            facts["empty_steps"] = callback.empty
        if isinstance(callback, RunCheckpoints) and callback.inexact:
            facts["inexact_resumes"] = [*callback.inexact]
    return facts


def _stoppers(trainer: pl.Trainer) -> list[StopOnCollapse]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, StopOnCollapse)]


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else None
