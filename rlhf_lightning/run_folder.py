"""Protection of a run's folder: one writer at a time, and only results of earlier runs are overwritten."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file, real_path
from rlhf_lightning.types import JSON

if sys.platform != "win32":
    import fcntl

MARK = "run.lock"
"""File that marks a folder as a run's. The process that writes to the folder locks it and stores its process id in it.
"""
STAGE_RESULTS = (
    "model",
    "merged",
    "checkpoints",
    "reference",
    "stage.json",
    "config.yaml",
    "sources.json",
    "metrics.csv",
    "samples.jsonl",
    "heldout.jsonl",
    "warnings.jsonl",
    "predictions.jsonl",
    "preference_report.json",
    "report.html",
)
PIPELINE_RESULTS = ("manifest.json", "pipeline.yaml", "report.html")
Nested = JSON | Mapping[str, "Nested"] | Sequence["Nested"] | os.PathLike[str]
"""Settings with paths."""
_held: dict[Path, int] = {}


def is_first_process() -> bool:
    """True if this is the first process of a run, according to the environment variables that launchers set."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def claim(root: Path, results: Iterable[str], patience: float = 0.0) -> None:
    """Lock a folder for writing until the `claims` context or this process ends; a crash leaves no lock.

    Args:
        root: The folder; created if missing.
        results: Names of the files and folders that a run writes there.
        patience: Seconds to wait for another writer to end.

    Raises:
        ConfigError: If another process is writing there, a result exists that no run has written, or a path of a file
            is not a regular file.
    """
    place = real_path(root)
    if place in _held:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        unmarked = not (root / MARK).exists()
        if unmarked and (foreign := [name for name in results if os.path.lexists(root / name)]):
            raise ConfigError(
                f"{root / foreign[0]} exists, was not written by rlhf, and would be overwritten. Choose another "
                "folder for the run, or move the file away."
            )
        for name in results:
            if Path(name).suffix:
                is_file(root / name)
        _held[place] = _locked(root, patience)
    except OSError as error:
        raise ConfigError(f"{root}: cannot be written to ({error.strerror}); choose another folder") from None


def _locked(root: Path, patience: float) -> int:
    is_file(root / MARK)
    file = os.open(root / MARK, os.O_RDWR | os.O_CREAT, 0o644)
    if sys.platform == "win32":
        return file
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            writer = os.pread(file, 100, 0).decode(errors="replace").strip()
            if time.monotonic() >= until:
                os.close(file)
                raise ConfigError(
                    f"{root}: process {writer or '?'} is writing to it. Wait until it ends, stop it, or choose another "
                    "folder."
                ) from None
            time.sleep(0.2)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


@contextmanager
def claims() -> Iterator[None]:
    """Context manager that releases the folders claimed inside it."""
    before = set(_held)
    try:
        yield
    finally:
        for place in set(_held) - before:
            os.close(_held.pop(place))


def refuse_inputs_in(root: Path, results: Iterable[str], settings: Nested) -> None:
    """Check that no setting names a file or folder that the run itself would overwrite.

    Args:
        root: Folder of the run.
        results: Names of the files and folders that a run writes there.
        settings: Nested mappings and lists with paths.

    Raises:
        ConfigError: If a setting does; the message has its name and the path.
    """
    places = [real_path(root / name) for name in results]
    for key, text in _texts(settings, ""):
        path = Path(text.partition("{")[0]).expanduser()
        try:
            if not text or not path.exists():
                continue
        except (OSError, ValueError):  # not a path: too long, or with a null character
            continue
        found = real_path(path)
        if taken := next((place for place in places if found.is_relative_to(place)), None):
            raise ConfigError(
                f"{key} is {text}, which is inside {taken}, where this run writes its results. Choose another "
                "trainer.default_root_dir."
            )


def _texts(value: Nested, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str | os.PathLike):
        yield key, str(value)
