"""Runs commands for the tests, and makes the files that they read."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main as entry
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.runs import complete

KINDS = {
    "sft": "sft",
    "preference": "preference",
    "reward_model": "preference",
    "reward": "preference",
    "dpo": "preference",
    "kto": "preference",
    "model": "preference",
    "policy": "policy",
    "rl": "policy",
    "ppo": "policy",
    "grpo": "policy",
    "gsm8k": "policy",
    "distill": "policy",
}


def mistake(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The output of a command that is refused: exit code 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        entry.main(args)
    out = capsys.readouterr()
    assert stop.value.code == 2, out.err
    assert "Traceback" not in out.err
    return out.err


def rlhf(*args: str, cwd: Path | None = None, code: int = 0) -> str:
    """Run a command as a user would, forked; returns its output."""
    with TemporaryDirectory() as folder:
        return complete(list(args), Path(folder) / "output", code, partial(os.chdir, cwd) if cwd else None)


def rlhf_process(*args: str, cwd: Path | None = None, code: int = 0) -> str:
    """Run a command in its own process, including the seconds that imports take; returns its output."""
    out = subprocess.run(
        [sys.executable, "-m", "rlhf_lightning", *args], capture_output=True, text=True, cwd=cwd, timeout=200
    )
    text = out.stdout + out.stderr
    assert out.returncode == code, text
    return text


def stage_config(kind: str, base: str, tmp_path: Path, **data: Any) -> dict[str, Any]:
    rows = {"sft": chats, "preference": pairs, "policy": prompts}[kind](12)
    train = write_rows(tmp_path / f"{kind}.jsonl", rows)
    model: dict[str, Any] = {"model": base, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}}
    if kind == "policy":
        model["sampler"] = {"max_tokens": 5}
        data = {"prompts_per_round": 4, "group_size": 2, **data}
    else:
        data = {"batch_size": 4, **data}
    run = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False}
    return {"model": model, "data": {"train": train, **data}, "trainer": run}


def write_yaml(path: Path, value: Any) -> str:
    path.write_text(yaml.safe_dump(value))
    return str(path)


def rlhf_in_process(*args: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(list(args))
    assert stop.value.code == code


def three_stages(base: str, folder: Path) -> str:
    """A pipeline file with the three stages."""
    for kind in ("sft", "preference", "policy"):
        write_yaml(folder / f"{kind}.yaml", stage_config(kind, base, folder))
    stages = [
        {"kind": "sft", "config": "sft.yaml"},
        {"kind": "preference", "config": "preference.yaml", "start": "sft"},
        {"kind": "policy", "config": "policy.yaml", "start": "sft", "reward": "preference"},
    ]
    plan = {"name": "three", "root": str(folder / "run"), "stages": stages}
    return write_yaml(folder / "plan.yaml", plan)
