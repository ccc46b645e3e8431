"""The same run on one rank and on two logs the same training metrics."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rows import chats, prompts, write_rows
from tests.helpers.runs import complete


def policy(root: Path, devices: int) -> list[str]:
    data = {"prompts_per_round": 2, "group_size": 3, "minibatches": 2}
    reward = {
        "class_path": "rlhf_lightning.rewards.FunctionReward",
        "init_args": {"function": "tests.helpers.modules.length"},
    }
    more = [f"--data.{name}={value}" for name, value in data.items()]
    more += ["--data.train", write_rows(root / "p.jsonl", prompts(5)), "--data.validation", str(root / "p.jsonl")]
    more += ["--model.rewards", json.dumps([reward]), "--model.sampler.max_tokens", "8"]
    return ["policy", *more, "--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "2"]


def sft(root: Path, devices: int) -> list[str]:
    rows = write_rows(root / "c.jsonl", chats(24))
    return ["sft", "--data.train", rows, f"--data.batch_size={8 // devices}", "--trainer.max_epochs", "1"]


@pytest.mark.parametrize("stage", [policy, sft])
def test_two_ranks_log_the_metrics_of_one(stage: Any, base: str, tmp_path: Path) -> None:
    logged = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        root.mkdir()
        kind, *more = stage(root, devices)
        trainer = {
            "accelerator": "cpu",
            "strategy": "ddp_fork" if devices == 2 else "auto",
            "devices": devices,
            "default_root_dir": root / "run",
            "log_every_n_steps": 1,
        }
        args = [kind, "fit", "--model.model", base, *more, *(f"--trainer.{k}={v}" for k, v in trainer.items())]
        complete(args, root / "out.txt")
        with open(root / "run" / "metrics.csv", newline="") as stream:
            logged.append(list(csv.DictReader(stream)))
    assert len(logged[0]) == len(logged[1]) >= 3
    names = [name for name in logged[0][0] if name.startswith("train/")]
    assert "train/loss" in names or "train/nll" in names
    for one, two in zip(*logged, strict=True):
        for name in names:
            assert (not one[name]) == (not two[name]), name
            if one[name]:
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4, abs=1e-4), name
