"""A file of JSON lines in the stage's folder that a resumed run goes on with where its checkpoint was written."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from rlhf_lightning.files import as_json


class JsonLines:
    """Rows that are appended as a run goes on, by its first rank.

    The owner keeps `state` in the checkpoint: how many bytes were written by then. A resumed run cuts the file there,
    so that no row stands in it twice and none is lost, wherever in a round the checkpoint was written.

    Args:
        name: of the file in the stage's folder.
    """

    def __init__(self, name: str) -> None:
        self.name, self.written = name, 0
        self._resumed = False

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint says of the file."""
        self.written, self._resumed = int(state["written"]), True

    @property
    def state(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"written": self.written}

    def start(self, trainer: pl.Trainer) -> None:
        """Cut the file to what the checkpoint knew of; begin it anew where there is none."""
        self._path = Path(trainer.default_root_dir) / self.name
        if self._writes(trainer) and self._path.exists():
            if self._resumed:
                os.truncate(self._path, min(self.written, self._path.stat().st_size))
            elif not trainer.global_step:
                self._path.unlink()
        self._resumed = False

    def append(self, trainer: pl.Trainer, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows in one write; nothing on other ranks than the first, nor in a trial run."""
        if not self._writes(trainer):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(as_json(row) + "\n" for row in rows)
        with open(self._path, "ab", buffering=0) as stream:
            stream.write(text.encode())
            self.written = stream.tell()

    @staticmethod
    def _writes(trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
