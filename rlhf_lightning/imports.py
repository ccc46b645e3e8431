"""Imports what a setting names."""

import re
from importlib import import_module
from pathlib import Path
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
        there = elsewhere(path)
        hint = f". Did you mean {there}?" if there else ""
        raise ConfigError(f"{setting} {path!r} cannot be imported: {error}{hint}") from error


def elsewhere(path: str) -> str | None:
    """The full name of this package's class with the name in a wrong path of this package; None if there is none.

    Args:
        path: Dotted path, perhaps as an earlier version had it.
    """
    package, _, name = path.partition(".")
    if package != "rlhf_lightning" or not (name := name.rpartition(".")[2]):
        return None
    root = Path(__file__).parent
    definition = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    # The text is searched, because importing every module would take seconds and need optional packages.
    found = [file for file in sorted(root.rglob("*.py")) if definition.search(file.read_text(encoding="utf-8"))]
    if len(found) != 1:
        return None
    parts = found[0].relative_to(root).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__"), name))
