"""Data sources that a package generates: `PACKAGE:NAME?PARAMETER=VALUE&…`."""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import parse_qsl

from rlhf_lightning.data import reasoning_gym, verifiers
from rlhf_lightning.data.tables import Item
from rlhf_lightning.errors import DataError
from rlhf_lightning.types import JSON

PACKAGES = {"reasoning_gym": reasoning_gym, "verifiers": verifiers}
_NAME = re.compile(rf"({'|'.join(PACKAGES)}):([^\s?]*)(?:\?(\S*))?")


class TaskSource(NamedTuple):
    """The parts of a source's name."""

    package: str
    name: str
    parameters: dict[str, JSON]


def is_task(source: str) -> bool:
    """True if the name of a data source is one that a package generates.

    Example:
        >>> is_task("reasoning_gym:chain_sum?min_terms=2"), is_task("prompts.jsonl")
        (True, False)
    """
    return _NAME.fullmatch(source) is not None


def is_task_installed(source: str) -> bool:
    """True if the package of a source is installed."""
    return PACKAGES[source.partition(":")[0]].is_installed()


def task_version(source: str) -> str:
    """Version of the package of a source, on which its rows depend; empty if it is not installed."""
    return PACKAGES[source.partition(":")[0]].package_version()


def check_task(source: str) -> None:
    """Raise `DataError` unless a source's package is installed and accepts the name and the parameters."""
    package, name, parameters = parsed(source)
    try:
        PACKAGES[package].check(name, parameters)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def task_items(source: str) -> Iterator[Item]:
    """Rows of a source, each with a column of the package's name that records where it is from.

    Args:
        source: For example `reasoning_gym:chain_sum?min_terms=2&size=500&seed=1`.

    Raises:
        DataError: If the package is missing, or refuses the name or a parameter.
    """
    package, name, parameters = parsed(source)
    try:
        yield from PACKAGES[package].items(source, name, parameters)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def parsed(source: str) -> TaskSource:
    """The parts of a source's name. A value is JSON, or else the text itself.

    Raises:
        DataError: If the parameters are malformed, or one is given twice.

    Example:
        >>> parsed("reasoning_gym:chain_sum?min_terms=2").parameters
        {'min_terms': 2}
    """
    match = _NAME.fullmatch(source)
    assert match is not None
    package, name, query = match[1], match[2], match[3] or ""
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and query.count("&") + 1 != len(pairs):
        raise DataError(f"{source}: parameters must have the form {package}:NAME?PARAMETER=VALUE&PARAMETER=VALUE")
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise DataError(f"{source}: the parameter {twice[0]!r} is given twice; remove one")
    return TaskSource(package, name, {key: _value(text) for key, text in pairs})


def _value(text: str) -> JSON:
    try:
        value: JSON = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value
