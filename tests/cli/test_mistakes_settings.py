"""Mistakes in flags and config files are reported with a suggestion, before any model is loaded."""

import json
import os
import re
from pathlib import Path

import pytest

from rlhf_lightning.cli import suggestions as meant
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.pipeline.plan import read_plan
from rlhf_lightning.run_folder import MARK
from rlhf_lightning.yaml_files import read_mapping
from tests.helpers.cli import write_yaml
from tests.helpers.fuzzing import refused, rlhf
from tests.helpers.rows import chats, write_rows

START = ["--model.model", "./base", "--data.train", "sft.jsonl"]
FLAGS: list[tuple[str, list[str], list[str]]] = [
    # unknown flags, with suggestions
    ("sft", ["--data.batchsize", "3"], ["--data.batchsize is not a flag", "did you mean --data.batch_size?"]),
    ("sft", ["--trainer.max_step", "3"], ["--trainer.max_step is not a flag", "did you mean --trainer.max_steps?"]),
    ("sft", ["--max_steps=3"], ["--max_steps is not a flag", "did you mean --trainer.max_steps?"]),
    ("sft", ["--lr", "1e-4"], ["did you mean --model.optimizer.init_args.lr?"]),
    ("sft", ["--optimizer", "torch.optim.SGD"], ["did you mean --model.optimizer?"]),
    ("sft", ["--trainer.gpus", "1"], ["did you mean --trainer.devices?"]),
    ("policy", ["--data.num_generations", "8"], ["did you mean --data.group_size?"]),
    ("preference", ["--model.beta", "0.1"], ["did you mean --model.scorer.init_args.beta?"]),
    ("sft", ["--nonsense", "1"], ["--nonsense is not a flag; --help lists all flags"]),
    ("sft", ["sft.yaml"], ["pass a config file with -c sft.yaml"]),
    ("sft", ["--fresh", "true"], ["'true' does not belong to a flag"]),
    ("sft", ["--data", "sft.jsonl"], ["--data sft.jsonl", "did you mean --data.train?"]),
    # unknown classes and arguments of classes
    ("sft", ["--model.optimizer", "adamw"], ["model.optimizer: there is no class", "torch.optim.AdamW?"]),
    ("sft", ["--model.lr_scheduler", "cosine"], ["rlhf_lightning.modules.schedules.Warmup with shape cosine"]),
    ("sft", ["--model.lr_scheduler", "CosineAnnealingLR"], ["T_max", "Set model.lr_scheduler.init_args.T_max"]),
    ("sft", ["--trainer.logger", "wandb"], ["Did you mean lightning.pytorch.loggers.WandbLogger?"]),
    (
        "sft",
        ["--trainer.callbacks", "EarlyStopping"],
        ["EarlyStopping needs the argument monitor", "Set trainer.callbacks.init_args.monitor"],
    ),
    ("sft", ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.betas", "0.9"], ["betas: ", "Write a list"]),
    ("sft", ["--model.lora.r", "8"], ["model.lora: rlhf_lightning.LoRA has no argument 'r'", "Did you mean rank?"]),
    (
        "preference",
        ["--model.loss", "DPO"],
        ["for DPO, set model.scorer to ImplicitReward and model.loss to BradleyTerry"],
    ),
    ("preference", ["--model.scorer", "Reward"], ["Did you mean ImplicitReward or RewardHead?"]),
    ("policy", ["--model.kl", "0.1"], ["model.kl is a section of settings", "--model.kl.coefficient"]),
    ("policy", ["--model.kl.coef", "0.1"], ["has no argument 'coef'", "Did you mean coefficient?"]),
    ("policy", ["--model.sampler.max_new_tokens", "9"], ["Did you mean max_tokens?"]),
    ("policy", ["--model.rewards", "KeywordReward"], ["model.rewards: ", "Write a list"]),
    # settings of other kinds of stages
    ("policy", ["--data.max_length", "9"], ["did you mean --data.max_prompt_tokens?"]),
    ("policy", ["--data.batch_size", "9"], ["did you mean --data.prompts_per_round?"]),
    ("policy", ["--data.max_seq_length", "9"], ["did you mean --data.max_prompt_tokens?"]),
    # values that the Trainer would accept, or reject with a traceback
    ("sft", ["--trainer.max_steps", "0"], ["trainer.max_steps is 0: nothing would be trained"]),
    ("sft", ["--trainer.limit_train_batches", "0.0"], ["trainer.limit_train_batches is 0"]),
    ("sft", ["--seed_everything", "-1"], ["--seed_everything is -1", "from 0 to 4294967295"]),
    ("sft", ["--trainer.num_nodes", "2"], ["trainer.num_nodes is 2", "MASTER_ADDR"]),
    ("sft", ["--monitor_mode", "max"], ["give the metric with --monitor"]),
    (
        "sft",
        ["--monitor", "train/nll", "--trainer.enable_checkpointing", "false"],
        ["--monitor train/nll", "trainer.enable_checkpointing is false"],
    ),
    ("sft", ["--ckpt_path", "best"], ["--ckpt_path best: there is no such checkpoint in", "--monitor METRIC"]),
    ("sft", ["--ckpt_path", "last"], ["--ckpt_path last: there is no such checkpoint in"]),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows. It needs no model, because no case gets as far as loading one."""
    for name in [name for name in os.environ if name.startswith(("MASTER_", "SLURM_", "NODE_", "GROUP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "sft.jsonl", chats(2))
    return tmp_path


@pytest.mark.parametrize(("kind", "args", "parts"), FLAGS, ids=[" ".join([k, *a])[:60] for k, a, _ in FLAGS])
def test_mistakes_in_flags(kind: str, args: list[str], parts: list[str], place: Path) -> None:
    message = refused(rlhf(kind, "fit", *START, *args))
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 4, message


MODEL = "model:\n  model: base\n"
CONFIGS: list[tuple[str, str, list[str]]] = [
    (
        "sft",
        f"{MODEL}trainer:\n  max_steps: 1\nmodel:\n  dtype: float32\n",
        ["c.yaml:5: the key model appears twice", "line 1"],
    ),
    (
        "sft",
        f"{MODEL}  dtype: float32\n  dtype: bfloat16\n",
        ["c.yaml:4: the key dtype appears twice, first in line 3"],
    ),
    ("sft", "model: {lora: {rank: 1, rank: 2}}", ["c.yaml:1: the key rank appears twice"]),
    (
        "sft",
        f"{MODEL}  train: x.jsonl\n",
        ["c.yaml:3: model.train is not a setting", "did you mean data.train"],
    ),
    ("sft", f"{MODEL}max_steps: 3\n", ["c.yaml:3: max_steps is not a setting", "did you mean trainer.max_steps?"]),
    ("sft", f"{MODEL}data:\n  group_size: 3\n", ["c.yaml:4: data.group_size", "it is a setting of rlhf policy"]),
    (
        "sft",
        f"{MODEL}trainer:\n  xyzzy: 3\n",
        ["c.yaml:4: trainer.xyzzy", "settings are accelerator, accumulate"],
    ),
    ("sft", "stages: []", ["c.yaml: this is a pipeline file; run it with rlhf pipeline c.yaml"]),
    ("sft", "model:\n\tmodel: base", ["c.yaml: not valid YAML", "spaces, not with tabs"]),
    ("sft", "# nothing\n", ["c.yaml: the file is empty", "configs/"]),
    ("sft", "data: {train: sft.jsonl}", ["model.model is not set", "--model.model"]),
]


@pytest.mark.parametrize(("kind", "text", "parts"), CONFIGS, ids=[text[-40:] for _, text, _ in CONFIGS])
@pytest.mark.parametrize("flag", [["-c", "c.yaml"], ["--config=c.yaml"]], ids=["-c", "="])
def test_mistakes_in_config_files(kind: str, text: str, parts: list[str], flag: list[str], place: Path) -> None:
    (place / "c.yaml").write_text(text)
    message = refused(rlhf(kind, "fit", *flag))
    assert all(part in message for part in parts), message


def test_folder_of_another_kind_of_stage_is_refused(place: Path) -> None:
    (place / "run").mkdir()
    for name in (MARK, "stage.json"):
        (place / "run" / name).write_text("{}")
    root = ["--trainer.default_root_dir", "run"]
    for kind, settings in (("policy", {"group_size": 2}), ("preference", {"kind": None})):
        (place / "run" / "config.yaml").write_text(json.dumps({"data": settings}))
        assert f"run contains a run of rlhf {kind}. Choose another" in refused(rlhf("sft", "fit", *START, *root))
    (place / "run" / "config.yaml").write_text(json.dumps({"data": {"batch_size": 8}}))
    assert "run contains a run of rlhf sft. Choose another" in refused(rlhf("policy", "fit", *START, *root))


def test_config_before_its_command_is_refused(place: Path) -> None:
    (place / "c.yaml").write_text(MODEL)
    message = refused(rlhf("sft", "-c", "c.yaml", "fit"))
    assert "rlhf KIND fit -c FILE" in message


def test_repeated_key_in_a_json_config_is_refused(place: Path) -> None:
    (place / "c.json").write_text('{"model": {"model": "base", "model": "other"}}')
    assert "c.json: the key 'model' appears twice" in refused(rlhf("sft", "fit", "-c", "c.json"))


def test_fresh_does_not_discard_its_own_checkpoint(place: Path) -> None:
    file = place / "runs" / "sft" / "checkpoints" / "step=1.ckpt"
    file.parent.mkdir(parents=True)
    import torch

    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}}, file)
    message = refused(rlhf("sft", "fit", *START, "--fresh", "--ckpt_path", str(file)))
    assert "--fresh discards" in message
    assert file.exists()


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ({"kind": "sft", "overrides": {"trainer.default_root_dir": "x"}}, "set the folder of the run with root"),
        ({"kind": "sft", "overrides": {"seed_everything": 3}}, "the pipeline sets seed_everything; set seed"),
        ({"kind": "sft", "overrides": {"fresh": True}}, "--rerun"),
    ],
)
def test_settings_of_the_pipeline_cannot_be_overridden(stage: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        read_plan({"stages": [stage]})


def test_reward_of_a_pipeline_must_be_a_preference_stage() -> None:
    stages = [{"kind": "sft"}, {"kind": "preference"}, {"kind": "policy", "reward": "sft"}]
    with pytest.raises(
        ConfigError,
        match=r"reward is 'sft', a stage of kind sft, but only .*earlier preference "
        r"stages: preference\)",
    ):
        read_plan({"stages": stages})
    stages[-1]["reward"] = "preference"
    assert read_plan({"stages": stages}).stages[-1].reward == "preference"


def test_repeated_key_in_a_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("stages:\n  - kind: sft\n    kind: preference\n")
    with pytest.raises(ConfigError, match=r"p.yaml:3: the key kind appears twice, first in line 2"):
        read_plan(tmp_path / "p.yaml")
    with pytest.raises(ConfigError, match="seed is -1; it must be a whole number from 0"):
        read_plan({"seed": -1, "stages": [{"kind": "sft"}]})


def test_yaml_merge_keys_are_not_repeated_keys(tmp_path: Path) -> None:
    """`<<` adds the keys of another mapping; the mapping's own keys override them, as intended."""
    text = "base: &base {lr: 1, eps: 2}\none: &one\n  <<: *base\n  lr: 3\n"
    text += "two:\n  <<: [*one, *base]\n  eps: 5\nthree: *one\n"
    (tmp_path / "m.yaml").write_text(text)
    found = read_mapping(tmp_path / "m.yaml")
    assert found["two"] == {"lr": 3, "eps": 5}
    assert found["three"] == {"lr": 3, "eps": 2}


def test_suggestions_for_names_of_other_trainers_exist() -> None:
    """The suggested names exist in one of the stages."""
    from rlhf_lightning.cli.stage import CLASSES

    inside = {"init_args", "optimizer", "sampler", "scorer"}
    known = {name for paths in CLASSES.values() for path in paths for name in meant.arguments(path)}
    known |= set(meant.arguments("rlhf_lightning.modules.base.RLHFModule"))
    known |= set(meant.arguments("rlhf_lightning.data.base.RowDataModule"))
    known |= set(meant.arguments("lightning.pytorch.Trainer")) | {
        "ckpt_path",
        "checkpoint_every",
        "keep",
        "seed_everything",
    }
    known |= set(meant.arguments("rlhf_lightning.generation.sampler.Sampler")) | {"lr", "eps", "weight_decay", "beta"}
    known |= {"rank", "alpha", "dropout", "target", "coefficient"}
    for target in meant.NAMES.values():
        parts = [part for part in target.split(".")[1:] or [target] if part not in inside]
        assert set(parts) <= known, target


@pytest.mark.parametrize(
    ("name", "command"), [("compare", "evaluate"), ("Chat", "chat"), ("genrate", "generate"), ("train", "sft")]
)
def test_unknown_command_gets_a_suggestion(name: str, command: str) -> None:
    result = rlhf(name)
    assert result.code == 2
    assert f"did you mean rlhf {command}?" in result.err


def test_messages_name_the_format_of_a_settings_file(place: Path) -> None:
    write_yaml(place / "stage.yaml", {"model": {"model": "base"}})
    (place / "rows.json").write_text(json.dumps(chats(1)))
    assert "config of a single stage, so run it with rlhf sft fit -c FILE" in refused(rlhf("pipeline", "stage.yaml"))
    assert "rows.json: contains a list; it must contain a mapping of settings" in refused(
        rlhf("sft", "fit", "-c", "rows.json")
    )
