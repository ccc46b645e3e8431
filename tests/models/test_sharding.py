"""Weights sharded over ranks (FSDP2): training, resume and saved models equal those of one process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.deepspeed_strategy import DeepSpeed
from rlhf_lightning.checkpointing.strategies import FSDP2, _contents
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.diagnostics.invariants import FirstStepInvariants
from rlhf_lightning.environments.base import StepResult
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import FORMAT
from rlhf_lightning.generation.sampler import Sampler
from tests.helpers.environments import PromptEnv
from tests.helpers.modules import data, make, same
from tests.helpers.resume import at, config, result
from tests.helpers.rows import prompts
from tests.helpers.runs import complete, free_port, in_ranks
from tests.helpers.sharding import PLAIN, assert_same_runs, run_command, run_every_command, train
from tests.helpers.training import trainer

pytestmark = pytest.mark.filterwarnings("ignore")


FAST = ("sft", "preference-lora", "in step")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]
)
def test_sharded_training_equals_one_process(name: str, base: str, tmp_path: Path) -> None:
    train(name, base, tmp_path / "one")
    in_ranks(2, lambda: train(name, base, tmp_path / "two", 2, 2), tmp_path / "two")
    assert_same_runs(tmp_path)


class Questions(PromptEnv):
    """An environment with the number of turns that the row has, so that ranks sample unequally often."""

    def step(self, message: dict[str, Any]) -> StepResult:
        self.turn += 1
        words = [{"role": "user", "content": "and one"}]
        return StepResult(len(message["content"]) / 9, self.turn >= self.row["turns"], words)


@pytest.mark.parametrize("gather", [True, False])
def test_ranks_that_sample_unequally_do_not_deadlock(gather: bool, base: str, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "turns": 1 + 2 * (i % 2) + i // 4} for i, row in enumerate(prompts(5))]

    def run() -> None:
        module = make("policy", base, rewards=[], environment=Questions, sampler=Sampler(max_tokens=4, gather=gather))
        source = PromptDataModule(rows, rows[:3], prompts_per_round=4, group_size=2, minibatches=2, seed=1)
        one = trainer(tmp_path, devices=2, strategy=FSDP2(), callbacks=[ExportModel()])
        one.fit(module, source)
        assert one.global_step == 4

    in_ranks(2, run, tmp_path / "out")
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "kind", [pytest.param("sft", marks=pytest.mark.slow), pytest.param("preference", marks=pytest.mark.slow), "policy"]
)
def test_sharded_commands_in_lower_precision(kind: str, base: str, tmp_path: Path) -> None:
    def run() -> None:
        one = trainer(tmp_path, devices=2, strategy=FSDP2(), precision="bf16-mixed", callbacks=[FirstStepInvariants()])
        run_every_command(kind, base, one)
        assert one.global_step == (3 if kind == "policy" else 2)

    in_ranks(2, run, tmp_path / "out")


def test_sharded_head_keeps_its_dtype(base: str, tmp_path: Path) -> None:
    def run() -> None:
        module = make("preference", base, dtype="bfloat16")
        one = trainer(tmp_path, devices=2, strategy=FSDP2(), precision="bf16-true", callbacks=[ExportModel()])
        one.fit(module, data("preference"))
        assert one.global_step == 2

    in_ranks(2, run, tmp_path / "out")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.pop("score.weight").dtype == torch.float32
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.checkpointing.deepspeed_strategy._DEEPSPEED_AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"rlhf-lightning\[deepspeed\]"):
        DeepSpeed(stage=3)


# -- commands ---------------------------------------------------------------------------------------------------------


def command(kind: str, base: str, folder: Path, root: str, **trainer_options: Any) -> list[str]:
    flags = {"devices": 2, "strategy": "fsdp2", "default_root_dir": folder / root, **trainer_options}
    return [*config(kind, base, folder), *(f"--trainer.{name}={value}" for name, value in flags.items())]


@pytest.mark.slow
def test_checkpoints_as_shards_and_as_files_give_the_same_result(base: str, tmp_path: Path) -> None:
    args = command("policy", base, tmp_path, "whole")
    run_command(args, tmp_path / "out")
    shares = tmp_path / "shares.yaml"
    strategy = {
        "class_path": "rlhf_lightning.checkpointing.strategies.FSDP2",
        "init_args": {"save_distributed_checkpoint": True},
    }
    shares.write_text(json.dumps({"trainer": {"strategy": strategy}}))
    folder = tmp_path / "shares"
    args = [*command("policy", base, tmp_path, "shares")[:-2], "-c", str(shares)]
    args = [arg for arg in args if "strategy=" not in arg] + [f"--trainer.default_root_dir={folder}"]
    dies = at("policy", "training", 9, True, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_command(args, tmp_path / "out", dies, code=-signal.SIGKILL)
    saved = sorted((folder / "checkpoints").iterdir())
    assert [(path / "checksums.json").is_file() for path in saved] == [True, True]
    assert [_contents(path)[1] for path in saved] == [FORMAT, FORMAT]
    share = next(saved[-1].glob("*.distcp"))
    share.write_bytes(share.read_bytes()[:-100])
    run_command(args, tmp_path / "out")
    assert "is damaged" in (tmp_path / "out" / "rank0.txt").read_text()
    assert result(folder) == result(tmp_path / "whole")


def killed_once(kind: str, place: str, number: int, after: bool) -> Callable[[], None]:
    return at(kind, place, number, after, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(
    ("kind", "place", "number", "after"),
    [
        ("preference", "validation", 4, True),
        pytest.param("sft", "training", 7, False, marks=pytest.mark.slow),
        pytest.param("policy", "sampling", 3, False, marks=pytest.mark.slow),
        pytest.param("policy", "a checkpoint's end", 2, True, marks=pytest.mark.slow),
    ],
)
def test_sharded_run_that_was_killed_equals_uninterrupted_run(
    kind: str, place: str, number: int, after: bool, base: str, tmp_path: Path
) -> None:
    run_command(command(kind, base, tmp_path, "whole"), tmp_path / "out")
    args = command(kind, base, tmp_path, "killed")
    run_command(args, tmp_path / "out", killed_once(kind, place, number, after), code=-signal.SIGKILL)
    run_command(args, tmp_path / "out")
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_on_two_nodes(strategy: str, base: str, tmp_path: Path) -> None:
    """As in docs/many-gpus.md, the same command runs on each node; here as two process groups on one machine."""
    port = free_port()
    one = [*config("sft", base, tmp_path), "--trainer.default_root_dir", str(tmp_path / "one")]
    complete(one, tmp_path / "one.txt")
    root = ["--trainer.default_root_dir", str(tmp_path / "two"), "--data.batch_size", "1"]
    trainer_flags = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", strategy]
    nodes = []
    for node in range(2):
        launch = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node), "--master_port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "rlhf_lightning"]
        with open(tmp_path / f"node{node}.txt", "w") as output:
            nodes.append(subprocess.Popen([*command, *one[:-2], *root, *trainer_flags], stdout=output, stderr=output))
    codes = [node.wait(200) for node in nodes]
    assert codes == [0, 0], (tmp_path / "node0.txt").read_text() + (tmp_path / "node1.txt").read_text()
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two")]
    same(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "strategy").glob("*.yaml")), ids=str)
def test_strategy_overlays_are_merged_over_a_recipe(path: Path, base: str, tmp_path: Path, capsys: Any) -> None:
    from rlhf_lightning.cli.main import main

    recipe = config("sft", base, tmp_path)
    with pytest.raises(SystemExit) as end:
        main([*recipe, "-c", str(path), "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load(path.read_text())["trainer"]["strategy"]
    found = printed["trainer"]["strategy"]
    assert found == wanted or found["class_path"] == wanted["class_path"]


def test_resume_on_another_number_of_devices(base: str, tmp_path: Path) -> None:
    """From FSDP2 to one process, at the end of a round."""
    args = [*config("policy", base, tmp_path), "--trainer.default_root_dir", str(tmp_path / "run")]
    two = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2"]
    run_command([*args, *two, "--trainer.max_epochs", "1"], tmp_path / "out")
    text = complete([*args, "--trainer.max_epochs", "2"], tmp_path / "one.txt")
    assert "will not be bit-exact" in text
    assert "ranks 2 → 1" in text
    assert json.loads((tmp_path / "run" / "stage.json").read_text())["inexact_resumes"]
