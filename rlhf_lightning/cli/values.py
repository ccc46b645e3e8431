"""Checks values that have the right type but are not valid: NaN, infinity, null, empty names."""

import argparse
import inspect
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin

from jsonargparse import Namespace

from rlhf_lightning.errors import MOST, ConfigError, check_whole
from rlhf_lightning.imports import imported
from rlhf_lightning.types import JSON

MAY_BE_INFINITE = ("clip_high", "dual_clip", "high", "ratio_max")
"""Bounds that may be infinite, which means no bound."""
MAY_BE_EMPTY = ("data.system",)
"""Settings that may be empty although their default is not empty; an empty system message means none."""
COUNTS: dict[str, tuple[int, int]] = {
    "checkpoint_every": (0, MOST),
    "keep": (1, MOST),
    "trainer.accumulate_grad_batches": (1, MOST),
    "trainer.check_val_every_n_epoch": (1, MOST),
    "trainer.devices": (-1, 1024),
    "trainer.log_every_n_steps": (0, MOST),
    "trainer.max_epochs": (-1, MOST),
    "trainer.max_steps": (-1, MOST),
    "trainer.min_epochs": (0, MOST),
    "trainer.min_steps": (0, MOST),
    "trainer.num_nodes": (1, 1024),
    "trainer.num_sanity_val_steps": (-1, MOST),
    "trainer.reload_dataloaders_every_n_epochs": (0, MOST),
}
"""Ranges of settings that Lightning does not check, or reports with a traceback."""
DURATIONS, UNITS = ("trainer.max_time", "trainer.val_check_interval"), ("weeks", "days", "hours", "minutes", "seconds")
KNOWN = ("rlhf_lightning.", "torch.", "lightning.")
"""Packages with classes whose arguments are checked."""


Setting = JSON | Namespace
"""A parsed value; a class is a `Namespace` of `class_path` and `init_args`."""


def check_values(parser: argparse.ArgumentParser, config: Namespace) -> None:
    """Check the settings of a stage, including those of nested classes.

    Args:
        parser: Parser of the command.
        config: The parsed settings.

    Raises:
        ConfigError: If a value is not valid.
    """
    for action in parser._actions:
        if action.dest in config:
            if isinstance(action, argparse._StoreTrueAction) and not isinstance(config[action.dest], bool):
                raise ConfigError(f"{action.dest} is {config[action.dest]!r}; it must be true or false")
            hint = getattr(action, "_typehint", None)
            takes_none = action.default is None or (_takes_none(hint) if hint is not None else False)
            value = config[action.dest]
            _check(action.dest, value, takes_none, action.default == "")
            for field in fields(kind) if isinstance(value, Namespace | dict) and (kind := _dataclass(hint)) else ():
                if (inner := value.get(field.name)) is None and inner != field.default and not _takes_none(field.type):
                    raise ConfigError(f"{action.dest}.{field.name} is null; it needs a value")


def _check(key: str, value: Setting, takes_none: bool, takes_empty: bool) -> None:
    if value is None and not takes_none:
        raise ConfigError(f"{key} is null; give a value, or leave the line out for the default")
    unbounded = value == math.inf and key.rpartition(".")[2] in MAY_BE_INFINITE
    if isinstance(value, float) and not math.isfinite(value) and not unbounded:
        raise ConfigError(f"{key} is {value}; it must be a finite number")
    if key in DURATIONS and isinstance(value, dict) and (wrong := value.keys() - UNITS):
        raise ConfigError(f"{key}: unknown unit of time {sorted(map(str, wrong))[0]}; units are {', '.join(UNITS)}")
    if key in COUNTS and value is not None and not isinstance(value, str | list):
        check_whole(key, value, *COUNTS[key])
    if value == "" and isinstance(value, str) and not takes_empty and key not in MAY_BE_EMPTY:
        raise ConfigError(f"{key} is empty; give a value, or leave the line out for the default")
    for inner, item, none, empty in _within(key, value):
        _check(inner, item, none, empty)


def _within(key: str, value: Setting) -> Iterator[tuple[str, Setting, bool, bool]]:
    """The settings inside a value, and whether each may be null or empty."""
    if isinstance(value, list | tuple):
        yield from ((f"{key}.{i}", item, True, True) for i, item in enumerate(value))
        return
    entries = _entries(value)
    path = entries.get("class_path")
    if path is None or "init_args" not in entries:
        yield from ((f"{key}.{name}", item, True, True) for name, item in entries.items())
    elif str(path).startswith(KNOWN):
        for name, item in _entries(entries["init_args"]).items():
            found = _parameter(str(path), name)
            none = found is None or found.default is None or _takes_none(found.annotation)
            yield f"{key}.init_args.{name}", item, none, found is None or found.default == ""


def _entries(value: Setting) -> Mapping[str, Setting]:
    """The settings inside a section or a class; empty for any other value."""
    return value if isinstance(value, dict) else vars(value) if isinstance(value, Namespace) else {}


def _parameter(path: str, name: str) -> inspect.Parameter | None:
    """An argument of a class, from the base class that defines it."""
    for base in imported(path, "class_path").__mro__:
        if name in (parameters := inspect.signature(base.__init__).parameters):
            return parameters[name]
    return None


def _dataclass(hint: type | types.UnionType | None) -> type | None:
    """The dataclass in a type hint, or None."""
    return next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)


def _takes_none(hint: type | types.UnionType | str | None) -> bool:
    if hint in (Any, None, type(None), inspect.Parameter.empty):
        return True
    return get_origin(hint) in (Union, types.UnionType) and any(_takes_none(inner) for inner in get_args(hint))
