"""A JSON Lines file in the stage's folder that a resumed run continues at the position of its checkpoint."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import lightning.pytorch as pl

from rlhf_lightning.files import as_json
from rlhf_lightning.modules.trainer_state import is_trial


class JsonLines:
    """A file to which rank 0 appends rows during a run.

    The owner stores `state`, the number of bytes written so far, in the checkpoint. A resumed run truncates the file to
    that size, so that no row is duplicated or lost.

    Args:
        name: Name of the file in the stage's folder.

    Example:
        >>> JsonLines("samples.jsonl").state
        {'written': 0}
    """

    def __init__(self, name: str) -> None:
        self.name, self.written = name, 0
        self._resumed = False

    def load(self, state: Mapping[str, int]) -> None:
        """Restore a `state`."""
        self.written, self._resumed = int(state["written"]), True

    @property
    def state(self) -> dict[str, int]:
        """The state for the checkpoint: the number of bytes written."""
        return {"written": self.written}

    def start(self, trainer: pl.Trainer) -> None:
        """Truncate the file to the restored state, or remove it at the start of a new run."""
        self._path = Path(trainer.default_root_dir) / self.name
        if not self._resumed and not trainer.global_step:
            self.written = 0
        if self._writes(trainer) and self._path.exists():
            if self._resumed:
                os.truncate(self._path, min(self.written, self._path.stat().st_size))
            elif not trainer.global_step:
                self._path.unlink()
        self._resumed = False

    def append(self, trainer: pl.Trainer, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows in one write. Does nothing on ranks other than 0, and in a `fast_dev_run`.

        Args:
            trainer: The Trainer.
            rows: The rows.
        """
        if not self._writes(trainer):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(as_json(row) + "\n" for row in rows)
        with open(self._path, "ab", buffering=0) as stream:
            stream.write(text.encode())
            self.written = stream.tell()

    @staticmethod
    def _writes(trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and not is_trial(trainer)
