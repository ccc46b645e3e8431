"""What `predict` finds, as a file."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from rlhf_lightning.data.base import data_ranks
from rlhf_lightning.files import as_json, is_file
from rlhf_lightning.rollout.ranks import leads

log = logging.getLogger(__name__)


class PredictionsFile(pl.Callback):
    """Writes `predictions.jsonl` into the folder of the command, a row for each row of data.

    Ranks with rows of their own have a file of their own.
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        rank, world = data_ranks(trainer)
        self._path = root / f"predictions{f'.{rank}' if world > 1 else ''}.jsonl"
        is_file(self._path)
        if leads():
            self._path.write_text("")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        if not leads():
            return
        with open(self._path, "a", encoding="utf-8") as stream:
            for row in outputs:
                stream.write(as_json(row) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("predictions: %s", self._path)
