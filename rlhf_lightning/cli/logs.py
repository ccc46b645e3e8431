"""Logging of a run: the console, and one file per run."""

import logging
import os
import sys
from pathlib import Path

LEVELS = ("debug", "info", "warning", "error")


class _NoAdvertising(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage()


def setup_logging(level: str, file: Path | None) -> None:
    """Log the project and Lightning to the console and, on the first rank, to a file that is appended to."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    if file is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
    if level != "debug":
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
