"""A run resumed at any step of three epochs ends with the weights of an uninterrupted run, also with `max_steps`."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.checkpointing.callbacks import RunCheckpoints
from rlhf_lightning.data.row_streams import Streaming
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.rewards import KeywordReward
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.training import adamw, trainer

pytestmark = pytest.mark.usefixtures("every_comparison")

KINDS = ("sft", "preference", "policy", "streamed", "streamed prompts")
LENGTHS: dict[str, dict[str, Any]] = {
    "steps": {"max_epochs": None, "max_steps": 9},
    "epochs": {"max_epochs": 3},
    "fewer steps": {"max_epochs": 3, "max_steps": 7},
    "fewer epochs": {"max_epochs": 3, "max_steps": 99},
}


def parts(kind: str, base: str) -> tuple[Any, Any]:
    """A module and its data: three batches per epoch (policy: four), with validation if rows are held out."""
    adam = adamw(0.01)
    quiet: dict[str, Any] = {"show_example": False}
    if kind == "sft":
        return SFTModule(base, optimizer=adam), SFTDataModule(chats(6), chats(2), batch_size=2, **quiet)
    if kind == "streamed":  # two sources, of which one starts over, in blocks of two rows
        file, other = (write_rows(Path(base) / name, chats(n)) for name, n in (("a.jsonl", 5), ("b.jsonl", 3)))
        mixture = {"a": {"source": file, "weight": 3}, "b": {"source": other, "weight": 4}}
        ends: dict[str, Any] = {"stopping_strategy": "all_exhausted", "streaming": Streaming(shuffle_buffer=2)}
        return SFTModule(base, optimizer=adam), SFTDataModule(mixture, chats(2), batch_size=4, **ends, **quiet)
    if kind == "preference":
        return PreferenceModule(base, optimizer=adam), PreferenceDataModule(pairs(6), pairs(2), batch_size=2, **quiet)
    policy = PolicyRLModule(
        base, optimizer=adam, rewards=[KeywordReward(["a", "e"], min_words=1)], sampler=Sampler(max_tokens=4)
    )
    rounds: dict[str, Any] = {"prompts_per_round": 2, "group_size": 2, "minibatches": 2}
    if kind == "streamed prompts":
        file = write_rows(Path(base) / "prompts.jsonl", prompts(4))
        return policy, PromptDataModule(file, prompts(2), streaming=Streaming(shuffle_buffer=3), **rounds, **quiet)
    return policy, PromptDataModule(prompts(4), prompts(2), **rounds, **quiet)


class Seen(pl.Callback):
    """Records the rows of each batch, by step, epoch and position in the epoch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((trainer.global_step, trainer.current_epoch, batch_idx, batch["input_ids"].tolist()))


def run(kind: str, base: str, root: Path, saver: Any, checkpoint: Path | None = None, **options: Any) -> Any:
    """The final weights, the number of steps, and the batches seen."""
    pl.seed_everything(3, verbose=False)
    module, data = parts(kind, base)
    seen = Seen()
    one = trainer(root, enable_checkpointing=True, callbacks=[seen, saver], num_sanity_val_steps=0, **options)
    one.fit(module, data, ckpt_path=checkpoint and str(checkpoint))
    return {name: value.clone() for name, value in module.state_dict().items()}, one.global_step, seen.batches


def ours(folder: Path) -> Any:
    return RunCheckpoints(folder, every=1, keep=99, signals=False)


def lightnings(folder: Path) -> Any:
    """Checkpoints as Lightning users save them: after each step, or after each epoch."""
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def check(kind: str, base: str, tmp_path: Path, options: dict[str, Any], saver: Any = ours) -> None:
    folder = tmp_path / "checkpoints"
    weights, steps, batches = run(kind, base, tmp_path / "whole", saver(folder), **options)
    assert steps >= 3
    for step in range(1, steps):
        file = folder / f"step={step}.ckpt"
        again, end, rest = run(kind, base, tmp_path / f"{step}", saver(tmp_path / f"{step}-c"), file, **options)
        assert end == steps
        assert rest == [batch for batch in batches if batch[0] >= step], f"resumed at step {step}"
        assert all(torch.equal(weights[name], again[name]) for name in weights), f"resumed at step {step}"


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_any_step_equals_uninterrupted_run(kind: str, base: str, tmp_path: Path) -> None:
    check(kind, base, tmp_path, {**LENGTHS["steps"], "max_steps": 5, "accumulate_grad_batches": 2})


@pytest.mark.parametrize(
    "kind", ["policy", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "policy")]
)
def test_run_ended_by_max_steps_continues_with_more_steps(kind: str, base: str, tmp_path: Path) -> None:
    """It continues within the second epoch as if it had not stopped there."""
    more, fewer = ({**LENGTHS["steps"], "max_steps": steps} for steps in (7, 5))
    weights, _, batches = run(kind, base, tmp_path / "whole", ours(tmp_path / "all"), **more)
    run(kind, base, tmp_path / "fewer", ours(tmp_path / "some"), **fewer)
    file = tmp_path / "some" / "step=5.ckpt"
    again, end, rest = run(kind, base, tmp_path / "again", ours(tmp_path / "rest"), file, **more)
    assert end == 7
    assert rest == [batch for batch in batches if batch[0] >= 5]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("saver", [ours, lightnings], ids=["ours", "Lightning's"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("length", list(LENGTHS))
@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_each_way_of_ending_the_run(
    kind: str, length: str, accumulate: int, saver: Any, base: str, tmp_path: Path
) -> None:
    check(kind, base, tmp_path, {**LENGTHS[length], "accumulate_grad_batches": accumulate}, saver)


@pytest.mark.slow
@pytest.mark.parametrize("within", [{"limit_train_batches": 2}, {"val_check_interval": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_with_limited_epochs_or_validation_within_them(
    kind: str, within: Any, base: str, tmp_path: Path
) -> None:
    check(kind, base, tmp_path, {**LENGTHS["steps"], "max_steps": 6, **within})
