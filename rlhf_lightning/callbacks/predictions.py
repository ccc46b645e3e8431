"""What `predict` finds, as a file."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

log = logging.getLogger(__name__)


class PredictionsFile(pl.Callback):
    """Writes `predictions.jsonl` into the folder of the command, a row for each row of data (one file per rank)."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._path = root / f"predictions{suffix}.jsonl"
        self._path.write_text("")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        with open(self._path, "a", encoding="utf-8") as stream:
            for row in outputs:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("predictions: %s", self._path)
