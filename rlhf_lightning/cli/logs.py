"""Logging of a run to the console and to a file."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TextIO

from rlhf_lightning.files import is_file, visible

_COLOR = re.compile(r"\x1b\[[\d;]*m")
LEVELS = ("debug", "info", "warning", "error")


class _NoAdvertising(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage()


class _Console(logging.StreamHandler):
    """Writes to the current `sys.stderr`, not to the one at the time when logging was set up."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _Record(logging.LogRecord):
    """Escapes control characters in all log messages.

    Other libraries have their own handlers, and log names of files and weights from untrusted sources.
    """

    def getMessage(self) -> str:  # noqa: N802
        message = super().getMessage()
        if self.name.startswith("transformers."):  # it colors its tables of weights in a terminal
            message = _COLOR.sub("", message)
        return visible(message)


class _Visible(logging.Formatter):
    """Escapes control characters, because messages contain rows, answers and names from untrusted sources."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def setup_logging(level: str, file: Path | None) -> None:
    """Log the package and Lightning to the console and, on rank 0, to a file.

    Args:
        level: Log level.
        file: File to append to; None for none.
    """
    handlers: list[logging.Handler] = [_Console()]
    handlers[0].setFormatter(_Visible("%(message)s"))
    if file is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        is_file(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[1].setFormatter(_Visible("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("rlhf_lightning", "lightning.pytorch", "py.warnings"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        for handler in handlers:
            handler.addFilter(_NoAdvertising())
            logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False
    logging.captureWarnings(True)
    logging.setLogRecordFactory(_Record)
    if level != "debug":
        _quieten()


def _quieten() -> None:
    """Hide messages of other libraries that are not relevant to users of this package."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for message in (
        ".*Experiment logs directory .* exists and is not empty.*",  # resuming in a stage's folder is intended
        ".*LeafSpec.* is deprecated.*",
        ".*does not have many workers.*",  # rows are in memory, so workers would only copy them
        ".*gradient_checkpointing.* is deprecated.*",
        ".*a tied layer is part of the adapter.*",  # models.loading.merge unties it
        ".*fan_in_fan_out is set to.*",
        ".*is smaller than the logging interval.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation rows
    ):
        warnings.filterwarnings("ignore", message=message)
