"""User code that would end the program is reported as a failure of that code, with its line."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from rlhf_lightning.cli.user_code import UserFolder
from rlhf_lightning.sys_exit import exit_of_user_code
from tests.helpers.cli import stage_config
from tests.helpers.fuzzing import refused, rlhf
from tests.helpers.rows import prompts, write_rows

CODE = """
import asyncio, sys, torch
import lightning.pytorch as pl
from rlhf_lightning.environments.base import MessageEnv, StepResult
{at_import}

def leave():
    {leave}

def reward(*args, **kwargs):
    leave()

class Env(MessageEnv):
    def __init__(self, row, where="reset"):
        self.row, self.where = row, where

    def reset(self):
        if self.where == "reset":
            leave()
        return [{{"role": "user", "content": "Hello"}}]

    async def step(self, message):
        if self.where == "task":
            async def inner():
                leave()
            await asyncio.gather(inner(), asyncio.sleep(0))
        leave()

class Callback(pl.Callback):
    def on_train_batch_start(self, *args):
        leave()

class Optimizer(torch.optim.SGD):
    def __init__(self, params, lr: float = 0.1):
        leave()
"""
WAYS = ["sys.exit(3)", "exit(0)", "raise SystemExit('enough')", "raise KeyboardInterrupt"]
REWARD = {"class_path": "rlhf_lightning.rewards.FunctionReward", "init_args": {"function": "leaving.reward"}}


@pytest.fixture
def project(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes the user's module, and runs a policy stage with changed settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.meta_path", [one for one in sys.meta_path if not isinstance(one, UserFolder)])

    def run(leave: str, kind: str = "policy", at_import: str = "", **settings: Any) -> str:
        Path("leaving.py").write_text(CODE.format(leave=leave, at_import=at_import))
        sys.modules.pop("leaving", None)
        config = stage_config(kind, base, tmp_path)
        config["model"] |= settings.get("model", {})
        config["trainer"] |= settings.get("trainer", {})
        Path("stage.yaml").write_text(yaml.safe_dump(config))
        return refused(rlhf(kind, "fit", "-c", "stage.yaml", "--trainer.default_root_dir", "run"), "leaving.py:")

    yield run
    sys.modules.pop("leaving", None)


@pytest.mark.parametrize("leave", WAYS)
def test_exit_in_a_reward(project: Any, leave: str) -> None:
    message = project(leave, model={"rewards": [REWARD]})
    assert "the reward reward failed with ProgramExit: " in message
    assert "leaving.py:8 in leave" in message
    assert "prompts.jsonl" in message or "policy.jsonl" in message


@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize("where", ["reset", "step", "task"])
def test_exit_in_an_environment(project: Any, where: str, limit: float | None) -> None:
    settings = {"environment": "leaving.Env", "environment_args": {"where": where}, "limits": {"step_timeout": limit}}
    message = project(WAYS[0], model=settings)
    assert "the environment failed: ProgramExit: sys.exit(3)" in message
    assert "leaving.py:8 in leave" in message


@pytest.mark.parametrize("leave", WAYS)
def test_exit_in_a_callback(project: Any, leave: str) -> None:
    message = project(leave, "sft", trainer={"callbacks": [{"class_path": "leaving.Callback"}]})
    assert "leaving.py:8 in leave) would have ended the program" in message


def test_exit_in_a_constructor_or_an_import(project: Any) -> None:
    message = project(WAYS[0], "sft", model={"optimizer": {"class_path": "leaving.Optimizer"}})
    assert "leaving.py:8 in leave" in message
    message = project("pass", at_import="sys.exit(4)", model={"rewards": [REWARD]})
    assert "sys.exit(4)" in message


def test_exit_in_the_judge_of_a_command(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Any
) -> None:
    Path("leaving.py").write_text(CODE.format(leave=WAYS[0], at_import=""))
    rows = write_rows(tmp_path / "prompts.jsonl", prompts(2))
    result = rlhf("evaluate", base, rows, "--gold", "leaving.reward", "--max_tokens", "4")
    assert "ProgramExit: sys.exit(3)" in refused(result, "leaving.py:8")


@pytest.mark.parametrize(
    ("file", "theirs"),
    [
        ("/usr/lib/python3/dist-packages/lightning/cli.py", False),
        ("/home/user/.local/lib/python3.11/site-packages/lightning/cli.py", False),
        (jsonargparse.__file__, False),
        ("/home/user/project/rewards.py", True),
    ],
)
def test_an_exit_of_a_library_is_one_of_the_command_wherever_it_is_installed(file: str, theirs: bool) -> None:
    with pytest.raises(SystemExit) as caught:
        exec(compile("raise SystemExit(0)", file, "exec"), {})
    assert (exit_of_user_code(caught.value) is not None) == theirs
