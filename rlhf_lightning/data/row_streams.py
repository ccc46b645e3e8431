"""Rows of one or several sources in the order of an epoch, without holding them in memory, resumable at each row.

A source is an `IterableDataset` of `datasets`, whose `state_dict` says where in which file it is. Its rows are split
among readers (a reader is a rank, or a worker of a rank) by their number, and shuffled in blocks: a reader takes the
next `shuffle_buffer` of its rows, and yields them in an order that depends on the seed, the epoch and the block. The
state before a block and the number of rows taken from it are therefore enough to go on with the same row; the shuffle
buffer of `datasets` itself is lost when its state is loaded. Each epoch has another order of the files' spans, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from rlhf_lightning.data.batching import mix_seeds
from rlhf_lightning.data.containers import dataset_cleaner
from rlhf_lightning.data.files import Wanted, local_files
from rlhf_lightning.data.mixing import Mixer, Mixture
from rlhf_lightning.data.names import is_stream
from rlhf_lightning.data.spans import RawRow, Span, file_spans, span_rows
from rlhf_lightning.errors import ConfigError, DataError, check_whole
from rlhf_lightning.settings import plain

if TYPE_CHECKING:
    import datasets


@plain
@dataclass(frozen=True)
class Streaming:
    """How `data.train` is streamed.

    Attributes:
        shuffle_buffer: Number of rows that each reader holds in memory and shuffles; 1 keeps the order of the file.
        workers: Number of processes per rank that read and tokenize ahead of training; 0 for none.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> Streaming(shuffle_buffer=1000).workers
        0
    """

    shuffle_buffer: int = 10_000
    workers: int = 0

    def __post_init__(self) -> None:
        check_whole("data.streaming.shuffle_buffer", self.shuffle_buffer)
        check_whole("data.streaming.workers", self.workers, least=0)


@dataclass(frozen=True)
class Reader:
    """One of the readers among which the rows are split.

    Attributes:
        index: Index of the reader.
        count: Number of readers.

    Example:
        >>> Reader(1, 4).count
        4
    """

    index: int = 0
    count: int = 1


class SourceState(TypedDict):
    """Where a reader is in a source."""

    passes: int
    """Number of times that the source has started over in this epoch."""
    block: int
    """Index of the block."""
    taken: int
    """Number of rows taken from it."""
    read: int
    """Number of rows of the source, of all readers, before the block."""
    kept: int
    """Number of rows of this pass that were not left out."""
    dataset: dict[str, Any] | None
    """State of the dataset before the block; None at the beginning."""


class StreamState(TypedDict):
    """Where a reader is in an epoch."""

    counts: list[int]
    ended: list[bool]
    """See `Mixer`."""
    sources: list[SourceState]


class StreamedSource:
    """A source that is read in pieces.

    Args:
        name: Name of the source, for messages.
        source: A file, a pattern, a folder of parts, a list of these, or an `IterableDataset` of `datasets`.
        wanted: How rows are to be read.

    Raises:
        DataError: If the source cannot be streamed.

    Example:
        ```python
        source = StreamedSource("chats", "chats.jsonl", Wanted())
        source.rows  # 5_000_000
        ```
    """

    def __init__(self, name: str, source: Any, wanted: Wanted) -> None:
        self.name = name
        self.dataset: datasets.IterableDataset | None = None
        self.spans: list[Span] = []
        if is_stream(source) and not hasattr(source, "__next__"):
            self.dataset = source
            self._clean = dataset_cleaner(source)
        else:
            self.spans = [span for file in self._files(source) for span in file_spans(file, wanted)]
            if not self.spans:
                raise DataError(f"{name}: there are no rows; give data with at least one row")

    def _files(self, source: Any) -> list[Path]:
        found: list[Path] = []
        for one in source if isinstance(source, list | tuple) else [source]:
            files = local_files(one) if isinstance(one, str | Path) else None
            if files is None:
                kind = f"{one}" if isinstance(one, str | Path) else f"a {type(one).__name__}"
                raise DataError(
                    f"{self.name}: {kind} cannot be streamed; give files of JSON lines or Parquet, or an "
                    "IterableDataset of datasets (load_dataset(…, streaming=True)), or leave out data.streaming"
                )
            found += files
        return found

    @property
    def rows(self) -> int | None:
        """Number of rows; None if it is unknown, as for compressed files."""
        counts = [span.rows for span in self.spans]
        known = [count for count in counts if count is not None]
        return sum(known) if counts and len(known) == len(counts) else None

    def counted(self) -> int:
        """Number of rows; compressed files are read to count them.

        Raises:
            ConfigError: For an `IterableDataset`, whose rows are not counted.
        """
        if self.dataset is not None:
            raise ConfigError(
                f"{self.name}: the number of rows of a {type(self.dataset).__name__} is unknown, but policy RL needs "
                "it to divide an epoch into rounds; save the rows as JSON lines or Parquet"
            )
        self.spans = [
            span._replace(rows=sum(1 for _ in span_rows([span]))) if span.rows is None else span for span in self.spans
        ]
        return self.rows or 0

    def facts(self) -> str:
        """Text that is equal on ranks which read the same files."""
        return repr([(span.start, span.end, span.rows) for span in self.spans])

    def open(self, seed: int | None) -> "datasets.IterableDataset":
        """A dataset of `{"raw": RawRow}`, or the given dataset.

        Args:
            seed: Seed of the order of the spans; None for the order of the files.
        """
        import datasets

        if self.dataset is not None:
            return deepcopy(self.dataset)  # because a state that is loaded stays in it
        order = range(len(self.spans)) if seed is None else permutation(len(self.spans), seed)
        given = {"spans": [self.spans[i] for i in order]}
        return datasets.IterableDataset.from_generator(_examples, gen_kwargs=given)

    def raw(self, example: Mapping[str, Any], index: int) -> RawRow:
        """The row of an example of the dataset.

        Args:
            example: The example.
            index: Its number in the dataset.
        """
        if self.dataset is None:
            row: RawRow = example["raw"]
            return row
        return RawRow(f"{self.name}[{index}]", None, self._clean(dict(example)))


def _examples(spans: list[Span]) -> Iterator[dict[str, RawRow]]:
    for row in span_rows(spans):
        yield {"raw": row}


def permutation(size: int, *seed: int) -> list[int]:
    """The numbers below `size` in an order that is determined by the seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix_seeds(*seed))).tolist()


class SourceReader:
    """Yields a reader's rows of one source, over and over.

    Attributes:
        kept: Number of rows of this pass, without those that `RowStream.leave_out` was called for.

    Args:
        source: The source.
        buffer: Number of rows of a block.
        seed: Seed of the source's order in the epoch; None to keep the order of the files.
        reader: The reader.
        state: Where to begin.
    """

    def __init__(
        self,
        source: StreamedSource,
        buffer: int,
        seed: int | None,
        reader: Reader,
        state: SourceState | None = None,
    ) -> None:
        self.source, self.buffer, self.seed, self.reader = source, buffer, seed, reader
        self._passes = state["passes"] if state else 0
        self._open(state)

    def _open(self, state: SourceState | None) -> None:
        """Open the dataset for a pass."""
        self._dataset = self.source.open(None if self.seed is None else mix_seeds(self.seed, self._passes))
        if state and state["dataset"]:
            self._dataset.load_state_dict(state["dataset"])
        self._examples = iter(self._dataset)
        self._block, self._taken = (state["block"], state["taken"]) if state else (0, 0)
        self._read = state["read"] if state else 0
        self.kept = state["kept"] if state else 0
        self._fill(state["dataset"] if state else None)

    def _fill(self, before: dict[str, Any] | None) -> None:
        """Read a block."""
        self._before, self._rows, self._next = before, list[RawRow](), self._read
        for number in range(self.buffer * self.reader.count):
            if (example := next(self._examples, None)) is None:
                break
            if number % self.reader.count == self.reader.index:
                self._rows.append(self.source.raw(example, self._next))
            self._next += 1
        if self.seed is not None:
            order = permutation(len(self._rows), self.seed, self._passes, self._block, self.reader.index)
            self._rows = [self._rows[i] for i in order]

    def next(self) -> RawRow | None:
        """The next row; None at the end of a pass."""
        while self._taken == len(self._rows):
            if self._next == self._read:
                return None
            state = self._dataset.state_dict()
            self._read, self._block, self._taken = self._next, self._block + 1, 0
            self._fill(state)
        self._taken += 1
        self.kept += 1
        return self._rows[self._taken - 1]

    def start_over(self) -> None:
        """Begin another pass."""
        self._passes += 1
        self._open(None)

    def state(self) -> SourceState:
        """Where the reader is."""
        return {
            "passes": self._passes,
            "block": self._block,
            "taken": self._taken,
            "read": self._read,
            "kept": self.kept,
            "dataset": self._before,
        }


class RowStream:
    """A reader's rows in the order of an epoch: those of the sources, mixed by weight.

    Args:
        sources: The sources of the mixture.
        mixture: Their weights.
        streaming: The settings.
        seed: Seed of the order in this epoch; None to keep the order of the files.
        reader: The reader.
        state: Where to begin; None for the beginning of the epoch.

    Example:
        ```python
        for source, row in RowStream(sources, mixture, Streaming(), seed=7):
            print(mixture.sources[source].name, row.where)
        ```
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        mixture: Mixture,
        streaming: Streaming,
        seed: int | None,
        reader: Reader,
        state: StreamState | None = None,
    ) -> None:
        self.sources, self.mixer = sources, Mixer(mixture)
        if state is not None:
            self.mixer.counts, self.mixer.ended = list(state["counts"]), list(state["ended"])
        self._readers = [
            SourceReader(
                source,
                streaming.shuffle_buffer,
                None if seed is None else mix_seeds(seed, number),
                reader,
                state["sources"][number] if state else None,
            )
            for number, source in enumerate(sources)
        ]

    def __iter__(self) -> Iterator[tuple[int, RawRow]]:
        while (source := self.mixer.choose()) is not None:
            reader = self._readers[source]
            row = reader.next()
            if row is None:
                starts_over = self.mixer.end(source)
                if not reader.kept and (starts_over or reader.reader.count == 1):
                    raise DataError(f"data.filter drops all rows of {self.sources[source].name}; change its rules")
                if not starts_over:
                    continue
                reader.start_over()
                row = reader.next()
                if row is None:
                    raise DataError(
                        f"{self.sources[source].name}: there are fewer rows than ranks and workers that read them; "
                        "leave out data.streaming for small files"
                    )
            self.mixer.counts[source] += 1
            yield source, row

    def leave_out(self, source: int) -> None:
        """Do not count the row that was yielded last, so that rows left out by a filter do not change the mixture.

        Args:
            source: Its source.
        """
        self.mixer.counts[source] -= 1
        self._readers[source].kept -= 1

    def state(self) -> StreamState:
        """Where the reader is, after the row that was yielded last."""
        return {
            "counts": list(self.mixer.counts),
            "ended": list(self.mixer.ended),
            "sources": [reader.state() for reader in self._readers],
        }


def check_rows(sources: Sequence[StreamedSource], readers: int) -> None:
    """Raise `ConfigError` if a source has fewer rows than there are readers, as far as its rows are counted."""
    for source in sources:
        if source.rows is not None and source.rows < readers:
            raise ConfigError(
                f"{source.name}: {source.rows} rows are fewer than the {readers} ranks and workers that read them; "
                "leave out data.streaming for small files"
            )
