"""Imports what a setting names."""

from importlib import import_module
from typing import Any

from rlhf_lightning.errors import ConfigError


def imported(path: str, setting: str) -> Any:
    """Import the object that a dotted path names.

    Args:
        path: For example `package.module.name`.
        setting: The setting with the path, for the error message.

    Raises:
        ConfigError: If it cannot be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting} {path!r} cannot be imported: {error}") from error
