"""Validates the JSON files in a run's folder before they are used."""

import json
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import check_format, is_file, read_object

NUMBER = "a number"
LARGEST = 1e300
"""Largest integer that is accepted; larger ones may not fit into a float."""
ENTRY = {
    "status!": str,
    "kind": str,
    "inputs!": {"settings": str, "data": {"*": str}, "start": str, "reward": str, "critic": str},
    "configs": [{"path!": str, "hash!": str}],
    "handed": {"*": str},
    "metrics": {"*": NUMBER},
    "seconds": NUMBER,
    "model": str,
    "model_hash": str,
}
MANIFEST = {"name": str, "stages": {"*": ENTRY}}
FACTS = {
    "kind": str,
    "metrics": {"*": NUMBER},
    "steps": NUMBER,
    "seconds": NUMBER,
    "parent": {"stage": str, "hash": str},
    "data": {"*": str},
    "versions": dict,
    "model_hash": str,
    "config_hash": str,
    "start": str,
    "stopped": (str, dict),
}
SAMPLE = {
    "step!": int,
    "prompt!": (str, list),
    "reward!": NUMBER,
    "response!": str,
    "response_tokens!": NUMBER,
    "stop_reason!": str,
}
PREFERENCE = {
    "numbers": {"*": NUMBER},
    "reliability": [{"pairs!": NUMBER, "confidence!": NUMBER, "accuracy!": NUMBER}],
}
FIGURES = {"*": NUMBER}
SUMMARY = {
    "base": dict,
    "sft": dict,
    "policy": dict,
    "samples": [{"prompt!": str, "sft!": str, "policy!": str}],
}


def read_record(path: Path, shape: Any) -> dict[str, Any]:
    """Read a JSON file of a run; empty if it does not exist. Raises `ConfigError` if its content is invalid."""
    if not is_there(path):
        return {}
    found = read_object(path)
    check_format(found.get("format"), str(path))
    check_shape(found, shape, str(path))
    return found


def is_there(path: Path) -> bool:
    """True if a file exists. Raises `ConfigError` for a broken link, a device, a folder, or a pipe, which would "
    "block."""
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path}: this is a broken link; restore the file")
    return is_file(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a pipeline's `manifest.json`. Raises `ConfigError` if a stage name could lead out of the run's folder."""
    found = read_record(path, MANIFEST)
    for name in found.get("stages") or {}:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(f"{path}: {name!r} is not a valid stage name; restore the file")
    return found


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Check that a value of a record has the expected shape.

    Args:
        value: The value as read.
        shape: A type, a tuple of types, `NUMBER`, `[shape]` for a list whose items have that shape, or a mapping from
            keys to shapes. A key that ends with `!` is required; other keys that are null are removed from `value`. The
            key `*` stands for all keys.
        where: Place of the value, for the message.

    Raises:
        ConfigError: If the shape is wrong; the message has the place and the value.
    """
    if isinstance(shape, dict):
        _check_mapping(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            _refuse(value, where)
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{number}]")
    elif shape == NUMBER:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(value, where)
        if isinstance(value, int) and abs(value) > LARGEST:
            _refuse(value, where)
    elif isinstance(value, bool) or not isinstance(value, shape):
        _refuse(value, where)


def _check_mapping(value: Any, shape: dict[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        _refuse(value, where)
    if "*" in shape:
        for key, item in value.items():
            check_shape(item, shape["*"], f"{where}: {key}")
        return
    for key, inner in shape.items():
        name, needed = key.removesuffix("!"), key.endswith("!")
        if needed and name not in value:
            raise ConfigError(f"{where}: {name} is missing; restore the file")
        if value.get(name) is not None or needed:
            check_shape(value[name], inner, f"{where}: {name}")
        else:
            value.pop(name, None)


def _refuse(value: Any, where: str) -> None:
    raise ConfigError(f"{where} is {json.dumps(value)[:80]}, which no run writes; restore the file")
