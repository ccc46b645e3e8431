"""Converts exceptions of other libraries about settings, disks and dead processes to errors with advice."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing import ProcessExitedException

from rlhf_lightning.cli.parser import tidy
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import DISK_FULL
from rlhf_lightning.rank_watch import LOST

EXTRAS = ("tensorboard", "wandb", "mlflow")
FULL = "free disk space, or set another folder (--trainer.default_root_dir); the same command resumes the run"
REMEDIES = {**dict.fromkeys(DISK_FULL, FULL), errno.EIO: "the disk or the network share is failing"}
"""What to do about errors of a disk for which a stage has more specific advice than `main`."""

# Patterns of Lightning's messages about unsuitable settings, and the messages that replace them.
REFUSED = {
    r"`val_check_interval` \((\d+)\) must be less than or equal to the number of the training batches \((\d+)\)": (
        "trainer.val_check_interval is {0}, but an epoch has only {1} batches, so validation would never run. Lower "
        "it, leave it out to validate after each epoch, or set trainer.check_val_every_n_epoch: null to count batches "
        "across epochs"
    ),
    r"Early stopping conditioned on metric `(\S+)` which is not available.*following: (.*)": (
        "trainer.callbacks: EarlyStopping.monitor is {0}, which is not logged; logged metrics are {1}. Metrics that "
        "begin with val/ need data.validation"
    ),
}


def refusal(error: BaseException) -> UserError | None:
    """The error that replaces Lightning's exception about a setting; None for any other exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning."):
        return None
    for pattern, message in REFUSED.items():
        if found := re.search(pattern, str(error), re.DOTALL):
            return ConfigError(message.format(*found.groups()))
    return None


@contextmanager
def unfit_settings() -> Iterator[None]:
    """Context manager for building objects from settings; converts the exceptions of classes to one-line errors."""
    try:
        yield
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        cause: BaseException | None = error  # jsonargparse replaces the exceptions of classes with its own
        while cause is not None and not isinstance(cause, ModuleNotFoundError):
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(_missing(cause) if cause else f"invalid setting: {tidy(str(error))}") from error


def _missing(error: ModuleNotFoundError) -> str:
    """Message about a missing package that a configured class needs. Exceptions of Lightning's loggers lack `name`."""
    text = " ".join(str(error).split())
    extra = next((name for name in EXTRAS if name in (error.name or text).lower()), None)
    return f"{text}: " + (f'pip install "rlhf-lightning[{extra}]"' if extra else "install it, or choose another class")


@contextmanager
def refusals() -> Iterator[None]:
    """Context manager for a stage's run. Exceptions of the user's own code are not changed."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except ProcessExitedException as error:
        raise UserError(
            f"a process of the run died ({error}), and the others were stopped. If it was killed, the machine may have "
            "run out of memory (see the system log); the same command resumes the run."
        ) from error
    except (ValueError, RuntimeError) as error:
        if found := refusal(error):
            raise found from error
        alone = "WORLD_SIZE" not in os.environ and not torch.distributed.is_initialized()
        if isinstance(error, ValueError) or alone or not any(sign in str(error) for sign in LOST):
            raise
        raise UserError(
            f"another process of the run died, or cannot be reached ({str(error).splitlines()[0][:200]}). If it was "
            "killed, the machine may have run out of memory (see the system log); the same command resumes the run."
        ) from error
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise UserError(
            f"{error.filename or 'a file of the run'}: {error.strerror}; {REMEDIES[error.errno]}"
        ) from error
