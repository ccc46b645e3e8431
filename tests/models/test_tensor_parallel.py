"""Tensor parallelism: training, resume and saved models equal those of one process."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.callbacks.predictions import PredictionsFile
from rlhf_lightning.checkpointing.strategies import FSDP2
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.diagnostics.invariants import FirstStepInvariants
from rlhf_lightning.environments.base import Limits, StepResult
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.loading import load_for_scoring
from rlhf_lightning.models.lora import LoRA, named_weights
from rlhf_lightning.models.tensor_parallel import layer_styles
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.types import Completion
from tests.helpers.models import build_model
from tests.helpers.modules import data, make, same, vowels
from tests.helpers.resume import at, config, result
from tests.helpers.rows import chats, pairs, prompts
from tests.helpers.runs import in_ranks
from tests.helpers.sharding import PLAIN, Keep, assert_same_runs, run_command, run_every_command, train
from tests.helpers.training import trainer

pytestmark = pytest.mark.filterwarnings("ignore")
FAST = ("preference-lora",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]
)
def test_tensor_parallel_training_equals_one_process(name: str, base: str, tmp_path: Path) -> None:
    train(name, base, tmp_path / "one")
    in_ranks(2, lambda: train(name, base, tmp_path / "two", 2, 2, tensor=2), tmp_path / "two")
    assert_same_runs(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "preference-lora", "dpo-stored", "policy", "in step", "shared"])
def test_training_on_a_two_dimensional_mesh_equals_one_process(name: str, base: str, tmp_path: Path) -> None:
    train(name, base, tmp_path / "one")
    in_ranks(4, lambda: train(name, base, tmp_path / "two", 4, 2, tensor=2), tmp_path / "two", limit=200)
    assert_same_runs(tmp_path)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["sft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("preference", "policy"))])
def test_gradients_have_the_scale_of_one_process(name: str, world: int, base: str, tmp_path: Path) -> None:
    """Clipping would hide a common factor of all gradients."""
    train(name, base, tmp_path / "one", clip=0)
    in_ranks(world, lambda: train(name, base, tmp_path / "two", world, 2, 2, clip=0), tmp_path / "two", limit=200)
    assert_same_runs(tmp_path)


ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}),
    ("mistral", {}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("cohere", {}),
    ("phi3", {}),
    ("qwen3", {"vocab_size": 331, "intermediate_size": 49}),  # sizes that two ranks cannot halve
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "options"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])
def test_plans_of_architectures(architecture: str, options: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    build_model(tokenizer, architecture=architecture, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    train("policy", str(folder), tmp_path / "one")
    in_ranks(2, lambda: train("policy", str(folder), tmp_path / "two", 2, 1, tensor=2), tmp_path / "two")
    assert_same_runs(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "options", "lora", "message"),
    [
        ("bloom", {}, None, "has no tensor-parallel plan for BloomForCausalLM"),
        ("qwen3", {"num_key_value_heads": 1}, None, "1 num_key_value_heads"),
        ("qwen3", {"attention_dropout": 0.1}, None, "dropout"),
        ("qwen3", {}, LoRA(dropout=0.1), "dropout"),
    ],
)
def test_unsupported_models_are_refused(
    architecture: str, options: dict[str, Any], lora: LoRA | None, message: str, tokenizer: Any
) -> None:
    model = build_model(tokenizer, architecture=architecture, **options)
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora.config(model, "CAUSAL_LM"))
    with pytest.raises(ConfigError, match=message):
        layer_styles(model, 2)


def test_experts_are_refused(tokenizer: Any) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    with pytest.raises(ConfigError, match="not supported"):
        layer_styles(transformers.MixtralForCausalLM(config), 2)


@pytest.mark.parametrize("size", [0, 3])
def test_sizes_that_do_not_match_the_devices_are_refused(size: int, base: str, tmp_path: Path) -> None:
    def run() -> None:
        with pytest.raises(ConfigError, match="tensor_parallel_size"):
            trainer(tmp_path, devices=2, strategy=FSDP2(tensor_parallel_size=size)).fit(make("sft", base), data("sft"))

    in_ranks(2, run, tmp_path / "out")


# -- what differs from rank to rank ---------------------------------------------------------------------------------


class Moody:
    """An environment that answers, ends and fails differently in every process."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row

    def reset(self) -> list[dict[str, str]]:
        self.lock = open(os.devnull)  # noqa: SIM115 - what cannot be sent to another process
        return [{"role": "user", "content": f"{self.row['prompt']} {random.random()}"}]

    def step(self, message: dict[str, Any]) -> StepResult:
        if random.random() < 0.3:
            raise RuntimeError("in no mood")
        words = [{"role": "user", "content": f"and {random.random()}"}]
        return StepResult(random.random(), random.random() < 0.5, words)


def noise(completions: list[str]) -> list[float]:
    return [random.random() for _ in completions]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_external_answers_come_from_one_rank(world: int, base: str, tmp_path: Path) -> None:
    """Ranks of a group have the same weights at the end, although rewards and environments differ."""

    def run() -> None:
        random.seed(os.getpid())
        limits = {"on_error": "retry", "retries": 20}
        module = make(
            "policy",
            base,
            rewards=[FunctionReward(noise)],
            environment=Moody,
            limits=Limits(max_turns=4, **limits),
            sampler=Sampler(max_tokens=4),
        )
        source = PromptDataModule(prompts(6), prompts(3), prompts_per_round=4, group_size=2, minibatches=2, seed=1)
        one = trainer(tmp_path, devices=world, strategy=FSDP2(tensor_parallel_size=2), callbacks=[Keep()])
        one.fit(module, source)
        norms = {name: p.to_local() for name, p in module.named_parameters() if "norm" in name}
        torch.save(norms, tmp_path / f"norms{one.global_rank}.pt")

    in_ranks(world, run, tmp_path / "out", limit=200)
    ours = [torch.load(tmp_path / f"norms{rank}.pt") for rank in range(world)]
    for first in range(0, world, 2):
        for name, value in ours[first].items():
            assert torch.equal(value, ours[first + 1][name]), name


class Recorded:
    """An external engine that keeps the weights it receives and answers differently in every process."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def sync(self, named_tensors: Any, version: int) -> None:
        self.weights = {name: value.detach().clone() for name, value in named_tensors}

    def generate(self, asked: Any, params: Any, seeds: Any) -> list[Completion]:
        return [
            Completion([random.randrange(5, 50) for _ in range(1 + i % 3)], [-1.0] * (1 + i % 3))
            for i in range(len(asked))
        ]


@pytest.mark.slow
def test_external_engine_gets_full_weights(base: str, tmp_path: Path) -> None:
    def run(world: int, folder: Path) -> None:
        torch.manual_seed(0)
        engine = Recorded()
        lora = LoRA(rank=2, target=["all"])
        module = make("policy", base, lora=lora, sampler=Sampler(max_tokens=6, engine=engine), dtype="float64")
        random.seed(os.getpid() if world > 1 else 0)
        strategy: Any = FSDP2(tensor_parallel_size=2) if world > 1 else "auto"
        one = trainer(folder, devices=world, strategy=strategy)
        one.fit(module, PromptDataModule(prompts(4), prompts_per_round=4, group_size=2, minibatches=1, seed=1))
        module.sampler.sync(9)
        if world > 1:
            module.save_pretrained(folder / "model")
        torch.save(engine.weights, folder / f"weights{one.global_rank}.pt")

    in_ranks(2, lambda: run(2, tmp_path / "two"), tmp_path / "two")
    zero, one = (torch.load(tmp_path / "two" / f"weights{rank}.pt") for rank in range(2))
    same(zero, one)
    merged = load_for_scoring(str(tmp_path / "two" / "model"), "CAUSAL_LM", "float64")
    same(zero, dict(named_weights(merged)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kind", ["sft", pytest.param("preference", marks=pytest.mark.slow), pytest.param("policy", marks=pytest.mark.slow)]
)
def test_metrics_and_predictions_count_each_row_once(kind: str, base: str, tmp_path: Path) -> None:
    """Metrics of an evaluation, and the rows of `predict`, equal those of one process."""
    rows = {"sft": chats, "preference": pairs, "policy": prompts}[kind](7)

    def run(world: int, folder: Path) -> None:
        torch.manual_seed(0)  # the first weights of a reward head
        extra = {"rewards": [FunctionReward(vowels)]} if kind == "policy" else {}
        module, source = make(kind, base, dtype="float64", **extra), data(kind)
        source.sources |= {"test": rows, "predict": rows}
        strategy: Any = FSDP2(tensor_parallel_size=2) if world > 1 else "auto"
        one = trainer(folder, devices=world, strategy=strategy, callbacks=[PredictionsFile()])
        numbers = one.test(module, source, verbose=False)[0]
        one.predict(module, source)
        if one.is_global_zero:
            (folder / "numbers.json").write_text(json.dumps(numbers))

    (tmp_path / "one").mkdir()
    run(1, tmp_path / "one")
    in_ranks(2, lambda: run(2, tmp_path / "two"), tmp_path / "two")
    one, two = (json.loads((tmp_path / folder / "numbers.json").read_text()) for folder in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-6)
    if kind != "sft":  # which predicts nothing of a row
        lines = [(tmp_path / folder / "predictions.jsonl").read_text().count("\n") for folder in ("one", "two")]
        assert lines == [7, 7]


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shares", [False, True], ids=["file", "shares"])
@pytest.mark.parametrize(("kind", "place", "number"), [("preference", "validation", 4), ("policy", "training", 9)])
def test_tensor_parallel_run_that_was_killed_equals_uninterrupted_run(
    kind: str, place: str, number: int, shares: bool, base: str, tmp_path: Path
) -> None:
    strategy = tmp_path / "strategy.yaml"
    options = {"tensor_parallel_size": 2, "save_distributed_checkpoint": shares}
    chosen = {"class_path": "rlhf_lightning.checkpointing.strategies.FSDP2", "init_args": options}
    strategy.write_text(json.dumps({"trainer": {"strategy": chosen, "devices": 2}}))

    def command(root: str) -> list[str]:
        return [*config(kind, base, tmp_path), "-c", str(strategy), "--trainer.default_root_dir", str(tmp_path / root)]

    run_command(command("whole"), tmp_path / "out")
    dies = at(kind, place, number, True, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_command(command("killed"), tmp_path / "out", dies, code=-signal.SIGKILL)
    run_command(command("killed"), tmp_path / "out")
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "preference", "policy"])
def test_tensor_parallel_commands_in_lower_precision(kind: str, base: str, tmp_path: Path) -> None:
    def run() -> None:
        strategy = FSDP2(tensor_parallel_size=2)
        checks = [FirstStepInvariants(strict=True)]
        one = trainer(tmp_path, devices=2, strategy=strategy, precision="bf16-mixed", callbacks=checks)
        run_every_command(kind, base, one, gradient_checkpointing=True)

    in_ranks(2, run, tmp_path / "out")
