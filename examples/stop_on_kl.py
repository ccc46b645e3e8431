"""`PolicyRLModule` as a base class, and a callback of your own that ends the run when the KL reaches a limit."""

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.kl import KLPenalty
from rlhf_lightning.types import RolloutBatch


class Brief(PolicyRLModule):
    """Policy RL that also logs the length of the longest answer of each round."""

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> dict[str, Tensor]:
        """The usual step, with one more logged value."""
        outputs = super().training_step(batch, batch_idx)
        longest = max(episode.response_tokens for episode in self.last_episodes)
        self.log("train/longest_response", float(longest))
        return outputs


class StopOnKL(pl.Callback):
    """Ends training when the policy is too far from its start.

    Args:
        limit: Largest KL, nats per episode.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Compare the KL of the round, which the module has logged, with the limit."""
        kl = trainer.callback_metrics.get("train/kl")
        if kl is not None and kl > self.limit:
            trainer.should_stop = True


def short(completions: list[str]) -> list[float]:
    """A reward that is easily over-optimized."""
    return [-float(len(text)) for text in completions]


def main(model: str, folder: str = "runs/examples", *, limit: float = 5.0, rate: float = 1e-5) -> pl.Trainer:
    """Train until the limit, or for 20 rounds."""
    module = Brief(
        model,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate),
        rewards=[FunctionReward(short)],
        kl=KLPenalty(coefficient=0.0),  # measured, not penalized
        sampler=Sampler(max_tokens=24),
    )
    trainer = pl.Trainer(
        max_epochs=20,
        callbacks=[StopOnKL(limit)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, PromptDataModule(["Say hello.", "Count to three."], prompts_per_round=2, group_size=4))
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
