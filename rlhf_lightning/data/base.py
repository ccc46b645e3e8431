"""Base class of the data modules: reads, checks, renders, summarizes and loads rows."""

import logging
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.data.agreement import Fact, require_agreement, rows_facts
from rlhf_lightning.data.batching import BatchT, DrawCounts, ExampleT, RowLoader, ShardSpec, run_seed
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
)
from rlhf_lightning.data.containers import settled
from rlhf_lightning.data.files import Wanted
from rlhf_lightning.data.mixing import STOPPING, Mixture, WeightedSource, inner_sources
from rlhf_lightning.data.records import (
    LocatedRow,
    Reading,
    RowError,
    SkippedRow,
    Source,
    check_on_bad_row,
    convert_row,
    convert_rows,
    fingerprint,
    is_here,
    read_rows,
)
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.rendering_settings import RenderingSettings, shared_by_all
from rlhf_lightning.data.response_starts import ResponseStarts
from rlhf_lightning.data.row_filter import FilterCounts, RowFilter, filtered
from rlhf_lightning.data.row_streams import StreamedSource, Streaming, check_rows
from rlhf_lightning.data.spans import parsed, span_rows
from rlhf_lightning.data.splits import Prepared, RowKey, hold_out, keys_of, leaks, row_key
from rlhf_lightning.data.stream_loader import StreamLoader
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.data.training_stream import TrainingStream
from rlhf_lightning.errors import ConfigError, DataError, UserError, check_object, check_seed, check_whole
from rlhf_lightning.types import JSON, Row, StepBatch

log = logging.getLogger(__name__)
EXAMPLE = "an example, with trained tokens between ⟦ and ⟧:\n%s"
OVERLONG = ("error", "truncate", "skip")


class RowDataModule(pl.LightningDataModule, Generic[ExampleT, BatchT]):
    """Base class of the data modules. A subclass turns a row into examples, and examples into a batch.

    Args:
        train: Rows to train on: a file (`.jsonl`, `.json`, `.csv`, `.parquet` and others), a Hub id
            (`owner/name:split`, `owner/name:configuration/split`), a list of these, a list of dicts, a data frame, a
            dataset of `datasets`, a dict of columns or of splits. A command reads only the rows that it needs.
        validation: Rows to validate on, in the same forms.
        test: Rows of the `test` command.
        predict: Rows of the `predict` command.
        batch_size: Number of rows per training step on one device.
        eval_batch_size: Number of rows per validation, test or predict step on one device; by default `batch_size`.
        validation_split: Number of rows (or fraction, below 1) of `train` to hold out if there is no `validation`. All
            rows of a prompt stay on one side.
        max_length: Maximum number of tokens of a row.
        overlong: What to do with rows that are too long: `error`, `truncate`, or `skip` and count them.
        on_bad_row: `error` stops at the first bad row and names file and line; `skip` leaves bad rows out and counts
            them.
        columns: Names of columns, `{our name: your name}`; `{our name: null}` ignores that column.
        format: `chat` renders with the chat template, `raw` uses the text unchanged. By default as recorded in the
            model's `stage.json`, else `chat`.
        template_kwargs: Arguments of the chat template, for example `{enable_thinking: false}`; by default as recorded
            in the model's `stage.json`, else none.
        system: System message for rows without one, `''` for none; by default as recorded in the model's `stage.json`,
            else none.
        tools: Tools for rows without any: a list, JSON text or a JSON file of tool schemas, `[]` for none; by default
            as recorded in the model's `stage.json`, else none.
        tokenizer: Tokenizer, or its folder or Hub id; by default that of the model.
        seed: Seed of the row order; by default that of the run.
        stopping_strategy: When an epoch of several weighted sources ends: `first_exhausted` when a source has no rows
            left, `all_exhausted` when each source has given all of its rows once, while shorter sources start over, or
            `all_exhausted_without_replacement` when all rows have been given once.
        streaming: Read `train` while training, for files that are larger than memory; true, or the settings of
            `Streaming`. Rows are shuffled in blocks, and an epoch has no known length.
        cache: Folder in which tokenized rows are kept for later runs, and read from instead of memory.
        filter: Leaves out rows of `train` that match rules, before they are rendered; see
            `rlhf_lightning.filtering.RuleFilter`. Other sources are not filtered.
        show_example: Log one rendered row with its loss mask.

    Raises:
        ConfigError: If a setting is invalid.

    Example:
        See `SFTDataModule`, `PreferenceDataModule` and `PromptDataModule`.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        validation_split: float = 0.0,
        max_length: int = 2048,
        overlong: str = "error",
        on_bad_row: str = "error",
        columns: dict[str, str | None] | None = None,
        format: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        system: str | None = None,
        tools: list[Any] | str | None = None,
        tokenizer: Any = None,
        seed: int | None = None,
        stopping_strategy: str = "first_exhausted",
        streaming: Streaming | bool = False,
        cache: str | Path | None = None,
        filter: RowFilter | None = None,
        show_example: bool = True,
    ) -> None:
        super().__init__()
        if filter is not None:
            check_object("data.filter", filter, "RuleFilter('rules.yaml')")
        if overlong not in OVERLONG:
            raise ConfigError(f"data.overlong is {overlong!r}; it must be one of {', '.join(OVERLONG)}")
        for name, size in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_length", max_length),
        ):
            if size is not None:
                check_whole(f"data.{name}", size)
        for name, value in (("columns", columns), ("template_kwargs", template_kwargs)):
            if not isinstance(value or {}, Mapping):
                raise ConfigError(f"data.{name} is {value!r}; it must be a mapping of column names")
        if stopping_strategy not in STOPPING:
            raise ConfigError(
                f"data.stopping_strategy is {stopping_strategy!r}; it must be one of {', '.join(STOPPING)}"
            )
        self.mixture = Mixture.of(train, stopping_strategy)
        if self.mixture is not None:
            train = [replace(one, source=settled(one.source)) for one in self.mixture.sources]
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        for name in ("validation", "test", "predict"):
            if Mixture.of(given[name]) is not None:
                raise ConfigError(f"data.{name} has weights, which only data.train takes; give a list of the files")
        self.sources: dict[str, Source | None] = {name: settled(source) for name, source in given.items()}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        if seed is not None:
            check_seed("data.seed", seed)
        if isinstance(validation_split, str) or not validation_split >= 0:
            raise ConfigError(
                f"data.validation_split is {validation_split}; it must be a number of rows, or a fraction below 1"
            )
        if validation_split and validation is not None:
            log.info("data.validation_split is not used, because data.validation is set")
        self.streaming = Streaming() if streaming is True else streaming or None
        if self.streaming is not None and validation_split and validation is None:
            raise ConfigError(
                "data.validation_split needs all rows of data.train, which data.streaming does not hold; give "
                "data.validation, or leave out data.streaming"
            )
        if self.streaming is not None and cache is not None:
            raise ConfigError(
                "data.streaming and data.cache are both set; stream rows once, or keep them tokenized: remove one"
            )
        self.cache = None if cache is None else Path(cache).expanduser()
        if filter is not None and (self.streaming is not None or cache is not None):
            raise ConfigError(
                "data.filter decides about all rows of data.train before training, so it cannot be combined with "
                "data.streaming or data.cache. Filter the file with rlhf filter apply, and train on the result"
            )
        self.stream: TrainingStream[ExampleT] | None = None
        """The streamed rows of `train`, once they are opened."""
        self.validation_split, self.max_length, self.overlong = validation_split, max_length, overlong
        self.on_bad_row, self.columns, self.format = on_bad_row, columns, format
        self.template_kwargs, self.system, self.tools, self.tokenizer = template_kwargs, system, tools, tokenizer
        self.seed = run_seed() if seed is None else seed
        self.filter = filter
        self.filter_counts: dict[str, FilterCounts] = {}
        """What the filter found in each source of `train`, by name."""
        self.show_example = show_example
        self.prepared: dict[str, Prepared[ExampleT]] = {}
        self.start: str | Path | None = None
        """Model that rows are rendered for, if there is no trainer with a module."""
        self.shared: Row = {}
        """`system` and `tools`, if all rows of `train` share them."""
        self.train_loader: DrawCounts | None = None
        """The loader of training batches, once it exists."""
        self._renderer: Renderer | None = None

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

    def completed(self, name: str) -> None:
        """Hook that is called with the name of each source once it is read and any validation split is held out."""

    @abstractmethod
    def collate(self, rows: list[ExampleT], weights: list[float]) -> BatchT:
        """Make a batch.

        Args:
            rows: `B` examples.
            weights: 1 for each example; 0 for an example that is only there so that each rank has one.
        """

    # -- Lightning ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and render the rows that the command needs; raises `DataError` or `ConfigError` on all ranks."""
        stage = getattr(stage, "value", stage)  # Lightning passes an enumeration, which prints as TrainerFn.…
        before, error = set(self.prepared), None
        try:
            self._setup(stage)
        except UserError as raised:
            error = raised
        require_agreement(error, lambda: self._facts(before))

    def _setup(self, stage: str) -> None:
        wanted = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, (stage,))
        before = set(self.prepared)
        for name in wanted:
            if name == "train" and self.streaming is not None and self.sources["train"] is not None:
                if self.stream is None:
                    self.stream = self._open_stream(self.streaming)
            elif name not in self.prepared:
                self._prepare(name, required=stage != "fit" or name == "train")
        self._hold_out(stage)
        for name in self.prepared:
            if name not in before:
                self.completed(name)
                if name in ("validation", "test") and self.sources[name] is not None:
                    self._compare(name)

    def _facts(self, before: set[str]) -> dict[str, Fact]:
        """Values that must be equal on all ranks, for the sources that were prepared since `before`."""
        facts: dict[str, Fact] = {"data.seed": self.seed}
        if self.stream is not None:
            facts["data.train"] = self.stream.facts()
        for name, found in self.prepared.items():
            if name in before:
                continue
            if found.sizes is not None:  # cached: comparing the examples would read all of them
                facts[f"data.{name}"] = f"{found.reading.rows} rows, {len(found.rows)} examples", str(found.sizes)
            else:
                facts[f"data.{name}"] = rows_facts(self.sources[name], name, found.rows, found.reading.rows)
        return facts

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
        dropped = 0
        if self.filter is not None and name == "train":
            names = [one.name for one in self.mixture.sources] if self.mixture is not None else ["data.train"]
            before = sum(map(len, inner))
            inner, self.filter_counts = filtered(inner, names, self.filter, self.columns)
            dropped = before - sum(map(len, inner))
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
        reading.rows += dropped
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

        def keyed(data: Row) -> Sequence[ExampleT]:
            examples = convert(data)
            keys[:] = [self.key(data)]
            return examples

        def rows() -> Iterator[CachedRow[ExampleT]]:
            for number, one in enumerate(sources):
                for row in self.located(one, name, reading):
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
            return {
                "rows": reading.rows,
                "skipped": reading.skipped,
                "truncated": self._truncated,
                "categories": sorted(counted.categories),
                "shared": self.shared,
            }

        check_on_bad_row(self.on_bad_row)
        facts: dict[str, JSON] = {
            **self.cache_facts(),
            "split": name,
            "rendering": self.renderer.settings(),
            "tokenizer": tokenizer_facts(self.renderer.tokenizer),
            "sources": [source_facts(one, name) for one in sources],
        }
        entry, found = RowCache(folder, self).entry(entry_key(facts), rows(), finish)
        self.renderer.asked = self.renderer.openings = None
        if name == "train":
            self.shared = entry.meta["shared"]
        log.info("%s: tokenized rows are %s %s", name, "read from" if found else "kept in", entry.folder)
        others = [self.sources["validation"], self.sources["test"], self.validation_split or None]
        compared = name != "train" or any(one is not None for one in others)
        return entry.prepared(compared, self.mixture is not None and name == "train")

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

        def noting(data: Row) -> Sequence[ExampleT]:
            refuse_media(data)
            if (names := self.used_columns(name, data)) is not None:
                refuse_misspelled(data, TRAINING_COLUMNS)
                unused.update(dict.fromkeys(k for k, v in data.items() if k not in names | mapped and not is_empty(v)))
                if used is not None:
                    used.update(names)
            return list(convert(data))

        return noting

    def used_columns(self, name: str, data: Row) -> set[str] | None:
        """Columns that the example is made from; None if it keeps all columns."""
        return None

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

    def train_dataloader(self) -> Iterable[StepBatch]:
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        if self.stream is not None:
            return self._stream_loader(self.stream, shuffle)
        self.train_loader = loader = self._loader("train", self.batch_size, shuffle, self.mixture)
        return loader

    def _stream_loader(self, stream: TrainingStream[ExampleT], shuffle: bool) -> StreamLoader[ExampleT, BatchT]:
        trainer, spec = self.trainer, shard_spec_of(self.trainer, training=True)
        check_rows(stream.sources, spec().world * stream.rows.workers)

        def taken() -> int:
            assert trainer is not None
            current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            return int(current.ready)

        loader = StreamLoader(
            stream.rows, self.collate, self.batch_size, shuffle, spec, None if trainer is None else taken
        )
        self.train_loader = loader
        return loader

    def val_dataloader(self) -> Iterable[StepBatch]:
        return self._loader("validation", self.eval_batch_size) if "validation" in self.prepared else []

    def test_dataloader(self) -> Iterable[StepBatch]:
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> Iterable[StepBatch]:
        return self._loader("predict", self.eval_batch_size)

    def _loader(
        self, name: str, batch_size: int, shuffle: bool = False, mixture: Mixture | None = None
    ) -> RowLoader[ExampleT, BatchT]:
        if name not in self.prepared:
            raise ConfigError(f"the rows of data.{name} are not read yet; call setup() first, as the Trainer does")
        return RowLoader(
            self.prepared[name].rows,
            self.collate,
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            shard_spec=shard_spec_of(self.trainer, training=name == "train"),
            order=self.prepared[name].order(mixture, self.seed),
        )

    # -- rendering ------------------------------------------------------------------------------------------------

    @property
    def renderer(self) -> Renderer:
        """The renderer with `tokenizer` or that of the trainer's module, and the settings of its model's training.

        Raises:
            ConfigError: If there is no tokenizer.
        """
        if self._renderer is None:
            tokenizer, module = self.tokenizer, self.trainer.lightning_module if self.trainer else None
            if tokenizer is None:
                if module is None:
                    raise ConfigError(
                        "the data module has no tokenizer; pass one, or use it in a Trainer with a module that has one"
                    )
                tokenizer = module.tokenizer
            elif isinstance(tokenizer, str | Path) or not hasattr(tokenizer, "apply_chat_template"):
                tokenizer = load_tokenizer(tokenizer)
            asking = self.asking
            rank_zero_only(asking.log)()
            own = module is None or (self.tokenizer is None and getattr(module, "own_tokenizer", True))
            self._renderer = asking.renderer(tokenizer, self._model_stops(), plain=False, own_tokenizer=own)
        return self._renderer

    def _model_stops(self) -> list[int]:
        """Ids that end a response according to the generation config of the trainer's model."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, "end_token_ids", [])

    @property
    def asking(self) -> RenderingSettings:
        """The rendering settings that the trainer's model was trained with, and those set here that replace them."""
        module = self.trainer.lightning_module if self.trainer else None
        given = {name: getattr(self, name) for name in ("format", "template_kwargs", "system", "tools")}
        return RenderingSettings.of(getattr(module, "start_source", self.start), **given)

    @rank_zero_only
    def _warn_of_differences(self, asking: RenderingSettings, openings: ResponseStarts | None) -> None:
        """Warn if settings differ from those of the model's training, or answers do not begin where prompts end."""
        asking.warn("all rows have the {} {}, but {} was trained with {}")
        if openings is not None and openings.message:
            log.warning("%s", openings.message)

    def _record_shared(self) -> None:
        """Record the system message and tools that all training rows share; warn if the model's training had others."""
        asked, openings = self.renderer.asked, self.renderer.openings
        self.renderer.asked = self.renderer.openings = None
        if asked is None:
            return
        self.shared = shared_by_all(asked)
        own = {key: value for key, value in self.shared.items() if value != getattr(self.renderer, key)}
        self._warn_of_differences(replace(self.asking, given=own), openings)

    @property
    def pad_id(self) -> int:
        """Token id of the padding. Masks never depend on it, so any id works."""
        pad = self.renderer.tokenizer.pad_token_id
        return self.renderer.stop_token_ids[0] if pad is None else pad

    def too_long(self, length: int, name: str = "data.max_length", can_truncate: bool = True) -> bool:
        """True if a row must be truncated; counts such rows.

        Args:
            length: Number of tokens of the row.
            name: Name of the limit, for the message.
            can_truncate: False if rows of this kind cannot be truncated.

        Raises:
            RowError: If the row is too long and must not be truncated.
            SkippedRow: If the row is too long and must be skipped.
        """
        if length <= self.max_length:
            return False
        if self.overlong == "truncate" and can_truncate:
            self._truncated += 1
            return True
        ways = "truncate or skip" if can_truncate else "skip"
        kind = SkippedRow if self.overlong == "skip" else RowError
        raise kind(f"{length} tokens exceed {name} {self.max_length}; raise it, or set data.overlong: {ways}")

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each source, for `stage.json`."""
        return {name: digest for name, source in self.sources.items() if (digest := fingerprint(source, name))}

    def row_counts(self) -> dict[str, JSON]:
        """Name, number of rows and number of examples of each source that was read, for the model card."""
        counts: dict[str, JSON] = {}
        if self.stream is not None:
            counts["train"] = {"streamed": True, "sources": self._stream_counts(self.stream)}
        for name, prepared in self.prepared.items():
            if name == "predict":
                continue
            one: dict[str, JSON] = {"rows": prepared.reading.rows, "examples": len(prepared.rows)}
            if name == "train" and (order := prepared.order(self.mixture, self.seed)) is not None:
                one["sources"] = self._mixture_counts([len(examples) for examples in order.examples])
            else:
                one["source"] = _named(self.sources.get(name), f"held out of train ({self.validation_split})")
            if name == "train" and self.filter is not None:
                one["filter"] = {source: found.as_json() for source, found in self.filter_counts.items()}
            counts[name] = one
        return counts

    def _stream_counts(self, stream: TrainingStream[ExampleT]) -> dict[str, JSON]:
        """Source, weight, number of rows, if known, and what was trained, of each streamed source."""
        loader = self.train_loader
        drawn = [0] * len(stream.sources) if loader is None else loader.drawn()
        counts: dict[str, JSON] = {}
        for number, (one, source) in enumerate(zip(stream.mixture.sources, stream.sources, strict=True)):
            given: dict[str, JSON] = {"source": _named(one.source, ""), "weight": one.weight, "rows": source.rows}
            if isinstance(loader, StreamLoader):  # rows of other loaders are prompts, one each
                total = loader.totals()[number]
                given |= {"skipped": total["skipped"], "truncated": total["truncated"]}
            counts[one.name] = {**given, "drawn": drawn[number]}
        return counts

    def _mixture_counts(self, examples: Sequence[int]) -> dict[str, JSON]:
        """Source, weight, number of examples, and number of examples trained on, of each source of the mixture."""
        sources = self.mixture.sources if self.mixture is not None else []
        drawn = self.train_loader.drawn() if self.train_loader is not None else [0] * len(sources)
        return {
            one.name: {"source": _named(one.source, ""), "weight": one.weight, "examples": count, "drawn": trained}
            for one, count, trained in zip(sources, examples, drawn, strict=True)
        }

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
        if self.show_example and name in ("train", "predict"):
            log.info(EXAMPLE, examples[0].show(self.renderer.tokenizer))


def _named(source: Source | None, otherwise: str) -> str:
    """Name of a source: that of the file or files, or the type of the object."""
    if source is None:
        return otherwise
    if isinstance(source, str | Path):
        return str(source)
    files = list(source) if isinstance(source, list | tuple) else []
    if files and all(isinstance(one, str | Path) for one in files):
        return ", ".join(map(str, files))
    return f"rows of a {type(source).__name__}"


_VERBS = {"train": "train on", "validation": "validate on", "test": "test on", "predict": "predict for"}


def data_ranks(trainer: pl.Trainer) -> tuple[int, int]:
    """Index of this rank among the ranks that have different rows, and the number of such ranks."""
    known = trainer.distributed_sampler_kwargs
    return (known["rank"], known["num_replicas"]) if known else (trainer.global_rank, trainer.world_size)


def shard_spec_of(trainer: pl.Trainer | None, training: bool) -> Callable[[], ShardSpec]:
    """A function that returns the trainer's `ShardSpec` at the start of an epoch; without a trainer, that of a single
    process."""

    def shard_spec() -> ShardSpec:
        if trainer is None:
            return ShardSpec()
        limit = trainer.num_training_batches if training else None
        rank, world = data_ranks(trainer)
        epochs: Any = trainer.fit_loop.epoch_progress.current
        return ShardSpec(
            rank=rank,
            world=world,
            accumulate=trainer.accumulate_grad_batches if training else 1,
            # The epoch that Lightning passes to samplers; after some resumes, `current_epoch` lags behind it.
            epoch=epochs.processed if training else 0,
            limit=int(limit) if limit and limit != float("inf") else None,
        )

    return shard_spec
