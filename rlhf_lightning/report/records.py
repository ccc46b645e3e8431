"""Types of the files in a run's folder, and validation of the files against them."""

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import (
    Any,
    Literal,
    NoReturn,
    Required,
    TypedDict,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import check_format, is_file, read_object
from rlhf_lightning.types import JSON, Message

T = TypeVar("T")
Handed = Literal["start", "reward", "critic"]
"""Models that a stage may receive: to start from, as the reward model, and to start the critic from."""
Kind = type | types.GenericAlias | types.UnionType
LARGEST = 1e300
"""Largest integer that is accepted; larger ones may not fit into a float."""


class ConfigFile(TypedDict):
    """A config file that the settings of a stage were read from.

    Attributes:
        path: Its absolute path.
        hash: SHA-256 of its content.
    """

    path: str
    hash: str


class StageInputs(TypedDict, total=False):
    """Inputs that the result of a stage depends on, as SHA-256 hashes, or as Hub ids.

    Attributes:
        settings: Hash of its settings.
        data: Hash of each data source.
        filter: Hash of the rules of `data.filter`.
        seed: Seed of the pipeline.
        start: Hash of the model that it starts from.
        reward: Hash of the model that rewards it.
        critic: Hash of the model that its critic starts from.
    """

    settings: str
    data: dict[str, str]
    filter: str
    seed: int
    start: str
    reward: str
    critic: str


class StageEntry(TypedDict, total=False):
    """A stage in the manifest of a pipeline.

    Attributes:
        status: `running`, `finished` or `failed`.
        kind: `sft`, `preference` or `policy`.
        inputs: The inputs that it was run with.
        configs: Files that its settings were read from.
        handed: Stages or folders of the models that it received, by `start`, `reward` and `critic`.
        metrics: Last value of each metric.
        seconds: Duration.
        model: Its model folder.
        model_hash: SHA-256 of the model folder.
        exit_code: Exit code of its process, if it failed.
    """

    status: Required[str]
    kind: str
    inputs: Required[StageInputs]
    configs: list[ConfigFile]
    handed: dict[Handed, str]
    metrics: dict[str, float]
    seconds: float
    model: str
    model_hash: str
    exit_code: int


class Manifest(TypedDict, total=False):
    """`manifest.json` of a pipeline.

    Attributes:
        format: Version of the format.
        name: Name of the pipeline.
        seed: Seed of all stages.
        stages: The stages that were started, by name.
    """

    format: int
    name: str
    seed: int
    stages: dict[str, StageEntry]


class Parent(TypedDict, total=False):
    """The earlier stage that a stage started from.

    Attributes:
        stage: Its name.
        hash: SHA-256 of its model folder.
    """

    stage: str
    hash: str


class StageFacts(TypedDict, total=False):
    """`stage.json` of a stage: the fields that the report reads.

    Attributes:
        kind: `sft`, `preference` or `policy`.
        metrics: Last value of each metric.
        steps: Optimizer steps.
        seconds: Duration.
        parent: The earlier stage that it started from.
        data: SHA-256 of each data source.
        versions: Versions of the libraries.
        model_hash: SHA-256 of the model folder.
        config_hash: SHA-256 of `config.yaml`.
        start: Model that it started from.
        stopped: The reason and the step of an early stop.
    """

    kind: str
    metrics: dict[str, float]
    steps: float
    seconds: float
    parent: Parent
    data: dict[str, str]
    versions: dict[str, str]
    model_hash: str
    config_hash: str
    start: str
    stopped: str | dict[str, JSON]


class SampleRow(TypedDict, total=False):
    """A row of `samples.jsonl` or `heldout.jsonl`: the fields that the report reads.

    Attributes:
        step: Optimizer steps before the row's round.
        prompt: Messages, or text.
        reward: The total reward.
        response: The policy's last message.
        response_tokens: Tokens that the policy sampled.
        stop_reason: See `Episode.stop_reason`.
        group: Position of the prompt in its data.
        terms: Score of each reward by name, unweighted; None where it does not apply.
    """

    step: Required[int]
    prompt: Required[str | list[Message]]
    reward: Required[float]
    response: Required[str]
    response_tokens: Required[float]
    stop_reason: Required[str]
    group: int
    terms: dict[str, float | None]


class ReliabilityBin(TypedDict):
    """A bin of the reliability curve.

    Attributes:
        pairs: Number of pairs.
        confidence: Mean predicted probability of these pairs.
        accuracy: Fraction of these pairs that the model orders as labeled.
    """

    pairs: float
    confidence: float
    accuracy: float


class PreferenceReport(TypedDict, total=False):
    """`preference_report.json`.

    Attributes:
        numbers: Metrics on the validation rows.
        reliability: The reliability curve.
    """

    numbers: dict[str, float]
    reliability: list[ReliabilityBin]


class AnswerPair(TypedDict):
    """Answers of the quickstart's SFT model and of its policy to a held-out prompt."""

    prompt: str
    sft: str
    policy: str


Figures = dict[str, float | None]
"""Figures of a model of the quickstart, see docs/quickstart.md; null where one does not apply."""


class Summary(TypedDict, total=False):
    """`summary.json` of the quickstart.

    Attributes:
        base: Figures of the base model.
        sft: Figures of the SFT model; also `val_nll_start` and `val_nll`, in nats per token.
        policy: Figures of the policy after RL.
        preference: `pair_accuracy` of the preference model.
        seconds: Duration of the first complete run.
        peak_memory_gb: Peak memory of its processes.
        samples: Some answers.
        model: The model that it started from.
        dtype: Data type of the weights.
        temperature: Temperature of the answers; 0 for greedy decoding.
        kinds: Fraction of instructions followed, by model and kind.
    """

    base: Figures
    sft: Figures
    policy: Figures
    preference: Figures
    seconds: float
    peak_memory_gb: float
    samples: list[AnswerPair]
    model: str
    dtype: str
    temperature: float
    kinds: dict[str, dict[str, float]]


QUICKSTART = {
    "gold_reward": "gold reward",
    "followed": "followed",
    "followed_other_kinds": "untrained kinds",
    "reward_model_score": "reward model",
    "kl": "KL to SFT (nats)",
    "response_tokens": "tokens",
    "truncated_fraction": "truncated",
    "perplexity": "perplexity",
}


def quickstart_columns(models: Sequence[Figures]) -> dict[str, str]:
    """Keys and titles of the figures that some model has.

    Args:
        models: Figures of the models.
    """
    return {key: title for key, title in QUICKSTART.items() if any(one.get(key) is not None for one in models)}


def quickstart_title(summary: Summary) -> str:
    """Title of the table of figures."""
    temperature = summary.get("temperature", 1.0)
    return f"held-out prompts, {f'sampled at temperature {temperature:g}' if temperature else 'greedy decoding'}"


def read_record(path: Path, kind: type[T]) -> T:
    """Read a JSON file of a run.

    Args:
        path: The file.
        kind: The type of its content, a TypedDict.

    Returns:
        The content; empty if there is no file.

    Raises:
        ConfigError: If the content does not have this type.
    """
    if not is_there(path):
        return kind()
    found: Any = read_object(path)
    check_format(found.get("format"), str(path))
    check_shape(found, kind, str(path))
    return found


def is_there(path: Path) -> bool:
    """True if a file exists. Raises `ConfigError` for a broken link, a device, a folder, or a pipe."""
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path}: this is a broken link; restore the file")
    return is_file(path)


def read_manifest(path: Path) -> Manifest:
    """Read a pipeline's `manifest.json`. Raises `ConfigError` if a stage name is not a plain folder name."""
    found = read_record(path, Manifest)
    for name in found.get("stages") or {}:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ConfigError(f"{path}: {name!r} is not a valid stage name; restore the file")
    return found


def check_shape(value: JSON, kind: Kind, where: str) -> None:
    """Check that a value of a record has the expected type.

    Args:
        value: The value as read. Optional fields that are null are removed from it.
        kind: The expected type. For a union, only the outermost types are checked.
        where: Location of the value, for the error message.

    Raises:
        ConfigError: If the value has another type.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if is_typeddict(kind):
        _check_fields(value, kind, where)
    elif origin is types.UnionType:
        if not any(
            _is_number(value) if one is float else isinstance(value, get_origin(one) or one) for one in arguments
        ):
            _refuse(value, where)
    elif kind is float:
        if not _is_number(value):
            _refuse(value, where)
    elif isinstance(value, bool) or not (isinstance(origin, type) and isinstance(value, origin)):
        _refuse(value, where)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_shape(item, arguments[0], f"{where}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_shape(item, arguments[1], f"{where}: {key}")


def _is_number(value: JSON) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    return whole or isinstance(value, float)


def _check_fields(value: JSON, kind: Kind, where: str) -> None:
    if not isinstance(value, dict):
        _refuse(value, where)
    required = vars(kind)["__required_keys__"]
    for name, inner in get_type_hints(kind).items():
        if name in required and name not in value:
            raise ConfigError(f"{where}: {name} is missing; restore the file")
        if value.get(name) is not None or name in required:
            check_shape(value[name], inner, f"{where}: {name}")
        else:
            value.pop(name, None)


def _refuse(value: JSON, where: str) -> NoReturn:
    raise ConfigError(f"{where} is {json.dumps(value)[:80]}, which is not a valid value here; restore the file")
