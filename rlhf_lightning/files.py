"""File utilities: hashes, atomic writes, JSON, CSV and text that is safe to print. Imports no heavy libraries."""

import csv
import errno
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import JSON

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MODEL_CONFIGS = ("config.json", "adapter_config.json")
"""Config files of models and adapters; a model folder has one of them."""


def real_path(path: str | Path) -> Path:
    """The absolute path with links resolved. Unlike `Path.resolve`, it does not raise for circular links."""
    return Path(os.path.realpath(path))


def hash_folder(folder: Path) -> str:
    """SHA-256 of the names and contents of a model folder's files, without `stage.json` and the model card.

    People may edit the card without changing the model.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("stage.json", "README.md")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_model(place: Path) -> str | None:
    """SHA-256 of a model folder, or of a model that is a single file; None if it does not exist."""
    return hash_folder(place) if place.is_dir() else hash_file(place) if is_file(place) else None


_KINDS = {
    stat.S_IFBLK: "device",
    stat.S_IFCHR: "device",
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
}
_STREAM = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")


def is_open_stream(path: str | os.PathLike[str]) -> bool:
    """True if a path is an open descriptor other than a file, such as a shell's `<(…)` or standard input."""
    return bool(_STREAM.fullmatch(os.fspath(path))) and not os.path.isfile(path) and os.path.exists(path)


def is_url(source: str) -> bool:
    """True for the address of a server, in place of a path."""
    return source.startswith(("http://", "https://"))


def is_file(path: str | os.PathLike[str]) -> bool:
    """True if a path is a file, False if it does not exist.

    Raises:
        ConfigError: If the path is a folder, pipe, socket or device. Reading from some of these could block forever.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    if not stat.S_ISREG(mode):
        kind = (
            "stream, which can be read only once" if is_open_stream(path) else _KINDS.get(stat.S_IFMT(mode), "device")
        )
        raise ConfigError(f"{os.fspath(path)}: this is a {kind}; it must be a file")
    return True


LFS_POINTER = b"version https://git-lfs.github.com/"
"""Beginning of the small text that a clone without Git LFS has in the place of a large file."""
LFS_REMEDY = "this is a pointer of Git LFS, not the file itself; fetch it with git lfs pull"


def is_model_folder(folder: Path) -> bool:
    """True if a folder has the config of a model or of an adapter."""
    return any((folder / name).exists() for name in MODEL_CONFIGS)


def adapted_base(folder: Path) -> JSON:
    """The base model named in the `adapter_config.json` of a folder, or None."""
    return read_object(folder / "adapter_config.json").get("base_model_name_or_path")


def check_path(what: str, source: str) -> Path:
    """Return the source of a model or tokenizer as a path, after checking that it exists if it cannot be a Hub id.

    Args:
        what: Name of the setting, for the message.
        source: Path or Hub id.

    Raises:
        ConfigError: If the source can only be a path, and it does not exist.
    """
    path = Path(source).expanduser()
    if (path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1) and not path.exists():
        raise ConfigError(f"{what}: no such folder (seen from {Path.cwd()})")
    return path


def check_model(what: str, source: str) -> None:
    """Check that the source of a model is a Hub id, a model folder or a file.

    Args:
        what: Name of the setting, for the message.
        source: Path or Hub id.

    Raises:
        ConfigError: If the path does not exist, or is a folder without a config, a pipe, or a device.
    """
    path = check_path(what, source)
    if path.is_dir() and not is_model_folder(path):
        inside = f"; did you mean {path / 'model'}?" if (path / "model").is_dir() else ""
        raise ConfigError(f"{what}: the folder has neither config.json nor adapter_config.json{inside}")
    if path.exists() and not path.is_dir():
        is_file(path)


def check_files_in(folder: Path, below: bool = False) -> None:
    """Raise `ConfigError` if a folder contains anything other than files and folders.

    Args:
        folder: The folder.
        below: Check its subfolders too.
    """
    for path in folder.rglob("*") if below else folder.iterdir():
        if not path.is_dir():
            is_file(path)


def read_object(path: Path, unique: bool = True) -> dict[str, JSON]:
    """Read a JSON file that contains an object.

    Args:
        path: The file.
        unique: Refuse repeated keys; parsers keep only the last of them.

    Raises:
        ConfigError: If the file cannot be read, or contains something other than an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read as JSON ({reason}); restore the file") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: contains a {type(value).__name__}, not an object; restore the file")
    return value


class RepeatedKey(ValueError):
    """A key appears twice in a mapping, so its value is ambiguous."""


def unique_keys(pairs: Sequence[tuple[str, JSON]]) -> dict[str, JSON]:
    """Hook for `json.loads` that raises `RepeatedKey` for repeated keys; by default the last value wins silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"the key {twice!r} appears twice in an object")
    return found


FORMAT = 1
"""Version of the format of checkpoints and of the records of runs and models."""


def check_format(found: JSON, what: str) -> None:
    """Check that this version can read a record. A record without a number is older than format numbers, and is read.

    Args:
        found: The format number in the record, or None.
        what: Name of the record, for the message.

    Raises:
        ConfigError: If the record has another format.
    """
    number = found if isinstance(found, int) and not isinstance(found, bool) else None
    if found is None or number == FORMAT:
        return
    newer = number is not None and number > FORMAT
    remedy = "update rlhf-lightning" if newer else "use the version that wrote it, or train again"
    raise ConfigError(f"{what} has format {found!r}, but this version reads format {FORMAT}: {remedy}")


def read_record(path: Path) -> dict[str, JSON]:
    """Read a JSON object that a run wrote; raises `ConfigError` if it cannot be read or has another format."""
    value = read_object(path)
    check_format(value.get("format"), str(path))
    return value


def read_stage(folder: str | Path) -> dict[str, JSON]:
    """Read the `stage.json` inside a model folder, or next to a run's `model` folder; empty if there is none.

    Args:
        folder: The model folder.
    """
    place = Path(str(folder)).expanduser()
    if str(folder) and place.is_dir():
        # Only for `model`: a base model in a run's folder must not get the record of the run.
        own = real_path(place).name == "model"
        for path in (place / "stage.json", *([real_path(place).parent / "stage.json"] if own else [])):
            if is_file(path):
                return read_record(path)
    return {}


def scratch_of(path: Path, tag: str = "partial") -> Path:
    """Temporary path to which a file or folder is written before it is renamed.

    Args:
        path: Its final path.
        tag: Distinguishes the temporary files of processes that may write the same file.
    """
    return path.with_name(f".{path.name}.{tag}")


@contextmanager
def replacing(path: Path, tag: str = "partial") -> Iterator[Path]:
    """Context manager that yields a temporary path and finally renames it, so that no reader sees a partial file.

    Args:
        path: The file.
        tag: See `scratch_of`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(path, tag)
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Context manager that lets one process at a time make a file or folder; others wait.

    The lock is a file next to it, and ends with the process, also if that is killed. On Windows there is none.

    Args:
        path: The file or folder.

    Raises:
        OSError: If the lock cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically; see `replacing`."""
    with replacing(path) as scratch:
        scratch.write_bytes(text.encode())


def write_text(path: Path, text: str) -> None:
    """Write a file that the user named, atomically.

    Args:
        path: The file.
        text: Its content.

    Raises:
        ConfigError: If it cannot be written, for example because the disk is full.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); free disk space, or choose another path"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; see `replacing`."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def duration(seconds: JSON) -> str:
    """Seconds as readable text, such as `2 min 5 s`; a dash for anything that is not a number."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{left} s"


_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Characters that change the direction of text, so that it is displayed in another order than it is stored."""
_CONTROL = re.compile(f"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_BIDI}]")


def visible(text: str) -> str:
    """Escape control characters, which a terminal would interpret and an HTML page cannot contain."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def as_json(value: Any, indent: int | None = None) -> str:
    """Readable JSON, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def table_cell(value: T) -> T | str:
    """Make a value safe for a CSV file: prefix text that a spreadsheet would evaluate as a formula with an apostrophe.

    Numbers stay unchanged, including numbers given as text. `table_value` reverses this.
    """
    return f"'{value}" if isinstance(value, str) and _is_formula(value.lstrip("'")) else value


def table_value(text: str) -> str:
    """The inverse of `table_cell`."""
    return text[1:] if text.startswith("'") and _is_formula(text.lstrip("'")) else text


def read_table(stream: Iterable[str]) -> Iterator[dict[str, str]]:
    """Read the rows of a CSV file as dicts, with the values that were given to `table_cell`."""
    lines = csv.reader(stream)
    columns = [table_value(name) for name in next(lines, [])]
    for line in lines:
        yield dict(zip(columns, map(table_value, line), strict=False))


def _is_formula(text: str) -> bool:
    if not text.startswith(("=", "@", "+", "-", "\t", "\r", "\n", "＝", "＋", "－", "＠")):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
