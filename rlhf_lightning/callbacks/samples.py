"""Samples of the policy during training: a row per episode in `samples.jsonl`, and tables in console and loggers."""

import sys
from statistics import fmean
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from rlhf_lightning.callbacks.loggers import log_samples
from rlhf_lightning.callbacks.table import SampleRow, choose, plain, rich
from rlhf_lightning.checkpointing.jsonl import JsonLines
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.rollout.statistics import episode_kl
from rlhf_lightning.types import Episode

if TYPE_CHECKING:
    from rlhf_lightning.types import RolloutBatch, StateDict


class SamplesLog(pl.Callback):
    """Appends the episodes of all ranks to `samples.jsonl` in the stage's folder, and prints some of them.

    The loggers of Weights & Biases, MLflow and TensorBoard get a table of the printed rounds, too.

    Within a round, rows are ordered by prompt and sample for any number of ranks. A resumed run continues the file from
    its checkpoint, so that no round is missing or duplicated.

    Args:
        every: Write the episodes of every `every`-th round.
        table_every: Print the best, median and worst episode of every `table_every`-th round; 0 for no tables.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> SamplesLog(every=5, table_every=0).every
        5
    """

    def __init__(self, every: int = 1, table_every: int = 10) -> None:
        if every < 1 or table_every < 0:
            raise ConfigError(
                f"SamplesLog.every is {every} and table_every is {table_every}; every must be at least 1, and "
                "table_every at least 0 (0 for no tables)"
            )
        self.every, self.table_every = every, table_every
        self._file = JsonLines("samples.jsonl")

    def state_dict(self) -> "StateDict":
        return self._file.state

    def load_state_dict(self, state_dict: "StateDict") -> None:
        self._file.load(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._file.start(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: "RolloutBatch", batch_idx: int
    ) -> None:
        if not isinstance(pl_module, PolicyRLModule) or batch.get("statistics") is None:
            return
        rollouts = pl_module.rollouts
        number = trainer.current_epoch * rollouts.rounds + batch_idx // rollouts.per_round
        written = number % self.every == 0
        shown = bool(self.table_every) and number % self.table_every == 0
        if not written and not shown:
            return
        found: list[list[SampleRow]] = gather(
            [_row(episode, trainer.global_step, number) for episode in pl_module.last_episodes]
        )
        # Sorted, so that the order does not depend on the number of ranks.
        rows = sorted((row for part in found for row in part), key=lambda row: (row["group"], row["sample"]))
        if written:
            self._file.append(trainer, rows)
        if shown and rows and trainer.is_global_zero:
            title = f"round {number} (step {trainer.global_step}): {len(rows)} episodes"
            chosen = choose(rows)
            _show(trainer, title, chosen)
            log_samples(trainer.loggers, rows, title, chosen)


def _row(episode: Episode, step: int, number: int) -> SampleRow:
    """The row of an episode. Its advantage is the mean of the advantages of its sampled tokens."""
    rows = [row for row in episode.training_samples if row.actions]
    advantages = [a for row in rows for a, flag in zip(row.advantages, row.loss_mask, strict=True) if flag]
    return {
        "step": step,
        "round": number,
        "group": episode.group,
        "sample": episode.sample_index,
        **episode.record(),
        "advantage": fmean(advantages) if advantages else None,
        "kl": episode_kl(episode) if any(row.reference_logprobs for row in rows) else None,
    }


def _show(trainer: pl.Trainer, title: str, chosen: dict[str, SampleRow]) -> None:
    text = (rich if sys.stdout.isatty() else plain)(title, chosen)
    bar = trainer.progress_bar_callback
    if bar is None:
        print(text, flush=True)
    else:
        bar.print(text)  # above the bar
