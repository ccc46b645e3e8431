"""Reads files of rows: finds the files for a name, detects their formats, and yields rows with file and line."""

import bz2
import glob
import gzip
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rlhf_lightning.data.containers import object_rows, unfilled
from rlhf_lightning.data.tables import Item, arrow_rows, csv_items
from rlhf_lightning.errors import DataError
from rlhf_lightning.files import LFS_POINTER, LFS_REMEDY, is_file, is_open_stream, unique_keys
from rlhf_lightning.types import JSON, Row

log = logging.getLogger(__name__)
JSON_KINDS = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
TEXTS = (".txt", ".text")
ARROW = (".parquet", ".arrow", ".feather")
KINDS = (*JSON_KINDS, ".parquet", ".arrow", ".feather", *TABLES, *TEXTS)
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (*KINDS, *(kind + end for kind in KINDS for end in COMPRESSIONS))
"""Extensions of files of rows."""
OTHERS = dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "an archive; unpack it, and give the file of rows")
OTHERS |= dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save it as .csv")
OTHERS |= dict.fromkeys(
    (".pkl", ".pickle", ".pt", ".npy", ".npz"), "Python objects; save the rows as .jsonl or .parquet"
)
OTHERS |= dict.fromkeys(
    (".yaml", ".yml", ".xml", ".html", ".db", ".sqlite"), "not a supported format; save the rows as .jsonl"
)
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
MAGIC |= {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"PK\x03\x04": ".zip"}
MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class Wanted:
    """How rows are to be read.

    Attributes:
        text_key: Column of rows that are plain text; None if rows must be objects.
        split: The split to read.
        lines: True if every line is text.

    Example:
        >>> Wanted(text_key="prompt", split="train").lines
        False
    """

    text_key: str | None = None
    split: str | None = None
    lines: bool = False


# -- names ------------------------------------------------------------------------------------------------------------


def place(source: str | os.PathLike[str]) -> str:
    """Resolve `~` and `file://` in a path."""
    name = os.fspath(source)
    if name.startswith("file://"):
        name = unquote(urlsplit(name).path)
    return os.path.expanduser(name)


def local_files(source: str | os.PathLike[str]) -> list[Path] | None:
    """The local files that a name refers to; the files of a pattern or a folder are sorted.

    Returns:
        The files; None if there is no local file or folder of that name.

    Raises:
        DataError: If a folder or a pattern has no files of rows, or the files of a folder are not parts of one dataset.
    """
    name = place(source)
    if not name.strip():
        raise DataError(f"{source!r}: the file name is empty")
    if os.path.isdir(name):
        return _parts(Path(name))
    if os.path.exists(name):
        return [Path(name)] if is_open_stream(name) or is_file(name) else []
    if not re.search(r"[*?\[]", name.partition(":")[0]):  # a Hub split may be train[:10%]
        return None
    found = [Path(file) for file in glob.glob(name, recursive=True) if not os.path.isdir(file) and is_file(file)]
    if not found:
        raise DataError(f"{source}: no file matches (seen from {Path.cwd()})")
    return sorted(found, key=_in_order)


def is_saved_dataset(folder: str) -> bool:
    """True if a folder was written by `save_to_disk` of `datasets`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _parts(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if not file.is_dir() and not file.name.startswith((".", "_"))]
    files = sorted((file for file in files if file.name.lower().endswith(SUFFIXES)), key=_in_order)
    files = [file for file in files if is_file(file)]
    if not files:
        raise DataError(f"{folder}: this is a folder; give a file ({', '.join(KINDS)}), or a pattern: {folder}/*.jsonl")
    if len({re.sub(r"\d+", "0", file.name) for file in files}) > 1:
        names = ", ".join(file.name for file in files[:6]) + (", …" if len(files) > 6 else "")
        raise DataError(
            f"{folder}: the files in this folder are not parts of one dataset ({names}); give a file, or a pattern: "
            f"{folder}/*{files[0].suffix}"
        )
    return files


def _in_order(file: Path) -> list[str | int]:
    """Sort key that puts part 2 before part 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(file))]


# -- a file -----------------------------------------------------------------------------------------------------------


def file_items(path: Path, wanted: Wanted) -> Iterator[Item]:
    """Rows of a file with their locations.

    Raises:
        DataError: If the file cannot be read.
    """
    kind, data = _content(path)
    if kind in OTHERS:
        raise DataError(f"{path}: {OTHERS[kind]}")
    if kind in ARROW:
        return _arrow_items(path, kind, data)
    return _unfilled(path, _text_items(path, kind, decoded(path, data), wanted))


def _unfilled(path: Path, items: Iterator[Item]) -> Iterator[Item]:
    """Remove Arrow's nulls from the items of a JSON file that `datasets` or pandas wrote from an Arrow table."""
    found = list(items)
    given = [item for _, item in found if isinstance(item, dict)]
    rows = unfilled(given, only_rendered=True)
    if rows is not given:
        log.info("%s: the file seems to come from an Arrow table; null keys of messages and tools are dropped", path)
    after = iter(rows)
    return ((where, next(after) if isinstance(item, dict) else item) for where, item in found)


def _content(path: Path) -> tuple[str, bytes]:
    """Extension for the format of a file, and its uncompressed bytes. Magic bytes take precedence over the name."""
    endings = [ending.lower() for ending in path.suffixes]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if data.startswith(LFS_POINTER):
        raise DataError(f"{path}: {LFS_REMEDY}")
    packed = magic(data)
    while packed in COMPRESSIONS:  # a loop, because some files are compressed twice
        data = _unpacked(path, packed, data)
        packed = magic(data)
    while endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    named = endings[-1] if endings else ""
    inner = magic(data)
    return (inner if inner and named not in OTHERS else named), data


def magic(data: bytes) -> str:
    """Kind of file according to its first bytes; empty if unknown."""
    return next((kind for start, kind in MAGIC.items() if data.startswith(start)), "")


def _unpacked(path: Path, packed: str, data: bytes) -> bytes:
    try:
        if packed == ".zst":
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
                return bytes(stream.read())
        openers: dict[str, Callable[[bytes], bytes]]
        openers = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
        return openers[packed](data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be decompressed ({packed[1:]}: {error}); is the file complete?") from None


def decoded(path: Path, data: bytes, first: int = 1, encoding: str | None = None) -> str:
    """The text of a file, or of the part of it that begins with line `first`.

    Args:
        path: The file, for messages.
        data: Its bytes.
        first: Number of the first line.
        encoding: The encoding; by default UTF-8, or UTF-16 or UTF-32 if there is a byte order mark.

    Raises:
        DataError: If the bytes are not text of that encoding.
    """
    encoding = encoding or next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + first
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{path}:{line}: not {name} text ({error.reason}); save the file as UTF-8") from None
    if "\x00" in text:
        line = text[: text.index("\x00")].count("\n") + first
        raise DataError(
            f"{path}:{line}: contains a null character, so it is not UTF-8 text; save the file as UTF-8 (UTF-16 is "
            "supported with a byte order mark)"
        )
    return text


def _arrow_items(path: Path, kind: str, data: bytes) -> Iterator[Item]:
    import pyarrow
    from pyarrow import feather, ipc, parquet

    source = pyarrow.BufferReader(data)
    try:
        if kind == ".parquet":
            table = parquet.read_table(source)
        elif data.startswith((b"ARROW1", b"FEA1")):
            table = feather.read_table(source)
        else:
            table = ipc.open_stream(source).read_all()
        rows = arrow_rows(table)
        yield from ((f"{path}[{index}]", row) for index, row in enumerate(rows))
    except (pyarrow.ArrowException, OSError) as error:
        name = "Parquet" if kind == ".parquet" else "Arrow"
        raise DataError(f"{path}: not a readable {name} file ({error})") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _text_items(path: Path, kind: str, text: str, wanted: Wanted) -> Iterator[Item]:
    if wanted.lines:
        return _lines_of_text(path, split_lines(text), wanted.text_key)
    if kind in TABLES:
        return csv_items(str(path), text, TABLES[kind])
    if kind in TEXTS and wanted.text_key:
        return _prompts(path, text, wanted)
    if kind not in (*JSON_KINDS, *TEXTS) and not text.lstrip().startswith(("{", "[", '"')) and text.strip():
        told = ", .txt for a prompt on each line (or set data.lines: true)" if wanted.text_key else ""
        ending = f"its extension {kind} is unknown" if kind else "it has no extension"
        raise DataError(
            f"{path}: the format is unknown: not JSON, and {ending}; rename it: .csv or .tsv for a table{told}"
        )
    return _json_items(path, kind, text, wanted)


def split_lines(text: str) -> list[str]:
    """Split a text at any kind of line end, and remove byte order marks, which concatenated files may have inside.

    Not `splitlines()`, which also splits at U+2028 and similar characters that JSON strings may contain.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    return [line.removeprefix("\ufeff").strip() for line in lines]


# -- text -------------------------------------------------------------------------------------------------------------


def _lines_of_text(path: Path, lines: list[str], text_key: str | None) -> Iterator[Item]:
    for number, line in enumerate(lines, 1):
        yield f"{path}:{number}", {text_key or "text": line} if line else None


def _prompts(path: Path, text: str, wanted: Wanted) -> Iterator[Item]:
    """Rows of a text file: a prompt per line, or JSON if every line is JSON."""
    lines = split_lines(text)
    kinds = {number: json_kind(line) for number, line in enumerate(lines, 1) if line}
    objects = [number for number, kind in kinds.items() if kind is dict]
    others = [number for number, kind in kinds.items() if kind is not dict]
    if objects and others:
        raise DataError(
            f"{path}:{others[0]}: not a JSON object, but line {objects[0]} is one; a file must contain either rows or "
            "lines of text. With data.lines: true, every line is text."
        )
    every = {kind for kind in kinds.values() if kind} if None not in kinds.values() else set()
    if objects or every == {str} or every == {list} or (others and all(lines[n - 1].startswith("{") for n in others)):
        return _json_items(path, ".jsonl", text, wanted)
    return _lines_of_text(path, lines, wanted.text_key)


# -- JSON -------------------------------------------------------------------------------------------------------------


def load_json(text: str) -> JSON:
    """Parse JSON.

    Raises:
        ValueError: If it is invalid, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def json_kind(line: str) -> type | None:
    """Type of a line's JSON value; None if the line is not JSON."""
    try:
        return type(load_json(line)) if line.startswith(("{", "[", '"')) else None
    except ValueError:
        return None


def _json_items(path: Path, kind: str, text: str, wanted: Wanted) -> Iterator[Item]:
    """Rows of JSON lines, of one JSON value, or of several concatenated values, whatever the name of the file."""
    lines = split_lines(text)
    first = next((line for line in lines if line), "")
    found = json_kind(first)
    if first and (kind == ".json" or found in (None, list)):
        try:
            whole = load_json(text)
        except ValueError as error:
            if found is None and (several := _stream(path, text)):
                return iter(several)
            if found is None and kind == ".json":
                line = getattr(error, "lineno", 1)
                raise DataError(f"{path}:{line}: not valid JSON ({error})") from None
        else:
            if kind == ".json" or found is None or _rows_only(whole, wanted):
                return _value_items(path, whole, wanted)
    return (_line_item(f"{path}:{number}", line, wanted) for number, line in enumerate(lines, 1))


def _rows_only(value: JSON, wanted: Wanted) -> bool:
    """True for a list that contains only rows."""
    kinds = (dict, str) if wanted.text_key else (dict,)
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


def _stream(path: Path, text: str) -> list[Item]:
    """Parse concatenated objects that each span several lines; empty if the text is something else."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    found: list[Item] = []
    position, line = 0, 1
    while position < len(text):
        if text[position].isspace() or text[position] == "\ufeff":
            line += text[position] == "\n"
            position += 1
            continue
        start = position
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        found.append((f"{path}:{line}", value))
        line += text.count("\n", start, position)
    return found


def _value_items(path: Path, value: JSON, wanted: Wanted) -> Iterator[Item]:
    """Rows of a single JSON value: a list of objects, or an object that contains them."""
    items = object_rows(value, wanted.split, str(path)) if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise DataError(f"{path}: contains a {type(items).__name__}; a .json file must contain a list of objects")
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        if isinstance(item, str) and wanted.text_key:
            item = {wanted.text_key: item}
        if not isinstance(item, dict):
            raise DataError(f"{where}: the row is a {type(item).__name__}; it must be an object")
        yield where, item


def _line_item(where: str, line: str, wanted: Wanted) -> Item:
    if not line:
        return where, None
    try:
        return where, line_row(line, wanted.text_key)
    except ValueError as error:
        return where, DataError(str(error))


def line_row(line: str, text_key: str | None) -> Row:
    """The row of one line of JSON.

    Raises:
        ValueError: If the line is not a JSON object.
    """
    try:
        value = load_json(line)
    except ValueError as error:  # a number with thousands of digits raises a plain ValueError, not JSONDecodeError
        raise ValueError(f"not valid JSON ({error}); each line must be one JSON object") from None
    if isinstance(value, str) and text_key:
        if value.lstrip().startswith("{") and json_kind(value.strip()) is dict:
            raise ValueError("the row is encoded twice (JSON inside a JSON string); encode it once")
        return {text_key: value}
    if not isinstance(value, dict):
        raise ValueError(f"this is a JSON {type(value).__name__}; each line must be one JSON object")
    return value
