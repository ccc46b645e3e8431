"""Reads tables as plain rows: Arrow tables without the nulls that Arrow adds, and CSV files."""

import ast
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from rlhf_lightning.errors import DataError
from rlhf_lightning.types import JSON, Row

if TYPE_CHECKING:
    import pyarrow

Item = tuple[str, Row | DataError | None]
"""A location with its content: a row, None for a blank line, or a `DataError` for a line that is not a row."""

ArrowValue: TypeAlias = Any
"""A value of an Arrow table in Python, such as a list, a number, a decimal or the pairs of a map."""
NUMBERS = {"label", "margin", "tie", "score", "weight", "train", "reward", "advantage"}
STRUCTURES = {"messages", "conversations", "tools", "responses", "scores", "ranks", "history"}
STRUCTURES |= {"tokens", "loss_mask", "logprobs", "prompt_tokens", "response_tokens"}
TEXTS_OR_MESSAGES = {"prompt", "completion", "chosen", "rejected", "response"}
MESSAGE_LIST = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
"""Beginning of a list of messages, whether well-formed or not."""


class Cells(dict[str, JSON]):
    """A row with values that are text or null, as in CSV; `cell` converts them by column.

    Example:
        >>> (_, row), *_ = csv_items("rows.csv", "prompt,label\\nHi,1\\n", ",")
        >>> row["label"], cell("label", row["label"])
        ('1', 1)
    """


# -- Arrow ------------------------------------------------------------------------------------------------------------


def arrow_rows(table: "pyarrow.Table") -> Iterator[Row]:
    """Rows of an Arrow table.

    Raises:
        DataError: If two columns have the same name.
    """
    names = table.schema.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two columns have the name {twice[0]!r}; rename one")
    clean = row_cleaner(table.schema)
    for batch in table.to_batches():
        for start in range(0, len(batch), 1000):
            for item in batch.slice(start, 1000).to_pylist():
                yield clean(item)


def row_cleaner(schema: "pyarrow.Schema", decoded: bool = False) -> Callable[[Row], Row]:
    """Make a function that converts rows with an Arrow schema to plain rows.

    An Arrow struct has the keys of all rows, with null for those that a row lacks; such keys are dropped. Arrow maps
    and JSON text keep the keys that were written, including nulls.

    Args:
        schema: The Arrow schema.
        decoded: True if JSON text is already parsed, as `datasets` does.
    """
    cleaners = {field.name: _cleaner(field.type, decoded) for field in schema}
    needed = {name: clean for name, clean in cleaners.items() if clean is not None}

    def clean(row: Row) -> Row:
        return {k: v if v is None or k not in needed else needed[k](v) for k, v in row.items()}

    return clean


def _cleaner(kind: "pyarrow.DataType", decoded: bool) -> Callable[[ArrowValue], JSON] | None:
    """Converter for values of an Arrow type; None if they are already plain. It is never called with None."""
    from pyarrow import types

    if types.is_struct(kind):
        inner = {field.name: _cleaner(field.type, decoded) for field in kind}

        def struct(value: ArrowValue) -> JSON:
            if not isinstance(value, Mapping):  # decoded by `datasets`, for example an image
                return value
            found = ((key, item, inner.get(key)) for key, item in value.items() if item is not None)
            return {key: clean(item) if clean else item for key, item, clean in found}

        return struct
    if types.is_map(kind):
        clean_item = _cleaner(kind.item_type, decoded) or _same

        def mapping(value: ArrowValue) -> JSON:
            pairs = value.items() if isinstance(value, Mapping) else value
            return {key: None if item is None else clean_item(item) for key, item in pairs}

        return mapping
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _cleaner(kind.value_type, decoded)
    if hasattr(kind, "value_type"):  # any kind of list
        clean = _cleaner(kind.value_type, decoded)
        return None if clean is None else lambda value: [None if item is None else clean(item) for item in value]
    if types.is_decimal(kind):
        return number
    if getattr(kind, "extension_name", "") == "arrow.json" and not decoded:
        return json.loads
    return None


def _same(value: ArrowValue) -> JSON:
    return value


def number(value: Decimal) -> int | float:
    """Convert a decimal to the number that JSON would have."""
    return int(value) if value == value.to_integral_value() else float(value)


# -- CSV --------------------------------------------------------------------------------------------------------------


def csv_items(path: str, text: str, delimiter: str) -> Iterator[Item]:
    """Rows of a CSV file with a header; empty cells are null, all others are text (see `cell`).

    Args:
        path: The file, for locations.
        text: Text of the file.
        delimiter: Separator of cells.

    Raises:
        DataError: If a column has no name or a duplicate one, a quote does not end, or the file is JSON.
    """
    first = text.lstrip().partition("\n")[0]
    if first.startswith(("{", "[")):
        raise DataError(
            f"{path}:1: the file has the name of a table, but begins like JSON; rename it to .jsonl or .json"
        )
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"  # spreadsheets write this in locales with a decimal comma
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from _records(path, text, delimiter)
    finally:
        csv.field_size_limit(limit)


def _records(path: str, text: str, delimiter: str) -> Iterator[Item]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    index = False
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{where}: the row that begins here cannot be parsed ({error}); check its quotes") from None
        if cells and cells[0].startswith("\ufeff"):
            cells[0] = cells[0].removeprefix("\ufeff")
        if not cells:
            yield where, None
        elif not header:
            header = [name.strip() for name in cells]
            index = not header[0].strip() and len(header) > 1  # written by pandas unless index=False
            _check_header(where, header[index:])
        elif [name.strip() for name in cells] == header:
            yield (
                where,
                DataError("this line repeats the header; the file seems to be concatenated. Remove this line"),
            )
        elif len(cells) != len(header):
            yield where, DataError(f"{_count(cells)}, but the header (line 1) has {_count(header)}")
        elif index and not cells[0].strip().isdigit():
            raise DataError(f"{path}:1: the first column has no name; name it in the header")
        else:
            yield where, Cells(zip(header[index:], (value or None for value in cells[index:]), strict=True))


def _count(cells: list[str]) -> str:
    return f"{len(cells)} cell{'s' if len(cells) != 1 else ''}"


def _check_header(where: str, header: list[str]) -> None:
    for position, name in enumerate(header):
        if not name.strip():
            raise DataError(f"{where}: a column of the header has no name (after {', '.join(header[:position])!r})")
        if name in header[:position]:
            raise DataError(f"{where}: the header has {name!r} twice; rename one")


def cell(name: str, text: str) -> JSON:
    """Convert the text of a cell by its column: numbers for labels and margins, JSON for messages and tools.

    Args:
        name: Name of the column.
        text: Text of the cell.

    Raises:
        ValueError: If a list or object cannot be parsed.

    Example:
        >>> cell("label", "1"), cell("prompt", "Hi")
        (1, 'Hi')
    """
    if name in NUMBERS:
        return _number(text)
    if name not in STRUCTURES | TEXTS_OR_MESSAGES or not text.lstrip().startswith(("[", "{")):
        return text
    found = _structure(text.strip())
    if name in STRUCTURES:
        written = found is not None
    else:
        written = _is_messages(found)
        if (found is not None and not written) or not MESSAGE_LIST.match(text):
            return found if written else text
    if not written:
        raise ValueError(f"{name!r} contains {text.strip()[:40]!r}…, which is not JSON; write the cell with json.dumps")
    return found


def _number(text: str) -> bool | float | str:
    word = text.strip()
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return text


def _structure(text: str) -> JSON:
    """The value of JSON, or of a printed Python list or dict (pandas writes these to cells); None for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    # Only if it prints the same: numpy prints two texts as ['a' 'b'], which Python would parse as one text 'ab'.
    return found if repr(found) == text else None


def _is_messages(value: JSON) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in value)
    )
