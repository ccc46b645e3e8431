"""Prompts of policy RL that are streamed round by round."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from rlhf_lightning.data.batching import Example, mix_seeds
from rlhf_lightning.data.mixing import epoch_sources
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.row_streams import Reader, RowStream, StreamState
from rlhf_lightning.data.training_stream import TrainingStream
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import UserError


class StreamedRound(NamedTuple):
    """A rank's prompts of a round.

    Attributes:
        prompts: The prompts; rows that are skipped are missing.
        where: File and line of each prompt, by its index.
        state: Where the stream is after the round, equal on all ranks.
    """

    prompts: list[Prompt]
    where: dict[int, str]
    state: StreamState | None


class StreamedPrompts:
    """The prompts of an epoch. Every rank reads all rows, and parses and renders only its own.

    The rollout dataloader needs a length, so the rows of compressed files are counted when this is created.

    Args:
        stream: The rows.

    Raises:
        ConfigError: If the number of rows of a source is unknown.

    Example:
        ```python
        prompts = StreamedPrompts(data.stream)
        for found in prompts.rounds(epoch=0, shuffle=True, per_round=16, rank=Reader(0, 1), state=None, first=0):
            print(len(found.prompts))
        ```
    """

    def __init__(self, stream: TrainingStream[Example]) -> None:
        self.stream = stream
        self._sizes = [source.counted() for source in stream.sources]
        self._length = len(self._epoch())

    def __len__(self) -> int:
        return self._length

    def _epoch(self) -> list[int]:
        """The source of each row of an epoch."""
        return epoch_sources(self._sizes, self.stream.mixture)

    def drawn(self, epochs: int, per_epoch: int, rows: int) -> list[int]:
        """See `MixedOrder.drawn`."""
        order = self._epoch()
        whole, part = Counter(order[:per_epoch]), Counter(order[:rows])
        return [epochs * whole[source] + part[source] for source in range(len(self._sizes))]

    def rounds(
        self, epoch: int, shuffle: bool, per_round: int, rank: Reader, state: StreamState | None, first: int
    ) -> Iterator[StreamedRound]:
        """The rounds of an epoch, from round `first` on.

        Args:
            epoch: The epoch.
            shuffle: True to shuffle the rows.
            per_round: Number of rows of a round.
            rank: The rank.
            state: Where the stream is before round `first`.
            first: Index of the first round.

        Raises:
            DataError: On all ranks, if a row is bad.
        """
        stream = self.stream
        seed = mix_seeds(stream.rows.seed, epoch) if shuffle else None
        rows = RowStream(stream.sources, stream.mixture, stream.streaming, seed, Reader(), state)
        items = iter(rows)
        for number in range(first, -(-len(self) // per_round)):
            raw = [row for _, row in islice(items, per_round)]
            prompts: list[Prompt] = []
            error: UserError | None = None
            for offset in range(rank.index, len(raw), rank.count):
                try:
                    examples, _ = stream.examples(stream.row(raw[offset]))
                except UserError as found:
                    error = found
                    break
                for prompt in examples:
                    assert isinstance(prompt, Prompt)
                    prompt.index = number * per_round + offset
                    prompts.append(prompt)
            if wrong := next((found for found in gather(error) if found), None):
                raise error or wrong
            yield StreamedRound(prompts, {prompt.index: prompt.where for prompt in prompts}, rows.state())
