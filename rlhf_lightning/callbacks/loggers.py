"""Samples and the report in Lightning's loggers of other tools, each by its own public API."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from rlhf_lightning.callbacks.table import SampleRow, asked, plain
from rlhf_lightning.callbacks.trackio_logger import TrackioLogger
from rlhf_lightning.types import JSON


def log_samples(loggers: Sequence[Logger], rows: Sequence[SampleRow], title: str, chosen: dict[str, SampleRow]) -> None:
    """Log the episodes of a round: a table in Weights & Biases, MLflow and trackio, text in TensorBoard.

    Args:
        loggers: Loggers of the trainer; others than these four are left out.
        rows: The episodes of a round, at least one.
        title: Title of the text.
        chosen: The episodes of the text, by their label.
    """
    step, number = rows[0]["step"], rows[0]["round"]
    cells = [_cells(row) for row in rows]
    names = list(dict.fromkeys(name for one in cells for name in one))  # a failed episode has no terms
    for logger in loggers:
        if isinstance(logger, WandbLogger | TrackioLogger):
            data = [[one.get(name) for name in names] for one in cells]
            logger.log_table("samples", columns=names, data=data, step=step)
        elif isinstance(logger, MLFlowLogger):
            columns = {name: [one.get(name) for one in cells] for name in names}
            logger.experiment.log_table(logger.run_id, columns, f"samples/round_{number:06}.json")
        elif isinstance(logger, TensorBoardLogger):
            lines = plain(title, chosen).splitlines()
            logger.experiment.add_text("samples", "\n".join(f"    {line}" for line in lines), step)


def log_report(loggers: Sequence[Logger], path: Path) -> None:
    """Log the report of a stage as an artifact; TensorBoard has none.

    Args:
        loggers: Loggers of the trainer.
        path: The report.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log_artifact(str(path), name=f"report-{logger.experiment.id}", type="report")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path))
        elif isinstance(logger, TrackioLogger):
            logger.experiment.log_artifact(path, type="report")


def _cells(row: SampleRow) -> dict[str, JSON]:
    """A row of a table."""
    terms: dict[str, JSON] = {f"reward_{name}": value for name, value in row["terms"].items()}
    return {
        "step": row["step"],
        "round": row["round"],
        "group": row["group"],
        "sample": row["sample"],
        "prompt": asked(row),
        "response": row["response"],
        "reward": row["reward"],
        "advantage": row["advantage"],
        "kl": row["kl"],
        "stop_reason": row["stop_reason"],
        **terms,
    }
