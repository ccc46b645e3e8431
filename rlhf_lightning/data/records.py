"""Rows and their sources: files, datasets on the Hub, and Python objects.

A `LocatedRow` keeps its file and line, so that later errors can name them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf_lightning.data.containers import (
    Container,
    dataset_rows,
    library,
    library_rows,
    of_mapping,
    plain,
    plain_row,
    settled,
    unfilled,
)
from rlhf_lightning.data.files import SUFFIXES, Wanted, file_items, is_saved_dataset, line_row, local_files, place
from rlhf_lightning.data.mixing import Mixture
from rlhf_lightning.data.names import check_there, hub_dataset, is_here, is_stream, load_saved
from rlhf_lightning.data.tables import Cells, Item, cell
from rlhf_lightning.data.task_sources import is_task, task_items, task_version
from rlhf_lightning.errors import DataError, quoted
from rlhf_lightning.files import is_open_stream
from rlhf_lightning.types import JSON, Row

__all__ = [
    "LocatedRow",
    "Reading",
    "RowError",
    "SkippedRow",
    "Source",
    "check_there",
    "convert_rows",
    "fingerprint",
    "is_here",
    "located",
    "read_rows",
    "rename_columns",
    "require",
    "require_list",
]
log = logging.getLogger(__name__)
T = TypeVar("T")
Source = str | Path | Mapping[str, Any] | Iterable[Any]


@dataclass
class LocatedRow:
    """One row of data, with its location `where`: `file:line` or `list[index]`.

    Example:
        >>> LocatedRow({"prompt": "Hi"}, "prompts.jsonl:1").where
        'prompts.jsonl:1'
    """

    data: Row
    where: str


class RowError(DataError):
    """A row cannot be used. The code that reads the file adds file and line."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Context manager that converts a `RowError` to a `DataError` with the location of the row.

    Args:
        where: File and line of the row.
    """
    try:
        yield
    except RowError as error:
        raise DataError(f"{where}: {error}") from None


class SkippedRow(RowError):
    """The user's settings leave out a row; it is counted, and is not an error."""


@dataclass
class Reading:
    """Counts and skipped rows of reading a source.

    Attributes:
        rows: Number of rows.
        blank: Number of blank lines.
        skipped: Locations of skipped rows, with the reasons.

    Example:
        >>> reading = Reading()
        >>> rows = convert_rows(read_rows([{"prompt": "Hi"}]), lambda data: [data], reading)
        >>> reading.rows
        1
    """

    rows: int = 0
    blank: int = 0
    skipped: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] | None = None
    """If a list, lines that are not rows are added to it with the reason; if None, they raise `DataError`."""


def read_rows(
    source: Source,
    text_key: str | None = None,
    reading: Reading | None = None,
    split: str | None = None,
    lines: bool = False,
) -> list[LocatedRow]:
    """Read all rows of a source.

    Args:
        source: A file name, a pattern, a folder of parts, a task of another package (see `data.task_sources`), or a Hub
            id (`owner/name`, `owner/name:split` or `owner/name:configuration/split`); a list of dicts, of such names,
            or of strings (with `text_key`); a dict of columns or of splits; a pandas or polars frame, an Arrow table,
            or a dataset of `datasets`; or a mixture of these (`data.mixing`), whose rows are read one after another.
        text_key: If set, a line of a text file, or a string instead of a row, becomes `{text_key: line}`.
        reading: Receives counts.
        split: The split to read.
        lines: If True, every line of a file is text.

    Returns:
        The rows.

    Raises:
        DataError: If the file does not exist, has an unknown format, an invalid line (the message has file and line),
            or no rows.

    Example:
        >>> read_rows([{"prompt": "Hi"}])
        [LocatedRow(data={'prompt': 'Hi'}, where='list[0]')]
    """
    reading = reading or Reading()
    rows = list(_rows(_items(source, Wanted(text_key, split, lines)), reading))
    if not rows and not reading.unreadable:
        raise DataError(f"{_name(source)}: there are no rows; give data with at least one row")
    return rows


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "the list" if isinstance(source, list | tuple) else f"the {type(source).__name__}"


def _rows(items: Iterable[Item], reading: Reading) -> Iterator[LocatedRow]:
    for where, item in items:
        if item is None:
            reading.blank += 1
        elif not isinstance(item, DataError):
            yield LocatedRow(item, where)
        elif reading.unreadable is None:
            raise DataError(f"{where}: {item}")
        else:
            reading.unreadable.append((where, str(item)))


def _items(source: Source, wanted: Wanted, name: str = "") -> Iterator[Item]:
    given, name, source = name, name or type(source).__name__, settled(source)
    if isinstance(source, str | os.PathLike):
        yield from _named(source, wanted)
    elif isinstance(source, bytes | bytearray | set | frozenset) or hasattr(source, "readline"):
        advice = "it has no order; give a list" if isinstance(source, set | frozenset) else "give the path of a file"
        raise DataError(f"rows cannot be read from a {name}: {advice}")
    elif (mixture := Mixture.of(source)) is not None:
        for one in mixture.sources:
            yield from _items(one.source, wanted)
    elif isinstance(source, Mapping):
        inner = of_mapping(source, wanted.split, given or _setting(wanted.split, source))
        yield from _items(inner, wanted, name if isinstance(inner, list) else "")
    elif library(source):
        yield from _listed(library_rows(source, name), wanted, name)
    else:
        yield from _listed(source, wanted, name)


def _setting(split: str | None, source: Mapping[str, Container]) -> str:
    """The setting with a mapping, for messages; the type of the mapping if it is not known."""
    return f"data.{split}" if split else type(source).__name__


def _listed(source: Iterable[Container], wanted: Wanted, name: str) -> Iterator[Item]:
    """Rows of a list, and of the files and containers in it."""
    if not isinstance(source, Iterable):
        raise DataError(f"no rows can be read from {source!r}; give a file or a list of dicts")
    items = list(source)
    rows = iter(unfilled([plain_row(item) for item in items if _is_row(item)]))
    for index, item in enumerate(items):
        where = f"{name}[{index}]"
        if _is_row(item):
            yield where, next(rows)
        elif isinstance(item, str) and wanted.text_key and not _is_name(item):
            yield from _text(item, where, wanted.text_key)
        elif isinstance(item, str | os.PathLike):
            yield from _named(item, wanted)
        elif library(item) in ("pandas", "polars", "pyarrow", "datasets"):
            yield from _items(item, wanted, where)
        else:
            raise DataError(f"{where}: the row is a {type(item).__name__}; it must be a dict")


def _is_row(item: Container) -> bool:
    return isinstance(item, Mapping) and not library(item)


def _text(text: str, where: str, text_key: str) -> Iterator[Item]:
    text = text.strip()
    if not text.startswith("{"):
        yield where, {text_key: text} if text else None
        return
    try:
        yield where, line_row(text, text_key)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _is_name(text: str) -> bool:
    """True if an item of a list of prompts is a source: a task, or a file name, which is a single word or exists."""
    return is_task(text) or (text.lower().endswith(SUFFIXES) and (len(text.split()) == 1 or os.path.isfile(text)))


# -- names ------------------------------------------------------------------------------------------------------------


def _named(source: str | os.PathLike[str], wanted: Wanted) -> Iterator[Item]:
    if isinstance(source, str) and is_task(source):
        yield from task_items(source)
        return
    saved, _, split = place(source).partition(":")
    if is_saved_dataset(place(source)) or (split and is_saved_dataset(saved)):
        folder = saved if split and is_saved_dataset(saved) else place(source)
        yield from _items(load_saved(folder), replace(wanted, split=split or wanted.split), os.fspath(source))
        return
    files = local_files(source)
    if files is None:
        dataset = hub_dataset(os.fspath(source))
        yield from ((f"{source}[{index}]", row) for index, row in enumerate(dataset_rows(dataset)))
        return
    for file in files:
        yield from file_items(file, wanted)


def fingerprint(source: Source | None, split: str | None = None, name: str = "") -> str | None:
    """SHA-256 of a source: of the bytes of files, of the JSON of rows, or of the name of a task or a Hub id.

    Args:
        source: The source.
        split: Name of the split of a container with several; None for the only one.
        name: Name of a source without a path, for messages.

    Returns:
        The digest; None, with a warning, for a stream, because it would have to be read again.
    """
    if source is None:
        return None
    if (mixture := Mixture.of(source)) is not None:
        parts = [[one.name, one.weight, fingerprint(one.source, split, name)] for one in mixture.sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if isinstance(source, Mapping):
        source = of_mapping(source, split, name or type(source).__name__)
    if is_stream(source):
        log.warning("a %s is a stream, so its rows are not hashed for the run's records", type(source).__name__)
        return None
    digest = hashlib.sha256()
    if library(source):
        source = list(library_rows(source, type(source).__name__))
    for item in [source] if isinstance(source, str | os.PathLike) else source:
        if isinstance(item, str | os.PathLike) and is_open_stream(place(item)):
            log.warning("%s is a stream, so its rows are not hashed for the run's records", item)
            return None
        files = hashed_files(item) if isinstance(item, str | os.PathLike) else []
        for file in files:
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        if not files:
            item = list(library_rows(item, "")) if library(item) and not isinstance(item, Mapping) else plain(item)
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())
        if isinstance(item, str) and is_task(item):
            digest.update(task_version(item).encode())
    return digest.hexdigest()


def hashed_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files of a source; `fingerprint` hashes their bytes. Empty for a task or a Hub id."""
    name = place(source)
    if is_task(name):
        return []
    folder = name if is_saved_dataset(name) else name.partition(":")[0]
    if is_saved_dataset(folder):
        return sorted(file for file in Path(folder).rglob("*") if file.is_file())
    try:
        return [] if is_open_stream(name) else local_files(source) or []
    except DataError:  # there are no files; the name is hashed, as for a Hub id
        return []


# -- conversion -------------------------------------------------------------------------------------------------------


def rename_columns(row: LocatedRow, columns: Mapping[str, str | None] | None) -> LocatedRow:
    r"""Apply a `columns:` mapping, `{our name: their name}`; their columns stay available under their own names.

    `{our name: None}` leaves that column out. Cells of CSV files become numbers, messages or tools, according to the
    name of their column.

    Args:
        row: The row.
        columns: The mapping.

    Raises:
        RowError: If a column does not exist, a cell cannot be converted, or a text contains an unpaired surrogate, as
            JSON can encode one (`\\ud83d`).

    Example:
        >>> rename_columns(LocatedRow({"question": "Hi"}, "a.jsonl:1"), {"prompt": "question"}).data
        {'question': 'Hi', 'prompt': 'Hi'}
    """
    for column, value in row.data.items():
        if (broken := _half_character({column: value})) is not None:
            raise RowError(
                f"{column}: {broken[:60]!a} contains an unpaired surrogate, so it is not valid text; fix the encoding"
            )
    data, columns = row.data, columns or {}
    left_out = {ours for ours, theirs in columns.items() if theirs is None}
    mapped = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    if missing := [theirs for theirs in mapped.values() if theirs not in data]:
        raise RowError(
            f"the row has no column {missing[0]!r} (named in data.columns); its columns are {quoted(data, none='none')}"
        )
    kept = {column: value for column, value in data.items() if column not in left_out}
    named = {**kept, **{ours: data[theirs] for ours, theirs in mapped.items()}}
    if isinstance(data, Cells):
        try:
            named = {key: cell(key, value) if isinstance(value, str) else value for key, value in named.items()}
        except ValueError as error:
            raise RowError(str(error)) from None
        named = unfilled([named])[0]
    return LocatedRow(named, row.where)


def _half_character(value: JSON) -> str | None:
    """The first text in a row that cannot be encoded as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value
        return None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := _half_character(item)) is not None), None)


def require(data: Row, *names: str) -> None:
    """Raise `RowError` for the first of `names` that a row lacks."""
    for name in names:
        if data.get(name) is None:
            raise RowError(
                f"the row has no {name!r}; its columns are {quoted(data, none='none')}. Add it, or map another column "
                f"with `columns: {{{name}: your_name}}`"
            )


def require_list(data: Row, name: str) -> list[JSON]:
    """The list in a column; raises `RowError` if there is none."""
    require(data, name)
    value = data[name]
    if not isinstance(value, list):
        raise RowError(f"{name!r} is a {type(value).__name__}; it must be a list")
    return value


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise `DataError` for an unknown value of `data.on_bad_row`."""
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'")


def convert_row(
    row: LocatedRow,
    convert: Callable[[Row], Sequence[T]],
    on_bad_row: str = "error",
    columns: Mapping[str, str | None] | None = None,
) -> tuple[list[T], str | None]:
    """Convert a row with a function.

    Args:
        row: The row.
        convert: Converts a row to a list of examples; raises `RowError` for a bad row.
        on_bad_row: `error` or `skip`.
        columns: See `rename_columns`.

    Returns:
        The examples, and None; or no examples, and why the row is skipped.

    Raises:
        DataError: If the row is bad, with file and line, unless `on_bad_row` is `skip`.
    """
    try:
        examples = list(convert(rename_columns(row, columns).data))
    except RowError as error:
        message = f"{row.where}: {error}"
        if on_bad_row == "error" and not isinstance(error, SkippedRow):
            raise DataError(f"{message}\n(or set data.on_bad_row: skip to leave out such rows)") from None
        return [], message
    for example in examples:
        if hasattr(example, "where"):
            example.where = row.where
    return examples, None


def convert_rows(
    rows: Iterable[LocatedRow],
    convert: Callable[[Row], Sequence[T]],
    reading: Reading,
    on_bad_row: str = "error",
    columns: Mapping[str, str | None] | None = None,
) -> list[T]:
    """Convert rows with a function. Bad rows raise an error, or are skipped and counted.

    Args:
        rows: The rows.
        convert: Converts a row to a list of examples; raises `RowError` for a bad row.
        reading: Receives counts.
        on_bad_row: `error` or `skip`.
        columns: See `rename_columns`.

    Returns:
        The examples of all rows.

    Raises:
        DataError: At the first bad row, with file and line, unless `on_bad_row` is `skip`; or if no row is left.
    """
    check_on_bad_row(on_bad_row)
    result: list[T] = []
    for row in rows:
        reading.rows += 1
        examples, skipped = convert_row(row, convert, on_bad_row, columns)
        result += examples
        if skipped is not None:
            reading.skipped.append(skipped)
    if not result:
        raise DataError(f"none of the {reading.rows} rows can be used; the first is {reading.skipped[0]}")
    return result
