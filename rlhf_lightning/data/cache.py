"""A cache of tokenized rows: an Arrow file that is mapped into memory, and read example by example.

An entry is a folder whose name is a hash of all that the examples depend on. It is written under a temporary name and
renamed when it is complete, so that a process that is killed leaves no partial entry. While one process writes an
entry, others wait for it.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, NotRequired, Protocol, TypedDict, overload

from rlhf_lightning.data.batching import ExampleT
from rlhf_lightning.data.records import Reading, Source, fingerprint, hashed_files
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.data.row_filter import FilterTotals
from rlhf_lightning.data.splits import Prepared, RowKey
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import locked
from rlhf_lightning.types import JSON, Row, Tokenizer

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)
VERSION = 1
"""Version of the format; a change of it makes all earlier entries unused."""
PER_BATCH = 1000
"""Number of examples of a record batch of the file."""
EXAMPLES, ROWS, META = "examples.arrow", "rows.arrow", "meta.json"


class Meta(TypedDict):
    """Facts about an entry."""

    rows: int
    """Number of rows that were read, with skipped ones."""
    skipped: list[str]
    truncated: int
    categories: list[str]
    shared: Row
    """`system` and `tools` that all rows share."""
    filter: NotRequired[dict[str, FilterTotals]]
    """What `data.filter` found in each source, if it is set."""


@dataclass
class Counted:
    """Counts of what was written.

    Attributes:
        rows: Number of rows.
        examples: Number of examples.
        categories: Categories of preference data.

    Example:
        >>> Counted(rows=2, examples=3).categories
        set()
    """

    rows: int = 0
    examples: int = 0
    categories: set[str] = field(default_factory=set)


class CachedRow(NamedTuple, Generic[ExampleT]):
    """A row to write.

    Attributes:
        examples: Its examples.
        key: Its key.
        source: Index of its source in a mixture.
    """

    examples: Sequence[ExampleT]
    key: RowKey
    source: int = 0


def source_facts(source: Source, split: str) -> JSON:
    """What identifies the rows of a source: path, size and time of modification of files, else a hash of the rows."""
    found: list[JSON] = []
    for item in source if isinstance(source, list) else [source]:
        files = hashed_files(item) if isinstance(item, str | os.PathLike) else []
        if not files:
            digest = fingerprint(item if isinstance(item, str) else [item], split)
            if digest is None:
                raise ConfigError(f"data.cache: the rows of a {type(item).__name__} cannot be identified; leave it out")
            found.append(digest)
        for file in files:
            facts = file.stat()
            found.append([str(file.resolve()), facts.st_size, facts.st_mtime_ns])
    return found


def tokenizer_facts(tokenizer: Tokenizer) -> JSON:
    """What identifies a tokenizer with its chat template.

    Raises:
        ConfigError: If the tokenizer cannot be identified, because it is not one of the library tokenizers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"data.cache: a {type(tokenizer).__name__} cannot be identified, because it is not a fast tokenizer; leave "
            "out data.cache"
        )
    text = backend.to_str() + repr((tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token))
    return hashlib.sha256(text.encode()).hexdigest()


def entry_key(facts: JSON) -> str:
    """Name of the entry for facts that the examples depend on."""
    return hashlib.sha256(json.dumps([VERSION, facts], sort_keys=True, default=str).encode()).hexdigest()[:32]


class Extra(TypedDict, total=False):
    """What an example of preference data has besides its tokens."""

    category: str | None
    margin: float
    tie: bool
    label: int
    ranks: list[int]


@dataclass
class StoredExample:
    """An example as it is stored.

    Attributes:
        sides: Its token rows.
        extra: What it has besides, as JSON.
        where: File and line.

    Example:
        >>> StoredExample([Rendered([1, 2], [0, 1])], {"category": "math"}).extra["category"]
        'math'
    """

    sides: list[Rendered]
    extra: Extra = field(default_factory=lambda: Extra())
    where: str = ""


class Codec(Protocol[ExampleT]):
    """Converts examples to their stored form and back."""

    def stored(self, example: ExampleT) -> StoredExample:
        """The stored form of an example."""

    def restored(self, stored: StoredExample) -> ExampleT:
        """The example of a stored form."""


class CachedExamples(Sequence[ExampleT]):
    """The examples of an entry, which are read from the file when they are used.

    Args:
        path: The Arrow file.
        codec: Makes the examples.

    Example:
        ```python
        examples = CachedExamples(Path(".cache/rows/0123…/examples.arrow"), data_module)
        examples[5].tokens
        ```
    """

    def __init__(self, path: Path, codec: Codec[ExampleT]) -> None:
        import pyarrow

        self.path, self.codec = path, codec
        self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._batches: dict[int, pyarrow.RecordBatch] = {}
        last = self._reader.num_record_batches - 1
        self._length = last * PER_BATCH + self._batch(last).num_rows if last >= 0 else 0

    def _batch(self, number: int) -> "pyarrow.RecordBatch":
        if number not in self._batches:
            self._batches[number] = self._reader.get_batch(number)
        return self._batches[number]

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> ExampleT: ...
    @overload
    def __getitem__(self, index: slice) -> list[ExampleT]: ...
    def __getitem__(self, index: int | slice) -> ExampleT | list[ExampleT]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self.codec.restored(_decoded(self._batch(index // PER_BATCH), index % PER_BATCH))

    def column(self, name: str) -> list[int]:
        """A column of numbers, of all examples."""
        batches = (self._batch(number) for number in range(self._reader.num_record_batches))
        return [value for batch in batches for value in batch.column(name).to_pylist()]

    def totals(self) -> tuple[int, int, int]:
        """Number of tokens, number of trained tokens, and length of the longest example."""
        tokens = self.column("tokens")
        return sum(tokens), sum(self.column("trained")), max(tokens)


# -- one example ------------------------------------------------------------------------------------------------------


def _schema() -> "pyarrow.Schema":
    import pyarrow as pa

    return pa.schema(
        {
            "ids": pa.list_(pa.int32()),  # of all sides, one after the other
            "loss_mask": pa.list_(pa.int8()),
            "lengths": pa.list_(pa.int32()),  # of each side
            "text_bytes": pa.list_(pa.int64()),
            "extra": pa.string(),
            "where": pa.string(),
            "row": pa.int64(),
            "source": pa.int32(),
            "tokens": pa.int32(),
            "trained": pa.int32(),
        }
    )


def _encoded(example: StoredExample, row: int, source: int) -> dict[str, JSON]:
    sides = example.sides
    return {
        "ids": [token for side in sides for token in side.ids],
        "loss_mask": [flag for side in sides for flag in side.loss_mask],
        "lengths": [side.tokens for side in sides],
        "text_bytes": [side.text_bytes for side in sides],
        "extra": json.dumps(example.extra),
        "where": example.where,
        "row": row,
        "source": source,
        "tokens": max(side.tokens for side in sides),
        "trained": sum(side.trained for side in sides),
    }


def _decoded(batch: "pyarrow.RecordBatch", index: int) -> StoredExample:
    def values(name: str) -> list[int]:
        """The list in a cell; much faster than `as_py`, which makes an object of each number."""
        column = batch.column(name)
        start, end = column.offsets[index].as_py(), column.offsets[index + 1].as_py()
        found: list[int] = column.values.slice(start, end - start).to_numpy(zero_copy_only=False).tolist()
        return found

    ids, loss_mask = values("ids"), values("loss_mask")
    sides, start = list[Rendered](), 0
    for length, text_bytes in zip(values("lengths"), values("text_bytes"), strict=True):
        sides.append(Rendered(ids[start : start + length], loss_mask[start : start + length], text_bytes))
        start += length
    return StoredExample(sides, json.loads(batch.column("extra")[index].as_py()), batch.column("where")[index].as_py())


# -- entries ----------------------------------------------------------------------------------------------------------


@dataclass
class Entry(Generic[ExampleT]):
    """An entry of the cache.

    Attributes:
        folder: Its folder.
        examples: The examples.
        meta: Facts about them.

    Example:
        ```python
        entry, found = RowCache(Path(".cache/rows"), data_module).entry(key, rows, finish)
        entry.examples[0].show(tokenizer)
        ```
    """

    folder: Path
    examples: CachedExamples[ExampleT]
    meta: Meta

    def keys(self) -> list[RowKey]:
        """Keys of the rows; they are read into memory."""
        import pyarrow

        with pyarrow.memory_map(str(self.folder / ROWS)) as file:
            rows = pyarrow.ipc.open_file(file).read_all().to_pylist()
        return [RowKey(row["row"], row["prompt"], row["where"], tuple(row["earlier"])) for row in rows]

    def prepared(self, compared: bool, mixed: bool) -> Prepared[ExampleT]:
        """The rows for batching.

        Args:
            compared: True if rows are compared or held out, for which their keys are read into memory.
            mixed: True for the rows of a mixture.
        """
        meta, row_of = self.meta, self.examples.column("row") if compared or mixed else []
        source_of = dict(zip(row_of, self.examples.column("source"), strict=True)) if mixed else {}
        return Prepared(
            self.examples,
            Reading(meta["rows"], skipped=meta["skipped"]),
            truncated=meta["truncated"],
            keys=self.keys() if compared else [],
            row_of=row_of,
            source_of=[source_of[row] for row in sorted(source_of)],
            categories=meta["categories"],
            sizes=self.examples.totals(),
        )


class RowCache(Generic[ExampleT]):
    """A folder of entries.

    Args:
        folder: The folder; created when an entry is written.
        codec: Converts the examples.

    Example:
        ```python
        entry, found = RowCache(Path(".cache/rows"), data_module).entry(key, rows, finish)
        ```
    """

    def __init__(self, folder: Path, codec: Codec[ExampleT]) -> None:
        self.folder, self.codec = folder, codec

    def entry(
        self, key: str, rows: Iterable[CachedRow[ExampleT]], finish: Callable[[Counted], Meta]
    ) -> tuple[Entry[ExampleT], bool]:
        """The entry of a key, which is written from `rows` if there is none.

        Args:
            key: Result of `entry_key`.
            rows: The rows; not read if there is an entry.
            finish: Completes the facts about the rows once they were read.

        Returns:
            The entry, and True if it was there before.

        Raises:
            ConfigError: If the folder cannot be written.
        """
        folder = self.folder / key
        try:
            with locked(folder):
                there = self._is_whole(folder)
                if not there:
                    self._write(folder, rows, finish)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be written ({error.strerror}); set data.cache to another folder"
            ) from None
        meta: Meta = json.loads((folder / META).read_text())
        return Entry(folder, CachedExamples(folder / EXAMPLES, self.codec), meta), there

    def _is_whole(self, folder: Path) -> bool:
        """True if there is an entry that can be read; a damaged one is removed."""
        import pyarrow

        if not folder.is_dir():
            return False
        try:
            json.loads((folder / META).read_text())
            CachedExamples(folder / EXAMPLES, self.codec)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            log.warning("%s: the cached rows are damaged (%s), and are made again", folder, error)
            shutil.rmtree(folder)
            return False
        return True

    def _write(self, folder: Path, rows: Iterable[CachedRow[ExampleT]], finish: Callable[[Counted], Meta]) -> None:
        for left in self.folder.glob(f".{folder.name}.*.partial"):  # of processes that were killed
            shutil.rmtree(left)
        scratch = self.folder / f".{folder.name}.{os.getpid()}.partial"
        scratch.mkdir(parents=True)
        try:
            counted = _write_rows(scratch, rows, self.codec)
            (scratch / META).write_text(json.dumps(finish(counted)))
            scratch.rename(folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _write_rows(folder: Path, rows: Iterable[CachedRow[ExampleT]], codec: Codec[ExampleT]) -> Counted:
    import pyarrow as pa

    counted = Counted()
    keys = pa.schema(
        {"row": pa.binary(), "prompt": pa.binary(), "where": pa.string(), "earlier": pa.list_(pa.binary())}
    )
    with (
        pa.OSFile(str(folder / EXAMPLES), "wb") as sink,
        pa.ipc.new_file(sink, _schema()) as writer,
        pa.OSFile(str(folder / ROWS), "wb") as key_sink,
        pa.ipc.new_file(key_sink, keys) as key_writer,
    ):
        waiting: list[dict[str, JSON]] = []
        of_rows: list[dict[str, object]] = []
        for row in rows:
            of_rows.append(
                {"row": row.key.row, "prompt": row.key.prompt, "where": row.key.where, "earlier": [*row.key.earlier]}
            )
            for example in row.examples:
                stored = codec.stored(example)
                waiting.append(_encoded(stored, counted.rows, row.source))
                counted.examples += 1
                if isinstance(category := stored.extra.get("category"), str):
                    counted.categories.add(category)
            counted.rows += 1
            while len(waiting) >= PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting[:PER_BATCH], _schema()))
                waiting = waiting[PER_BATCH:]
            if len(of_rows) >= PER_BATCH:
                key_writer.write_batch(pa.RecordBatch.from_pylist(of_rows, keys))
                of_rows = []
        if waiting:
            writer.write_batch(pa.RecordBatch.from_pylist(waiting, _schema()))
        if of_rows:
            key_writer.write_batch(pa.RecordBatch.from_pylist(of_rows, keys))
    return counted
