"""Writes checkpoint files atomically, and verifies them before reading."""

import errno
import io
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from rlhf_lightning.checkpointing.quantized_state import as_plain, as_quantized
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.files import read_object, replacing, scratch_of, write_json
from rlhf_lightning.rank_watch import undisturbed

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from lightning.fabric.utilities.types import _PATH

    from rlhf_lightning.types import JSON, StateDict

log = logging.getLogger(__name__)
VERSION = "pytorch-lightning_version"  # the key that Lightning checks first
CHECKSUMS = "checksums.json"
STEP = re.compile(r"step=(\d+)\.ckpt")


class DamagedCheckpoint(UserError):
    """A checkpoint was truncated or altered after it was written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes `.NAME.partial` in the same folder, syncs it to disk and renames it; verifies a file before loading it.

    Lightning's own `CheckpointIO` writes to the system's temporary folder, and copies the file if that is on another
    disk; a run killed during the copy leaves a partial file. The checksums are those of the zip format, which
    `torch.save` writes and `torch.load` does not verify. So any torch checkpoint can be verified, and checkpoints
    written by this class can be opened by any tool.

    Example:
        >>> io = AtomicCheckpointIO()
        >>> trainer = Trainer(plugins=[io])  # doctest: +SKIP
    """

    def save_checkpoint(
        self, checkpoint: "StateDict", path: "_PATH", storage_options: "dict[str, JSON] | None" = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: The content.
            path: The file.
            storage_options: See Lightning.

        Raises:
            UserError: If the disk is full or the folder cannot be written to.
        """
        if "optimizer_states" in checkpoint:
            checkpoint = {**checkpoint, "optimizer_states": as_plain(checkpoint["optimizer_states"])}
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        stream: _Stream | None = None
        try:
            with undisturbed(), replacing(target) as scratch, _Stream(io.FileIO(scratch, "wb")) as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:
            # torch's exception for a failed write does not contain the reason.
            reason = error if isinstance(error, OSError) else stream and stream.error
            if not reason:
                raise
            raise UserError(
                f"{target}: the checkpoint cannot be written ({reason.strerror}). Free disk space or choose another "
                "--trainer.default_root_dir; the same command resumes from the previous checkpoint."
            ) from error

    def load_checkpoint(
        self,
        path: "_PATH",
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> "StateDict":
        """Read a checkpoint.

        Args:
            path: The file, or a URL.
            map_location: See `torch.load`.
            weights_only: Read only tensors and plain values; None counts as True.

        Raises:
            DamagedCheckpoint: If the file was truncated or altered.
            UserError: If the file is not a checkpoint of a Lightning run, or if it needs torchao, which is missing.
        """
        if "://" not in str(path) and Path(path).is_file() and (found := damage(Path(path))):
            raise DamagedCheckpoint(f"{path}: the checkpoint is damaged ({found}); use an earlier one, or start over")
        # With Lightning's default, a checkpoint from a URL could run code.
        plain = True if weights_only is None else weights_only
        try:
            state = super().load_checkpoint(path, map_location, plain)
        except UnpicklingError as error:
            raise UserError(
                f"{path}: the checkpoint contains more than tensors and plain values; it is not opened, because it "
                "could run code"
            ) from error
        if Path(path).name.startswith("."):
            return state  # bare weights, which Lightning's forking launcher uses to return what its processes trained
        if not (isinstance(state, dict) and isinstance(state.get("state_dict"), dict) and VERSION in state):
            raise UserError(f"{path}: not a checkpoint of a Lightning run; give one from runs/NAME/checkpoints")
        if "optimizer_states" in state:
            state["optimizer_states"] = as_quantized(state["optimizer_states"])
        return state


class _Stream(io.BufferedWriter):
    """A file that records why a write failed."""

    error: OSError | None = None

    def write(self, data: "ReadableBuffer") -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def damage(path: Path) -> str | None:
    """Check a checkpoint file or folder for damage.

    Returns:
        A description of the damage; None for an intact checkpoint and for a folder without checksums.

    Raises:
        UserError: If the checkpoint cannot be read, so that it is unknown whether it is damaged.
    """
    try:
        return _folder_damage(path) if path.is_dir() else _file_damage(path)
    except OSError as error:
        # Not damage: the run would resume from an earlier checkpoint, and remove this one.
        raise UserError(
            f"{path}: the checkpoint cannot be read ({error.strerror}). Make it readable and run the same command "
            "again, or remove it to use an earlier one."
        ) from error


def _file_damage(path: Path) -> str | None:
    if not path.is_file():
        return "no file"  # for example a pipe, where reading could wait forever
    with open(path, "rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                broken = archive.testzip()
            torch._C.PyTorchFileReader(str(path))  # checks headers that Python's reader does not
        except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, zlib.error, NotImplementedError, ValueError) as e:
            # zipfile raises BadZipFile if it cannot read the end of a file.
            failed = e.__context__ if isinstance(e, zipfile.BadZipFile) else e
            if isinstance(failed, OSError) and failed.errno not in (None, errno.EINVAL):
                raise failed from None
            # Everything else means damage; EINVAL is a seek before the start of the file, to a damaged offset.
            return f"{e}".partition(". ")[0].rstrip(".").lower() or type(e).__name__
    return f"the checksum of {broken} differs" if broken else None


def _folder_damage(folder: Path) -> str | None:
    if not (folder / CHECKSUMS).is_file():
        return None
    try:
        checksums = read_object(folder / CHECKSUMS)
    except ConfigError as error:
        if isinstance(error.__context__, OSError):
            raise
        return f"{CHECKSUMS} cannot be read"
    for name, wanted in checksums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != wanted:
            return f"the checksum of {name} differs"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


@contextmanager
def folder_of_shards(target: "_PATH", strategy: Strategy) -> Iterator[Path]:
    """Context manager in which all ranks write their shards of a checkpoint folder, which is put in place as a whole.

    Args:
        target: Final path, which need not be the same on all ranks; that of rank 0 counts.
        strategy: Strategy of the run, whose ranks wait for each other.

    Yields:
        The folder to write to, next to the final path. An error leaves it there, and an earlier checkpoint as it was.
    """
    final = Path(strategy.broadcast(target))
    scratch = scratch_of(final)
    if strategy.is_global_zero:
        remove(scratch)  # of an interrupted run
    strategy.barrier("cleared")
    yield scratch
    strategy.barrier("saved")
    if strategy.is_global_zero:
        _finish(scratch, final)
    strategy.barrier("finished")


def _finish(scratch: Path, target: Path) -> None:
    """Write the checksums of all files, sync the files to disk, and rename the folder to its target."""
    files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
    write_json(scratch / CHECKSUMS, {str(path.relative_to(scratch)): _checksum(path) for path in files})
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    remove(target)
    os.replace(scratch, target)


def remove(path: Path) -> None:
    """Remove a checkpoint file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints `step=N.ckpt` of a folder with their steps, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step=*.ckpt") if (match := STEP.fullmatch(path.name))]
    return sorted(found, reverse=True)


def candidates(folder: Path) -> list[Path]:
    """Checkpoints to resume from, best first: `step=N.ckpt` by step, then others by modification time."""
    ours = [path for _, path in saved_steps(folder)]
    others = [path for path in folder.glob("*.ckpt") if path not in ours]
    return ours + sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint or None, and a description of the damage of each newer one."""
    wrong: list[str] = []
    for path in candidates(folder):
        found = damage(path)
        if found is None:
            return path, wrong
        wrong.append(f"{path} is damaged ({found})")
    return None, wrong
