"""Rows in memory: converts lists, columns, data frames, Arrow tables and datasets to plain Python values."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from rlhf_lightning.data.tables import arrow_rows, number, row_cleaner
from rlhf_lightning.errors import DataError, quoted, short
from rlhf_lightning.types import JSON, Row

if TYPE_CHECKING:
    import datasets
    import pandas

log = logging.getLogger(__name__)
Container: TypeAlias = Any
"""Rows in a form of any library: a frame, table, dataset, mapping or iterable. They have no common base class."""
SPLITS = {"train": (), "validation": ("valid", "val", "dev", "eval"), "test": (), "predict": ()}
"""Names of splits by their use."""
ALL_SPLITS = {name for key, names in SPLITS.items() for name in (key, *names)}
ROW_COLUMNS = {"messages", "conversations", "prompt", "completion", "instruction", "text", "chosen", "rejected"}
ROW_COLUMNS |= {"response", "responses", "tokens", "prompt_tokens"}
BESIDE_ROWS = {"system", "tools", "label", "weight", "train", "margin", "score", "tie", "category"}
"""Columns with a meaning, which would be lost if they were next to a list of rows."""


def library(value: Container) -> str | None:
    """The library that defines the container's class or a base class: `pandas`, `polars`, `pyarrow`, `datasets`,
    `torch`, or None."""
    names = [kind.__module__.partition(".")[0] for kind in type(value).__mro__]
    return next((name for name in names if name in ("pandas", "polars", "pyarrow", "datasets", "torch")), None)


def settled(source: Container) -> Container:
    """Return a source that can be read repeatedly; an iterator is read into memory."""
    if library(source) == "pyarrow" and hasattr(source, "read_all"):
        return source.read_all()
    if hasattr(source, "__next__") and not hasattr(source, "readline"):
        return list(source)
    return source


def library_rows(source: Container, name: str) -> Iterator[Row]:
    """Rows of a data frame, an Arrow table or a dataset of another library.

    Raises:
        DataError: If no rows can be read from it.
    """
    of = library(source)
    kind = type(source).__name__
    if of == "pandas" and hasattr(source, "columns"):
        yield from _frame_rows(source, name)
    elif of == "polars" and hasattr(source, "to_arrow") and hasattr(source, "columns"):
        yield from arrow_rows(source.to_arrow())
    elif of == "polars" and hasattr(source, "collect"):
        raise DataError(f"{name}: this is a polars {kind}; pass the result of its collect()")
    elif of == "pyarrow" and hasattr(source, "schema"):
        import pyarrow

        table = source if isinstance(source, pyarrow.Table) else pyarrow.Table.from_batches([source])
        yield from arrow_rows(table)
    elif of == "datasets":
        yield from dataset_rows(source)
    elif of == "torch" and hasattr(source, "collate_fn"):
        raise DataError(f"{name}: this is a {kind}, which yields batches; pass the dataset that it loads")
    else:
        yield from _indexed(source, name)


def _indexed(source: Container, name: str) -> Iterator[Row]:
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and library(source) == "torch":
        yield from (source[i] for i in range(len(source)))
    elif hasattr(source, "__iter__"):
        yield from source
    else:
        raise DataError(f"{name}: no rows can be read from a {type(source).__name__}; give a file or a list of dicts")


def dataset_rows(dataset: "datasets.Dataset | datasets.IterableDataset") -> Iterator[Row]:
    """Rows of a `datasets.Dataset` or `IterableDataset`, without the nulls that Arrow adds."""
    given = getattr(dataset, "format", None) or {"type": None}
    if given["type"] not in (None, "custom"):  # tensors would only have to be converted back
        dataset = dataset.with_format(None, columns=given["columns"])
    yield from map(dataset_cleaner(dataset), dataset)


def dataset_cleaner(dataset: "datasets.Dataset | datasets.IterableDataset") -> Callable[[Row], Row]:
    """Make a function that converts the rows of a dataset to plain rows without the nulls that Arrow adds."""
    custom = (getattr(dataset, "format", None) or {"type": None})["type"] == "custom"
    if getattr(dataset, "features", None) is None or custom:
        return lambda row: without_nulls(plain_row(row))
    clean = row_cleaner(dataset.features.arrow_schema, decoded=True)
    return lambda row: plain_row(clean(row))


def _frame_rows(frame: "pandas.DataFrame", name: str) -> Iterator[Row]:
    """Rows of a pandas frame. Empty cells become null. Arrays in cells come from Arrow, which adds nulls to them."""
    import pandas

    names = list(frame.columns)
    if wrong := [column for column in names if not isinstance(column, str)]:
        raise DataError(f"{name}: the name of column {wrong[0]!r} is not text; set names with frame.columns = [...]")
    if twice := [column for column in names if names.count(column) > 1]:
        raise DataError(f"{name}: two columns have the name {twice[0]!r}; rename one")
    columns = [frame[column].tolist() for column in names]
    arrow = any(hasattr(value, "dtype") and getattr(value, "ndim", 0) for column in columns for value in column)
    rows = []
    for values in zip(*columns, strict=True):
        empty = [pandas.api.types.is_scalar(value) and pandas.isna(value) for value in values]
        rows.append({k: None if e else plain(v) for k, v, e in zip(names, values, empty, strict=True)})
    yield from (without_nulls(row) for row in rows) if arrow else unfilled(rows)


# -- plain values -----------------------------------------------------------------------------------------------------


def plain(value: Container) -> JSON:
    """Convert arrays, tensors, numpy numbers, tuples and mappings to JSON-like values; anything else is unchanged."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return _plain_object(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Decimal):
        return number(value) if value.is_finite() else float(value)
    if callable(tolist := getattr(value, "tolist", None)):
        found = tolist()
        return plain(found) if isinstance(found, list) else found
    return value


def plain_row(row: Mapping[str, Container]) -> Row:
    """A row with plain names and values; see `plain`.

    Raises:
        DataError: If the name of a column is not text.
    """
    named = _plain_object(row)
    if wrong := [name for name in named if not isinstance(name, str)]:
        raise DataError(f"the name {wrong[0]!r} of a column is not text, in {short(named)}; use text for all names")
    return named


def _plain_object(value: Mapping[str, Container]) -> Row:
    """An object with plain names and values. Names may be numbers, as in `frame.to_dict()`."""
    return {str.__str__(name) if isinstance(name, str) else name: plain(item) for name, item in value.items()}


def without_nulls(row: Row) -> Row:
    """A row without the null-valued keys of its inner objects."""
    return {key: _dropped(value) for key, value in row.items()}


def _dropped(value: JSON) -> JSON:
    if isinstance(value, dict):
        return {key: _dropped(item) for key, item in value.items() if item is not None}
    return [_dropped(item) for item in value] if isinstance(value, list) else value


class _Shapes:
    """Collects the keys of the objects at each place in the rows (`messages[].tool_calls[]`)."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, ...]] = {}
        self.nulls: dict[str, set[str]] = {}
        self.values: dict[str, set[str]] = {}
        self.alike = True

    def look(self, value: JSON, place: str = "") -> None:
        if not self.alike:
            return
        if isinstance(value, list):
            for item in value:
                self.look(item, f"{place}[]")
        elif isinstance(value, dict):
            keys = tuple(value)
            if self.keys.setdefault(place, keys) != keys:
                self.alike = False
                return
            nulls, values = self.nulls.setdefault(place, set()), self.values.setdefault(place, set())
            for key, item in value.items():
                (nulls if item is None else values).add(key)
                self.look(item, f"{place}.{key}")


def unfilled(rows: list[Row], only_rendered: bool = False) -> list[Row]:
    """Remove the nulls that Arrow adds, if the rows look as if they came from Arrow (`list(dataset)`).

    They do if the objects at each place have the same keys in the same order in every row, and a key that is null in
    one inner object has a value in another. In rows written by hand, an object has only the keys that it needs.

    Args:
        rows: The rows; returned unchanged if they do not come from Arrow.
        only_rendered: Change only the columns of messages and tools.
    """
    shapes = _Shapes()
    for row in rows:
        shapes.look(row)
        if not shapes.alike:
            return rows
    # A turn with tool calls has null content in handwritten rows, too.
    filled = any((shapes.nulls[place] & shapes.values[place]) - {"content"} for place in shapes.keys if place)
    if not filled:
        return rows
    if only_rendered:
        return [unfilled_row(row) for row in rows]
    return [without_nulls(row) for row in rows]


def unfilled_row(row: Row) -> Row:
    """A row without the null-valued keys of its messages and tools."""
    return {key: _dropped(item) if _is_rendered(key, item) else item for key, item in row.items()}


def _is_rendered(name: str, value: JSON) -> bool:
    """True for columns that templates render: messages and tools."""
    messages = isinstance(value, list) and any(
        isinstance(item, dict) and {"role", "from"} & item.keys() for item in value
    )
    return messages or name in ROW_COLUMNS | {"tools", "functions"}


# -- columns and splits -----------------------------------------------------------------------------------------------


def of_mapping(given: Mapping[str, Container], split: str | None, name: str) -> Container:
    """The content of a mapping for a split: its columns as a list of rows, or another source.

    Args:
        given: The mapping.
        split: Name of the split; None for the only one.
        name: Name of the source, for messages.

    Raises:
        DataError: If there is no such split, columns differ in length, or the mapping is a single row.
    """
    if library(given) == "datasets" or _is_splits(given):
        return choose_split(given, split, name)
    columns = {key: plain(value) for key, value in given.items()}
    if (rows := _of_pandas(columns)) is not None:
        return rows
    if _is_columns(columns):
        return rows_of_columns(columns)
    lengths = {key: len(value) for key, value in columns.items() if isinstance(value, list)}
    if given and len(lengths) == len(given) and not _holds_messages(columns):
        found = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise DataError(
            f"{name}: the columns have different lengths ({found}); each row must have a value in every column"
        )
    raise DataError(
        f"{name}: a dict must contain columns (lists), weighted sources ({{name: {{source: FILE, weight: 2}}}}) or "
        f"splits (train, validation, test), but it contains {quoted(given)}; put a single row into a list: [row]"
    )


def object_rows(given: Row, split: str | None, name: str) -> Sequence[JSON]:
    """Rows of one JSON object: its split, columns or list of rows, or the object as a single row.

    Args:
        given: The object.
        split: Name of the split; None for the only one.
        name: Name of the source, for messages.

    Raises:
        DataError: If it has several lists of rows and none is the split, or a column with a meaning next to the list.
    """
    if (frame := _of_pandas(given)) is not None:
        return frame
    if _is_splits(given):
        found = choose_split(given, split, name)
        if not isinstance(found, list):
            raise DataError(f"{name}: the split is a {type(found).__name__}; it must be a list of objects")
        return found
    if given.keys() & ROW_COLUMNS:
        return rows_of_columns(given) if _is_columns(given) else [given]
    lists = {
        key: value
        for key, value in given.items()
        if isinstance(value, list) and all(isinstance(i, dict) for i in value)
    }
    if not lists:
        return rows_of_columns(given) if _is_columns(given) else [given]
    if len(lists) > 1:
        raise DataError(
            f"{name}: there are several lists of objects ({', '.join(lists)}); keep only the one with the rows"
        )
    ((column, rows),) = lists.items()
    others = [key for key in given if key != column]
    if lost := sorted(BESIDE_ROWS.intersection(others)):
        raise DataError(f"{name}: {lost[0]!r} is outside the rows ({column}); put it into each row")
    if others:
        log.info("%s: rows are read from %r; not used: %s", name, column, ", ".join(others))
    return rows


def choose_split(given: Mapping[str, Container], split: str | None, name: str) -> Container:
    """The split with a name, or the only split if no name is given.

    Args:
        given: The splits by name.
        split: Name of the split; None for the only one.
        name: Name of the source, for messages.

    Raises:
        DataError: If there is no such split, or there are several; the message names them.
    """
    wanted = [key for key in (split, *SPLITS.get(split or "", ())) if key in given]
    if split is None and len(given) == 1:
        wanted = list(given)
    if not wanted or (len(wanted) > 1 and wanted[0] != split):
        asked = f"there is no split {split!r}" if split else "there are several splits"
        raise DataError(f"{name}: {asked}; splits are {quoted(given)}. Pass only the split to read")
    if others := [key for key in given if key != wanted[0]]:
        log.info("%s: reading split %r; not used: %s", name, wanted[0], ", ".join(others))
    return given[str(wanted[0])]


def _is_splits(given: Mapping[str, Container]) -> bool:
    """True for a mapping of splits: by its keys, or because its values are containers or lists of rows."""
    if not given:
        return False
    if all(key in ALL_SPLITS for key in given):
        return True
    if all(library(value) in ("pandas", "polars", "datasets") and not _is_series(value) for value in given.values()):
        return True
    return all(
        isinstance(value, list) and bool(value) and all(isinstance(i, dict) and i.keys() & ROW_COLUMNS for i in value)
        for value in given.values()
    )


def _is_series(value: Container) -> bool:
    return not hasattr(value, "columns") and not hasattr(value, "column_names")


def _is_columns(given: Row) -> TypeGuard[dict[str, list[JSON]]]:
    lengths = {len(value) if isinstance(value, list) else -1 for value in given.values()}
    return len(lengths) == 1 and -1 not in lengths and not _holds_messages(given)


def _holds_messages(given: Row) -> bool:
    """True if a column is a list of messages or tools, so that the mapping is a single row."""
    lists = [given[key] for key in ("messages", "conversations", "tools", *ROW_COLUMNS) if key in given]
    return any(isinstance(value, list) and any(isinstance(item, dict) for item in value) for value in lists)


def _of_pandas(given: Row) -> list[Row] | None:
    """Rows of the output of a pandas frame's `to_dict` or `to_json`, by columns (the default), `index` or `split`."""
    if given.keys() >= {"columns", "data"} and given.keys() <= {"columns", "data", "index"}:
        columns, data = given["columns"], given["data"]
        if isinstance(columns, list) and isinstance(data, list):
            names = [name for name in columns if isinstance(name, str)]
            rows = [row for row in data if isinstance(row, list) and len(row) == len(columns)]
            if len(names) == len(columns) and len(rows) == len(data):
                return [dict(zip(names, row, strict=True)) for row in rows]
    inner = [value for value in given.values() if isinstance(value, dict) and value]
    if not inner or len(inner) < len(given):
        return None
    if all(value.keys() == inner[0].keys() for value in inner):
        if all(str(key).isdecimal() for key in inner[0]) and all(isinstance(key, str) for key in given):
            return rows_of_columns({key: list(value.values()) for key, value in zip(given, inner, strict=True)})
        if all(str(key).isdecimal() for key in given):
            return inner
    return None


def rows_of_columns(columns: Mapping[str, list[JSON]]) -> list[Row]:
    """Convert columns to rows: `{"a": [1, 2]}` becomes `[{"a": 1}, {"a": 2}]`."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
