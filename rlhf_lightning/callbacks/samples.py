"""What the policy says as it learns: a row for each episode in `samples.jsonl`, and a table in the console."""

import sys
from statistics import fmean
from typing import Any

import lightning.pytorch as pl

from rlhf_lightning.callbacks.table import choose, plain, rich
from rlhf_lightning.checkpointing.jsonl import JsonLines
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rollout.statistics import episode_kl
from rlhf_lightning.types import Episode


class SamplesLog(pl.Callback):
    """Appends the episodes of rounds, of all ranks, to `samples.jsonl` in the stage's folder, and shows some of them.

    Rows stand in the order of prompt and sample within a round, whatever the number of ranks. A resumed run goes on
    where its checkpoint was written, so that no round is missing or stands there twice.

    Args:
        every: rounds from one that is written to the next.
        table_every: rounds from one whose best, median and worst episode are printed to the next; 0 prints none.
    """

    def __init__(self, every: int = 1, table_every: int = 10) -> None:
        if every < 1 or table_every < 0:
            raise ConfigError(
                f"SamplesLog.every is {every}, table_every {table_every}; at least 1, and at least 0 for no table"
            )
        self.every, self.table_every = every, table_every
        self._file = JsonLines("samples.jsonl")

    def state_dict(self) -> dict[str, Any]:
        return self._file.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._file.load(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._file.start(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, dict) or batch.get("statistics") is None:
            return
        rollouts = pl_module.rollouts
        number = trainer.current_epoch * rollouts.rounds + batch_idx // rollouts.per_round
        written = number % self.every == 0
        shown = bool(self.table_every) and number % self.table_every == 0
        if not written and not shown:
            return
        head = {"step": trainer.global_step, "round": number}
        found = gather([{**head, **_record(episode)} for episode in pl_module.last_episodes])
        # Ranks take prompts in turn: their order must not depend on how many there are.
        rows = sorted((row for part in found for row in part), key=lambda row: (row["group"], row["sample"]))
        if written:
            self._file.append(trainer, rows)
        if shown and rows and trainer.is_global_zero:
            _show(trainer, rows)


def _record(episode: Episode) -> dict[str, Any]:
    """The row of an episode; its advantage is the mean over sampled tokens of what is trained on."""
    rows = [row for row in episode.training_samples if row.actions]
    advantages = [a for row in rows for a, flag in zip(row.advantages, row.loss_mask, strict=True) if flag]
    return {
        "group": episode.group,
        "sample": episode.sample,
        **episode.record(),
        "advantage": fmean(advantages) if advantages else None,
        "kl": episode_kl(episode) if any(row.reference_logprobs for row in rows) else None,
    }


def _show(trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
    title = f"round {rows[0]['round']} (step {rows[0]['step']}): {len(rows)} episodes"
    text = (rich if sys.stdout.isatty() else plain)(title, choose(rows))
    bar = trainer.progress_bar_callback
    if bar is None:
        print(text, flush=True)
    else:
        bar.print(text)  # above the bar, not through it
