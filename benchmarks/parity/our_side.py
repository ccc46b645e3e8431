"""Optimizer steps of this project: `Trainer.fit` with its own data module, recorded by a callback."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.parity.setup import Folders, Step, gradients, rows_of
from benchmarks.parity.trl_side import RATE
from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)


class Watch(pl.Callback):
    """Collects, for each optimizer step, the losses and rows of its micro-batches and the gradient."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._losses: list[float] = []
        self._rows: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self._rows += rows_of(batch["input_ids"], batch["loss_mask"], _there(batch))

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        self._losses.append(float(loss))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.steps.append(Step(sum(self._losses), gradients(module.model), sorted(self._rows)))
        self._losses, self._rows = [], []


def _there(batch: dict[str, Any]) -> Any:
    columns = torch.arange(batch["input_ids"].shape[1])
    if "lengths" in batch:
        return columns < batch["lengths"][:, None]
    return (
        columns <= (batch["loss_mask"].ne(0) * columns).amax(1)[:, None]
    )  # a rollout row ends with its last sampled token


def sgd(rate: float = RATE) -> Any:
    """Plain gradient descent, in the form that the modules take."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def fit(module: Any, data: Any, root: Path, steps: int, accumulate: int = 1) -> list[Step]:
    """Record the steps of a fit."""
    watch = Watch()
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[watch],
    ).fit(module, data)
    return watch.steps


def supervised(task: str, folders: Folders, rows: Sequence[Any], root: Path, **options: Any) -> list[Step]:
    """Steps of SFT (`sft`), the reward model (`reward`) and losses of preferences (any other name).

    Args:
        options: `micro` and `steps`; all others are passed to the module.
    """
    micro, steps = options.pop("micro", None) or len(rows), options.pop("steps", 1)
    folder = folders.classifier if task == "reward" else folders.policy
    data_of: Any = SFTDataModule if task == "sft" else PreferenceDataModule
    module: Any = (SFTModule if task == "sft" else PreferenceModule)(folder, optimizer=sgd(), **options)
    data = data_of(list(rows), batch_size=micro, show_example=False)
    return fit(module, data, root, steps, len(rows) // micro)


def recorded(folders: Folders, episodes: list[dict[str, Any]], root: Path, **options: Any) -> list[Step]:
    """Steps of policy RL on one round of recorded episodes.

    Args:
        options: `minibatches` that are accumulated to a step, `steps` (passes over the round) and `rate`; all others
            are passed to the module.
    """
    parts, steps, rate = options.pop("minibatches", 1), options.pop("steps", 2), options.pop("rate", RATE)
    data = PromptDataModule(
        episodes=episodes,
        prompts_per_round=len({row["group"] for row in episodes}),
        update_epochs=steps,
        minibatches=parts,
        show_example=False,
    )
    return fit(PolicyRLModule(folders.policy, optimizer=sgd(rate), **options), data, root, steps, parts)
