"""Names of data: checks if they are on this machine, and loads datasets from the Hub or from disk."""

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.data.containers import Container, library
from rlhf_lightning.data.files import SUFFIXES, is_saved_dataset, local_files, place
from rlhf_lightning.data.mixing import Mixture
from rlhf_lightning.data.task_sources import check_task, is_task, is_task_installed
from rlhf_lightning.errors import DataError
from rlhf_lightning.files import check_files_in

if TYPE_CHECKING:
    import datasets


def load_saved(folder: str) -> "datasets.Dataset | datasets.DatasetDict":
    """Load a dataset that `save_to_disk` wrote.

    Raises:
        DataError: If it cannot be loaded.
    """
    from datasets import load_from_disk

    check_files_in(Path(folder), below=True)
    try:
        return load_from_disk(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: a dataset saved with save_to_disk, but it cannot be loaded ({reason})") from error


def check_there(source: str) -> None:
    """Raise `DataError` unless the path exists, is a task of another package, or may be a Hub id."""
    if is_task(source):
        check_task(source)
        return
    if "://" in source and not source.startswith("file://"):
        raise DataError(f"{source}: this is a URL; download the file, or give a Hub id like owner/name")
    if local_files(source.partition(":")[0] if is_saved_dataset(place(source).partition(":")[0]) else source) is None:
        name = source.partition(":")[0]
        if name.count("/") != 1 or name.lower().endswith(SUFFIXES) or name.startswith((".", "/", "~")):
            raise DataError(f"{source}: no such file (seen from {Path.cwd()}); give a path or a Hub id like owner/name")


def is_here(source: Container, texts: bool = False) -> bool:
    """True if a source can be read without the Hub, because all files and tasks that it names exist.

    Args:
        source: The source.
        texts: If True, strings in a list are rows unless they end like file names.
    """
    if (mixture := Mixture.of(source)) is not None:
        return all(is_here(one.source, texts) for one in mixture.sources)
    if isinstance(source, str) and is_task(source):
        return is_task_installed(source)
    if isinstance(source, str | os.PathLike):
        saved = is_saved_dataset(place(source).partition(":")[0])
        return saved or os.path.exists(place(source)) or bool(glob.glob(place(source), recursive=True))
    items = source.values() if isinstance(source, Mapping) else source if isinstance(source, list | tuple) else []
    names = [item for item in items if isinstance(item, str | os.PathLike)]
    if texts:
        names = [
            name for name in names if not isinstance(name, str) or name.lower().endswith(SUFFIXES) or is_task(name)
        ]
    return all(is_here(name) for name in names) and not is_stream(source)


def is_stream(source: Container) -> bool:
    """True if a source is read lazily, and again each time."""
    return hasattr(source, "__next__") or (library(source) == "datasets" and not hasattr(source, "__len__"))


def hub_dataset(source: str) -> "datasets.Dataset":
    """Load a dataset from the Hub.

    Raises:
        DataError: If it cannot be loaded.
    """
    name, _, part = source.partition(":")
    configuration, _, split = part.rpartition("/")
    check_there(source)
    from datasets import load_dataset

    try:
        return load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:
        # Joined into one line, because the message lists configurations and splits on further lines.
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise DataError(
            f"{source}: neither a local file nor a dataset on the Hub that can be loaded ({reason}); "
            "write a configuration and a split as owner/name:configuration/split"
        ) from error
