"""The rollout dataloader, which makes on-policy RL an ordinary `Trainer.fit` with automatic optimization."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Generic, NamedTuple, NotRequired, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from rlhf_lightning.data.batching import (
    MixedOrder,
    ShardSpec,
    complete_epochs,
    mix_seeds,
    pad_right,
    pad_tokens,
    split_evenly,
    total_counts,
)
from rlhf_lightning.data.row_streams import Reader, StreamState
from rlhf_lightning.distributed import RoundLeft, gather, leave_if, safe_points
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rollout.producer import ProducerState
from rlhf_lightning.rollout.statistics import Sums, means
from rlhf_lightning.types import Counts, RolloutBatch, TrainingSample

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class LoaderState(TypedDict):
    """State of the loader in a checkpoint."""

    position: int
    """Number of batches yielded in this epoch, including the one that is being trained on; 0 again once the last batch
    of the epoch was yielded."""
    rows: list[list[dict[str, Any]]]
    """Within a round, the training samples of every rank, as plain values."""
    stream: NotRequired[StreamState | None]
    """Within an epoch, where streamed prompts are after the last round that was begun."""
    ahead: NotRequired[ProducerState]
    """Within an epoch, what a producer has sampled ahead."""


class ItemsOfRound(Protocol[T_co]):
    """See `StreamedRound`."""

    @property
    def prompts(self) -> Sequence[T_co]: ...

    @property
    def where(self) -> Mapping[int, str]: ...

    @property
    def state(self) -> StreamState | None: ...


class StreamedItems(Protocol[T_co]):
    """Items that are read round by round; see `StreamedPrompts`."""

    def __len__(self) -> int: ...

    def drawn(self, epochs: int, per_epoch: int, rows: int) -> list[int]: ...

    def rounds(
        self, epoch: int, shuffle: bool, per_round: int, rank: Reader, state: StreamState | None, first: int
    ) -> Iterator[ItemsOfRound[T_co]]: ...


class Producer(Protocol[T_contra]):
    """Samples rounds ahead of training; see `RolloutProducer`."""

    def running(self, rounds: Sequence[tuple[int, Sequence[T_contra]]]) -> AbstractContextManager[None]: ...

    def state_dict(self, first: int) -> ProducerState: ...

    def load_state_dict(self, state: ProducerState, rank: int, world: int) -> None: ...


class Interruption(NamedTuple):
    """What stops the collection of a round early, without an error.

    Attributes:
        asked: True once this rank is asked to stop.
        on_leave: Called on each rank after the round was left.
    """

    asked: Callable[[], bool]
    on_leave: Callable[[], None]


class RolloutDataLoader(Generic[T]):
    """Yields mini-batches of rounds of episodes.

    It has a length, because Lightning prefetches from loaders without one and would sample with outdated weights, and a
    state for checkpoints.

    An epoch is one pass over the prompts. In each round, the loader calls `collect(prompts, round_index)` to get
    training samples, and yields `update_epochs × minibatches` mini-batches of them, shuffled again in each update
    epoch. The number of mini-batches does not depend on the number of samples: one without samples contains a dummy
    row with `loss_mask` 0.

    A batch is a `RolloutBatch`. Its tensors are `[B, T]` (`lengths` `[B]`), log-probabilities in nats. Column t of each
    belongs to the token `input_ids[:, t]`, without a shift; `reference_logprobs`, `values` and `returns` are 0 if not
    computed. It also has the `denominators` of its optimizer step, the `round`, `where` (file and line of each row's
    prompt, or of the first recorded episode of its group), `first` (True in the first optimizer step of a round) and,
    on the first batch of a round, its `statistics`.

    Args:
        items: Prompts or recorded groups of all ranks.
        collect: Returns the training samples of this rank's items in a round, and each statistic of it as sum and
            count.
        items_per_round: Items of all ranks in a round: `prompts_per_round` of `PromptDataModule`, or as many groups of
            recorded episodes.
        update_epochs: See `PromptDataModule`.
        minibatches: See `PromptDataModule`.
        pad_id: Token id of padding.
        seed: Seed for shuffling prompts and rows.
        shard_spec: Called at the start of each epoch; returns rank, world size, epoch, micro-batches per optimizer
            step, and limit.
        shuffle: True to shuffle the prompts in each epoch.
        where: File and line of each prompt, or of the first episode of each recorded group, by its index.
        producer: Samples the rounds that `collect` returns, ahead of training; None if `collect` samples.
        draw: Called at the start of each epoch with the epoch and `items_per_round`; returns the positions of its items
            in order, as many as there are. By default each item occurs once, in random order.
        order: Order of the items of a mixture.
        stream: Streamed prompts, instead of `items`.

    Raises:
        ConfigError: On iteration, if an optimizer step would span two rounds.

    Example:
        >>> from rlhf_lightning.types import TrainingSample
        >>> def collect(prompts, round_index):
        ...     return [TrainingSample([1, 2], [0, 1], [0.0, -0.5], advantages=[0.0, 1.0]) for _ in prompts], {}
        >>> loader = RolloutDataLoader(["a", "b"], collect, items_per_round=1, update_epochs=1, minibatches=1, pad_id=0)
        >>> [batch["input_ids"].tolist() for batch in loader]
        [[[1, 2]], [[1, 2]]]
    """

    def __init__(
        self,
        items: Sequence[T],
        collect: Callable[[list[T], int], tuple[list[TrainingSample], Sums]],
        items_per_round: int,
        update_epochs: int,
        minibatches: int,
        pad_id: int,
        seed: int = 0,
        shard_spec: Callable[[], ShardSpec] = ShardSpec,
        shuffle: bool = True,
        where: Mapping[int, str] | None = None,
        producer: Producer[T] | None = None,
        draw: Callable[[int, int], list[int]] | None = None,
        order: MixedOrder | None = None,
        stream: "StreamedItems[T] | None" = None,
    ) -> None:
        self.items, self.collect, self.pad_id, self.seed = items, collect, pad_id, seed
        self.order, self.stream = order, stream
        self.items_per_epoch = len(items if stream is None and order is None else stream or order or [])
        self.items_per_round = min(items_per_round, self.items_per_epoch)
        self.update_epochs, self.minibatches = update_epochs, minibatches
        self.shard_spec, self.shuffle, self.where, self.producer = shard_spec, shuffle, where or {}, producer
        self.draw = draw
        self.position = self._start = 0
        """See `LoaderState.position`."""
        self._epoch: int | None = None
        self._streamed: dict[int, StreamState | None] = {}
        """State of the stream after the last rounds, by the number of rounds read."""
        self.interruption: Interruption | None = None
        """Set by the checkpoint callback, to stop on a signal while a round is collected. None if a round is always
        finished, as with a sharded model."""
        self._rows: list[TrainingSample] = []
        self._restored: list[TrainingSample] | None = None

    @property
    def rounds(self) -> int:
        """Number of rounds in an epoch."""
        return -(-self.items_per_epoch // self.items_per_round)

    @property
    def at_round_start(self) -> bool:
        """True if the next batch is the first of a round."""
        return self.position % self.per_round == 0

    @property
    def per_round(self) -> int:
        """Number of mini-batches in a round."""
        return self.update_epochs * self.minibatches

    def __len__(self) -> int:
        return self.rounds * self.per_round

    def __iter__(self) -> Iterator[RolloutBatch]:
        shard_spec = self.shard_spec()
        if self.minibatches % shard_spec.accumulate:
            raise ConfigError(
                f"data.minibatches ({self.minibatches}) must be a multiple of trainer.accumulate_grad_batches "
                f"({shard_spec.accumulate}), because an optimizer step must not span two rounds"
            )
        self._epoch = shard_spec.epoch
        # Only a loaded state sets the start. An epoch that was cut short (limit_train_batches) is not continued.
        start, self._start = self._start, 0
        self.position = start
        first = start // self.per_round
        if self.stream is not None:
            rounds: Iterable[list[T]] = self._streamed_rounds(self.stream, first, shard_spec)
            ahead: list[tuple[int, list[T]]] = []
        else:
            rounds = own = self._own_rounds(first, shard_spec)
            # Those that the epoch reaches, less a round that is restored as a whole.
            reached = range(first + (self._restored is not None), -(-self._batches(shard_spec) // self.per_round))
            ahead = [(self._index(k, shard_spec), own[k - first]) for k in reached]
        with self.producer.running(ahead) if self.producer else nullcontext():
            for round_in_epoch, items in enumerate(rounds, first):
                done = max(0, start - round_in_epoch * self.per_round)
                yield from self._round(items, round_in_epoch, done, shard_spec)

    def _own_rounds(self, first: int, shard_spec: ShardSpec) -> list[list[T]]:
        """This rank's items of each round of an epoch, from round `first` on."""
        order, size = self._order(shard_spec.epoch), self.items_per_round
        rounds = [order[k * size : (k + 1) * size] for k in range(first, self.rounds)]
        return [[self.items[i] for i in positions[shard_spec.rank :: shard_spec.world]] for positions in rounds]

    def _streamed_rounds(self, stream: "StreamedItems[T]", first: int, shard_spec: ShardSpec) -> Iterator[list[T]]:
        """The same for streamed items, which are read when their round begins."""
        state = self._streamed.get(first + (self._restored is not None))
        if self._restored is not None:
            first += 1
            yield []  # its training samples are restored
        rank = Reader(shard_spec.rank, shard_spec.world)
        self._streamed = {first: state}
        for found in stream.rounds(shard_spec.epoch, self.shuffle, self.items_per_round, rank, state, first):
            first += 1
            self._streamed[first] = found.state
            self._streamed.pop(first - 3, None)
            self.where = found.where
            yield [*found.prompts]

    def _order(self, epoch: int) -> list[int]:
        """Positions of an epoch's items, in order."""
        if self.order is not None:
            return self.order.epoch(epoch, self.shuffle)
        if not self.shuffle:
            return list(range(len(self.items)))
        if self.draw is not None:
            return self.draw(epoch, self.items_per_round)
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
        return torch.randperm(len(self.items), generator=generator).tolist()

    def drawn(self) -> list[int]:
        """Number of items that each source of the mixture has given since training began; empty without a mixture."""
        if (counter := self.order if self.stream is None else self.stream) is None:
            return []
        shard_spec = self.shard_spec()
        epoch, inside = (-(-batches // self.per_round) for batches in (self._batches(shard_spec), self.position))
        epochs = complete_epochs(self._epoch, self.position, shard_spec)
        return counter.drawn(epochs, epoch * self.items_per_round, inside * self.items_per_round)

    def _index(self, round_in_epoch: int, shard_spec: ShardSpec) -> int:
        """Index of a round over all epochs."""
        return shard_spec.epoch * self.rounds + round_in_epoch

    def _batches(self, shard_spec: ShardSpec) -> int:
        """Number of batches of an epoch, which `limit_train_batches` may cut short."""
        return min(len(self), shard_spec.limit or len(self))

    def _round(self, items: list[T], round_in_epoch: int, done: int, shard_spec: ShardSpec) -> Iterator[RolloutBatch]:
        """The mini-batches of a round.

        Args:
            items: Prompts or recorded groups of this rank.
            round_in_epoch: Index of the round in its epoch.
            done: Number of its mini-batches that were yielded before the checkpoint.
            shard_spec: The part of the epoch that this rank takes.
        """
        round_index = self._index(round_in_epoch, shard_spec)
        statistics: dict[str, float] | None = None
        if done and self._restored is not None:
            self._rows = self._restored
        else:
            with self._interruptible():
                self._rows, sums = self.collect(items, round_index)
                # Merged here, on all ranks, because a rank may have no episodes or different metrics.
                statistics = means(gather(sums))
        self._restored = None
        minibatches = self._minibatches(round_index)
        denominators = self._denominators(minibatches, shard_spec)
        batches = self._batches(shard_spec)
        for k in range(done, self.per_round):
            self.position = (round_in_epoch * self.per_round + k + 1) % batches
            batch = self._collate(minibatches[k])
            batch["denominators"] = denominators[k // shard_spec.accumulate]
            batch["round"] = round_index
            batch["where"] = [self.where.get(row.group, f"prompt {row.group}") for row in minibatches[k]]
            batch["first"] = k < shard_spec.accumulate
            batch["statistics"] = statistics if k == 0 else None
            yield batch
        self._rows = []

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Context manager for collecting a round.

        Once a rank is asked to stop, `safe_point()`, which the sampler and rewards call, raises `RoundLeft` (a
        `KeyboardInterrupt`) on all ranks.
        """
        interruption = self.interruption
        if interruption is None:
            yield
            return
        try:
            with safe_points(lambda: leave_if(interruption.asked())):
                yield
        except RoundLeft:
            interruption.on_leave()
            raise

    def _minibatches(self, round_index: int) -> list[list[TrainingSample]]:
        """The rows of each mini-batch.

        Each update epoch shuffles the groups, and the rows within each group. The rows of a group stay adjacent, so
        that a forward pass can compute their shared prompt once.
        """
        minibatches = []
        for epoch in range(self.update_epochs):
            generator = torch.Generator().manual_seed(mix_seeds(self.seed, round_index, epoch, 1))
            rows = [self._rows[i] for i in torch.randperm(len(self._rows), generator=generator).tolist()]
            group_order: dict[int, int] = {}
            for row in rows:
                group_order.setdefault(row.group, len(group_order))
            minibatches += split_evenly(sorted(rows, key=lambda row: group_order[row.group]), self.minibatches)
        return minibatches

    def _denominators(self, minibatches: list[list[TrainingSample]], shard_spec: ShardSpec) -> list[Counts]:
        """Denominators of each optimizer step, over all ranks."""
        names = ("tokens", "sequences")
        steps = [minibatches[k : k + shard_spec.accumulate] for k in range(0, len(minibatches), shard_spec.accumulate)]
        local = [total_counts(row.counts() for rows in step for row in rows) for step in steps]
        table = torch.tensor([[count.get(name, 0.0) for name in names] for count in local], dtype=torch.float64)
        total = torch.stack(gather(table)).sum(0)
        return [dict(zip(names, row, strict=True)) for row in total.tolist()]

    def _collate(self, rows: list[TrainingSample]) -> RolloutBatch:
        """Pad rows on the right, and make a tensor `[B, T]` of each of their fields."""
        # A rank without rows computes a dummy row with `loss_mask` 0, so that it takes part in collective operations.
        rows = rows or [TrainingSample([self.pad_id, self.pad_id], [0, 0], [0.0, 0.0])]
        tokens = pad_tokens([row.ids for row in rows], [row.loss_mask for row in rows], self.pad_id)

        def column(values: Callable[[TrainingSample], list[float]]) -> Tensor:
            """A column of the rows, `[B, T]`; 0 where it was not computed."""
            return pad_right([values(row) or [0.0] * len(row.ids) for row in rows], 0.0, torch.float32)

        return {
            "input_ids": tokens["input_ids"],
            "loss_mask": tokens["loss_mask"],
            "lengths": tokens["lengths"],
            "sampling_logprobs": column(lambda row: row.sampling_logprobs),
            "old_logprobs": column(lambda row: row.old_logprobs),
            "advantages": column(lambda row: row.advantages),
            "reference_logprobs": column(lambda row: row.reference_logprobs),
            "values": column(lambda row: row.values),
            "returns": column(lambda row: row.returns),
        }

    def state_dict(self) -> LoaderState:
        """The position, within a round all its rows on every rank, and what was sampled ahead in the epoch.

        All ranks must call this together.
        """
        inside = not self.at_round_start
        rows = [asdict(row) for row in self._rows] if inside else []
        state: LoaderState = {"position": self.position, "rows": gather(rows)}
        if self.stream is not None and self.position:
            state["stream"] = self._streamed.get(-(-self.position // self.per_round))
        if self.producer and self.position:
            first = self._index(self.position // self.per_round + inside, self.shard_spec())
            state["ahead"] = self.producer.state_dict(first)
        return state

    def load_state_dict(self, state: LoaderState) -> None:
        """Restore a `state_dict`.

        Raises:
            ConfigError: If the checkpoint was written within a round by a different number of ranks.
        """
        self.position = self._start = state["position"]
        shard_spec = self.shard_spec()
        inside = not self.at_round_start
        if inside and len(state["rows"]) != shard_spec.world:
            raise ConfigError(
                f"the checkpoint was written within a round and contains the episodes of {len(state['rows'])} ranks, "
                f"but this run has {shard_spec.world}. Resume with the same number of devices, or from a checkpoint at "
                "the end of a round (--ckpt_path), which exists if --checkpoint_every is a multiple of the optimizer "
                "steps per round."
            )
        if "stream" in state:
            self._streamed = {-(-self.position // self.per_round): state["stream"]}
        self._restored = [TrainingSample(**row) for row in state["rows"][shard_spec.rank]] if inside else None
        if self.producer and "ahead" in state:
            self.producer.load_state_dict(state["ahead"], shard_spec.rank, shard_spec.world)
