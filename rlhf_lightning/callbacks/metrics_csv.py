"""`metrics.csv` in the stage's folder, going on where an interrupted run stopped."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(CSVLogger):
    """Lightning's CSV logger, writing straight into the folder; Lightning's own starts the file anew on resume.

    Args:
        folder: of the stage. resume: keep the rows that are there; those of steps that are run again are replaced.
    """

    def __init__(self, folder: str | Path, resume: bool = False) -> None:
        super().__init__(save_dir=str(folder), name="", version="", flush_logs_every_n_steps=20)
        path = Path(folder) / "metrics.csv"
        self._earlier = _read(path) if resume and path.exists() else []
        if not rank_zero_only.rank:  # type: ignore[attr-defined]
            # Lightning warns of, and deletes, what is there.
            path.unlink(missing_ok=True)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log; the first call tells from which step on a resumed run repeats itself."""
        if self._earlier and step is not None:
            experiment = self.experiment
            experiment.metrics += [row for row in self._earlier if int(row["step"]) < step]
            self._earlier = []
        super().log_metrics(metrics, step)


def _read(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as stream:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]
    return [row for row in rows if row.get("step", "").isdigit()]
