"""What the policy says as it learns: a row for each episode in `samples.jsonl`."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only


class SamplesLog(pl.Callback):
    """Appends the episodes of every `every`-th round to `samples.jsonl` in the stage's folder.

    A resumed run first drops what was written after its checkpoint, so that no round stands there twice.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = max(1, every)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        path = self._path(trainer)
        if trainer.is_global_zero and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < trainer.global_step]
            path.write_text("".join(f"{line}\n" for line in kept) if trainer.global_step else "")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, dict) or batch.get("statistics") is None:
            return
        if batch_idx // pl_module.rollouts.per_round % self.every == 0:
            self._append(trainer, pl_module)

    @rank_zero_only
    def _append(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with open(self._path(trainer), "a", encoding="utf-8") as stream:
            for episode in pl_module.last_episodes:
                record = {"step": trainer.global_step, **episode.record()}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    @staticmethod
    def _path(trainer: pl.Trainer) -> Path:
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        return root / "samples.jsonl"
