"""Streams the training rows of a data module: opens the sources, checks their first rows, and makes the loader."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Generic

from rlhf_lightning.data.batching import ExampleT
from rlhf_lightning.data.files import Wanted
from rlhf_lightning.data.mixing import Mixture
from rlhf_lightning.data.records import LocatedRow, check_on_bad_row, convert_row
from rlhf_lightning.data.row_filter import CountingFilter, FilterCounts
from rlhf_lightning.data.row_streams import StreamedSource, Streaming
from rlhf_lightning.data.spans import RawRow, parsed
from rlhf_lightning.data.stream_loader import Converted, RowSource
from rlhf_lightning.errors import UserError
from rlhf_lightning.types import Row

log = logging.getLogger(__name__)
FIRST = 100
"""Number of rows at the beginning of each source that are checked before training."""


class TrainingStream(Generic[ExampleT]):
    """The streamed rows of `data.train`.

    Args:
        mixture: The sources.
        wanted: How rows are to be read.
        streaming: The settings.
        convert: Converts a row to examples; raises `RowError` for a bad row.
        on_bad_row: See `RowDataModule`.
        columns: See `RowDataModule`.
        seed: Seed of the order.
        truncated: Returns the number of examples that `convert` has truncated so far.
        row_filter: Leaves out rows before they are converted.

    Raises:
        DataError: If a source cannot be streamed.

    Example:
        ```python
        stream = TrainingStream(mixture, Wanted(), Streaming(), convert, "error", None, seed=0, truncated=lambda: 0)
        stream.check_first()
        ```
    """

    def __init__(
        self,
        mixture: Mixture,
        wanted: Wanted,
        streaming: Streaming,
        convert: Callable[[Row], Sequence[ExampleT]],
        on_bad_row: str,
        columns: Mapping[str, str | None] | None,
        seed: int,
        truncated: Callable[[], int],
        row_filter: CountingFilter | None = None,
    ) -> None:
        check_on_bad_row(on_bad_row)
        self.row_filter = row_filter
        self.mixture, self.wanted, self.streaming = mixture, wanted, streaming
        self._convert, self._on_bad_row, self._columns, self._truncated = convert, on_bad_row, columns, truncated
        self.sources = [StreamedSource(one.name, one.source, wanted) for one in mixture.sources]
        self.rows = RowSource(self.sources, mixture, streaming, self._converted, seed)
        self.checked: list[ExampleT] = []
        """The examples of the first rows, once `check_first` was called."""
        self._told = 0

    def row(self, raw: RawRow) -> LocatedRow:
        """A row, parsed.

        Raises:
            DataError: If it cannot be parsed; with file and line.
        """
        return LocatedRow(parsed(raw, self.wanted), raw.where)

    def examples(self, row: LocatedRow) -> tuple[list[ExampleT], str | None]:
        """The examples of a row, and None; or no examples, and why the row is skipped.

        Raises:
            DataError: If the row is bad; with file and line.
        """
        return convert_row(row, self._convert, self._on_bad_row, self._columns)

    def filtered(self, row: LocatedRow) -> FilterCounts | None:
        """What the filter finds in a row; None without a filter.

        Raises:
            DataError: If the row is blocked.
        """
        if self.row_filter is None:
            return None
        counts = FilterCounts()
        [decision] = self.row_filter.decide([row])
        counts.add(decision)
        return counts

    def _converted(self, source: int, raw: RawRow) -> Converted[ExampleT]:
        before = self._truncated()
        try:
            row = self.row(raw)
            counts = self.filtered(row)
            filtered = None if counts is None else counts.totals()
            examples, skipped = self.examples(row) if counts is None or counts.kept else ([], None)
        except UserError as error:
            return Converted(source, (), error=error)
        if skipped is not None and self._told < 3:
            self._told += 1
            log.warning("skipped %s", skipped)
        return Converted(source, examples, self._truncated() - before, filtered=filtered)

    def check_first(self) -> None:
        """Convert the first rows of each source, so that most mistakes are found before training.

        Raises:
            DataError: If one of these rows is bad; with file and line.
        """
        for source in self.sources:
            for index, example in enumerate(islice(source.open(None), FIRST)):
                row = self.row(source.raw(example, index))
                counts = self.filtered(row)
                if counts is None or counts.kept:
                    self.checked += self.examples(row)[0]

    def facts(self) -> tuple[str, str]:
        """A text and a hash that are equal on ranks which read the same files."""
        digest = hashlib.sha256(repr([source.facts() for source in self.sources]).encode()).hexdigest()
        return f"{self.size} rows", digest

    @property
    def size(self) -> str:
        """Number of rows, as text; it is not known of compressed files."""
        known = [source.rows for source in self.sources]
        return str(sum(count or 0 for count in known)) + (" or more" if None in known else "")

    def describe(self) -> str:
        """A line for the log."""
        named = ", ".join(f"{one.name} with weight {one.weight:g}" for one in self.mixture.sources)
        mixed = f" of {named} ({self.mixture.stopping})" if len(self.sources) > 1 else ""
        return (
            f"train: {self.size} rows{mixed} are streamed, shuffled in blocks of {self.streaming.shuffle_buffer} rows, "
            f"with {self.streaming.workers} workers"
        )
