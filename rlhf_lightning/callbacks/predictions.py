"""Writes the results of `predict` to a file."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from rlhf_lightning.data.shards import data_ranks
from rlhf_lightning.distributed import is_leader
from rlhf_lightning.files import as_json, is_file

if TYPE_CHECKING:
    from rlhf_lightning.types import Row, StepBatch

log = logging.getLogger(__name__)


class PredictionsFile(pl.Callback):
    """Writes `predictions.jsonl` into the Trainer's `default_root_dir`, with one line per data row.

    With several data ranks, each writes its own file, `predictions.RANK.jsonl`.

    Example:
        >>> trainer = Trainer(callbacks=[PredictionsFile()])  # doctest: +SKIP
        >>> trainer.predict(module, data)  # doctest: +SKIP
    """

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        rank, world = data_ranks(trainer)
        self._path = root / f"predictions{f'.{rank}' if world > 1 else ''}.jsonl"
        is_file(self._path)
        if is_leader():
            self._path.write_text("")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: "list[Row]",
        batch: "StepBatch",
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not is_leader():
            return
        with open(self._path, "a", encoding="utf-8") as stream:
            for row in outputs:
                stream.write(as_json(row) + "\n")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("predictions: %s", self._path)
