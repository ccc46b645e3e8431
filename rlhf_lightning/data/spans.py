"""Reads files that are larger than memory in pieces.

JSON lines are split into spans of bytes, Parquet files into row groups; a compressed file is one span, because it can
only be read from its beginning. A span knows the number of its first line, so that rows keep their file and line.
"""

import bz2
import gzip
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from rlhf_lightning.data.containers import unfilled, unfilled_row
from rlhf_lightning.data.files import (
    ARROW,
    COMPRESSIONS,
    MARKS,
    OTHERS,
    TABLES,
    TEXTS,
    Wanted,
    decoded,
    json_kind,
    line_row,
    magic,
    split_lines,
)
from rlhf_lightning.data.tables import arrow_rows
from rlhf_lightning.errors import DataError
from rlhf_lightning.types import Row

log = logging.getLogger(__name__)
SIZE = 8 << 20
"""Bytes of a span of JSON lines."""
SAMPLE = 1000
"""Number of rows at the beginning of a file, up to `SIZE`, from which it is decided whether nulls come from Arrow."""
LINES, COMPRESSED, PARQUET = "lines", "compressed", "parquet"
_BLANK = b" \t\r\n\x0b\x0c\xef\xbb\xbf"


class Span(NamedTuple):
    """A part of a file.

    Example:
        >>> Span("chats.jsonl", "lines", start=0, end=8192, first=1, rows=10).first
        1
    """

    path: str
    kind: str
    """`lines`, `compressed` or `parquet`."""
    start: int
    """First byte, or index of the row group."""
    end: int
    """The byte after the last one; 0 for other kinds than `lines`."""
    first: int
    """Number of the first line, from 1; or index of the first row of a Parquet file."""
    rows: int | None
    """Number of rows; None if it is unknown."""
    filled: bool = False
    """True if nulls in messages and tools come from Arrow and are dropped."""


class RawRow(NamedTuple):
    """A row that is not parsed yet, with file and line."""

    where: str
    line: str | None
    """Text of a line; None if the row is given as `row`."""
    row: Row | None
    filled: bool = False


def file_spans(path: Path, wanted: Wanted) -> list[Span]:
    """Split a file into spans. A file of JSON lines is read once, to count its lines.

    Args:
        path: The file.
        wanted: How rows are to be read.

    Raises:
        DataError: If the file cannot be streamed; the message says what to do.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(1 << 16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    endings = [ending.lower() for ending in path.suffixes]
    packed = magic(head) in COMPRESSIONS
    while endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    if packed:
        with opened(path) as stream:
            head = _read(path, stream, 1 << 16)
    inner, named = magic(head), endings[-1] if endings else ""
    kind = inner if inner and named not in OTHERS else named
    _check_kind(path, kind, head, packed, wanted)
    if kind == ".parquet":
        return _row_groups(path)
    _check_lines(path, kind, wanted)
    filled = not wanted.lines and _filled(path, wanted)
    spans = [Span(str(path), COMPRESSED, 0, 0, 1, None)] if packed else list(_line_spans(path))
    return [span._replace(filled=filled) for span in spans]


def _check_kind(path: Path, kind: str, head: bytes, packed: bool, wanted: Wanted) -> None:
    """Raise `DataError` for a kind of file that cannot be read in pieces."""
    advice = "write it as JSON lines or Parquet, or leave out data.streaming"
    if kind in OTHERS:
        raise DataError(f"{path}: {OTHERS[kind]}")
    if kind in ARROW and (packed or kind != ".parquet"):
        name = f"a compressed {kind} file" if packed else f"a {kind} file"
        raise DataError(f"{path}: {name} cannot be streamed; {advice}")
    if kind in COMPRESSIONS:
        raise DataError(f"{path}: the file is compressed twice, and cannot be streamed; unpack it once")
    if kind in TABLES and not wanted.lines:
        raise DataError(f"{path}: a table of text ({kind}) cannot be streamed; {advice}")
    if kind in TEXTS and wanted.text_key and not wanted.lines:
        raise DataError(f"{path}: a text file is streamed only with data.lines: true, a prompt per line; or {advice}")
    if any(head.startswith(mark) for mark in MARKS):
        raise DataError(f"{path}: only UTF-8 text can be streamed; save the file as UTF-8")


def _check_lines(path: Path, kind: str, wanted: Wanted) -> None:
    """Raise `DataError` if the first line is not a row, for example because the file is one JSON list."""
    if wanted.lines:
        return
    first = next(iter(_raw_lines(path)), None)
    if first is None:
        raise DataError(f"{path}: there are no rows; give data with at least one row")
    found = json_kind(first.line or "")
    if found is dict or (found is str and wanted.text_key):
        return
    what = "a JSON list" if (first.line or "").startswith("[") else "not a JSON object on one line"
    raise DataError(
        f"{first.where}: this is {what}, but streaming reads JSON lines: one object on each line. Convert the file "
        "(jq -c '.[]' FILE for a list), or leave out data.streaming to read it as a whole"
    )


def _raw_lines(path: Path) -> Iterator[RawRow]:
    """The lines at the beginning of a file that are not blank."""
    yield from span_rows([Span(str(path), COMPRESSED, 0, 0, 1, None)])


def _filled(path: Path, wanted: Wanted) -> bool:
    """True if the first rows look as if `datasets` or pandas wrote them from an Arrow table; see `unfilled`."""
    rows, size = list[Row](), 0
    for raw in islice(_raw_lines(path), SAMPLE):
        size += len(raw.line or "")
        if size > SIZE:
            break
        try:
            rows.append(line_row(raw.line or "", wanted.text_key))
        except ValueError:
            continue  # reported with its line when it is read
    if unfilled(rows, only_rendered=True) is rows:
        return False
    log.info("%s: the file seems to come from an Arrow table; null keys of messages and tools are dropped", path)
    return True


def _line_spans(path: Path) -> Iterator[Span]:
    start, line = 0, 1
    with open(path, "rb") as stream:
        for block in _blocks(path, stream):
            lines = _split(block)
            rows = sum(1 for one in lines if one.strip(_BLANK))
            yield Span(str(path), LINES, start, start + len(block), line, rows)
            start, line = start + len(block), line + len(lines)


def _split(block: bytes) -> list[bytes]:
    """The lines of a block, as `split_lines` splits its text."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return block.removesuffix(b"\n").split(b"\n")


def _row_groups(path: Path) -> list[Span]:
    import pyarrow
    from pyarrow import parquet

    try:
        facts = parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None
    spans, first = list[Span](), 0
    for group in range(facts.num_row_groups):
        rows = facts.row_group(group).num_rows
        spans.append(Span(str(path), PARQUET, group, 0, first, rows))
        first += rows
    return spans


# -- reading ----------------------------------------------------------------------------------------------------------


def opened(path: Path) -> IO[bytes]:
    """Open a file and decompress it while it is read."""
    with open(path, "rb") as stream:
        packed = magic(stream.read(8))
    if packed == ".zst":
        import pyarrow

        unpacked: IO[bytes] = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        return unpacked
    openers: dict[str, Callable[[Path], IO[bytes]]]
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]
    return openers[packed](path) if packed in openers else open(path, "rb")


def _read(path: Path, stream: IO[bytes], size: int) -> bytes:
    try:
        return stream.read(size)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be decompressed ({error}); is the file complete?") from None


def _blocks(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    """Blocks of about `SIZE` bytes that end with a line."""
    rest = b""
    while block := _read(path, stream, SIZE):
        block = rest + block
        end = block.rfind(b"\n") + 1
        if end:
            yield block[:end]
        rest = block[end:]
    if rest:
        yield rest


def span_rows(spans: list[Span]) -> Iterator[RawRow]:
    """The rows of spans; blank lines are left out.

    Raises:
        DataError: If a file cannot be read; with file and line.
    """
    for span in spans:
        path = Path(span.path)
        if span.kind == PARQUET:
            yield from _group_rows(path, span)
            continue
        with opened(path) as stream:
            line = span.first
            if span.kind == LINES:
                stream.seek(span.start)
                blocks = iter([_read(path, stream, span.end - span.start)])
            else:
                blocks = _blocks(path, stream)
            for block in blocks:
                lines = split_lines(decoded(path, block, line, "utf-8-sig"))
                yield from (RawRow(f"{path}:{n}", one, None, span.filled) for n, one in enumerate(lines, line) if one)
                line += len(lines)


def _group_rows(path: Path, span: Span) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    index = span.first
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000, row_groups=[span.start]):
            for row in arrow_rows(pyarrow.Table.from_batches([batch])):
                yield RawRow(f"{path}[{index}]", None, row)
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def parsed(raw: RawRow, wanted: Wanted) -> Row:
    """Parse a row.

    Raises:
        DataError: If a line is not a JSON object; with file and line.
    """
    if raw.line is None:
        return raw.row or {}
    if wanted.lines:
        return {wanted.text_key or "text": raw.line}
    try:
        row = line_row(raw.line, wanted.text_key)
    except ValueError as error:
        raise DataError(f"{raw.where}: {error}") from None
    return unfilled_row(row) if raw.filled else row
