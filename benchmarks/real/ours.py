"""Training with this project: whole `Trainer.fit` runs."""

import time
from pathlib import Path
from typing import Any, TypedDict

import lightning.pytorch as pl
import torch

from benchmarks.learning.graph_walk import Curve
from benchmarks.real.plan import ALPHA, RANK, Cell
from benchmarks.real.rows import Rows
from benchmarks.real.scoring import scores
from rlhf_lightning import (
    Critic,
    KLPenalty,
    LoRA,
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead
from rlhf_lightning.rewards import FunctionReward


class Trained(TypedDict, total=False):
    """What a run leaves, besides a folder."""

    seconds: list[float]
    """Seconds of each step."""
    processor_seconds: list[float]
    """Processor time of each step, which other processes on the machine hardly change."""
    peak_gib: float
    """Largest resident memory of the process."""
    curves: dict[str, list[float]]
    """Numbers of each step."""
    held_out: dict[str, float]
    """Of a preference model: accuracy and margin on held-out pairs."""


class Clock:
    """Time and processor time from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """The end of a step, or the start of the first."""
        self.marks.append((time.perf_counter(), time.process_time()))

    def of(self, which: int) -> list[float]:
        """Differences of the marks: 0 for seconds, 1 for processor seconds."""
        return [b[which] - a[which] for a, b in zip(self.marks, self.marks[1:], strict=False)]


def peak_gib() -> float:
    """Largest resident memory of this process so far. Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


class Watch(pl.Callback):
    """Times the steps and records their losses."""

    def __init__(self) -> None:
        self.clock, self.losses = Clock(), list[float]()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.mark()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.clock.mark()


def parts(cell: Cell, rows: Rows) -> tuple[Any, Any]:
    """Module and data of a cell."""
    part = cell.settings
    common: dict[str, Any] = {
        "lora": LoRA(rank=RANK, alpha=ALPHA),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=part.rate, weight_decay=0.0),
    }
    if part.policy_rl:

        def reward(completions: list[str], episodes: list[Any]) -> list[float]:
            return scores(part.task, completions, [episode.row for episode in episodes])

        common |= {
            "rewards": [FunctionReward(reward)],
            "sampler": Sampler(max_tokens=part.max_tokens),
        }
        if part.kind == "grpo":
            kl = KLPenalty(part.beta, place="loss", estimator="k3")
            module = PolicyRLModule.grpo(cell.model, kl=kl, **common)
        else:
            critic = Critic(shared=True)
            module = PolicyRLModule.ppo(cell.model, kl=KLPenalty(part.beta, place="reward"), critic=critic, **common)
        sizes = {"prompts_per_round": part.batch, "group_size": part.group}
        return module, PromptDataModule(rows.train, seed=cell.seed, show_example=False, **sizes)
    options: dict[str, Any] = {"batch_size": part.batch, "seed": cell.seed, "show_example": False}
    if part.kind == "sft":
        return SFTModule(cell.model, **common), SFTDataModule(rows.train, **options)
    scorer = RewardHead() if part.kind == "reward" else ImplicitReward(beta=part.beta)
    data = PreferenceDataModule(rows.train, validation=rows.held_out or None, **options)
    return PreferenceModule(cell.model, scorer=scorer, **common), data


def train(cell: Cell, rows: Rows, folder: Path) -> Trained:
    """Train, and save the model in a folder."""
    pl.seed_everything(cell.seed, verbose=False)
    module, data = parts(cell, rows)
    watch, curve = Watch(), Curve()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=cell.settings.epochs,
        limit_val_batches=0,
        precision=cell.precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.parent,
        num_sanity_val_steps=0,
        callbacks=[watch, *([curve] if cell.settings.policy_rl else [])],
    )
    trainer.fit(module, data)
    found: Trained = {
        "seconds": watch.clock.of(0),
        "processor_seconds": watch.clock.of(1),
        "peak_gib": peak_gib(),
        "curves": {name: curve.of(name) for name in ("reward", "kl", "response_tokens")}
        if cell.settings.policy_rl
        else {"loss": watch.losses},
    }
    if rows.held_out and cell.settings.kind in ("reward", "dpo"):
        trainer.limit_val_batches = 1.0
        (numbers,) = trainer.validate(module, data, verbose=False)
        found["held_out"] = {name: numbers[f"val/{name}"] for name in ("accuracy", "margin")}
    module.save_pretrained(folder)
    return found
