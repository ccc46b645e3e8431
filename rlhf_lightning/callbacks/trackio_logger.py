"""A logger for trackio, which Lightning has none for."""

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.errors import missing_package
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from trackio import Run


class TrackioLogger(Logger):
    """Logs metrics, settings, the samples of rounds and the report to trackio, on this machine.

    The files are in the folder of the environment variable `TRACKIO_DIR`, by default in the cache of Hugging Face;
    `trackio show` displays them. Nothing is sent unless `options` or a variable of trackio names a server.

    Args:
        project: Name of the project.
        name: Name of the run, which is continued if there is one; by default trackio makes one up.
        options: Further arguments of `trackio.init`, for example `{group: grpo}`.

    Raises:
        ConfigError: If trackio is not installed.

    Example:
        ```yaml
        trainer:
          logger:
            class_path: rlhf_lightning.callbacks.trackio_logger.TrackioLogger
            init_args: {project: mine}
        ```
    """

    def __init__(self, project: str, name: str | None = None, options: dict[str, JSON] | None = None) -> None:
        super().__init__()
        try:
            import trackio  # noqa: F401
        except ModuleNotFoundError as error:
            raise missing_package(error, "TrackioLogger", "trackio") from None
        self.project, self._name, self._options = project, name, options or {}
        self._settings: dict[str, JSON] = {}
        self._run: Run | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run":
        """The run, which begins when it is first used."""
        if self._run is None:
            import trackio

            # `allow`: after training has ended, the report belongs to the same run.
            given = {"embed": False, "resume": "allow", "config": self._settings, **self._options}
            self._run = trackio.init(self.project, self._name, **given)
            self._name = self._run.name
        return self._run

    @property
    def name(self) -> str:
        """Name of the project."""
        return self.project

    @property
    def version(self) -> str | None:
        """Name of the run; None before it begins."""
        return self._name

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, JSON] | Namespace) -> None:
        """Log settings, which trackio stores when the run begins.

        Args:
            params: The settings.
        """
        self._settings.update(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics.

        Args:
            metrics: The metrics.
            step: The step.
        """
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_table(self, name: str, columns: list[str], data: list[list[JSON]], step: int) -> None:
        """Log a table.

        Args:
            name: Name of the table.
            columns: Names of the columns.
            data: The rows.
            step: The step.
        """
        import trackio

        self.experiment.log({name: trackio.Table(columns=columns, data=data)}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left to disk.

        Args:
            status: How training ended.
        """
        if self._run is not None:
            self._run.finish()
            self._run = None
