"""Mistakes of newcomers give one message that names the problem and says what to do."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import DataError
from rlhf_lightning.pipeline.plan import Plan, Stage
from rlhf_lightning.pipeline.run import check_data
from tests.helpers.cli import stage_config, write_yaml
from tests.helpers.fuzzing import refused, rlhf
from tests.helpers.models import TEXTS, build_model
from tests.helpers.rows import chats, pairs, write_rows

REWARDS = "rlhf_lightning.rewards"
KEYWORDS = {"class_path": f"{REWARDS}.KeywordReward", "init_args": {"keywords": ["a"]}}
MY_REWARDS = """
CONSTANT = 3
one = lambda completions: [1.0]
needs = lambda completions, answer: [1.0 for _ in completions]
text = lambda completions: ["good" for _ in completions]
"""


def reward(name: str, **arguments: Any) -> list[str]:
    return ["--model.rewards", json.dumps([{"class_path": f"{REWARDS}.{name}", "init_args": arguments}])]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, session_tokenizer: Any) -> Path:
    """A folder with files that are used for the wrong purpose."""
    from rlhf_lightning.quickstart.model import make_tokenizer

    place = tmp_path_factory.mktemp("mistakes")
    build_model(session_tokenizer).save_pretrained(place / "base")
    session_tokenizer.save_pretrained(place / "base")
    shutil.copytree(place / "base", place / "no-template")
    (place / "no-template" / "chat_template.jinja").unlink()
    shutil.copytree(place / "base", place / "run" / "model")
    other = make_tokenizer(TEXTS)
    other.add_tokens([f"<extra{i}>" for i in range(900)])
    other.save_pretrained(place / "other-tokenizer")
    session_tokenizer.save_pretrained(place / "adapter")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere/base", "r": 2, "target_modules": ["q_proj"]}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps({**adapter, "task_type": "CAUSAL_LM"}))
    write_rows(place / "pairs.jsonl", pairs(4))
    write_rows(place / "chats.jsonl", chats(4))
    write_rows(place / "labels.jsonl", [{"prompt": "a", "response": "b", "label": 1}] * 2)
    write_rows(place / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    write_rows(place / "texts.jsonl", [{"messages": "Hello"}])
    (place / "empty.jsonl").write_text("")
    (place / "rows.csv").write_text("prompt,completion\na,b, c\n")
    (place / "list.jsonl").write_text(json.dumps(["a", "b"], indent=1))
    (place / "broken.jinja").write_text("{% for message in messages %}")
    (place / "half.ckpt").write_bytes(b"half")
    torch.save({"weight": torch.ones(2)}, place / "weights.ckpt")
    (place / "broken.yaml").write_text("model: [\n")
    (place / "newcomers_rewards.py").write_text(MY_REWARDS)
    return place


MISTAKES: list[tuple[str, list[str], list[str]]] = [
    # data
    ("sft", ["--data.train", "missing.jsonl"], ["missing.jsonl: no such file", "give a path"]),
    ("sft", ["--data.train", "empty.jsonl"], ["empty.jsonl: there are no rows", "at least one row"]),
    (
        "sft",
        ["--data.train", "."],
        ["the files in this folder are not parts of one dataset (", "give a file, or a pattern"],
    ),
    ("sft", ["--data.train", "rows.csv"], ["rows.csv:2: 3 cells, but the header (line 1) has 2 cells"]),
    ("sft", ["--data.train", "list.jsonl"], ["list.jsonl[0]: the row is a str", "it must be an object"]),
    (
        "sft",
        ["--data.train", "pairs.jsonl"],
        ["pairs.jsonl:1: the row has no conversation", "'chosen'", "it needs messages"],
    ),
    ("sft", ["--data.train", "texts.jsonl"], ["texts.jsonl:1: there is no assistant turn to train on"]),
    ("sft", ["--data.columns", "{messages: dialog}"], ["the row has no column 'dialog'", "its columns are 'messages'"]),
    ("sft", ["--data.train_on", "nothing"], ["data.train_on is 'nothing'; it must be one of last_assistant"]),
    ("sft", ["--data.max_length", "3"], ["sft.jsonl:1", "the prompt alone exceeds data.max_length 3"]),
    ("sft", ["--data.batch_size", "0"], ["data.batch_size is 0; it must be at least 1"]),
    ("sft", ["--data.validation_split", "50"], ["data.validation_split is 50.0, which leaves none of the 12 rows"]),
    (
        "preference",
        ["--data.train", "chats.jsonl"],
        ["chats.jsonl:1: the row has no 'chosen'", "columns: {chosen: your_name}"],
    ),
    ("preference", ["--data.train", "labels.jsonl"], ["labels.jsonl:1", "set model.loss to a loss for labels"]),
    ("preference", ["--data.train", "same.jsonl"], ["same.jsonl:1: chosen equals rejected"]),
    (
        "policy",
        ["--data.max_prompt_tokens", "2"],
        ["policy.jsonl:1", "exceed data.max_prompt_tokens 2; raise it"],
    ),
    # keys, types, classes
    ("sft", ["--data.trian", "x"], ["--data.trian"]),
    ("sft", ["--model.learning_rate", "1"], ["--model.learning_rate"]),
    ("sft", ["--trainer.max_epochs", "many"], ["trainer.max_epochs: expected int, got many"]),
    ("sft", ["--model.optimizer.init_args.lr", "1e-5x"], ["lr: expected float, got 1e-5x"]),
    ("sft", ["--model.optimizer.init_args.lr", "-1"], ["model.optimizer", "Invalid learning rate: -1.0"]),
    (
        "sft",
        ["--model.optimizer", "torch.optim.Adamm"],
        ["model.optimizer: module 'torch.optim' has no attribute 'Adamm'"],
    ),
    ("sft", ["--trainer.precision", "fp16"], ["trainer.precision: expected ", "'16-mixed'", ", got fp16"]),
    ("sft", ["--trainer.gradient_clip_val", "-1"], ["trainer.gradient_clip_val is -1", "it must be at least 0"]),
    ("preference", ["--trainer.accumulate_grad_batches", "-2"], ["accumulate_grad_batches is -2", "at least 1"]),
    ("sft", ["-c", "broken.yaml"], ["broken.yaml: not valid YAML"]),
    ("sft", ["-c", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    (
        "preference",
        ["--model.loss", "DPO"],
        ["model.loss: there is no class or function DPO", "Write a class or function with its module"],
    ),
    (
        "preference",
        ["--model.loss", "BradleyTerry", "--model.loss.label_smoothing", "0.7"],
        ["label_smoothing is 0.7"],
    ),
    ("preference", ["--model.loss", "KTO"], ["KTO", "RewardHead", "Use ImplicitReward"]),
    (
        "preference",
        ["--model.scorer", "ImplicitReward", "--model.scorer.beta", "-1"],
        ["beta is -1"],
    ),
    ("preference", ["--model.freeze_backbone", "true", "--model.lora.rank", "2"], ["freeze_backbone"]),
    # models, tokenizers, templates
    ("sft", ["--model.model", "./nowhere"], ["model './nowhere': no such folder (seen from"]),
    ("sft", ["--model.model", "./run"], ["neither config.json nor adapter_config.json; did you mean run/model?"]),
    ("sft", ["--model.model", "weights.ckpt"], ["'weights.ckpt': this is a Lightning checkpoint", "model folder"]),
    (
        "sft",
        ["--model.model", "./adapter"],
        ["the base of the adapter adapter cannot be used", "'/nowhere/base': no such folder"],
    ),
    ("sft", ["--model.model", "no-template"], ["no-template has no chat template", "model.chat_template: FILE.jinja"]),
    ("sft", ["--model.chat_template", "missing.jinja"], ["missing.jinja", "neither a file nor a template"]),
    ("sft", ["--model.chat_template", "broken.jinja"], ["the chat template is not valid Jinja", "model.chat_template"]),
    (
        "sft",
        ["--model.tokenizer", "./other-tokenizer"],
        ["tokens, but the model has 312 embeddings", "do not match", "own tokenizer"],
    ),
    ("sft", ["--data.tokenizer", "./nowhere"], ["tokenizer './nowhere': no such folder"]),
    ("sft", ["--model.dtype", "float99"], ["model.dtype is 'float99'; it must be a dtype, for example float32"]),
    ("sft", ["--model.lora.target", "[wings]"], ["lora.target 'wings' matches no layer; use attention, mlp"]),
    # the machine, the run
    ("sft", ["--trainer.accelerator", "cuda"], ["CUDA", "accelerator"]),
    ("sft", ["--trainer.devices", "0"], ["devices='0'", "cpu accelerator"]),
    ("sft", ["--trainer.strategy", "fsdpp"], ["strategy='fsdpp'", "Example choices: auto, ddp"]),
    ("sft", ["--trainer.default_root_dir", "/proc/nothing"], ["/proc/nothing: cannot be created"]),
    ("sft", ["--trainer.max_time", "soon"], ["'soon'", "DD:HH:MM:SS"]),
    (
        "sft",
        ["--trainer.max_time", "00:00:00:00"],
        ["ended before its first optimizer step", "copy of the start model"],
    ),
    ("sft", ["--ckpt_path", "missing.ckpt"], ["--ckpt_path missing.ckpt: no such checkpoint (seen from"]),
    ("sft", ["--ckpt_path", "half.ckpt"], ["--ckpt_path half.ckpt: damaged, or not a checkpoint"]),
    ("sft", ["--ckpt_path", "weights.ckpt"], ["weights.ckpt: not a checkpoint", "runs/NAME/checkpoints"]),
    ("sft", ["--ckpt_path", "base"], ["--ckpt_path base: this folder", "set model.model"]),
    ("sft", ["--export", "best"], ["needs a metric to compare checkpoints"]),
    ("sft", ["--monitor", "val/nll"], ["--monitor val/nll", "set data.validation"]),
    # names of earlier versions
    (
        "policy",
        ["--model.rewards", "[rlhf_lightning.rollout.rewards.LengthReward]"],
        ["mean rlhf_lightning.rewards.length.Le"],
    ),
    (
        "policy",
        ["--model.sampler.engine", "rlhf_lightning.rollout.vllm.VLLMEngine"],
        ["Did you mean rlhf_lightning.generation.vllm_engine.VLLMEngine?"],
    ),
    (
        "policy",
        ["--model.environment", "rlhf_lightning.rollout.tools.ToolEnv"],
        ["Did you mean rlhf_lightning.environments.tools.ToolEnv?"],
    ),
    ("policy", ["--model.objective", "rlhf_lightning.objectives.policy.GRPO"], ["set --model.recipe grpo"]),
    ("sft", ["--model.lr_scheduler", "rlhf_lightning.schedules.Warmup"], ["Did you mean rlhf_lightning.modules.sched"]),
    # policy RL
    ("policy", ["--model.rewards", "null"], ["there is no reward"]),
    ("policy", reward("ModelReward", model="./base"), ["./base is not a preference model", "random scores"]),
    ("policy", reward("ModelReward", model="runs/preference/model"), ["'runs/preference/model': no such folder"]),
    ("policy", reward("FunctionReward", function="newcomers_rewards"), ["newcomers_rewards", "with its module"]),
    ("policy", reward("FunctionReward", function="newcomers_rewards.two"), ["newcomers_rewards", "no attribute 'two'"]),
    ("policy", reward("FunctionReward", function="newcomers_rewards.one"), ["returned 1 numbers for 8 episodes"]),
    (
        "policy",
        reward("FunctionReward", function="newcomers_rewards.needs"),
        ["requires the argument 'answer', which is not a column of the data; available are"],
    ),
    ("policy", reward("FunctionReward", function="newcomers_rewards.text"), ["returned 'good' for", "a finite number"]),
    ("policy", ["--model.rewards", "newcomers_rewards.one"], ["model.rewards: expected list, got"]),
    ("policy", ["--model.environment", "nowhere.Env"], ["cannot be imported: No module named 'nowhere'"]),
    ("policy", ["--model.advantage", "GAE"], ["GAE needs the values of a critic. Set model.critic"]),
    (
        "policy",
        ["--model.critic.learning_rate", "1"],
        ["GroupCentered does not use values. Set model.advantage to GAE"],
    ),
    ("policy", ["--model.kl.coefficient", "-1"], ["kl.coefficient is -1.0; it must be finite and not negative"]),
    ("policy", ["--data.group_size", "1"], ["group_size is 1"]),
    ("policy", ["--data.minibatches", "99"], ["data.minibatches is 99, but a round has only 8 episodes"]),
    (
        "policy",
        ["--trainer.accumulate_grad_batches", "3"],
        ["a multiple of trainer.accumulate_grad_batches (3)"],
    ),
    ("policy", ["--model.sampler.temperature", "-1"], ["temperature is -1"]),
    ("policy", ["--model.sampler.max_tokens", "999"], ["exceeds the model's 256 positions"]),
    (
        "policy",
        ["--model.sampler.max_length", "99"],
        ["model.sampler: rlhf_lightning.Sampler has no argument 'max_length'"],
    ),
]


@pytest.mark.parametrize(
    ("kind", "args", "parts"), MISTAKES, ids=[" ".join([kind, *args])[:60] for kind, args, _ in MISTAKES]
)
def test_mistakes(
    kind: str, args: list[str], parts: list[str], workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    settings = stage_config(kind, str(workplace / "base"), workplace)
    if kind == "policy":
        settings["model"]["rewards"] = [KEYWORDS]
    settings["trainer"] |= {"max_steps": 1, "enable_progress_bar": False, "default_root_dir": str(tmp_path / "run")}
    config = write_yaml(tmp_path / "c.yaml", settings)
    message = refused(rlhf(kind, "fit", "-c", config, *args))
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) <= 8, message


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "usage: rlhf COMMAND"),
        (["sfft"], "unknown command 'sfft'; commands are sft, preference"),
        (["sft"], 'expected "subcommand" to be one of {fit,validate,test,predict}'),
        (["sft", "train"], "choose from 'fit', 'validate'"),
        (["pipeline", "missing.yaml"], "missing.yaml: no such file"),
        (["pipeline", "chats.yaml"], "pipeline: stages is missing; this is the config of a single stage"),
        (["score", "base", "pairs.jsonl"], "base is not a preference model"),
        (["generate", "base"], "give either a file of prompts, or --prompt TEXT"),
        (["generate", "./nowhere", "--prompt", "a"], "model './nowhere': no such folder"),
        (["export", "base", "run"], "run: the folder is not empty; choose one that is empty"),
        (["report", "base"], "base: contains no run"),
        (["data", "check", "chats.jsonl"], "required: --kind, --model"),
        (["score", "base", "pairs.jsonl", "--output", "run"], "--output run: this is a folder; give a file in it"),
        (["score", "base", "pairs.jsonl", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (
            ["evaluate", "base", "pairs.jsonl", "--output", "/proc/x"],
            "--output /proc/x: /proc is not a writable folder",
        ),
        (["evaluate", "base", "pairs.jsonl", "--device", "cuda:99"], "--device cuda:99: "),
        (["generate", "base", "--prompt", "a", "--device", "gpu"], "--device gpu: unknown device; use cpu, cuda"),
        (
            ["generate", "base", "--prompt", "a", "--dtype", "fp16"],
            "--dtype is 'fp16'; it must be one of float32, bfloat16",
        ),
        (["generate", "base", "--promt", "a"], "did you mean --prompt?"),
        (["chat", "base", "--max_tokens", "0"], "--max_tokens is 0; it must be at least 1"),
        (["report", "base", "--output", "run"], "--output run: this is a folder"),
        (["init", "pairs.jsonl"], "pairs.jsonl: this is a file; give a folder"),
        (["init", "new", "--model", "./nowhere"], "--model ./nowhere: no such folder (seen from"),
        (["init", "new", "--model", "pairs.jsonl"], "--model pairs.jsonl: this is a file; give a folder"),
    ],
)
def test_wrong_commands(args: list[str], part: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    write_yaml(workplace / "chats.yaml", {"model": {}})
    result = rlhf(*args)
    assert result.code == 2
    assert part in result.err + result.out
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ({"model.sampler.max_tokenz": 8}, "pipeline: stage policy: model.sampler: "),
        ({"nothing": None}, "pipeline: stage policy: nothing is not a setting of rlhf policy; settings are"),
        ({"modle": {}}, "pipeline: stage policy: modle is not a setting of rlhf policy; did you mean model?"),
        ({"model.smapler": {}}, "pipeline: stage policy: model.smapler is not a setting of rlhf policy; did you mean"),
        ({"data.train": "nowhere.jsonl"}, "pipeline: stage policy: nowhere.jsonl: no such file"),
        (
            {"monitor": "val/loss"},
            "pipeline: stage policy: --monitor val/loss is a validation metric, but there are no validation rows",
        ),
    ],
)
def test_mistake_in_the_last_stage_is_reported_before_the_first_runs(
    override: dict[str, Any], part: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    for kind in ("sft", "policy"):
        write_yaml(tmp_path / f"{kind}.yaml", stage_config(kind, "base", workplace))
    stages = [{"kind": "sft", "config": "sft.yaml"}, {"kind": "policy", "config": "policy.yaml", "start": "sft"}]
    stages[1] |= {"overrides": {"model.rewards": [KEYWORDS], **override}}
    plan = write_yaml(tmp_path / "plan.yaml", {"stages": stages})
    message = refused(rlhf("pipeline", plan, "--root", str(tmp_path / "run")))
    assert part in message, message
    assert not (tmp_path / "run").exists()


def test_class_in_the_current_folder_is_found_before_the_first_stage(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    code = "from rlhf_lightning.rewards import KeywordReward\n\n\nclass Mine(KeywordReward):\n    pass\n"
    (tmp_path / "rewards_of_a_pipeline.py").write_text(code)
    settings = stage_config("policy", str(workplace / "base"), workplace)
    mine = {"class_path": "rewards_of_a_pipeline.Mine", "init_args": {"keywords": ["a"]}}
    settings["model"]["rewards"], settings["data"]["train"] = [mine], "nowhere.jsonl"
    write_yaml(tmp_path / "policy.yaml", settings)
    plan = write_yaml(tmp_path / "plan.yaml", {"stages": [{"kind": "policy", "config": "policy.yaml"}]})
    message = refused(rlhf("pipeline", plan, "--root", str(tmp_path / "run")))
    assert "nowhere.jsonl: no such file" in message, message


def test_data_written_by_an_earlier_stage_may_be_missing(workplace: Path, tmp_path: Path) -> None:
    settings = {"data": {"train": str(tmp_path / "run" / "sft" / "samples.jsonl")}}
    plan = Plan("test", [Stage("policy", "policy", settings)], tmp_path / "run")
    check_data(plan, plan.stages[0])
    with pytest.raises(DataError, match="no such file"):
        check_data(replace(plan, root=tmp_path / "other"), plan.stages[0])


def test_checkpoint_of_another_kind_of_stage_is_refused(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    run: Callable[..., Any] = lambda kind, *args: rlhf(  # noqa: E731
        kind, "fit", "-c", write_yaml(tmp_path / f"{kind}.yaml", stage_config(kind, "base", workplace)), *args
    )
    one = run("sft", "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path / "sft"))
    assert one.code == 0, one.err
    saved = tmp_path / "sft" / "checkpoints" / "step=1.ckpt"
    result = run("preference", "--ckpt_path", str(saved), "--trainer.default_root_dir", str(tmp_path / "other"))
    message = refused(result, "the checkpoint does not match this stage and its settings")
    assert "Start a new stage from a model folder" in message
