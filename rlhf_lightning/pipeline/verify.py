"""Verifies a run: hashes its inputs and outputs again, and compares them with the recorded hashes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning.data.records import fingerprint, is_here
from rlhf_lightning.data.row_filter import filter_fingerprint
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import hash_file, hash_folder, hash_model
from rlhf_lightning.pipeline.plan import HANDED, section
from rlhf_lightning.report.records import StageEntry, StageFacts, read_manifest, read_record
from rlhf_lightning.types import JSON
from rlhf_lightning.yaml_files import read_mapping

SAME, DIFFERS, MISSING, UNFINISHED, HUB = "same", "differs", "missing", "unfinished", "not checked"
"""Results of a check. Data and models on the Hub are not checked, and do not count as failures."""


@dataclass
class StageCheck:
    """The check of an input or output of a stage.

    Attributes:
        stage: Name of the stage.
        what: The checked input or output, for example `data.train`.
        path: Its path.
        status: `same`, `differs`, `missing`, `unfinished` or `not checked`.

    Example:
        >>> StageCheck("sft", "model", "runs/mine/sft/model", SAME).status
        'same'
    """

    stage: str
    what: str
    path: str
    status: str


def verify_run(root: str | Path) -> list[StageCheck]:
    """Check the configuration, data, input models and outputs of every stage of a run.

    Args:
        root: Folder of a pipeline's run, or of a single stage. Data files are looked up at their recorded paths,
            relative to the current folder; models of the run's own stages are looked up in `root`, even if it was
            moved.

    Raises:
        ConfigError: If the folder contains no run, or its records cannot be read.
    """
    root = Path(root)
    if (root / "manifest.json").exists():
        stages = read_manifest(root / "manifest.json").get("stages") or {}
        return [check for name in stages for check in _stage(root, name, stages)]
    if (root / "stage.json").exists():
        return _alone(root)
    raise ConfigError(
        f"--verify {root}: not the folder of a run; it has neither a pipeline's manifest.json nor a stage's stage.json"
    )


def _stage(root: Path, name: str, stages: dict[str, StageEntry]) -> list[StageCheck]:
    entry = stages[name]
    folder, inputs = root / name, entry["inputs"]
    settings = _settings(folder / "input.yaml")
    found = []
    for config in entry.get("configs") or ():
        status = _compare(hash_file(config["path"]), config["hash"]) if Path(config["path"]).is_file() else MISSING
        found.append(StageCheck(name, "config", config["path"], status))
    now = None if settings is None else settings_hash(settings)
    found.append(StageCheck(name, "settings", str(folder / "input.yaml"), _compare(now, inputs.get("settings", ""))))
    found += _data(name, section(settings or {}, "data"), inputs.get("data") or {})
    if rules := inputs.get("filter"):
        found.append(_filter(name, section(settings or {}, "data").get("filter"), rules))
    for key in HANDED:
        if recorded := inputs.get(key):
            source = (entry.get("handed") or {}).get(key) or ""
            path = root / source / "model" if source in stages else Path(source)
            found.append(StageCheck(name, key, str(path), _handed(path, recorded)))
    if entry["status"] != "finished":
        return [*found, StageCheck(name, "model", str(folder / "model"), UNFINISHED)]
    return [*found, *_outputs(name, folder, entry.get("model_hash") or "")]


def _alone(folder: Path) -> list[StageCheck]:
    """Checks of a stage that is not part of a pipeline."""
    facts, settings = read_record(folder / "stage.json", StageFacts), _settings(folder / "config.yaml")
    found = _data(folder.name, section(settings or {}, "data"), facts.get("data") or {})
    if config := facts.get("config_hash"):
        path = folder / "config.yaml"
        found.append(
            StageCheck(folder.name, "config", str(path), _compare(hash_file(path) if settings else None, config))
        )
    return [*found, *_outputs(folder.name, folder, facts.get("model_hash") or "")]


def _outputs(name: str, folder: Path, recorded: str) -> list[StageCheck]:
    model, facts = folder / "model", folder / "stage.json"
    said = read_record(facts, StageFacts).get("model_hash")
    return [
        StageCheck(name, "model", str(model), _compare(hash_folder(model) if model.is_dir() else None, recorded)),
        StageCheck(name, "stage.json", str(facts), _compare(said, recorded)),
    ]


def _data(name: str, settings: dict[str, JSON], recorded: dict[str, str]) -> list[StageCheck]:
    return [
        StageCheck(name, f"data.{key}", _short(settings.get(key)), _source(settings.get(key), recorded[key], key))
        for key in recorded
    ]


def _filter(name: str, chosen: JSON, recorded: str) -> StageCheck:
    try:
        now = filter_fingerprint(chosen)
    except ConfigError:  # the rules cannot be read any more
        now = None
    return StageCheck(name, "data.filter", _short(chosen), _compare(now, recorded))


def _source(source: JSON, recorded: str, split: str) -> str:
    if not isinstance(source, str | list | dict):
        return MISSING
    gone = not is_here(source)
    if fingerprint(source, split) == recorded:
        return HUB if gone else SAME  # the fingerprint of Hub data is only its name
    return MISSING if gone else DIFFERS


def _handed(folder: Path, recorded: str) -> str:
    """Status of a model that the stage used. `folder` is where the model is now."""
    if recorded in (str(folder), "failed"):
        return HUB  # no hash: it is a Hub id, or a failed stage that a rule reward replaced
    return _compare(hash_model(folder), recorded)


def settings_hash(settings: Mapping[str, JSON]) -> str:
    """SHA-256 of settings, independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _compare(now: str | None, recorded: str) -> str:
    return MISSING if now is None else SAME if now == recorded else DIFFERS


def _settings(path: Path) -> dict[str, JSON] | None:
    if not path.is_file():
        return None
    try:
        return read_mapping(path)
    except ConfigError:
        return {"unreadable": str(path)}  # differs from every recorded hash


def _short(source: JSON) -> str:
    return source if isinstance(source, str) else json.dumps(source, default=str)[:80]
