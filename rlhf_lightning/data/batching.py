"""Makes batches from rows: padding, the order of an epoch, and the denominators of losses."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as natural_numbers
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from rlhf_lightning.data.mixing import Mixture, epoch_sources
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import Counts, StepBatch, TokenBatch, Tokenizer


class Example(Protocol):
    """What a data module makes from a data row, for example a `Pair` or a `Prompt`."""

    @property
    def tokens(self) -> int: ...

    @property
    def trained(self) -> int: ...

    def counts(self) -> Counts:
        """The example's contribution to the denominators of its optimizer step."""

    def show(self, tokenizer: Tokenizer) -> str:
        """Text of the example, with the trained part marked."""


T = TypeVar("T")
ExampleT = TypeVar("ExampleT", bound=Example)
BatchT = TypeVar("BatchT", bound=StepBatch)


class DrawCounts(Protocol):
    """A loader that knows how often the sources of a mixture were used."""

    def drawn(self) -> list[int]:
        """Number of rows that each source of the mixture has given since training began; empty without a mixture."""


@dataclass(frozen=True)
class ShardSpec:
    """The part of each epoch that a rank takes.

    Attributes:
        rank: Index of this rank.
        world: Number of ranks.
        accumulate: Number of micro-batches per optimizer step.
        epoch: Index of the epoch.

    Example:
        >>> ShardSpec(rank=1, world=4, accumulate=2).limit is None
        True
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1
    epoch: int = 0
    limit: int | None = None
    """Number of batches per epoch if the Trainer limits it (`limit_train_batches`)."""


class MixedOrder:
    """The order of the examples of a mixture in memory.

    In every epoch, and each time that a source starts over, the examples of a source are shuffled again.

    Args:
        mixture: The sources and their weights.
        source_of: Index of the source of each example.
        seed: Seed of the order within a source.

    Raises:
        ConfigError: If a source has no examples.

    Example:
        >>> mixture = Mixture.of({"a": {"source": "a.jsonl"}, "b": {"source": "b.jsonl"}})
        >>> order = MixedOrder(mixture, source_of=[0, 0, 1, 1, 1])
        >>> len(order), order.epoch(0, shuffle=False)
        (4, [0, 2, 1, 3])
    """

    def __init__(self, mixture: Mixture, source_of: Sequence[int], seed: int = 0) -> None:
        self.mixture, self.seed = mixture, seed
        self.examples: list[list[int]] = [[] for _ in mixture.sources]
        """Indices of the examples of each source."""
        for example, source in enumerate(source_of):
            self.examples[source].append(example)
        for one, examples in zip(mixture.sources, self.examples, strict=True):
            if not examples:
                raise ConfigError(f"data.train: {one.name} has no rows to train on; remove it or hold out fewer rows")
        self.sources = epoch_sources([len(examples) for examples in self.examples], mixture)
        """The source of each example of an epoch, the same in every epoch."""

    def __len__(self) -> int:
        return len(self.sources)

    def epoch(self, epoch: int, shuffle: bool) -> list[int]:
        """Indices of examples in the order of an epoch."""
        found = [self._of_source(source, epoch, shuffle) for source in range(len(self.examples))]
        return [next(found[source]) for source in self.sources]

    def _of_source(self, source: int, epoch: int, shuffle: bool) -> Iterator[int]:
        examples = self.examples[source]
        for again in natural_numbers():
            yield from (examples[i] for i in _order(len(examples), (self.seed, source, epoch, again), shuffle))

    def drawn(self, epochs: int, per_epoch: int, rows: int) -> list[int]:
        """Number of examples that each source has given.

        Args:
            epochs: Number of complete epochs.
            per_epoch: Number of examples in each of them.
            rows: Number of examples of the epoch that is not complete.
        """
        whole, part = Counter(self.sources[:per_epoch]), Counter(self.sources[:rows])
        return [epochs * whole[source] + part[source] for source in range(len(self.examples))]


def _order(size: int, seed: Sequence[int], shuffle: bool) -> list[int]:
    """The indices below `size`, in random order with `shuffle`."""
    if not shuffle:
        return list(range(size))
    return torch.randperm(size, generator=torch.Generator().manual_seed(mix_seeds(*seed))).tolist()


class RowLoader(Generic[ExampleT, BatchT]):
    """A sized and stateful loader over rows in memory.

    It has a length, so that Lightning does not prefetch, and a state, so that a run interrupted within an epoch resumes
    at the next batch.

    One optimizer step takes a window of `batch_size × accumulate × world` rows. Within the window, rows are distributed
    by length, so that a micro-batch has rows of similar length and ranks have similar work; the gradient of the step
    does not depend on this. Each batch has `denominators`, the counts of its whole window. A rank without a row gets
    one with weight 0, so that all ranks take the same number of steps and no row is repeated or lost.

    Args:
        rows: The examples.
        collate: Function `(rows, weights) -> batch`.
        batch_size: Number of rows per rank and micro-batch.
        shuffle: Use a new order in each epoch, determined by the seed and the epoch.
        seed: Seed of the order.
        shard_spec: Called at the start of each epoch.
        order: Order of the rows of a mixture; by default each row occurs once in an epoch.

    Example:
        ```python
        loader = RowLoader(rows, collate=data_module.collate, batch_size=8, shuffle=True)
        for batch in loader:
            loss = total(batch) / batch["denominators"]["tokens"]
        ```
    """

    def __init__(
        self,
        rows: Sequence[ExampleT],
        collate: Callable[[list[ExampleT], list[float]], BatchT],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        shard_spec: Callable[[], ShardSpec] = ShardSpec,
        order: MixedOrder | None = None,
    ) -> None:
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.shuffle, self.seed, self.shard_spec, self.order = shuffle, seed, shard_spec, order
        self.position = self._start = 0
        """Number of batches of this epoch that were taken; 0 at its end."""
        self._epoch: int | None = None

    @property
    def dataset(self) -> Sequence[ExampleT]:
        """The rows; Lightning's BatchSizeFinder stops when a batch contains all of them."""
        return self.rows

    def __len__(self) -> int:
        rows = len(self.rows) if self.order is None else len(self.order)
        return -(-rows // (self.batch_size * self.shard_spec().world))

    def __iter__(self) -> Iterator[BatchT]:
        # Only a loaded state sets the start: an epoch that ended early (sanity check, limited batches) must not be
        # continued.
        start, self._start = self._start, 0
        self.position = start
        shard_spec = self.shard_spec()
        self._epoch = shard_spec.epoch
        batches = self._batches(shard_spec)
        order = self._order(shard_spec.epoch)
        for first in range(0, batches, shard_spec.accumulate):
            micro = min(shard_spec.accumulate, batches - first)
            if first + micro <= start:
                continue
            for k, batch in self._window(order, first, micro, shard_spec, start):
                self.position = (k + 1) % batches
                yield batch

    def _batches(self, shard_spec: ShardSpec) -> int:
        """Number of batches of an epoch, which `limit_train_batches` may cut short."""
        return min(len(self), shard_spec.limit or len(self))

    def _order(self, epoch: int) -> list[int]:
        """Row indices in the order of an epoch."""
        if self.order is not None:
            return self.order.epoch(epoch, self.shuffle)
        return _order(len(self.rows), (self.seed, epoch), self.shuffle)

    def drawn(self) -> list[int]:
        """See `DrawCounts`."""
        if self.order is None:
            return []
        shard_spec = self.shard_spec()
        per_batch = self.batch_size * shard_spec.world
        epochs = complete_epochs(self._epoch, self.position, shard_spec)
        return self.order.drawn(epochs, self._batches(shard_spec) * per_batch, self.position * per_batch)

    def _window(
        self, order: list[int], first: int, micro: int, shard_spec: ShardSpec, start: int
    ) -> Iterator[tuple[int, BatchT]]:
        """This rank's batches of one optimizer step, with their indices."""
        per_micro = self.batch_size * shard_spec.world
        window = [self.rows[i] for i in order[first * per_micro : (first + micro) * per_micro]]
        denominators = total_counts(row.counts() for row in window)
        if self.shuffle:
            window.sort(key=lambda row: row.tokens)
        parts = split_evenly(window, micro * shard_spec.world)
        for k in range(micro):
            if first + k < start:
                continue
            rows = parts[k * shard_spec.world + shard_spec.rank]
            batch = self.collate(rows, [1.0] * len(rows)) if rows else self.collate(window[:1], [0.0])
            batch["denominators"] = denominators
            batch["where"] = [getattr(row, "where", "") for row in rows]
            yield first + k, batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches of this epoch that were taken and, within an epoch, the number of ranks."""
        inside = {"world": self.shard_spec().world} if self.position else {}
        return {"position": self.position, **inside}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = self._start = int(state["position"])
        if self.position and "world" in state:
            check_world(state["world"], self.shard_spec().world)


def check_world(written: int, world: int) -> None:
    """Raise `ConfigError` if a checkpoint within an epoch was written by another number of ranks."""
    if written != world:
        raise ConfigError(
            f"the checkpoint was written by {written} ranks in the middle of an epoch, but this run has {world} ranks, "
            "so rows would be repeated or left out. Resume with the same number of devices, or from a checkpoint at "
            "the end of an epoch (--ckpt_path)."
        )


def complete_epochs(begun: int | None, position: int, shard_spec: ShardSpec) -> int:
    """Number of epochs that a loader has completed.

    Args:
        begun: The epoch that it began last; None if it did not begin any since the run was started or resumed.
        position: Number of batches of that epoch that were taken; 0 at its end.
        shard_spec: The trainer's epoch, which also counts an epoch that `max_steps` ends early.
    """
    return shard_spec.epoch if begun is None else begun + (position == 0)


def split_evenly(rows: Sequence[T], parts: int) -> list[list[T]]:
    """Split into `parts` consecutive lists whose sizes differ by at most one.

    Example:
        >>> split_evenly([1, 2, 3, 4, 5], 2)
        [[1, 2], [3, 4, 5]]
    """
    edges = [round(i * len(rows) / parts) for i in range(parts + 1)]
    return [list(rows[a:b]) for a, b in pairwise(edges)]


def total_counts(counts: Iterator[Counts]) -> Counts:
    """The sum of each count."""
    total: Counts = {}
    for count in counts:
        for name, value in count.items():
            total[name] = total.get(name, 0.0) + value
    return total


def run_seed() -> int:
    """The seed passed to `seed_everything`; 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def mix_seeds(*parts: int) -> int:
    """Combine numbers into one seed, with a splitmix64 step for each, so that (1, 0) and (0, 1) differ."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF


def pad_right(
    rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Pad rows on the right.

    Args:
        rows: `B` lists of numbers.
        fill: Value of the padding.
        dtype: Data type of the result.
        device: Device of the result; by default the CPU.

    Returns:
        `[B, T]`, where T is the length of the longest row. Causal models never attend to right padding, so no attention
        mask is needed.

    Example:
        >>> pad_right([[1, 2], [3]], fill=0, dtype=torch.long)
        tensor([[1, 2],
                [3, 0]])
    """
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device=device)


def pad_tokens(
    ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], pad_id: int, device: torch.device | None = None
) -> TokenBatch:
    """Make a padded batch of token rows.

    Args:
        ids: Token ids of each row.
        masks: Loss mask of each row.
        pad_id: Token id of the padding.
        device: Device of the batch; by default the CPU.

    Returns:
        `input_ids` and `loss_mask`, `[B, T]`, and the `lengths` without padding, `[B]`.
    """
    return {
        "input_ids": pad_right(ids, pad_id, torch.long, device),
        "loss_mask": pad_right(masks, 0, torch.float32, device),
        "lengths": torch.tensor([len(row) for row in ids], device=device),
    }
