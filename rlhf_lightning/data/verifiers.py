"""Tasks of environments of the package verifiers as data."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from types import ModuleType
from typing import Protocol

from rlhf_lightning.data.tables import Item
from rlhf_lightning.errors import ConfigError, DataError, cut
from rlhf_lightning.types import JSON, Row

COLUMN = "verifiers"
"""Column of a row that records its taskset, parameters and index."""
LIMIT = "limit"
"""Parameter with the number of tasks; all others are those of the taskset."""


class TaskMessage(Protocol):
    """A message of a task's prompt."""

    role: str
    content: str | list[JSON] | None


class TaskData(Protocol):
    """The data of a task."""

    prompt: str | list[TaskMessage] | None
    system_prompt: str | None
    name: str | None


class Task(Protocol):
    """A task of the package, which the package runs and scores."""

    data: TaskData


_LOADED: dict[str, list[Task]] = {}
"""Tasks that this process has read as data, by the name of their taskset with its parameters."""


def is_installed() -> bool:
    """True if the package is installed."""
    return find_spec("verifiers") is not None


def package_version() -> str:
    """Version of the package; empty if it is not installed."""
    try:
        return version("verifiers")
    except PackageNotFoundError:
        return ""


def verifiers() -> ModuleType:
    """The package.

    Raises:
        ConfigError: If it cannot be imported.
    """
    try:
        return import_module("verifiers.v1")
    except ImportError as error:
        raise ConfigError(
            f"environments of verifiers need the package verifiers from 0.4 on, which cannot be imported ({error}). "
            "Install it with pip install 'rlhf-lightning[verifiers]'"
        ) from None


def check(name: str, parameters: Mapping[str, JSON]) -> None:
    """Raise `DataError` unless a taskset can be loaded with these parameters."""
    _tasks(name, parameters)


def items(source: str, name: str, parameters: Mapping[str, JSON]) -> Iterator[Item]:
    """Rows of a taskset: its prompts, and the column `verifiers`.

    Args:
        source: The whole name of the data source.
        name: Name of the installed package that exports the taskset.
        parameters: Parameters of the taskset, and `limit`.

    Raises:
        DataError: If it cannot be loaded.
    """
    for index, task in enumerate(_tasks(name, parameters)):
        origin: Row = {"taskset": name, "index": index, "parameters": dict(parameters)}
        yield f"{source}[{index}]", {"prompt": _prompt(task.data), COLUMN: origin}


def loaded_task(row: Row) -> Task:
    """The task of a row.

    Only tasks that this process has read from a data source are found: the name of a taskset is the name of a module,
    and a data file must not have one imported.

    Raises:
        DataError: If the row is not from a data source of this process.
    """
    origin = row.get(COLUMN)
    if isinstance(origin, dict):
        tasks = _LOADED.get(_key(str(origin.get("taskset")), origin.get("parameters")), [])
        index = origin.get("index")
        if isinstance(index, int) and 0 <= index < len(tasks):
            return tasks[index]
    raise DataError(
        f"the row's column {COLUMN!r} is {cut(repr(origin), 200)}, which is not a task of a data source; set "
        "data.train to verifiers:TASKSET"
    )


def taskset_config(row: Row) -> dict[str, JSON]:
    """The config of a row's taskset: its name and its parameters."""
    origin = row[COLUMN]
    assert isinstance(origin, dict)
    parameters = origin["parameters"]
    assert isinstance(parameters, dict)
    return {**{key: value for key, value in parameters.items() if key != LIMIT}, "id": origin["taskset"]}


def _key(name: str, parameters: JSON) -> str:
    return json.dumps([name, parameters], sort_keys=True)


def _tasks(name: str, parameters: Mapping[str, JSON]) -> list[Task]:
    """The tasks of a taskset, loaded once."""
    key = _key(name, dict(parameters))
    if key not in _LOADED:
        _LOADED[key] = _load(name, parameters)
    return _LOADED[key]


def _load(name: str, parameters: Mapping[str, JSON]) -> list[Task]:
    limit = parameters.get(LIMIT)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"the parameter {LIMIT!r} is {limit!r}; it must be a whole number of at least 1")
    settings = {key: value for key, value in parameters.items() if key != LIMIT}
    try:
        vf = verifiers()
        taskset = vf.load_taskset(vf.taskset_config_type(name).model_validate({**settings, "id": name}))
        if limit is None and not taskset.bounded:
            raise DataError(f"the taskset {name!r} has no end; add ?limit=NUMBER to its name")
        tasks: Iterable[Task] = taskset
        return list(islice(tasks, limit and min(limit, sys.maxsize)))
    except ConfigError as error:
        raise DataError(str(error)) from None
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # pydantic's errors are ValueErrors
        reason = cut(" ".join(str(error).split()), 400)
        raise DataError(f"the taskset {name!r} of verifiers cannot be loaded: {reason}") from error


def _prompt(data: TaskData) -> list[JSON]:
    """The messages that a task begins with; where the environment begins, a message that names the task."""
    messages: list[JSON] = []
    if data.system_prompt is not None:
        messages.append({"role": "system", "content": data.system_prompt})
    if data.prompt is None:
        return [*messages, {"role": "user", "content": data.name or "(the environment begins)"}]
    if isinstance(data.prompt, str):
        return [*messages, {"role": "user", "content": data.prompt}]
    for message in data.prompt:
        if not isinstance(message.content, str):
            raise DataError("a prompt of the taskset has content other than text, which is not supported")
        messages.append({"role": message.role, "content": message.content})
    return messages
