"""Loads batches from streamed rows: rows are parsed, rendered and batched while training runs."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypedDict

import torch.utils.data
from torch.utils.data import DataLoader, IterableDataset

from rlhf_lightning.data.batching import BatchT, ExampleT, ShardSpec, check_world, mix_seeds, split_evenly, total_counts
from rlhf_lightning.data.mixing import Mixture
from rlhf_lightning.data.row_filter import FilterCounts, FilterTotals
from rlhf_lightning.data.row_streams import Reader, RowStream, StreamedSource, Streaming, StreamState
from rlhf_lightning.data.spans import RawRow
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError, DataError, UserError
from rlhf_lightning.types import Counts


class Converted(NamedTuple, Generic[ExampleT]):
    """The examples of one row.

    Attributes:
        source: Index of its source.
        examples: The examples; empty for a row that is skipped.
        truncated: Number of them that were truncated.
        error: What is wrong with the row, if it stops training.
        filtered: What the filter found in it; None without a filter.
    """

    source: int
    examples: Sequence[ExampleT]
    truncated: int = 0
    error: UserError | None = None
    filtered: FilterTotals | None = None

    @property
    def dropped(self) -> bool:
        """True if the filter leaves the row out."""
        return self.filtered is not None and self.filtered["dropped"] > 0


class SourceCounts(TypedDict):
    """What a source has given since training began."""

    rows: int
    examples: int
    skipped: int
    truncated: int
    filtered: FilterTotals
    """What the filter found; zero without a filter."""


class Position(TypedDict):
    """Where the readers of a rank are: the state of each worker, and the worker that gives the next row."""

    streams: list[StreamState | None]
    turn: int
    counts: list[SourceCounts]


class RankState(TypedDict):
    """State of a rank in a checkpoint."""

    position: Position
    """Before the first row of the optimizer step whose examples are not all used."""
    used: int
    """Number of examples of that row that earlier steps used."""
    batches: int
    """Number of batches of the optimizer step that were taken."""


class StreamLoaderState(TypedDict):
    """State of the loader in a checkpoint."""

    position: int
    """Number of batches of this epoch that were taken; 0 at its end."""
    epoch: int
    """Index of the epoch, or of the next one at its end. Lightning's own is not right yet when it fetches ahead."""
    ranks: list[RankState]


class Share(NamedTuple):
    """What the ranks exchange about an optimizer step."""

    error: UserError | None
    examples: int
    denominators: Counts
    counts: list[SourceCounts]


class RowSource(Generic[ExampleT]):
    """Makes examples of the streamed rows.

    Args:
        sources: The sources.
        mixture: Their weights.
        streaming: The settings.
        convert: Makes the examples of a row.
        seed: Seed of the order.

    Example:
        ```python
        rows = RowSource(sources, mixture, Streaming(), convert, seed=0)
        for converted, position in rows.read(epoch=0, rank=0, world=1, position=rows.begin(), shuffle=True):
            ...
        ```
    """

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        mixture: Mixture,
        streaming: Streaming,
        convert: Callable[[int, RawRow], Converted[ExampleT]],
        seed: int,
    ) -> None:
        self.sources, self.mixture, self.streaming = sources, mixture, streaming
        self.convert, self.seed = convert, seed

    @property
    def workers(self) -> int:
        """Number of readers of a rank."""
        return max(1, self.streaming.workers)

    def begin(self, counts: Sequence[SourceCounts] = ()) -> Position:
        """The beginning of an epoch."""
        known = list(counts) or [_sum([]) for _ in self.sources]
        return {"streams": [None] * self.workers, "turn": 0, "counts": known}

    def read(
        self, epoch: int, rank: int, world: int, position: Position, shuffle: bool
    ) -> Iterator[tuple[Converted[ExampleT], Position]]:
        """The rows of a rank from a position on, each with the position after it."""
        if len(position["streams"]) != self.workers:
            raise ConfigError(
                f"the checkpoint was written with {len(position['streams'])} readers per rank "
                f"(data.streaming.workers), but now there are {self.workers}; set it as it was"
            )
        rows = _WorkerRows(self, epoch, Reader(rank, world), position, shuffle)
        found: Iterator[tuple[int, Converted[ExampleT], StreamState]] = iter(rows)
        if self.streaming.workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rows are tokenized one by one; avoids a warning
            workers = DataLoader(
                rows,
                batch_size=None,
                num_workers=self.streaming.workers,
                collate_fn=_same,
                multiprocessing_context="fork",  # a renderer cannot be pickled
            )
            found = iter(workers)
        streams, counts = list(position["streams"]), position["counts"]
        for worker, converted, state in found:
            streams[worker] = state
            counts = [_added(one, converted) if i == converted.source else one for i, one in enumerate(counts)]
            turn = (worker + 1) % self.workers
            yield converted, {"streams": list(streams), "turn": turn, "counts": counts}


def _sum(counts: Sequence[SourceCounts]) -> SourceCounts:
    """The counts of several ranks together."""
    return {
        "rows": sum(one["rows"] for one in counts),
        "examples": sum(one["examples"] for one in counts),
        "skipped": sum(one["skipped"] for one in counts),
        "truncated": sum(one["truncated"] for one in counts),
        "filtered": FilterCounts.sum(one["filtered"] for one in counts).totals(),
    }


def _sums(counts: Sequence[Sequence[SourceCounts]]) -> list[SourceCounts]:
    """The counts of all ranks, by source."""
    return [_sum(of_ranks) for of_ranks in zip(*counts, strict=True)]


def _no_worker_info() -> None:
    return None


def _same(value: Any) -> Any:
    return value


def _added(counts: SourceCounts, converted: Converted[Any]) -> SourceCounts:
    filtered = counts["filtered"]
    if converted.filtered is not None:
        filtered = FilterCounts.sum((filtered, converted.filtered)).totals()
    return {
        "rows": counts["rows"] + 1,
        "examples": counts["examples"] + len(converted.examples),
        "skipped": counts["skipped"] + (not converted.examples and not converted.dropped),
        "truncated": counts["truncated"] + converted.truncated,
        "filtered": filtered,
    }


class _WorkerRows(IterableDataset, Generic[ExampleT]):
    """The rows of one of a rank's workers; the workers take turns, beginning with the one whose turn it is."""

    def __init__(self, rows: RowSource[ExampleT], epoch: int, rank: Reader, position: Position, shuffle: bool) -> None:
        self.rows, self.epoch, self.rank, self.position, self.shuffle = rows, epoch, rank, position, shuffle

    def __iter__(self) -> Iterator[tuple[int, Converted[ExampleT], StreamState]]:
        rows, workers = self.rows, self.rows.workers
        info = torch.utils.data.get_worker_info()
        if info is not None:  # `datasets` would split its files among the workers, too; rows are split here
            torch.utils.data.get_worker_info = _no_worker_info
        worker = (self.position["turn"] + (info.id if info else 0)) % workers
        stream = RowStream(
            rows.sources,
            rows.mixture,
            rows.streaming,
            mix_seeds(rows.seed, self.epoch) if self.shuffle else None,
            Reader(self.rank.index * workers + worker, self.rank.count * workers),
            self.position["streams"][worker],
        )
        try:
            for source, raw in stream:
                converted = rows.convert(source, raw)
                if converted.dropped:
                    stream.leave_out(source)
                yield worker, converted, stream.state()
        except UserError as error:  # found while reading; all ranks must learn of it
            yield worker, Converted(0, (), error=error), stream.state()


class StreamLoader(Generic[ExampleT, BatchT]):
    """A stateful loader over streamed rows. It has no length, because rows are counted only when they are converted.

    One optimizer step takes up to `batch_size × accumulate` examples of each rank. The ranks exchange the counts of
    their examples, so that each batch has the `denominators` of the whole step. A rank without examples at the end of
    an epoch gets a row with weight 0, so that all ranks take the same number of steps.

    Lightning fetches a batch ahead from loaders without a length, so the loader keeps its state after each of the last
    batches, and saves the one that belongs to the batch that was trained.

    Args:
        rows: Makes examples of rows.
        collate: Function `(rows, weights) -> batch`.
        batch_size: Number of rows per rank and micro-batch.
        shuffle: Use a new order in each epoch.
        shard_spec: Called at the start of each epoch.
        taken: Returns the number of batches of this epoch that were trained or are being trained; by default those
            that were yielded.

    Example:
        ```python
        loader = StreamLoader(rows, collate=data_module.collate, batch_size=8, shuffle=True)
        for batch in loader:
            loss = total(batch) / batch["denominators"]["tokens"]
        ```
    """

    KEPT = 4
    """Number of batches whose states are kept; Lightning is one batch ahead."""

    def __init__(
        self,
        rows: RowSource[ExampleT],
        collate: Callable[[list[ExampleT], list[float]], BatchT],
        batch_size: int,
        shuffle: bool = False,
        shard_spec: Callable[[], ShardSpec] = ShardSpec,
        taken: Callable[[], int] | None = None,
    ) -> None:
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.shuffle, self.shard_spec = shuffle, shard_spec
        self._yielded, self._epoch, self._exhausted = 0, 0, False
        self._taken = taken or (lambda: self._yielded)
        self._limit: int | None = None
        self._states: dict[int, tuple[RankState, list[SourceCounts]]] = {}
        """State of this rank, and counts of all ranks, by the number of batches taken."""
        self._start: StreamLoaderState | None = None
        self._totals: list[SourceCounts] = self.rows.begin()["counts"]

    def __iter__(self) -> Iterator[BatchT]:
        shard_spec = self.shard_spec()
        start, self._start = self._start, None
        state = start["ranks"][shard_spec.rank] if start else self._new_epoch()
        self._yielded, self._epoch = (start["position"], start["epoch"]) if start else (0, shard_spec.epoch)
        self._exhausted, self._limit = False, shard_spec.limit
        self._states = {self._yielded: (state, self._totals)}
        window = _Window(
            self.rows.read(self._epoch, shard_spec.rank, shard_spec.world, state["position"], self.shuffle), state
        )
        done = state["batches"]
        while True:
            left = None if shard_spec.limit is None else shard_spec.limit - self._yielded + done
            if left == 0:
                return
            most = min(shard_spec.accumulate, left or shard_spec.accumulate)
            before, examples = window.state, window.take(most * self.batch_size)
            shares = gather(
                Share(window.error, len(examples), total_counts(row.counts() for row in examples), window.counts)
            )
            if error := next((share.error for share in shares if share.error), None):
                raise window.error or error
            longest = max(share.examples for share in shares)
            self._totals = _sums([share.counts for share in shares])
            if not longest:
                self._exhausted = True
                if not self._yielded:
                    raise DataError("data.train: none of the streamed rows can be used")
                return
            micro = min(most, -(-longest // self.batch_size))
            dummy = examples[:1]
            if min(share.examples for share in shares) < micro:
                dummy = next(found for found in gather(examples[:1]) if found)
            if self.shuffle:
                examples.sort(key=lambda row: row.tokens)
            denominators = total_counts(share.denominators for share in shares)
            for k, rows in enumerate(split_evenly(examples, micro)):
                if k < done:
                    continue
                self._yielded += 1
                after = window.state if k + 1 == micro else RankState({**before, "batches": k + 1})
                self._states[self._yielded] = after, self._totals
                self._states.pop(self._yielded - self.KEPT, None)
                batch = self.collate(rows, [1.0] * len(rows)) if rows else self.collate(dummy, [0.0])
                batch["denominators"] = denominators
                batch["where"] = [getattr(row, "where", "") for row in rows]
                yield batch
            done = 0

    def _new_epoch(self) -> RankState:
        """The beginning of an epoch; counts go on."""
        counts = self._states[self._yielded][0]["position"]["counts"] if self._yielded in self._states else ()
        return {"position": self.rows.begin(counts), "used": 0, "batches": 0}

    def drawn(self) -> list[int]:
        """See `DrawCounts`."""
        return [counts["examples"] for counts in self.totals()]

    def totals(self) -> list[SourceCounts]:
        """What each source has given for training on all ranks since training began."""
        return self._states[self._taken()][1] if self._taken() in self._states else self._totals

    def state_dict(self) -> StreamLoaderState:
        """The number of batches that were taken, and where each rank is. All ranks must call this together."""
        if self._start is not None:
            return self._start
        taken = self._taken() if self._taken() in self._states else self._yielded
        ended = taken == self._limit or (self._exhausted and taken == self._yielded)
        own = self._states[taken][0] if taken in self._states else self._new_epoch()
        if ended:
            own = {"position": self.rows.begin(own["position"]["counts"]), "used": 0, "batches": 0}
        return {"position": 0 if ended else taken, "epoch": self._epoch + ended, "ranks": gather(own)}

    def load_state_dict(self, state: StreamLoaderState) -> None:
        """Restore a `state_dict`.

        Raises:
            ConfigError: If the checkpoint was written within an epoch by a different number of ranks.
        """
        world, counts = self.shard_spec().world, [state["position"]["counts"] for state in state["ranks"]]
        if state["position"]:
            check_world(len(state["ranks"]), world)
        elif len(state["ranks"]) != world:  # at the end of an epoch; the first rank keeps the counts
            others = [self.rows.begin()["counts"]] * (world - 1)
            begun = [self.rows.begin(kept) for kept in (_sums(counts), *others)]
            state = {**state, "ranks": [{"position": one, "used": 0, "batches": 0} for one in begun]}
        self._start, self._totals = state, _sums(counts)


class _Window(Generic[ExampleT]):
    """Takes examples from rows, and knows the state from which the examples that follow can be made again."""

    def __init__(self, rows: Iterator[tuple[Converted[ExampleT], Position]], state: RankState) -> None:
        self._rows, self._queue = rows, deque[ExampleT]()
        self._position, self._used, self._before = state["position"], 0, state["position"]
        self._skip = state["used"]
        self.error: UserError | None = None

    @property
    def counts(self) -> list[SourceCounts]:
        return self._position["counts"]

    @property
    def state(self) -> RankState:
        """State before the next example."""
        if self._queue or self._skip:
            return {"position": self._before, "used": self._used + self._skip, "batches": 0}
        return {"position": self._position, "used": 0, "batches": 0}

    def take(self, count: int) -> list[ExampleT]:
        """The next examples; fewer at the end of the epoch, or before a row with an error."""
        found: list[ExampleT] = []
        while len(found) < count and self.error is None:
            if not self._queue:
                converted, after = next(self._rows, (None, None))
                if converted is None or after is None:
                    break
                self.error = converted.error
                self._before, self._position = self._position, after
                self._queue.extend(converted.examples)
                for _ in range(self._skip):
                    self._queue.popleft()
                self._used, self._skip = self._skip, 0
                continue
            found.append(self._queue.popleft())
            self._used += 1
        return found
