"""Reads and checks pipeline files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_lightning.errors import ConfigError, check_seed
from rlhf_lightning.files import hash_file, real_path
from rlhf_lightning.report.records import ConfigFile, Handed
from rlhf_lightning.types import JSON
from rlhf_lightning.yaml_files import read_mapping

KINDS = ("sft", "preference", "policy")
LONGEST = 200
"""Largest length in bytes of a name that is used as a folder name; file systems allow 255."""
HANDED: tuple[Handed, ...] = ("start", "reward", "critic")
"""Keys of a stage that name an earlier stage or a model folder."""
PLAN_KEYS = {"name", "seed", "root", "stages"}
STAGE_KEYS = {"name", "kind", "config", "overrides", "start", "reward", "critic", "on_failure"}
SET = {
    "trainer.default_root_dir": "set the folder of the run with root or --root; a stage's folder is root/NAME",
    "seed_everything": "set seed in the pipeline file, for all stages",
    "log_file": "all stages write to logs/run.log in root",
    "fresh": "run a stage again with --rerun",
}


@dataclass
class Stage:
    """A stage of a plan, with its whole configuration.

    Attributes:
        name: Its name, which is also that of its folder.
        kind: `sft`, `preference` or `policy`.
        settings: Its settings, as nested dicts.
        start: Earlier stage or model folder that the stage starts from.
        reward: Earlier stage or model folder that scores its responses.
        critic: Earlier stage or model folder that its critic starts from.

    Example:
        >>> Stage("sft", "sft", {"trainer": {"max_steps": 5}}).start is None
        True
    """

    name: str
    kind: str
    settings: dict[str, JSON]
    start: str | None = None
    reward: str | None = None
    critic: str | None = None
    configs: list[ConfigFile] = field(default_factory=list)
    """Files that the settings were read from."""
    rule_reward: dict[str, JSON] | None = None
    """Reward that replaces this stage's model in later stages if it fails; None stops the pipeline."""

    @property
    def handed(self) -> dict[Handed, str]:
        """The earlier stages or model folders that the stage uses, by key."""
        return {key: value for key in HANDED if (value := getattr(self, key))}


@dataclass
class Plan:
    """A pipeline: its stages in order, with their folders `root/NAME`.

    Attributes:
        name: Its name.
        stages: Its stages.
        root: Folder of the run.
        seed: Seed of all stages.
        source: The content of the pipeline file.

    Example:
        >>> plan = Plan("mine", [Stage("sft", "sft", {})], Path("runs/mine"))
        >>> plan.model("sft")
        'runs/mine/sft/model'
    """

    name: str
    stages: list[Stage]
    root: Path
    seed: int = 0
    source: dict[str, JSON] = field(default_factory=dict)

    def folder(self, stage: str) -> Path:
        """The folder of a stage."""
        return self.root / stage

    def model(self, reference: str) -> str:
        """The model folder of a `start`, `reward` or `critic`, which is the name of an earlier stage or a folder."""
        names = {stage.name for stage in self.stages}
        return str(self.folder(reference) / "model") if reference in names else reference

    def descendants(self, name: str) -> set[str]:
        """Names of a stage and of all stages that depend on it."""
        found = {name}
        for stage in self.stages:
            if found.intersection(stage.handed.values()):
                found.add(stage.name)
        return found


def read_plan(
    plan: Mapping[str, JSON] | str | Path, root: str | Path | None = None, overlays: Sequence[str | Path] = ()
) -> Plan:
    """Read a pipeline from a YAML or JSON file, or from a dict.

    Args:
        plan: The file or dict.
        root: Folder of the run; `runs/NAME` by default.
        overlays: Config files that are merged over the settings of every stage.

    Raises:
        ConfigError: If the file does not exist, a key or kind is unknown, or a stage refers to a stage that does not
            come before it.
    """
    base, name = Path(), "pipeline"
    if isinstance(plan, str | Path):
        base, name = Path(plan).parent, Path(plan).stem
        plan = read_mapping(Path(plan))
    if {"model", "data", "trainer"} & set(plan) and "stages" not in plan:
        raise ConfigError(
            "pipeline: stages is missing; this is the config of a single stage, so run it with rlhf sft fit -c FILE"
        )
    if unknown := set(plan) - PLAN_KEYS:
        raise ConfigError(f"pipeline: unknown key {sorted(unknown)[0]!r}; known keys are name, seed, root, stages")
    entries = plan.get("stages")
    if not isinstance(entries, list) or not entries:
        raise ConfigError("pipeline: stages must be a list of at least one stage")
    seed = check_seed("pipeline: seed", plan.get("seed", 0))
    _check_texts(plan, ("name", "root"), "pipeline")
    name = str(plan.get("name") or name)
    if len(name.encode(errors="replace")) > LONGEST:
        raise ConfigError(f"pipeline: name is {name[:50]!r}…, which is too long for a folder name")
    folder = Path(root or str(plan.get("root") or Path("runs") / name))
    stages: list[Stage] = []
    for index, entry in enumerate(entries):
        stages.append(_stage(entry, index, [stage.name for stage in stages], base))
        _check_reward(stages)
    for file in overlays:
        laid_over, record = read_mapping(Path(file)), _read_record(Path(file))
        for stage in stages:
            stage.settings = merged(stage.settings, laid_over)
            stage.configs.append(record)
    return Plan(name, stages, folder, seed, dict(plan))


def _stage(entry: JSON, index: int, earlier: list[str], base: Path) -> Stage:
    where = f"pipeline: stage {index + 1}"
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: must be a mapping with kind and config")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"{where}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if unknown := set(entry) - STAGE_KEYS:
        raise ConfigError(
            f"{where}: unknown key {sorted(unknown)[0]!r}; known keys are {', '.join(sorted(STAGE_KEYS))}"
        )
    _check_texts(entry, ("name", "start", "reward", "critic"), where)
    given = entry.get("config")
    given = given if isinstance(given, list) else [] if given is None else [given]
    files = [file for file in given if isinstance(file, str) and file]
    if len(files) < len(given):
        raise ConfigError(f"{where}: config is {entry['config']!r}; it must be a file, or a list of files")
    overrides = entry.get("overrides")
    if not isinstance(overrides, dict | None):
        raise ConfigError(
            f"{where}: overrides is {overrides!r}; it must be a mapping, for example {{trainer.max_steps: 5}}"
        )
    name = str(entry.get("name") or kind)
    if name in (*earlier, ".", "..") or "/" in name or len(name.encode(errors="replace")) > LONGEST:
        raise ConfigError(
            f"{where}: the name {name!r} is used twice or is not a valid folder name; give each stage its own name"
        )
    for key in HANDED:
        _check_reference(entry.get(key), earlier, f"{where} ({name}): {key}")
    for key in HANDED[1:]:
        if entry.get(key) and kind != "policy":
            raise ConfigError(
                f"{where} ({name}): {key} is only for policy stages, and this is a {kind} stage; remove it"
            )
    settings: dict[str, JSON] = {}
    for file in files:
        settings = merged(settings, read_mapping(base / file, f"{where}: config: "))
    overrides = nested(overrides or {})
    for setting, remedy in SET.items():
        outer, _, inner = setting.rpartition(".")
        part = overrides.get(outer) if outer else overrides
        if isinstance(part, Mapping) and inner in part:
            raise ConfigError(f"{where} ({name}): overrides: the pipeline sets {setting}; {remedy}")
    settings = merged(settings, overrides)
    start, reward, critic = (value if isinstance(value := entry.get(key), str) else None for key in HANDED)
    configs = [_read_record(base / file) for file in files]
    return Stage(name, kind, settings, start, reward, critic, configs, _rule(entry.get("on_failure"), where))


def _check_texts(given: Mapping[str, JSON], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if (value := given.get(key)) is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be text")


def _read_record(path: Path) -> ConfigFile:
    return {"path": str(real_path(path)), "hash": hash_file(path)}


def _check_reference(reference: JSON, earlier: list[str], where: str) -> None:
    if reference is None or reference in earlier or Path(str(reference)).exists():
        return
    if str(reference).count("/") == 1:
        return  # a Hub id
    raise ConfigError(
        f"{where} is {reference!r}: neither an earlier stage ({', '.join(earlier) or 'there is none'}) nor a folder"
    )


def _check_reward(stages: Sequence[Stage]) -> None:
    """Raise `ConfigError` if the reward of the last stage is an earlier stage that gives no scores."""
    last, kinds = stages[-1], {stage.name: stage.kind for stage in stages[:-1]}
    if last.reward is None or kinds.get(last.reward) in (None, "preference"):
        return
    scoring = [name for name, kind in kinds.items() if kind == "preference"]
    raise ConfigError(
        f"pipeline: stage {len(stages)} ({last.name}): reward is {last.reward!r}, a stage of kind "
        f"{kinds[last.reward]}, but only a preference stage gives scores (earlier preference stages: "
        f"{', '.join(scoring) or 'none'})"
    )


def _rule(value: JSON, where: str) -> dict[str, JSON] | None:
    if value in (None, "stop"):
        return None
    rule = value.get("rule_reward") if isinstance(value, dict) and len(value) == 1 else None
    if isinstance(rule, dict) and "class_path" in rule:
        return dict(rule)
    raise ConfigError(f"{where}: on_failure must be 'stop' or {{rule_reward: {{class_path: …, init_args: …}}}}")


def nested(flat: Mapping[str, JSON]) -> dict[str, JSON]:
    """Expand dotted keys: `{"trainer.max_steps": 5}` becomes `{"trainer": {"max_steps": 5}}`."""
    result: dict[str, JSON] = {}
    for key, value in flat.items():
        *path, last = str(key).split(".")
        inner: dict[str, JSON] = {last: value}
        for part in reversed(path):
            inner = {part: inner}
        result = merged(result, inner)
    return result


def section(settings: Mapping[str, JSON], name: str) -> dict[str, JSON]:
    """A section of a stage's settings, such as `data`; empty if there is none."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def merged(base: Mapping[str, JSON], over: Mapping[str, JSON]) -> dict[str, JSON]:
    """Merge settings recursively. An entry with another `class_path` is replaced as a whole.

    Args:
        base: The settings.
        over: Settings that override them.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _same_class(old, value):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _same_class(old: Mapping[str, JSON], new: Mapping[str, JSON]) -> bool:
    return "class_path" not in new or new["class_path"] == old.get("class_path")
