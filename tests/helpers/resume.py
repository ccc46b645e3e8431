"""Runs that are interrupted and resumed: their settings, their results, and where a signal hits."""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.pytorch.utilities import rank_zero_only

import rlhf_lightning.cli.stage  # before forking: a run then starts at once
from rlhf_lightning.files import hash_folder
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.modules.sft import SFTModule
from tests.helpers.cli import stage_config, write_yaml
from tests.helpers.rows import chats, pairs, prompts, write_rows
from tests.helpers.runs import fork_stages

assert rlhf_lightning.cli.stage
MODULES = {"sft": SFTModule, "preference": PreferenceModule, "policy": PolicyRLModule}
ROWS = {"sft": chats, "preference": pairs, "policy": prompts}
FILES = ("metrics.csv", "samples.jsonl", "heldout.jsonl", "warnings.jsonl")


class Setting(NamedTuple):
    """A run to interrupt; a pipeline has the three modules, one after another."""

    kind: str
    devices: int = 1
    length: str = "max_epochs"
    accumulate: int = 2
    streamed: bool = False

    def __str__(self) -> str:
        ranks = "1 device" if self.devices == 1 else f"{self.devices} ranks (DDP, gloo)"
        streamed = ", streamed" if self.streamed else ""
        return f"{self.kind}, {ranks}, {self.length} alone, accumulation {self.accumulate}{streamed}"

    @property
    def stages(self) -> list[str]:
        """The trained modules, in order."""
        return list(MODULES) if self.kind == "pipeline" else [self.kind]

    @property
    def flag(self) -> str:
        """The command's flag for the folder of the results."""
        return "--root" if self.kind == "pipeline" else "--trainer.default_root_dir"


LIMIT = 600
"""Seconds that one run may take; on a machine that is left alone it is a tenth of a minute."""
STEPS = {1: 20, 2: 10}
"""The optimizer steps of `max_steps` by accumulation: they end within an epoch, most of them within the third."""


def config(
    kind: str,
    base: str,
    folder: Path,
    devices: int = 1,
    length: str = "max_epochs",
    accumulate: int = 2,
    streamed: bool = False,
) -> list[str]:
    """A config with everything that a kill may hit: micro-batches, validations within epochs, rounds, checkpoints."""
    settings = stage_config(kind, base, folder)
    settings["data"]["validation"] = write_rows(folder / f"{kind}-held.jsonl", ROWS[kind](5))
    settings["data"]["train"] = write_rows(folder / f"{kind}-train.jsonl", ROWS[kind](14))
    run = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0, "val_check_interval": 0.5}
    settings["trainer"] |= {**run, "max_epochs": 3, "enable_progress_bar": False}
    if length == "max_steps":
        del settings["trainer"]["max_epochs"]
        settings["trainer"]["max_steps"] = STEPS[accumulate]

    settings["model"]["lr_scheduler"] = {"class_path": "rlhf_lightning.modules.schedules.Warmup"}
    if kind == "policy":
        settings["data"] |= {"minibatches": 4}
        rule = {"class_path": "rlhf_lightning.rewards.KeywordReward"}
        settings["model"]["rewards"] = [{**rule, "init_args": {"keywords": ["a", "e"], "min_words": 1}}]
        settings["model"]["kl"] = {"coefficient": 0.05}
    else:
        settings["data"]["batch_size"] = 2
    if streamed:
        settings["data"]["streaming"] = {"shuffle_buffer": 3}
        if kind != "policy":  # an epoch has no known length
            settings["trainer"]["val_check_interval"] = 2
            if length == "max_epochs":
                del settings["model"]["lr_scheduler"]
    if devices > 1:
        settings["trainer"] |= {"devices": devices, "strategy": "ddp_fork"}
    return [kind, "fit", "-c", write_yaml(folder / f"{kind}.yaml", settings), "--checkpoint_every", "2"]


def command_of(setting: Setting, base: str, folder: Path) -> list[str]:
    """The command of a setting, without its flag for the folder of the results."""
    if setting.kind != "pipeline":
        return config(setting.kind, base, folder, *setting[1:])
    files = {kind: config(kind, base, folder, *setting[1:])[3] for kind in MODULES}
    often = {"overrides": {"checkpoint_every": 2}}
    stages = [
        {"kind": "sft", "config": files["sft"], **often},
        {"kind": "preference", "config": files["preference"], "start": "sft", **often},
        {"kind": "policy", "config": files["policy"], "start": "sft", "reward": "preference", **often},
    ]
    return ["pipeline", write_yaml(folder / "plan.yaml", {"stages": stages})]


def result(folder: Path) -> dict[str, Any]:
    """The files that must be equal, byte for byte."""
    facts = json.loads((folder / "stage.json").read_text())
    files = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in FILES}
    return {"model": hash_folder(folder / "model"), "steps": facts["steps"], "metrics": facts["metrics"], **files}


def results(setting: Setting, root: Path) -> dict[str, Any]:
    """`result` of all stages of a setting."""
    if setting.kind != "pipeline":
        return result(root)
    found = {kind: result(root / kind) for kind in MODULES}
    return {f"{name} of {kind}": value for kind, values in found.items() for name, value in values.items()}


def places(kind: str) -> dict[str, tuple[Any, str]]:
    """Where a run can be interrupted, by name: the functions that it is in."""
    from lightning.pytorch.callbacks import Callback

    from rlhf_lightning.checkpointing import callbacks as checkpoints
    from rlhf_lightning.checkpointing import io as checkpoint_io
    from rlhf_lightning.checkpointing import metrics_csv
    from rlhf_lightning.generation.local_engine import LocalEngine

    assert Callback
    return {
        "training": (MODULES[kind], "training_step"),
        "validation": (MODULES[kind], "validation_step"),
        "writing a checkpoint": (checkpoint_io._Stream, "write"),
        "a checkpoint's end": (checkpoints.RunCheckpoints, "_save"),
        "logging": (metrics_csv.MetricsCSV, "log_metrics"),
        **({"sampling": (LocalEngine, "generate")} if kind == "policy" else {}),
    }


def at(
    kind: str, place: str, number: int, after: bool, act: Callable[[], Any], rank: int | None = None
) -> Callable[[], None]:
    """For `Run(before=…)`: call `act` before or after the `number`th call of a place, in one rank if that is given."""

    def install() -> None:
        owner, name = places(kind)[place]
        original, calls = getattr(owner, name), Counter[str]()

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls["n"] += 1
            mine = calls["n"] == number and rank in (None, rank_zero_only.rank)
            if mine and not after:
                act()
            value = original(*args, **kwargs)
            if mine and after:
                act()
            return value

        setattr(owner, name, counted)

    return install


def within(setting: Setting, installs: dict[str, Callable[[], None]]) -> Callable[[], None]:
    """For `Run(before=…)`: install something in the process of a stage, by kind; those of a pipeline are forked."""

    def install() -> None:
        if sys.argv[1] in installs:
            installs[sys.argv[1]]()

    return (lambda: fork_stages(pytest.MonkeyPatch(), install)) if setting.kind == "pipeline" else install


def counting(kind: str, folder: Path) -> Callable[[], None]:
    """For `Run(before=…)`: write how often each rank called each place, one file per rank."""

    def install() -> None:
        calls: Counter[str] = Counter()

        def count(place: str, owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def counted(*args: Any, **kwargs: Any) -> Any:
                calls[place] += 1
                (folder / f"{kind}-{rank_zero_only.rank}.json").write_text(json.dumps(calls))
                return original(*args, **kwargs)

            setattr(owner, name, counted)

        for place, (owner, name) in places(kind).items():
            count(place, owner, name)

    return install


def killed() -> None:
    """As with kill -9, together with all processes of the run."""
    os.killpg(0, signal.SIGKILL)
