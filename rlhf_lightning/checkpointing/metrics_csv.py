"""Logger to `metrics.csv` in the stage's folder, which a resumed run continues."""

import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.files import is_file, read_table, replace_text, table_cell

log = logging.getLogger(__name__)
NAME = "metrics.csv"


class MetricsCSV(Logger):
    """Logs metrics to `metrics.csv` in a folder; a row is in the file when the call returns.

    Because a run may be killed at any moment, a row is appended in one write. If a new column changes the header, the
    file is rewritten under another name and renamed.

    Args:
        folder: Folder of the stage.
        resume: Keep existing rows; rows of repeated steps are replaced.

    Example:
        >>> logger = MetricsCSV("runs/sft")
        >>> logger.path.as_posix()
        'runs/sft/metrics.csv'
    """

    def __init__(self, folder: str | Path, resume: bool = False) -> None:
        super().__init__()
        self.path = Path(folder) / NAME
        self._resuming = resume
        self._columns: list[str] | None = None
        self._is_early, self._early = False, ""
        self.rows = 0
        """Number of rows in the file."""
        self._kept: int | None = None

    @property
    def name(self) -> str:
        """Empty, so that Lightning stores the logger's files directly in the folder."""
        return ""

    @property
    def version(self) -> str:
        """Empty, like `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    def keep(self, rows: int) -> None:
        """Set the number of existing rows that a resumed run keeps, whatever their steps."""
        self._kept = rows

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because `config.yaml` contains the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row.

        Args:
            metrics: Values by name.
            step: Optimizer step. In a resumed run, existing rows from the step of the first call on are replaced.
        """
        if self._columns is None:
            self._start(step or 0)
        assert self._columns is not None
        row = {**metrics, "step": step or 0}
        if new := row.keys() - set(self._columns):
            self._rewrite(sorted({*self._columns, *new}), [item for item in _read(self.path) if item])
        text = _text(self._columns, [row])
        repeated, self._early = text == self._early, text if self._is_early else ""
        if not repeated:
            with open(self.path, "ab", buffering=0) as stream:
                stream.write(text.encode())
            self.rows += 1

    @staticmethod
    @contextmanager
    def early(trainer: pl.Trainer) -> Iterator[None]:
        """Context manager that writes rows before Lightning logs the same values; that second call is then dropped."""
        others, ours = trainer.loggers, [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        trainer.loggers = list(ours)
        for logger in ours:
            logger._is_early = True
        try:
            yield
        finally:
            trainer.loggers = others
            for logger in ours:
                logger._is_early = False

    def _start(self, step: int) -> None:
        rows = _read(self.path) if self._resuming else []
        if self._kept is None:
            rows = [row for row in rows if row["step"].isdigit() and int(row["step"]) < step]
        else:
            if len(rows) < self._kept:
                log.warning(
                    "%s: only %d rows, but it had %d at the checkpoint; metrics of some earlier steps are lost",
                    self.path,
                    len(rows),
                    self._kept,
                )
            rows = rows[: self._kept]
        self._resuming, self._kept, self.rows = False, None, len(rows)
        if rows or self.path.exists():
            self._rewrite(sorted(set().union(*rows)) if rows else [], rows)
        else:
            self._columns = []

    def _rewrite(self, columns: list[str], rows: Sequence[Mapping[str, float | str]]) -> None:
        self._columns = columns
        replace_text(self.path, _text(columns, rows, header=True))


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, float | str]], header: bool = False) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream)
    if header:
        writer.writerow(map(table_cell, columns))
    writer.writerows([table_cell(row.get(name, "")) for name in columns] for row in rows)
    return stream.getvalue()


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of the file, without a truncated last row."""
    if not is_file(path):
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].decode(errors="replace") + "\n"
    rows = read_table(io.StringIO(whole, newline=""))
    return [{key: value for key, value in row.items() if value} for row in rows if row.get("step")]
