"""Reads settings files (YAML or JSON), which may come from untrusted sources."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import RepeatedKey, is_file, unique_keys
from rlhf_lightning.types import JSON

MOST = 100_000
"""Largest number of values in a file. A few lines with YAML aliases can expand to billions of values."""


def read_mapping(path: Path, where: str = "") -> dict[str, JSON]:
    """Read a YAML or JSON file with a mapping.

    Args:
        path: The file.
        where: Prefix of the error message.

    Raises:
        ConfigError: If the file cannot be read, or contains something other than a mapping.
    """
    is_json = path.suffix == ".json"
    try:
        there = is_file(path)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    if not there:
        raise ConfigError(f"{where}{path}: no such file (seen from {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique_keys) if is_json else yaml.load(text, UniqueKeys)
    except RepeatedKey as error:
        raise ConfigError(f"{path}:{' ' if is_json else ''}{error}. Remove one of them") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        hint = ". YAML is indented with spaces, not with tabs" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{path}: not valid {'JSON' if is_json else 'YAML'}: {error}{hint}") from None
    if value is None:
        raise ConfigError(
            f"{path}: the file is empty; it must contain a mapping of settings, see the files in configs/"
        )
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: contains a {type(value).__name__}; it must contain a mapping of settings")
    _check_values(value, path)
    return value


def _check_values(settings: dict[str, JSON], path: Path) -> None:
    """Refuse text that cannot be stored in files or file names, and aliases that expand to more than `MOST` values."""
    waiting, count = [(str(key), value) for key, value in settings.items()], 0
    while waiting:
        key, value = waiting.pop()
        count += 1
        if isinstance(value, str) and (found := re.search("[\0\ud800-\udfff]", value)):
            raise ConfigError(f"{path}: {key} contains the character {found[0]!r}, which is not allowed; remove it")
        if count + len(waiting) > MOST:
            raise ConfigError(
                f"{path}: the file has more than {MOST:,} values, counting each repetition by an alias (*name); "
                "shorten it"
            )
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [(f"{key}.{inner}", item) for inner, item in items]


class UniqueKeys(yaml.SafeLoader):
    """Loads YAML like `yaml.safe_load`, but raises `RepeatedKey` for repeated keys instead of keeping the last value.

    Example:
        >>> yaml.load("a: 1", UniqueKeys)
        {'a': 1}
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines and isinstance(key, yaml.ScalarNode):
                raise RepeatedKey(f"{line}: the key {key.value} appears twice, first in line {lines[key.value]}")
            lines[str(key.value)] = line
        return node


def find_line(path: Path, keys: Sequence[str]) -> str:
    """`FILE:LINE` of a key; `FILE` if the line is unknown.

    Args:
        path: The file.
        keys: The enclosing keys and the key itself, outermost first.
    """
    if path.suffix == ".json":
        return str(path)
    node, line = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader), None
    for key in keys:
        found = [pair for pair in getattr(node, "value", ()) if isinstance(pair, tuple) and pair[0].value == key]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return f"{path}:{line}" if line else str(path)
