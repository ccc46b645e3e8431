"""The folder that a run writes to: one writer at a time, and nothing in it is replaced that no run has made."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file

if sys.platform != "win32":
    import fcntl

MARK = "run.lock"
"""Says that a run has made what is in the folder; locked and with the writer's process id while one writes."""
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
    "warnings.jsonl",
    "predictions.jsonl",
    "preference_report.json",
    "report.html",
)
PIPELINE_RESULTS = ("manifest.json", "pipeline.yaml", "report.html")
_held: dict[Path, int] = {}


def is_first_process() -> bool:
    """Whether this is the first of a run's processes, by what its launcher tells each of them."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def claim(root: Path, results: Iterable[str], patience: float = 0.0) -> None:
    """Become the writer of a folder, until `claims` or this process ends; a crash leaves no lock behind.

    Args:
        root: the folder, which is made. results: names that a run writes there.
        patience: seconds to wait for a writer that is about to end.

    Raises:
        ConfigError: another process writes there, or one of the results is there and no run has made it.
    """
    place = root.resolve()
    if place in _held:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        unmarked = not (root / MARK).exists()
        if unmarked and (foreign := [name for name in results if os.path.lexists(root / name)]):
            raise ConfigError(
                f"{root / foreign[0]} is there, and no run of rlhf has made it: it would be replaced. Name another "
                "folder for the run, or move it away."
            )
        _held[place] = _locked(root, patience)
    except OSError as error:
        raise ConfigError(f"{root}: cannot be written to ({error.strerror}); name another folder") from None


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
                    f"{root}: process {writer or '?'} is writing to it. Wait for its end, stop it, or name another "
                    "folder."
                ) from None
            time.sleep(0.2)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


@contextmanager
def claims() -> Iterator[None]:
    """Around a command: folders that are claimed inside are free for others at its end."""
    before = set(_held)
    try:
        yield
    finally:
        for place in set(_held) - before:
            os.close(_held.pop(place))


def refuse_inputs_in(root: Path, results: Iterable[str], settings: Any) -> None:
    """Refuse a setting that names a file or folder which the run itself would replace.

    Args:
        root: of the run. results: names that it writes there. settings: mappings and lists of them, with paths.

    Raises:
        ConfigError: names the setting and the path.
    """
    places = [(root / name).resolve() for name in results]
    for key, text in _texts(settings, ""):
        path = Path(text.partition("{")[0]).expanduser()
        try:
            if not text or not path.exists():
                continue
        except (OSError, ValueError):  # no path at all: too long, or with a null
            continue
        found = path.resolve()
        if taken := next((place for place in places if found.is_relative_to(place)), None):
            raise ConfigError(
                f"{key} {text}: it is in {taken}, where this run would write its own results. Name another "
                "trainer.default_root_dir."
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str | os.PathLike):
        yield key, str(value)
