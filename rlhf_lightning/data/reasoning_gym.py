"""Tasks of the package reasoning-gym as data: the rows that they generate, and their own scores of answers."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import NoneType
from typing import Literal, Protocol, TypedDict, Union, get_args, get_origin, get_type_hints

from rlhf_lightning.data.tables import Item
from rlhf_lightning.errors import DataError, first_line, quoted
from rlhf_lightning.types import JSON, Row

COLUMN = "reasoning_gym"
"""Column of a row that records its task, parameters and index."""
DEFAULTS: dict[str, JSON] = {"size": 500, "seed": 0}
"""Parameters of every task. The package's own default of `seed` is a random number."""
UNSUPPORTED = {
    "composite": "give a list of tasks instead",
    "list_functions": "it draws from the random generator of the process, so a question cannot be generated again",
}
HASH_DEPENDENT = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Tasks whose questions depend on the order of sets, and so on the seed with which a Python process hashes text."""
KINDS = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
}
"""Types of parameters that a data source can set."""


class Entry(TypedDict):
    """An entry of a task, with further values that its scorer uses."""

    question: str
    answer: str | None


class Task(Protocol):
    """The interface of the package's `ProceduralDataset`."""

    def __len__(self) -> int:
        """Number of entries."""

    def __getitem__(self, index: int) -> Entry:
        """Generate an entry."""

    def score_answer(self, answer: str | None, entry: Entry) -> float:
        """Score an answer, usually from 0 to 1; None is an answer that was not found."""


@dataclass(frozen=True)
class ScoredEntry:
    """An entry, and the task that scores answers to it.

    Example:
        ```python
        entry = task_entry("chain_sum", {"min_terms": 2}, index=0)
        entry.task.score_answer(entry.entry["answer"], entry.entry)  # 1.0
        ```
    """

    name: str
    """Name of the task."""
    task: Task
    entry: Entry


def is_installed() -> bool:
    """True if the package is installed."""
    return find_spec("reasoning_gym") is not None


def package_version() -> str:
    """Version of the package; empty if it is not installed."""
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        return ""


def check(name: str, parameters: Mapping[str, JSON]) -> None:
    """Raise `DataError` unless there is such a task, and it accepts the parameters."""
    _task(name, _checked(name, parameters))


def items(source: str, name: str, parameters: Mapping[str, JSON]) -> Iterator[Item]:
    """Rows of a task: `prompt`, `answer`, and the column `reasoning_gym`.

    Args:
        source: The whole name of the data source.
        name: Name of the task.
        parameters: Its parameters.

    Raises:
        DataError: If the package is missing, the task or a parameter is unknown, or a value is unsuitable.
    """
    checked = _checked(name, parameters)
    for index in range(len(_task(name, checked))):
        entry = _entry(name, checked, index).entry
        origin: Row = {"task": name, "index": index, "parameters": json.loads(checked)}
        yield f"{source}[{index}]", {"prompt": entry["question"], "answer": entry["answer"], COLUMN: origin}


def task_entry(name: str, parameters: Mapping[str, JSON], index: int) -> ScoredEntry:
    """Generate an entry.

    Args:
        name: Name of the task.
        parameters: Its parameters.
        index: Index of the entry.

    Raises:
        DataError: If the package is missing, the task or a parameter is unknown, or a value is unsuitable.
    """
    checked = _checked(name, parameters)
    if not 0 <= index < len(_task(name, checked)):
        raise DataError(f"the reasoning-gym task {name!r} has no entry {index}; it has {len(_task(name, checked))}")
    return _entry(name, checked, index)


# -- parameters --------------------------------------------------------------------------------------------------------


def _checked(name: str, parameters: Mapping[str, JSON]) -> str:
    """All given parameters and `DEFAULTS` as JSON, after checking names and types."""
    hints = _hints(name)
    for key, value in parameters.items():
        what = f"the parameter {key!r} of the reasoning-gym task {name!r}"
        if key not in hints:
            close = get_close_matches(key, hints, 1)
            advice = f"Did you mean {close[0]}?" if close else f"They are {', '.join(sorted(hints))}"
            raise DataError(f"the reasoning-gym task {name!r} has no parameter {key!r}. {advice}")
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        kinds = _kinds(hints[key])
        if not choices and not kinds:
            raise DataError(f"{what} cannot be set in a data source")
        if value not in choices if choices else not _fits(value, kinds):
            wanted = quoted(choices) if choices else " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds))
            raise DataError(f"{what} is {value!r}; it must be {wanted}")
    return json.dumps({**DEFAULTS, **parameters}, sort_keys=True)


def _fits(value: JSON, allowed: tuple[type, ...]) -> bool:
    """True if a value has one of the allowed types; a whole number is also a number, and a list also a tuple."""
    if isinstance(value, bool) or value is None:
        return type(value) in allowed
    kinds = {int: (int, float), list: (list, tuple)}.get(type(value), (type(value),))
    return any(kind in allowed for kind in kinds)


def _kinds(hint: type) -> tuple[type, ...]:
    """The types among `KINDS` that a parameter may have."""
    members = get_args(hint) if get_origin(hint) is Union else (hint,)
    origins = [get_origin(member) or member for member in members]
    return tuple(kind for kind in KINDS if kind in origins)


@lru_cache
def _hints(name: str) -> dict[str, type]:
    """Types of a task's parameters by name."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"tasks of reasoning-gym need the package reasoning-gym, which cannot be imported ({error}). Install it "
            "with pip install 'rlhf-lightning[reasoning-gym]'"
        ) from None
    if name in UNSUPPORTED:
        raise DataError(f"the reasoning-gym task {name!r} is not supported; {UNSUPPORTED[name]}")
    if name not in DATASETS:
        close = get_close_matches(name.lower().replace("-", "_"), DATASETS, 3, 0.5)
        advice = f"Did you mean {' or '.join(close)}?" if close else f"Tasks are {', '.join(sorted(DATASETS))}"
        raise DataError(f"there is no reasoning-gym task {name!r}. {advice}")
    settings = DATASETS[name][1]
    hints = get_type_hints(settings)
    # `data_file` is left out, because a row must not name a file. Without a seed, the questions would be random.
    return {**{field.name: hints[field.name] for field in fields(settings) if field.name != "data_file"}, "seed": int}


# -- tasks and entries ------------------------------------------------------------------------------------------------


@lru_cache
def _task(name: str, parameters: str) -> Task:
    """A task with parameters that `_checked` returned."""
    from reasoning_gym import create_dataset

    if name in HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        raise DataError(
            f"the questions of the reasoning-gym task {name!r} depend on the seed of Python's hashes, so that another "
            "process would get others; set PYTHONHASHSEED=0 in the environment of every process"
        )
    hints = _hints(name)
    values = {key: tuple(v) if _kinds(hints[key]) == (tuple,) else v for key, v in json.loads(parameters).items()}
    try:
        task: Task = create_dataset(name, **values)
    except (AssertionError, ValueError, TypeError) as error:  # the package checks its parameters with assertions
        raise DataError(f"the reasoning-gym task {name!r} refuses its parameters: {first_line(error)}") from None
    return task


@lru_cache(maxsize=65536)
def _entry(name: str, parameters: str, index: int) -> ScoredEntry:
    """An entry of a task; cached, because some take a second to generate."""
    task = _task(name, parameters)
    try:
        return ScoredEntry(name, task, task[index])
    except (AssertionError, ValueError, RuntimeError, IndexError) as error:
        raise DataError(
            f"the reasoning-gym task {name!r} cannot generate entry {index} with these parameters "
            f"({first_line(error)}); choose others"
        ) from None
