"""Checks a command and its config files before anything is built from them."""

import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from jsonargparse import Namespace

from rlhf_lightning import errors
from rlhf_lightning.checkpointing.io import candidates, damage, newest_whole
from rlhf_lightning.cli import suggestions as meant
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file
from rlhf_lightning.types import JSON
from rlhf_lightning.yaml_files import find_line, read_mapping

SHARDED = ("checksums.json", "meta.pt", ".metadata", "latest", "checkpoint")
"""Files that identify the folder of a sharded checkpoint, of Lightning or DeepSpeed."""


CONFIG_FLAGS = ("-c", "--config", "--model", "--data", "--trainer")
SECTIONS = ("model", "data", "trainer")


def read_configs(args: list[str]) -> dict[str, dict[str, JSON]]:
    """Read the config files of a command, by path; raises `ConfigError` for a file that is not a mapping."""
    given = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("-") else [arg])]
    named = [(name, value) for name, value in pairwise(given) if name in CONFIG_FLAGS]
    for name, value in named:
        if (
            name not in ("-c", "--config")
            and os.path.isfile(value)
            and Path(value).suffix not in (".yaml", ".yml", ".json")
        ):
            inner = "data.train" if name == "--data" else "model.model"
            raise ConfigError(f"{name} {value}: {name} needs a YAML file with a section; did you mean --{inner}?")
    there = {name: os.path.exists if name in CONFIG_FLAGS[:2] else os.path.isfile for name in CONFIG_FLAGS}
    files = {value: read_mapping(Path(value)) for name, value in named if there[name](value)}
    return {value: files[value] for name, value in named if value in files and name in CONFIG_FLAGS[:2]}


def check_keys(
    files: Mapping[str, dict[str, JSON]],
    known: set[str],
    kind: str,
    commands: Iterable[str],
    kinds: Mapping[str, tuple[str, str]],
) -> None:
    """Refuse unknown keys in config files; the message names file and line.

    Args:
        files: Content of the config files, by path.
        known: All settings, as dotted names.
        kind: Kind of the stage.
        commands: Commands; a config file that precedes the command may have a section for each.
        kinds: All kinds of stages, with the classes of their module and data module.

    Raises:
        ConfigError: If a key is unknown, or a section is not a mapping. The parser would ignore an empty section.
    """
    for file, settings in files.items():
        if isinstance(settings.get("stages"), list):
            raise ConfigError(f"{file}: this is a pipeline file; run it with rlhf pipeline {file}")
        of_commands = [inner for name in commands if isinstance(inner := settings.get(name), dict)]
        for section, inner in ((s, i) for part in (settings, *of_commands) for s, i in part.items()):
            of_file = isinstance(inner, str) and os.path.isfile(inner)
            if section in SECTIONS and not isinstance(inner, dict) and not of_file:
                raise ConfigError(
                    f"{find_line(Path(file), [section])}: {section} is {inner!r}; it must be a mapping of settings, or "
                    "the path of a file with one"
                )
        for section, inner in settings.items():
            if section in commands:
                continue
            if section in SECTIONS and isinstance(inner, dict):
                names = {f"{section}.{key}": [section, str(key)] for key in inner}
            else:
                names = {str(section): [str(section)]}
            for name, path in names.items():
                if name not in known:
                    raise ConfigError(f"{find_line(Path(file), path)}: {_no_setting(name, known, kind, kinds)}")


def _no_setting(name: str, known: set[str], kind: str, kinds: Mapping[str, tuple[str, str]]) -> str:
    close, (section, _, inner) = meant.setting(name, known), name.partition(".")
    place = 0 if section == "model" else 1
    others = [other for other in kinds if other != kind and inner in meant.arguments(kinds[other][place])]
    if section not in known:
        sections = ", ".join(sorted(k for k in known if "." not in k))
        hint = f"did you mean {close}?" if close else f"settings are {sections}"
    elif others:
        hint = f"it is a setting of rlhf {' and rlhf '.join(others)}; is the config for that stage?"
    elif close:
        hint = f"did you mean {close}?"
    else:
        there = ", ".join(sorted(k.partition(".")[2] for k in known if k.startswith(f"{section}.")))
        hint = f"settings are {there}"
    return f"{name} is not a setting of rlhf {kind}; {hint}"


def check_sections(config: Namespace) -> None:
    """Raise `ConfigError` for sections that are not mappings, and for contradictory settings that Lightning accepts."""
    for name in ("model", "data"):
        if not hasattr(config[name], "as_dict"):
            raise ConfigError(
                f"{name} is {config[name]!r}; it must be a mapping of settings, see the files in configs/"
            )
    data, trainer = config.data, config.trainer
    if trainer.model_registry is not None:
        raise ConfigError("trainer.model_registry needs Lightning's cloud, which is not supported; remove it")
    held_out = data.validation or getattr(data, "validation_split", None)
    if str(config.get("monitor") or "").startswith("val/") and not held_out:
        raise ConfigError(
            f"--monitor {config.monitor} is a validation metric, but there are no validation rows; set data.validation"
        )
    if config.get("monitor") and trainer.enable_checkpointing is False:
        raise ConfigError(
            f"--monitor {config.monitor} saves checkpoints, but trainer.enable_checkpointing is false; leave out one"
        )
    if config.get("monitor_mode") == "max" and not config.get("monitor"):
        raise ConfigError("--monitor_mode max has no effect without --monitor; give the metric with --monitor")
    if trainer.num_nodes > 1 and not any(name in os.environ for name in NODES):
        raise ConfigError(
            f"trainer.num_nodes is {trainer.num_nodes}, but the other machines are unknown, so the run would wait "
            "forever. Start it on each machine with torchrun or Slurm, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )


def check_trained(config: Namespace) -> None:
    """Raise `ConfigError` for a `fit` without steps, which would export the start weights as its result."""
    trainer = config.trainer
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if trainer.get(name) is not None and float(trainer[name]) == 0 and not isinstance(trainer[name], bool):
            raise ConfigError(
                f"trainer.{name} is 0: nothing would be trained, and model/ would be a copy of the start model; set it "
                "above 0"
            )
    optimizer = config.model.get("optimizer")
    arguments = (optimizer or {}).get("init_args") if hasattr(optimizer, "get") else None
    if arguments and arguments.get("lr") == 0:
        raise ConfigError(
            "model.optimizer: lr is 0: nothing would be trained, and model/ would be a copy of the start model; set it "
            "above 0"
        )


NODES = ("MASTER_ADDR", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "LSB_JOBID", "KUBERNETES_PORT")
"""Variables that torchrun, Slurm, LSF or a user sets for runs on several machines."""


def named_checkpoint(name: str | None, root: Path) -> str | None:
    """The checkpoint in the stage's folder for `--ckpt_path last` or `best`; other values are returned unchanged.

    Lightning would search only among its own checkpoints.

    Args:
        name: Value of `--ckpt_path`.
        root: The stage's folder.

    Raises:
        ConfigError: If there is no such checkpoint.
    """
    folder = root / "checkpoints"
    if name == "last":
        found = newest_whole(folder)[0] if candidates(folder) else None
    elif name == "best":
        found = max(folder.glob("best-*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    else:
        return name
    if found is None:
        hint = (
            "give its path" if name == "last" else "give its path; with --monitor METRIC, fit keeps the best checkpoint"
        )
        raise ConfigError(f"--ckpt_path {name}: there is no such checkpoint in {folder}; {hint}")
    return str(found)


def check_seed(config: Namespace) -> None:
    """Raise `ConfigError` for a seed that numpy does not accept."""
    errors.check_seed("--seed_everything", int(config.get("seed_everything") or 0))


def check_checkpoint(path: str | None) -> None:
    """Raise `ConfigError` for a `--ckpt_path` that is missing, damaged, a model folder, or not a checkpoint."""
    if path in (None, "hpc") or str(path).startswith(("registry", "http")):
        return
    place = Path(str(path))
    if not place.exists():
        raise ConfigError(f"--ckpt_path {path}: no such checkpoint (seen from {Path.cwd()})")
    if place.is_dir() and not any((place / name).exists() for name in SHARDED):
        raise ConfigError(
            f"--ckpt_path {path}: this folder is not a checkpoint. To start from a model folder, set model.model."
        )
    if not place.is_dir():
        is_file(place)
    if found := damage(place):
        raise ConfigError(f"--ckpt_path {path}: damaged, or not a checkpoint ({found}); use an earlier checkpoint")
