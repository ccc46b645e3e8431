"""Options that several commands share, and checks of their values before anything is loaded."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf_lightning.cli import suggestions as meant
from rlhf_lightning.errors import MOST, ConfigError, check_dtype, check_seed, check_whole
from rlhf_lightning.files import visible

MAY_BE_EMPTY = ("stop", "system")
"""Flags whose value may be empty, which means none."""
MANY = 2**16
"""Largest number of responses per prompt; all of them are kept in memory."""


COUNTS = (
    *((name, 1, MANY) for name in ("samples", "n")),
    ("best_of", 0, MANY),
    *((name, 1, MOST) for name in ("max_tokens", "limit", "batch_size")),
)


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, without the usage.

    Example:
        >>> parser = Parser(prog="rlhf score")
    """

    def error(self, message: str) -> NoReturn:
        """Print the message with a suggestion for a misspelled flag, and exit with code 2."""
        if message.startswith("unrecognized arguments: "):
            flags = {flag for action in self._actions for flag in action.option_strings}
            first = message.partition(": ")[2].split()[0].partition("=")[0]
            close = meant.like(first, flags) if first.startswith("-") else None
            message += f"; did you mean {close}?" if close else ""
        print(visible(f"error: {message}. {self.prog} --help lists all options"), file=sys.stderr)
        sys.exit(2)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        names = not isinstance(action, argparse._SubParsersAction)  # its values are all arguments of the subcommand
        if arg_string == "" and names and action.dest not in MAY_BE_EMPTY:
            raise argparse.ArgumentError(action, "the value is empty")
        return super()._get_value(action, arg_string)


def device_of(name: str | None) -> str:
    """The device with a name.

    Args:
        name: Name of the device; by default a GPU if there is one.

    Raises:
        ConfigError: If there is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: unknown device; use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ConfigError(
            f"--device {name}: this machine has {f'only {there} CUDA devices' if there else 'no CUDA device'}"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: this machine has no MPS device")
    return name


def check_options(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for numbers and dtypes that are not valid, and for output files that cannot be written."""
    if (dtype := getattr(options, "dtype", None)) is not None:
        check_dtype(dtype)
    for name, least, most in COUNTS:
        if (value := getattr(options, name, None)) is not None:
            check_whole(f"{'-' if len(name) == 1 else '--'}{name}", value, least, most)
    if hasattr(options, "seed"):
        check_seed("--seed", options.seed)
    for name in ("output", "summary"):
        if (path := getattr(options, name, None)) is not None:
            check_writable(f"--{name}", path, options.overwrite)


def add_weight_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for dtype and device of a model's weights."""
    parser.add_argument(
        "--dtype", default="float32", help="dtype of the weights: float32, bfloat16 or float16 (default: float32)"
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: a GPU if there is one)")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`, for commands that write to a given file."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file (default: refuse)")


def column_names(pairs: Sequence[str] | None) -> dict[str, str]:
    """The mapping of `--columns OURS=YOURS`.

    Args:
        pairs: The values of the flag.

    Raises:
        ConfigError: If one has another form.
    """
    columns: dict[str, str] = {}
    for pair in pairs or ():
        ours, separator, theirs = pair.partition("=")
        if not (ours and separator and theirs):
            raise ConfigError(f"--columns {pair}: write OURS=YOURS, for example prompt=question")
        columns[ours] = theirs
    return columns


def check_writable(name: str, path: Path, overwrite: bool = False) -> None:
    """Check that an output file can be written, before the work begins.

    Args:
        name: Name of the option, for the message.
        path: The file.
        overwrite: Allow an existing file.

    Raises:
        ConfigError: If the file exists or cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{name} {path}: this is a folder; give a file in it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{name} {path}: this is a device or pipe; give a file, or leave out {name} to print")
    if path.exists() and path.stat().st_size and not overwrite:
        raise ConfigError(f"{name} {path}: the file exists; give another file, or replace it with --overwrite")
    parent = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not os.access(parent, os.W_OK) or not (parent.is_dir() or parent == path.absolute()) or _virtual(parent):
        raise ConfigError(f"{name} {path}: {parent} is not a writable folder; choose another path")


def _virtual(path: Path) -> bool:
    return path.parts[1:2] in (("proc",), ("sys",))
