"""Rows and where they come from: JSONL, JSON, Parquet, text files, Hub data sets and Python lists.

A `Row` keeps its file and line, so that whatever is found wrong later can name them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import DataError

Source = str | Path | Sequence[Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".txt")


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


def read_rows(source: Source, text_key: str | None = None, reading: Reading | None = None) -> list[Row]:
    """Read every row of a file, several files, a Hub data set or a Python list.

    Args:
        source: a path (`.jsonl`, `.json`, `.parquet`; `.txt` with `text_key`), a Hub id (`owner/name`,
            `owner/name:split` or `owner/name:configuration/split`), a list of these, or a list of dicts (or strings,
            with `text_key`).
        text_key: where given, a line that is no JSON object becomes `{text_key: line}`.
        reading: counts blank lines.

    Raises:
        DataError: no such file, unknown kind, unreadable line (with file and line), or no row at all.
    """
    reading = reading or Reading()
    rows = list(_rows(source, text_key, reading))
    if not rows and not reading.unreadable:
        name = "the list" if not isinstance(source, str | Path) else str(source)
        raise DataError(f"{name}: no rows. The data set is empty; give a file with at least one row.")
    return rows


def _rows(source: Source, text_key: str | None, reading: Reading) -> Iterator[Row]:
    if isinstance(source, str | Path):
        yield from _file_rows(source, text_key, reading)
        return
    for index, item in enumerate(source):
        if isinstance(item, Mapping):
            yield Row(dict(item), f"list[{index}]")
        elif isinstance(item, Path) or (isinstance(item, str) and (text_key is None or _is_file_name(item))):
            yield from _file_rows(item, text_key, reading)
        elif isinstance(item, str) and text_key:
            yield from _line_row(item, f"list[{index}]", text_key, reading)
        else:
            raise DataError(f"list[{index}]: a row is a dict, this is {type(item).__name__}")


def _is_file_name(text: str) -> bool:
    """Whether an item of a list of prompts is a file: it ends like one, and is a single word or there."""
    return text.endswith(SUFFIXES) and (len(text.split()) == 1 or Path(text).is_file())


def _file_rows(source: str | Path, text_key: str | None, reading: Reading) -> Iterator[Row]:
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path}: a folder; name the file ({', '.join(SUFFIXES)}) or give a list of files")
    if not path.exists():
        yield from _hub_rows(str(source))
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.suffix == ".json":
        yield from _json_rows(path)
    else:
        yield from _line_rows(path, text_key, reading)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _line_rows(path: Path, text_key: str | None, reading: Reading) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like, which splitlines() takes for line ends.
    lines = _read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            yield from _line_row(line, where, text_key, reading)
        except DataError as error:
            if reading.unreadable is None:
                raise
            reading.unreadable.append((where, str(error).removeprefix(f"{where}: ")))


def _line_row(line: str, where: str, text_key: str | None, reading: Reading) -> Iterator[Row]:
    line = line.strip()
    if not line:
        reading.blank += 1
    elif text_key and not line.startswith("{"):
        yield Row({text_key: line}, where)
    else:
        yield Row(_object(line, where), where)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise DataError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}; each line must be one JSON object")
    return value


def _json_rows(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; the file looks like JSON lines, name it .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path}: not valid JSON ({error}){hint}") from None
    if isinstance(value, dict):
        value = next((v for v in value.values() if isinstance(v, list)), [value])
    if not isinstance(value, list):
        raise DataError(f"{path}: holds a {type(value).__name__}; a .json file must hold a list of objects")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{path}[{index}]: a {type(item).__name__}; every row must be an object")
        yield Row(item, f"{path}[{index}]")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        items = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None
    for index, item in enumerate(items):
        yield Row(item, f"{path}[{index}]")


def check_there(source: str) -> None:
    """Whether the path is there, or may be a Hub id instead; raises `DataError`."""
    name = source.partition(":")[0]
    local = name.count("/") != 1 or Path(name).suffix in SUFFIXES or name.startswith((".", "/", "~"))
    if local and not Path(source).exists():
        raise DataError(f"{source}: no such file (seen from {Path.cwd()}); give a path or a Hub id like owner/name")


def _hub_rows(source: str) -> Iterator[Row]:
    name, _, part = source.partition(":")
    configuration, _, split = part.rpartition("/")
    check_there(source)
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:
        # What it lists of configurations or splits stands on further lines.
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise DataError(
            f"{source}: neither a file here nor a Hub data set that could be loaded ({reason}); "
            "a configuration and a split are named by owner/name:configuration/split"
        ) from error
    for index, item in enumerate(dataset):
        yield Row(dict(item), f"{source}[{index}]")


def rename_columns(row: Row, columns: Mapping[str, str | None] | None) -> Row:
    """Apply a `columns:` mapping, `{our name: their name}`; their columns stay available under their own names.

    `{our name: None}` leaves that column out.

    Raises:
        RowError: no such column, or half a character, as JSON can write one (`\\ud83d`), anywhere in the row.
    """
    for column, value in row.data.items():
        if (broken := _half_character({column: value})) is not None:
            raise RowError(
                f"{column}: {broken[:60]!a} holds half a character (an unpaired surrogate), which is no text"
            )
    if not columns:
        return row
    left_out = {ours for ours, theirs in columns.items() if theirs is None}
    mapped = {ours: theirs for ours, theirs in columns.items() if theirs is not None}
    missing = [theirs for theirs in mapped.values() if theirs not in row.data]
    if missing:
        raise RowError(f"no column {missing[0]!r} (named in columns:); the row has {_names(row.data)}")
    kept = {column: value for column, value in row.data.items() if column not in left_out}
    return Row({**kept, **{ours: row.data[theirs] for ours, theirs in mapped.items()}}, row.where)


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


def fingerprint(source: Source | None) -> str | None:
    """SHA-256 of what a source holds: the bytes of files, or the JSON of a list; a Hub id stands for itself."""
    if source is None:
        return None
    digest = hashlib.sha256()
    for item in [source] if isinstance(source, str | Path) else source:
        if isinstance(item, str | Path) and Path(item).is_file():
            with open(item, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()
