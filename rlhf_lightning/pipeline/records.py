"""What the files of a run's folder hold, compared with what is written there, before anything is made of it."""

import json
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import check_format, is_file, read_object

NUMBER = "a number"
LARGEST = 1e300
"""No run has measured more, and it does not fit a float."""
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
    """A JSON file of a run, empty where it is not there; raises `ConfigError` where it holds something else."""
    if not is_there(path):
        return {}
    found = read_object(path)
    check_format(found.get("format"), str(path))
    check_shape(found, shape, str(path))
    return found


def is_there(path: Path) -> bool:
    """Whether a file is there; raises `ConfigError` for a pipe, which would be waited for, a device, or a folder."""
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path}: a link that leads nowhere; restore the file")
    return is_file(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """`manifest.json` of a pipeline, whose stages lie in folders of their own below it; raises `ConfigError`."""
    found = read_record(path, MANIFEST)
    for name in found.get("stages") or {}:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(f"{path}: {name!r} is no name of a stage; restore the file")
    return found


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Refuse a value of a record that is not of the kind that is written there.

    Args:
        value: as read.
        shape: a type, several, `NUMBER`, `[shape]` of all items, or a mapping: of keys (one that ends with `!` must be
            there, any other that is `null` is left out of `value`), or `*` for all of them.
        where: for the message.

    Raises:
        ConfigError: says where, and what stands there.
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
    raise ConfigError(f"{where} is {json.dumps(value)[:80]}, which is not what a run writes; restore the file")
