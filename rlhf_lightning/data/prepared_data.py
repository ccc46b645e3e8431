"""How the data modules read their sources and convert the rows to examples."""

import logging
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Generic

from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.data.batching import ExampleT
from rlhf_lightning.data.cache import (
    CachedRow,
    Counted,
    Meta,
    RowCache,
    StoredExample,
    entry_key,
    source_facts,
    tokenizer_facts,
)
from rlhf_lightning.data.columns import (
    TRAINING_COLUMNS,
    is_empty,
    refuse_media,
    refuse_misspelled,
    refuse_unused_names,
    repeats_prompt,
)
from rlhf_lightning.data.files import Wanted
from rlhf_lightning.data.mixing import Mixture, WeightedSource, inner_sources
from rlhf_lightning.data.records import (
    LocatedRow,
    Reading,
    Source,
    check_on_bad_row,
    convert_row,
    convert_rows,
    is_here,
    read_rows,
)
from rlhf_lightning.data.rendered_data import RenderedData
from rlhf_lightning.data.response_starts import ResponseStarts
from rlhf_lightning.data.row_filter import CountingFilter, FilterCounts, RowFilter
from rlhf_lightning.data.row_streams import StreamedSource, Streaming
from rlhf_lightning.data.spans import parsed, span_rows
from rlhf_lightning.data.splits import Prepared, RowKey, hold_out, keys_of, leaks, row_key
from rlhf_lightning.data.training_stream import TrainingStream
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.types import JSON, Row

log = logging.getLogger(__name__)
EXAMPLE = "an example, with trained tokens between ⟦ and ⟧:\n%s"
_VERBS = {"train": "train on", "validation": "validate on", "test": "test on", "predict": "predict for"}


class PreparedData(RenderedData, Generic[ExampleT]):
    """The part of the data modules that reads the sources, and converts their rows to examples."""

    sources: dict[str, Source | None]
    mixture: Mixture | None
    streaming: Streaming | None
    cache: Path | None
    columns: dict[str, str | None] | None
    on_bad_row: str
    seed: int
    validation_split: float
    filter: RowFilter | None
    filter_counts: dict[str, FilterCounts]
    """What the filter found in each source of `train`, by name."""
    show_example: bool
    prepared: dict[str, Prepared[ExampleT]]
    """The examples of each source that was read."""

    # -- for subclasses -------------------------------------------------------------------------------------------

    stage_kind = ""
    """Kind of the stage that these batches are for."""
    text_key: str | None = None
    """If set, a line of a text file becomes the row `{text_key: line}`."""
    lines: bool = False
    """True if every line of a file is text, whatever its name."""

    @abstractmethod
    def examples(self, name: str) -> Callable[[Row], Sequence[ExampleT]]:
        """Return a function that converts a row of a source to examples; it raises `RowError` for a bad row.

        Args:
            name: The source: `train`, `validation`, `test` or `predict`.
        """

    def key(self, data: Row) -> RowKey:
        """The key by which rows of `train`, `validation` and `test` are compared; by default the whole row.

        Raises:
            RowError: If the row is bad.
        """
        return row_key(data, None)

    def used_columns(self, name: str, data: Row) -> set[str] | None:
        """Columns that the example is made from; None if it keeps all columns."""
        return None

    def _counting_filter(self, name: str) -> CountingFilter | None:
        """The filter of a source; only `train` has one."""
        return CountingFilter(self.filter, self.columns) if self.filter is not None and name == "train" else None

    def _source_names(self) -> list[str]:
        """Name of each source of `train`, for counts."""
        return ["data.train"] if self.mixture is None else [one.name for one in self.mixture.sources]

    def stored(self, example: ExampleT) -> StoredExample:
        """The form of an example in the cache; a subclass that supports `data.cache` defines it.

        Raises:
            ConfigError: If the cache is not supported.
        """
        raise ConfigError(f"{type(self).__name__} does not support data.cache; leave it out")

    def restored(self, stored: StoredExample) -> ExampleT:
        """The example of a form in the cache; see `stored`."""
        raise ConfigError(f"{type(self).__name__} does not support data.cache; leave it out")

    def cache_facts(self) -> dict[str, JSON]:
        """What the examples depend on besides the rows, the tokenizer and the rendering; a subclass adds its own."""
        return {
            "module": type(self).__qualname__,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "on_bad_row": self.on_bad_row,
            "columns": {**(self.columns or {})},
        }

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, source: Source, name: str, reading: Reading) -> list[LocatedRow]:
        """Read the rows of a source.

        Args:
            source: The source.
            name: `train`, `validation`, `test` or `predict`.
            reading: Receives counts.

        Raises:
            DataError: If the rows cannot be read.
        """
        return read_rows(source, self.text_key, reading, name, self.lines)

    def located(self, source: Source, name: str, reading: Reading) -> Iterator[LocatedRow]:
        """The rows of a source as `read` gives them; a file that can be read in pieces is not read as a whole."""
        wanted = Wanted(self.text_key, name, self.lines)
        try:
            spans = StreamedSource(name, source, wanted).spans
        except DataError:  # another kind of source; what is wrong with it is reported by its reader
            spans = []
        if not spans:
            yield from self.read(source, name, reading)
        for raw in span_rows(spans):
            try:
                row = parsed(raw, wanted)
            except DataError as error:
                if reading.unreadable is None:
                    raise
                reading.unreadable.append((raw.where, str(error).removeprefix(f"{raw.where}: ")))
                continue
            yield LocatedRow(row, raw.where)

    def converter(
        self, name: str, unused: dict[str, None], used: set[str] | None = None
    ) -> Callable[[Row], Sequence[ExampleT]]:
        """The function of `examples`, extended to record which columns are used.

        Args:
            name: The source.
            unused: Receives the names of columns that have values but are not used.
            used: Receives the names of columns that are used, for `refuse_unused_names`.
        """
        convert, mapped = self.examples(name), set((self.columns or {}).values())
        self._repeated = 0

        def noting(data: Row) -> Sequence[ExampleT]:
            refuse_media(data)
            if (names := self.used_columns(name, data)) is not None:
                self._repeated += repeats_prompt(data)
                refuse_misspelled(data, TRAINING_COLUMNS)
                unused.update(dict.fromkeys(k for k, v in data.items() if k not in names | mapped and not is_empty(v)))
                if used is not None:
                    used.update(names)
            return list(convert(data))

        return noting

    # -- the rows of a source -------------------------------------------------------------------------------------

    def _prepare(self, name: str, required: bool) -> None:
        """Read, convert and summarize one source, if it is not None."""
        source = self.sources[name]
        if source is None:
            if required and not (name == "validation" and self.validation_split):
                raise ConfigError(f"data.{name} is not set; give the file to {_VERBS[name]} with data.{name}: FILE")
            if required:
                self._prepare("train", required=True)
            return
        if self.cache is not None and name != "predict":
            self.prepared[name] = self._cached(name, source, self.cache)
            self._summarize(name, source)
            return
        reading = Reading()
        inner = [self.read(one, name, reading) for one in inner_sources(source)]
        counting = self._counting_filter(name)
        if counting is not None:
            inner = [list(counting.kept(rows, one)) for rows, one in zip(inner, self._source_names(), strict=True)]
            self.filter_counts = counting.counts
        rows = [row for rows in inner for row in rows]
        self._truncated = 0
        if name == "train":
            self.renderer.asked, self.renderer.openings = set(), ResponseStarts()
        unused: dict[str, None] = {}
        used: set[str] = set()
        convert = self.converter(name, unused, used)
        keys: list[RowKey] = []
        row_of: list[int] = []
        source_of: list[int] = []
        ends = list(accumulate(len(rows) for rows in inner))

        def keyed(data: Row) -> Sequence[ExampleT]:
            examples = convert(data)
            if name != "predict":
                row_of.extend([len(keys)] * len(examples))
                keys.append(self.key(data))
                if self.mixture is not None and name == "train":
                    source_of.append(bisect_right(ends, reading.rows - 1))
            return examples

        converted = convert_rows(rows, keyed, reading, self.on_bad_row, self.columns)
        reading.rows += counting.dropped if counting is not None else 0
        refuse_unused_names(self.columns, used)
        self._record_shared()
        for index, example in enumerate(converted):
            if hasattr(example, "index"):  # a seed, so that random numbers do not depend on the batch or rank
                example.index = index
            if keys:
                keys[row_of[index]].where = getattr(example, "where", "")
        self.prepared[name] = Prepared(
            converted, reading, truncated=self._truncated, keys=keys, row_of=row_of, source_of=source_of
        )
        self._summarize(name, source)
        if unused:
            log.info("%s: columns not used: %s", name, ", ".join(unused))

    def _cached(self, name: str, source: Source, folder: Path) -> Prepared[ExampleT]:
        """The rows of a source from the cache, which are read and tokenized if they are not there."""
        sources, reading = inner_sources(source), Reading()
        unused: dict[str, None] = {}
        used: set[str] = set()
        self._truncated = 0
        if name == "train":
            self.renderer.asked, self.renderer.openings = set(), ResponseStarts()
        convert = self.converter(name, unused, used)
        keys: list[RowKey] = []
        counting = self._counting_filter(name)

        def kept(number: int) -> Iterator[LocatedRow]:
            found = self.located(sources[number], name, reading)
            return found if counting is None else counting.kept(found, self._source_names()[number])

        def keyed(data: Row) -> Sequence[ExampleT]:
            examples = convert(data)
            keys[:] = [self.key(data)]
            return examples

        def rows() -> Iterator[CachedRow[ExampleT]]:
            for number in range(len(sources)):
                for row in kept(number):
                    reading.rows += 1
                    examples, skipped = convert_row(row, keyed, self.on_bad_row, self.columns)
                    if skipped is not None:
                        reading.skipped.append(skipped)
                        continue
                    keys[0].where = row.where
                    yield CachedRow(examples, keys[0], number)

        def finish(counted: Counted) -> Meta:
            if not counted.examples:
                raise DataError(f"none of the {reading.rows} rows can be used; the first is {reading.skipped[0]}")
            refuse_unused_names(self.columns, used)
            self._record_shared()
            if unused:
                log.info("%s: columns not used: %s", name, ", ".join(unused))
            meta: Meta = {
                "rows": reading.rows,
                "skipped": reading.skipped,
                "truncated": self._truncated,
                "categories": sorted(counted.categories),
                "shared": self.shared,
            }
            if counting is not None:
                meta["rows"] += counting.dropped
                meta["filter"] = {one: counts.totals() for one, counts in counting.counts.items()}
            return meta

        check_on_bad_row(self.on_bad_row)
        facts: dict[str, JSON] = {
            **self.cache_facts(),
            "split": name,
            "rendering": self.renderer.settings(),
            "tokenizer": tokenizer_facts(self.renderer.tokenizer),
            "sources": [source_facts(one, name) for one in sources],
        }
        if counting is not None and self.filter is not None:
            facts["filter"] = self.filter.fingerprint()
        entry, found = RowCache(folder, self).entry(entry_key(facts), rows(), finish)
        self.renderer.asked = self.renderer.openings = None
        if name == "train":
            self.shared = entry.meta["shared"]
            totals = entry.meta.get("filter", {})
            self.filter_counts = {one: FilterCounts.sum([counts]) for one, counts in totals.items()}
        log.info("%s: tokenized rows are %s %s", name, "read from" if found else "kept in", entry.folder)
        others = [self.sources["validation"], self.sources["test"], self.validation_split or None]
        compared = name != "train" or any(one is not None for one in others)
        return entry.prepared(compared, self.mixture is not None and name == "train")

    def _open_stream(self, streaming: Streaming) -> TrainingStream[ExampleT]:
        """Open the sources of `train` for streaming, and check their first rows."""
        mixture = self.mixture or Mixture([WeightedSource("train", self.sources["train"])])
        unused: dict[str, None] = {}
        used: set[str] = set()
        self._truncated = 0
        stream = TrainingStream(
            mixture,
            Wanted(self.text_key, "train", self.lines),
            streaming,
            self.converter("train", unused, used),
            self.on_bad_row,
            self.columns,
            self.seed,
            lambda: self._truncated,
            self._counting_filter("train"),
        )
        self.renderer.openings = openings = ResponseStarts()
        stream.check_first()
        self.renderer.openings = None
        refuse_unused_names(self.columns, used)
        self._log_stream(stream, unused, openings)
        return stream

    @rank_zero_only
    def _log_stream(self, stream: TrainingStream[ExampleT], unused: dict[str, None], openings: ResponseStarts) -> None:
        log.info("%s", stream.describe())
        if openings.message:
            log.warning("among the first rows, %s", openings.message)
        if unused:
            log.info("train: columns not used in the first rows: %s", ", ".join(unused))
        if self.show_example and stream.checked:
            log.info(EXAMPLE, stream.checked[0].show(self.renderer.tokenizer))

    def _hold_out(self, stage: str) -> None:
        if stage not in ("fit", "validate") or "validation" in self.prepared or not self.validation_split:
            return
        self.prepared["validation"] = hold_out(self.prepared["train"], self.validation_split, self.seed)

    @rank_zero_only
    def _compare(self, name: str) -> None:
        """Warn if evaluation rows also appear in the training data."""
        if self.streaming is not None:
            log.info("data.%s is not compared with data.train, which is streamed", name)
            return
        train = self.prepared["train"].keys if "train" in self.prepared else self._train_keys()
        found = leaks(train, self.prepared[name].keys)
        if found.prompts or found.conversations:
            log.warning("%s", found.message(name))

    def _train_keys(self) -> list[RowKey]:
        """Keys of the training rows for a command that does not read them; empty if they are not on this machine."""
        source = self.sources["train"]
        if source is None or not is_here(source, texts=self.text_key is not None):
            return []
        try:
            rows = self.read(source, "train", Reading(unreadable=[]))
        except DataError as error:
            log.warning("rows are not compared with data.train, because it cannot be read: %s", error)
            return []
        return keys_of(rows, self.key, self.columns)

    @rank_zero_only
    def _summarize(self, name: str, source: Source) -> None:
        prepared = self.prepared[name]
        examples, (tokens, trained, longest) = prepared.rows, prepared.totals()
        log.info(
            "%s (%s): %d rows read, %d examples, %d tokens, %d trained, longest %d, "
            "truncated %d, skipped %d, blank lines %d",
            name,
            source if isinstance(source, str | Path) else f"{type(source).__name__}",
            prepared.reading.rows,
            len(examples),
            tokens,
            trained,
            longest,
            prepared.truncated,
            len(prepared.reading.skipped),
            prepared.reading.blank,
        )
        if name == "train" and (order := prepared.order(self.mixture, self.seed)) is not None:
            log.info(
                "an epoch has %d examples (%s): %s",
                len(order),
                order.mixture.stopping,
                ", ".join(
                    f"{given} of {one.name}, which has {len(examples)}"
                    for one, given, examples in zip(
                        order.mixture.sources, order.drawn(1, len(order), 0), order.examples, strict=True
                    )
                ),
            )
        for message in prepared.reading.skipped[:3]:
            log.warning("skipped %s", message)
        if self._repeated > prepared.reading.rows / 2:
            log.warning(
                "%s: in %d of %d rows the response begins with the whole text of the prompt. If the responses repeat "
                "the prompt, remove it from them, because everything in a response is trained",
                name,
                self._repeated,
                prepared.reading.rows,
            )
        if self.show_example and name in ("train", "predict"):
            log.info(EXAMPLE, examples[0].show(self.renderer.tokenizer))
