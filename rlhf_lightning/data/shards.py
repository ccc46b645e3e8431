"""Which rows a rank gets."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from rlhf_lightning.data.batching import ShardSpec


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
