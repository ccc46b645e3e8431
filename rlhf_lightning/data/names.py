"""Names of data: whether they are here, and data sets of the Hub or on disk that `datasets` loads."""

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_lightning.data.containers import library
from rlhf_lightning.data.files import SUFFIXES, is_saved_dataset, local_files, place
from rlhf_lightning.errors import DataError
from rlhf_lightning.files import check_files_in


def load_saved(folder: str) -> Any:
    """What `save_to_disk` wrote; raises `DataError`."""
    from datasets import load_from_disk

    check_files_in(Path(folder), below=True)
    try:
        return load_from_disk(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: a data set of datasets that cannot be loaded ({reason})") from error


def check_there(source: str) -> None:
    """Whether the path is there, or may be a Hub id instead; raises `DataError`."""
    if "://" in source and not source.startswith("file://"):
        raise DataError(f"{source}: an address; download the file, or give a Hub id like owner/name")
    if local_files(source.partition(":")[0] if is_saved_dataset(place(source).partition(":")[0]) else source) is None:
        name = source.partition(":")[0]
        if name.count("/") != 1 or name.lower().endswith(SUFFIXES) or name.startswith((".", "/", "~")):
            raise DataError(f"{source}: no such file (seen from {Path.cwd()}); give a path or a Hub id like owner/name")


def is_here(source: Any, texts: bool = False) -> bool:
    """Whether a source can be read without the Hub: all files that it names are there.

    `texts`: strings of a list that do not end like files are rows.
    """
    if isinstance(source, str | os.PathLike):
        saved = is_saved_dataset(place(source).partition(":")[0])
        return saved or os.path.exists(place(source)) or bool(glob.glob(place(source), recursive=True))
    items = source.values() if isinstance(source, Mapping) else source if isinstance(source, list | tuple) else []
    names = [item for item in items if isinstance(item, str | os.PathLike)]
    if texts:
        names = [name for name in names if not isinstance(name, str) or name.lower().endswith(SUFFIXES)]
    return all(is_here(name) for name in names) and not is_stream(source)


def is_stream(source: Any) -> bool:
    """Whether a source is read as it comes, once more for each reading."""
    return hasattr(source, "__next__") or (library(source) == "datasets" and not hasattr(source, "__len__"))


def hub_dataset(source: str) -> Any:
    """A data set of the Hub; raises `DataError`."""
    name, _, part = source.partition(":")
    configuration, _, split = part.rpartition("/")
    check_there(source)
    from datasets import load_dataset

    try:
        return load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:
        # What it lists of configurations or splits stands on further lines.
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise DataError(
            f"{source}: neither a file here nor a Hub data set that could be loaded ({reason}); "
            "a configuration and a split are named by owner/name:configuration/split"
        ) from error
