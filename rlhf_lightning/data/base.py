"""Base class of the data modules."""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

from rlhf_lightning.data.agreement import Fact, require_agreement, rows_facts
from rlhf_lightning.data.batching import BatchT, DrawCounts, ExampleT, RowLoader, run_seed
from rlhf_lightning.data.containers import settled
from rlhf_lightning.data.mixing import STOPPING, Mixture
from rlhf_lightning.data.prepared_data import PreparedData
from rlhf_lightning.data.records import Source, fingerprint
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.row_filter import FilterCounts, RowFilter
from rlhf_lightning.data.row_streams import Streaming, check_rows
from rlhf_lightning.data.shards import shard_spec_of
from rlhf_lightning.data.splits import Prepared
from rlhf_lightning.data.stream_loader import StreamLoader
from rlhf_lightning.data.training_stream import TrainingStream
from rlhf_lightning.errors import ConfigError, UserError, check_object, check_seed, check_whole
from rlhf_lightning.types import JSON, Row, StepBatch

log = logging.getLogger(__name__)
OVERLONG = ("error", "truncate", "skip")


class RowDataModule(PreparedData[ExampleT], Generic[ExampleT, BatchT]):
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
        if filter is not None and self.streaming is not None:
            filter.check_streaming(self.streaming.workers)
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

    # -- records --------------------------------------------------------------------------------------------------

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each source, for `stage.json`."""
        return {
            name: digest
            for name, source in self.sources.items()
            if (digest := fingerprint(source, name, f"data.{name}"))
        }

    def row_counts(self) -> dict[str, JSON]:
        """Name, number of rows and number of examples of each source that was read, for the model card."""
        counts: dict[str, JSON] = {}
        if self.stream is not None:
            streamed: dict[str, JSON] = {"streamed": True, "sources": self._stream_counts(self.stream)}
            if self.filter is not None and isinstance(self.train_loader, StreamLoader):
                totals = zip(self.stream.sources, self.train_loader.totals(), strict=True)
                streamed["filter"] = {
                    source.name: FilterCounts.sum([one["filtered"]]).as_json() for source, one in totals
                }
            counts["train"] = streamed
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
