"""What a refused command prints: the parser's findings in few lines, and mistakes that only show in a whole command."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_lightning.callbacks.checkpoint_io import damage
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.pipeline.plan import read_mapping

NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value type:",
    "Given value: NestedArg",
    "Not a valid subclass of",
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with class_path entry",
    "a dict without class_path but",
)
SHARDED = ("checksums.json", "meta.pt", ".metadata", "latest", "checkpoint")
"""What stands in the folder of a sharded checkpoint, of Lightning or of DeepSpeed."""


def tidy(message: str) -> str:
    """The parser's message without its own types and the attempts that could not fit: key, reason, value."""
    text = re.sub(r"Type .*? expects a function or a callable class: ", "", message)
    text = re.sub(r"[.;]? Got value: (Namespace\(|Write).*", "", text)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    kept = [line if len(line) < 300 else f"{line[:300]}…" for line in lines if line and not line.startswith(NOISE)]
    text = "".join(line + (" " if line.endswith(":") else "; ") for line in dict.fromkeys(kept)).strip("; ")
    if "<class 'float'>" in text or "<class 'int'>" in text:  # no class was meant, whatever else it may be
        text = re.sub(r"Expected a dot import path string: [^;]*; ", "", text)
    if "Expected a dot import path string" in text and "Write a class" not in text:
        text += ". Write a class or function with its module, for example torch.optim.AdamW"
    return text


def read_configs(args: list[str]) -> dict[str, dict[str, Any]]:
    """What the config files hold; one with no mapping is refused by name, which the parser does not say."""
    files = [value for name, value in pairwise(args) if name in ("-c", "--config") and Path(value).is_file()]
    return {file: read_mapping(Path(file)) for file in files}


def check_sections(config: Any) -> None:
    """Refuse settings that are none, and values that Lightning would take though they cannot be meant."""
    for name in ("model", "data"):
        if not hasattr(config[name], "as_dict"):
            raise ConfigError(f"{name}: {config[name]!r} is no mapping of settings; see the files in configs/")
    data = config.data
    held_out = data.validation or getattr(data, "validation_split", None)
    if str(config.get("monitor") or "").startswith("val/") and not held_out:
        raise ConfigError(
            f"--monitor {config.monitor} is measured on validation rows, and there are none: set data.validation"
        )


def check_empty(files: dict[str, dict[str, Any]], config: Any) -> None:
    """Refuse unknown settings of config files that hold an empty mapping; the parser takes them in silence."""
    for file, settings in files.items():
        for section, inner in settings.items():
            unknown = [section] if inner == {} and section not in config else []
            if isinstance(inner, dict) and hasattr(config.get(section), "as_dict"):
                unknown += [f"{section}.{key}" for key in inner if inner[key] == {} and key not in config[section]]
            if unknown:
                raise ConfigError(f"{file}: {unknown[0]} is no setting; the ones there are: --help, or configs/")


def check_checkpoint(path: str | None) -> None:
    """Refuse what `--ckpt_path` cannot name: nothing there, a model folder, a file that is damaged or no checkpoint."""
    if path in (None, "last", "best", "hpc") or str(path).startswith(("registry", "http")):
        return
    place = Path(str(path))
    if not place.exists():
        raise ConfigError(f"--ckpt_path {path}: no such checkpoint (seen from {Path.cwd()})")
    if place.is_dir() and not any((place / name).exists() for name in SHARDED):
        raise ConfigError(
            f"--ckpt_path {path}: a folder, and not that of a checkpoint. To start from a model folder set model.model."
        )
    if found := damage(place):
        raise ConfigError(f"--ckpt_path {path}: damaged, or no checkpoint ({found}); name the one before it")
