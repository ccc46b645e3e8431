"""Training runs in one process, or in several that hold shards of the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.checkpointing.strategies import FSDP2
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.models.sharding import full_tensor, zero3_gathered
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.modules import data, few_vowels, make, policy_settings, same, vowels
from tests.helpers.rows import chats, pairs, prompts
from tests.helpers.runs import in_ranks
from tests.helpers.training import trainer

# Model options, and what the trainer is told beside.
PLAIN: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "sft": ("sft", lambda: {"max_tokens_per_batch": 40}),
    "sft-lora": ("sft", lambda: {"lora": LoRA(rank=2), "gradient_checkpointing": True}),
    "preference": ("preference", lambda: {"max_tokens_per_batch": 40}),
    "preference-lora": ("preference", lambda: {"lora": LoRA(rank=2)}),
    "dpo": ("preference", lambda: {"scorer": ImplicitReward()}),
    "dpo-stored": ("preference", lambda: {"scorer": ImplicitReward(store=True), "lora": LoRA(rank=2)}),
    "policy": ("policy", lambda: {"kl": KLPenalty(0.1), "max_tokens_per_batch": 40}),
    "policy-lora": ("policy", lambda: {"kl": KLPenalty(0.1), "lora": LoRA(rank=2, target=["all"])}),
    "in step": ("policy", lambda: {"kl": KLPenalty(0.1), "sampler": Sampler(max_tokens=6, gather=False)}),
    **{
        name: ("policy", lambda name=name: policy_settings(name))
        for name in ("critic", "shared", "lora", "refresh", "resampled")
    },
}


def run_every_command(kind: str, base: str, one: Trainer, **options: Any) -> None:
    """Validate, fit, validate, test and predict; training changes what is measured."""
    rows = {"sft": chats, "preference": pairs, "policy": prompts}[kind](5)
    module, source = make(kind, base, **options), data(kind)
    source.sources |= {"test": rows, "predict": rows}
    before = one.validate(module, source, verbose=False)
    one.fit(module, source)
    after = one.validate(module, source, verbose=False)
    assert before[0].keys() == after[0].keys() != set()
    assert before != after
    assert one.test(module, source, verbose=False)
    assert one.predict(module, source)


def assert_same_runs(root: Path, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """The runs in the folders `one` and `two` ended with the same weights, and saved the same files.

    Up to the rounding of float32: one process leaves out positions in the last layer, sharded models compute all.
    """
    one, two = (torch.load(root / folder / "weights.pt") for folder in ("one", "two"))
    same(one, two, rtol=rtol, atol=atol)
    files = [next((root / folder / "model").glob("*model.safetensors")) for folder in ("one", "two")]
    same(load_file(files[0]), load_file(files[1]), rtol=rtol, atol=atol)
    assert {path.name for path in files[0].parent.iterdir()} == {path.name for path in files[1].parent.iterdir()}


class Keep(Callback):
    """Writes all final trained weights, on the first rank."""

    def on_fit_end(self, run: Any, module: Any) -> None:
        with zero3_gathered(module):
            state = {name: full_tensor(value.detach()).clone() for name, value in module.state_dict().items()}
        if run.is_global_zero:
            torch.save(state, Path(run.default_root_dir) / "weights.pt")


def train(
    name: str,
    base: str,
    root: Path,
    world: int = 1,
    accumulate: int = 1,
    tensor: int = 1,
    clip: float = 0.5,
    strategy: Any = None,
    dtype: str = "float64",
) -> None:
    kind, options = PLAIN[name]
    torch.manual_seed(0)  # the first weights of adapters and of a reward head
    extra = options()
    if kind == "policy":
        extra.setdefault("rewards", [FunctionReward(few_vowels if name == "resampled" else vowels)])
    module = make(kind, base, dtype=dtype, **extra)
    root.mkdir(parents=True, exist_ok=True)
    run = trainer(
        root,
        devices=world,
        strategy=strategy or (FSDP2(tensor_parallel_size=tensor) if world > 1 else "auto"),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
        max_epochs=2,
        callbacks=[Keep(), ExportModel()],
    )
    minibatches = {"minibatches": accumulate} if kind == "policy" else {}
    run.fit(module, data(kind, 7 if kind == "policy" else 11, 8 * tensor // world // accumulate, **minibatches))


def run_command(args: list[str], folder: Path, before: Callable[[], Any] | None = None, code: int = 0) -> None:
    def both() -> None:
        from rlhf_lightning.cli.main import main

        if before:
            before()
        main(args)

    in_ranks(2, both, folder, code=code)
