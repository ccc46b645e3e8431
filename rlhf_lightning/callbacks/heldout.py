"""Answers to the same held-out prompts before and after training, in `heldout.jsonl`."""

from typing import TYPE_CHECKING, Required

import lightning.pytorch as pl
import torch

from rlhf_lightning.checkpointing.jsonl import JsonLines
from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.shards import data_ranks
from rlhf_lightning.distributed import gather
from rlhf_lightning.errors import check_whole
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.trainer_state import row_data_of
from rlhf_lightning.types import EpisodeRecord

if TYPE_CHECKING:
    from rlhf_lightning.types import StateDict


class HeldOutRow(EpisodeRecord, total=False):
    """A row of `heldout.jsonl`."""

    step: Required[int]
    """Optimizer steps before the answer."""
    group: Required[int]
    """Position of the prompt in the validation data."""


class HeldOutAnswers(pl.Callback):
    """Answers the first validation prompts greedily at the start and at the end of training, and rewards the answers.

    Both are written to `heldout.jsonl` in the stage's folder, ordered by prompt for any number of ranks, and the report
    shows them side by side. A resumed run keeps the answers from the start. Without validation prompts, nothing is
    written.

    Args:
        prompts: Number of prompts; 0 for none.

    Raises:
        ConfigError: If `prompts` is out of range.

    Example:
        >>> HeldOutAnswers(prompts=16).prompts
        16
    """

    def __init__(self, prompts: int = 8) -> None:
        check_whole("HeldOutAnswers.prompts", prompts, 0)
        self.prompts = prompts
        self._file = JsonLines("heldout.jsonl")

    def state_dict(self) -> "StateDict":
        return self._file.state

    def load_state_dict(self, state_dict: "StateDict") -> None:
        self._file.load(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._file.start(trainer)
        if not self._file.written:
            self._answer(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._answer(trainer, pl_module)

    def _answer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = row_data_of(trainer)
        if data is None or "validation" not in data.prepared or not isinstance(pl_module, PolicyRLModule):
            return
        prompts = [row for row in data.prepared["validation"].rows[: self.prompts] if isinstance(row, Prompt)]
        if not prompts or not pl_module.rewarded:
            return
        rank, world = data_ranks(trainer)
        with torch.no_grad():
            episodes = pl_module.answer_greedily(prompts[rank::world])
        own: list[HeldOutRow] = [
            {"step": trainer.global_step, "group": episode.group, **episode.record()} for episode in episodes
        ]
        rows = sorted((row for part in gather(own) for row in part), key=lambda row: row["group"])
        self._file.append(trainer, rows)
