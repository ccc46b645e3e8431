"""Rows and where they come from: files, Hub data sets, and what Python holds.

A `Row` keeps its file and line, so that whatever is found wrong later can name them.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_lightning.data.containers import dataset_rows, library, library_rows, plain, settled, unfilled, unwrapped
from rlhf_lightning.data.files import SUFFIXES, Wanted, file_items, is_saved_dataset, line_row, local_files, place
from rlhf_lightning.data.names import check_there, hub_dataset, is_here, is_stream, load_saved
from rlhf_lightning.data.tables import Cells, Item, cell
from rlhf_lightning.errors import DataError
from rlhf_lightning.files import is_open_stream

__all__ = [
    "Reading",
    "Row",
    "RowError",
    "SkippedRow",
    "Source",
    "check_there",
    "convert_rows",
    "fingerprint",
    "is_here",
    "read_rows",
    "rename_columns",
    "require",
]
log = logging.getLogger(__name__)
Source = str | Path | Mapping[str, Any] | Iterable[Any]


@dataclass
class Row:
    """One row of data as read, with `where` it was read: `file:line`, or `list[index]`."""

    data: dict[str, Any]
    where: str


class RowError(DataError):
    """A row that does not fit; the reader of the file adds file and line."""


class SkippedRow(RowError):
    """A row that the user asked to leave out: counted, never an error."""


@dataclass
class Reading:
    """What happened while rows were read: how many, how many were skipped and why."""

    rows: int = 0
    blank: int = 0
    skipped: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] | None = None
    """Where it is a list, a line that is no row is put there, with the reason, and reading goes on."""


def read_rows(
    source: Source,
    text_key: str | None = None,
    reading: Reading | None = None,
    split: str | None = None,
    lines: bool = False,
) -> list[Row]:
    """Read every row of a file, several files, a Hub data set or what Python holds.

    Args:
        source: the name of a file, a pattern, a folder of parts, or a Hub id (`owner/name`, `owner/name:split` or
            `owner/name:configuration/split`); a list of dicts, of these names, or of strings (with `text_key`); a
            dict of columns or of splits; a pandas or polars frame, an Arrow table, a data set of `datasets`.
        text_key: where given, a line of a text file, or a string where a row is due, becomes `{text_key: line}`.
        reading: counts blank lines.
        split: what to take of several splits.
        lines: every line of a file is text as it stands.

    Raises:
        DataError: no such file, unknown kind, unreadable line (with file and line), or no row at all.
    """
    reading = reading or Reading()
    rows = list(_rows(_items(source, Wanted(text_key, split, lines)), reading))
    if not rows and not reading.unreadable:
        raise DataError(f"{_name(source)}: no rows. The data set is empty; give a file with at least one row.")
    return rows


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return "the list" if isinstance(source, list | tuple) else f"the {type(source).__name__}"


def _rows(items: Iterable[Item], reading: Reading) -> Iterator[Row]:
    for where, item in items:
        if item is None:
            reading.blank += 1
        elif not isinstance(item, DataError):
            yield Row(item, where)
        elif reading.unreadable is None:
            raise DataError(f"{where}: {item}")
        else:
            reading.unreadable.append((where, str(item)))


def _items(source: Source, wanted: Wanted, name: str = "") -> Iterator[Item]:
    name, source = name or type(source).__name__, settled(source)
    if isinstance(source, str | os.PathLike):
        yield from _named(source, wanted)
    elif isinstance(source, bytes | bytearray | set | frozenset) or hasattr(source, "readline"):
        advice = "it has no order; give a list" if isinstance(source, set | frozenset) else "give the path of a file"
        raise DataError(f"a {name} is no source of rows: {advice}")
    elif isinstance(source, Mapping):
        inner = unwrapped(source, wanted.split, name)
        yield from _items(inner, wanted, name if isinstance(inner, list) else "")
    elif library(source):
        yield from _listed(library_rows(source, name), wanted, name)
    else:
        yield from _listed(source, wanted, name)


def _listed(source: Iterable[Any], wanted: Wanted, name: str) -> Iterator[Item]:
    """Rows of a list, and of the files and containers that stand in it."""
    if not isinstance(source, Iterable):
        raise DataError(f"no rows can be read from {source!r}; give a file or a list of dicts")
    items = list(source)
    rows = iter(unfilled([plain(item) for item in items if _is_row(item)]))
    for index, item in enumerate(items):
        where = f"{name}[{index}]"
        if _is_row(item):
            yield where, next(rows)
        elif isinstance(item, str) and wanted.text_key and not _is_file_name(item):
            yield from _text(item, where, wanted.text_key)
        elif isinstance(item, str | os.PathLike):
            yield from _named(item, wanted)
        elif library(item) in ("pandas", "polars", "pyarrow", "datasets"):
            yield from _items(item, wanted, where)
        else:
            raise DataError(f"{where}: a row is a dict, this is {type(item).__name__}")


def _is_row(item: Any) -> bool:
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


def _is_file_name(text: str) -> bool:
    """Whether an item of a list of prompts is a file: it ends like one, and is a single word or there."""
    return text.lower().endswith(SUFFIXES) and (len(text.split()) == 1 or os.path.isfile(text))


# -- names ------------------------------------------------------------------------------------------------------------


def _named(source: str | os.PathLike[str], wanted: Wanted) -> Iterator[Item]:
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


def fingerprint(source: Source | None, split: str | None = None) -> str | None:
    """SHA-256 of what a source holds: the bytes of files, or the JSON of rows; a Hub id stands for itself.

    None, with a warning, for a stream, which would have to be read once more.
    """
    if source is None:
        return None
    if isinstance(source, Mapping):
        source = unwrapped(source, split, type(source).__name__)
    if is_stream(source):
        log.warning("a %s is a stream: what was read of it is not hashed", type(source).__name__)
        return None
    digest = hashlib.sha256()
    if library(source):
        source = list(library_rows(source, type(source).__name__))
    for item in [source] if isinstance(source, str | os.PathLike) else source:
        if isinstance(item, str | os.PathLike) and is_open_stream(place(item)):
            log.warning("%s is a stream: what was read of it is not hashed", item)
            return None
        files = hashed_files(item) if isinstance(item, str | os.PathLike) else []
        for file in files:
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        if not files:
            item = list(library_rows(item, "")) if library(item) and not isinstance(item, Mapping) else plain(item)
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def hashed_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files that hold a source, whose bytes are hashed; none of a Hub id, which stands for itself."""
    name = place(source)
    folder = name if is_saved_dataset(name) else name.partition(":")[0]
    if is_saved_dataset(folder):
        return sorted(file for file in Path(folder).rglob("*") if file.is_file())
    try:
        return [] if is_open_stream(name) else local_files(source) or []
    except DataError:  # nothing there to hash: it stands for itself, as a Hub id does
        return []


# -- what becomes of rows ---------------------------------------------------------------------------------------------


def rename_columns(row: Row, columns: Mapping[str, str | None] | None) -> Row:
    """Apply a `columns:` mapping, `{our name: their name}`; their columns stay available under their own names.

    `{our name: None}` leaves that column out. The cells of CSV become numbers, messages and tools where the name of
    their column says so.

    Raises:
        RowError: no such column, a cell that cannot be read so, or half a character, as JSON can write one
            (`\\ud83d`), anywhere in the row.
    """
    for column, value in row.data.items():
        if (broken := _half_character({column: value})) is not None:
            raise RowError(
                f"{column}: {broken[:60]!a} holds half a character (an unpaired surrogate), which is no text"
            )
    data, columns = row.data, columns or {}
    left_out = {ours for ours, theirs in columns.items() if theirs is None}
    mapped = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    if missing := [theirs for theirs in mapped.values() if theirs not in data]:
        raise RowError(f"no column {missing[0]!r} (named in columns:); the row has {_names(data)}")
    kept = {column: value for column, value in data.items() if column not in left_out}
    named = {**kept, **{ours: data[theirs] for ours, theirs in mapped.items()}}
    if isinstance(data, Cells):
        try:
            named = {key: value if value is None else cell(key, value) for key, value in named.items()}
        except ValueError as error:
            raise RowError(str(error)) from None
        named = unfilled([named])[0]
    return Row(named, row.where)


def _half_character(value: Any) -> str | None:
    """The first text in a row that UTF-8 cannot hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value
        return None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := _half_character(item)) is not None), None)


def _names(data: Mapping[str, Any]) -> str:
    return ", ".join(repr(k) for k in data) or "no columns"


def require(data: Mapping[str, Any], *names: str) -> None:
    """Raise `RowError` for the first of `names` that a row lacks."""
    for name in names:
        if data.get(name) is None:
            raise RowError(
                f"no {name!r}; the row has {_names(data)}. Add it, or map yours with `columns: {{{name}: your_name}}`"
            )


def convert_rows(
    rows: Iterable[Row],
    convert: Callable[[dict[str, Any]], Any],
    reading: Reading,
    on_bad_row: str = "error",
    columns: Mapping[str, str | None] | None = None,
) -> list[Any]:
    """Turn rows into what `convert` makes of them (a list each), with bad rows refused or skipped and counted.

    Raises:
        DataError: the first bad row with file and line, unless `on_bad_row="skip"`; or nothing left.
    """
    if on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'")
    result: list[Any] = []
    for row in rows:
        reading.rows += 1
        try:
            for example in convert(rename_columns(row, columns).data):
                if hasattr(example, "where"):
                    example.where = row.where
                result.append(example)
        except RowError as error:
            message = f"{row.where}: {error}"
            if on_bad_row == "error" and not isinstance(error, SkippedRow):
                raise DataError(f"{message}\n(or set data.on_bad_row: skip to leave such rows out)") from None
            reading.skipped.append(message)
    if not result:
        raise DataError(f"none of {reading.rows} rows could be used; the first: {reading.skipped[0]}")
    return result
