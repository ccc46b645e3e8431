"""The three modules and their data with plain settings, and comparisons of weights."""

from pathlib import Path
from typing import Any

import torch

from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.objectives.policy import ClippedSurrogate, ImportanceWeights
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GAE, GlobalWhitened
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.rows import chats, pairs, prompts
from tests.helpers.training import sgd, trainer


def vowels(completions: list[str]) -> list[float]:
    """A reward that differs between random texts."""
    return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]


def length(completions: list[str]) -> list[float]:
    """A reward of long texts."""
    return [float(len(text)) for text in completions]


def make(kind: str, base: Any, tokenizer: Any = None, **options: Any) -> Any:
    """A module of a kind with plain settings."""
    options.setdefault("optimizer", sgd(0.1))
    if kind == "sft":
        return SFTModule(base, tokenizer=tokenizer, **options)
    if kind == "preference":
        return PreferenceModule(base, tokenizer=tokenizer, **options)
    options.setdefault("rewards", [FunctionReward(vowels)])
    options.setdefault("sampler", Sampler(max_tokens=6))
    return PolicyRLModule(base, tokenizer=tokenizer, **options)


def data(kind: str, size: int = 12, batch: int = 4, **options: Any) -> Any:
    """The data of a kind; for the policy, `batch` is the number of mini-batches per round."""
    if kind == "sft":
        return SFTDataModule(chats(size), chats(5), batch_size=batch, seed=1, **options)
    if kind == "preference":
        return PreferenceDataModule(pairs(size), pairs(5), batch_size=batch, seed=1, **options)
    options = {"prompts_per_round": 4, "group_size": 2, "minibatches": 12 // batch // 3 or 1, **options}
    return PromptDataModule(prompts(size), prompts(3), seed=1, **options)


def reward_model(base: str, root: Path, rows: int) -> str:
    """The folder of a small reward model that was trained on some pairs."""
    torch.manual_seed(0)
    source = PreferenceDataModule(pairs(rows), batch_size=4, show_example=False)
    trainer(root, callbacks=[ExportModel()]).fit(make("preference", base), source)
    return str(root / "model")


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


Options = dict[str, Any]


def policy_settings(name: str) -> Options:
    """New arguments of PolicyRLModule, since some of them keep state."""
    adaptive = KLPenalty(0.3, "reward", target=0.01, horizon=8)
    found: dict[str, Options] = {
        "critic": {
            "critic": Critic(learning_rate=0.3),
            "advantage": GAE(),
            "objective": ClippedSurrogate(),
            "kl": adaptive,
        },
        "shared": {
            "critic": Critic(shared=True),
            "advantage": GAE(lam=0.9),
            "objective": ClippedSurrogate(),
            "kl": KLPenalty(0.1),
        },
        "lora": {
            "critic": Critic(lora=LoRA(rank=2)),
            "advantage": GAE(),
            "lora": LoRA(rank=2),
            "kl": KLPenalty(0.1, refresh_every=1),
        },
        "adaptive": {"kl": KLPenalty(0.3, target=0.01, horizon=8), "entropy_coefficient": 0.1},
        "whitened": {"advantage": GlobalWhitened(), "kl": KLPenalty(0.1, "reward")},
        "centered": {"kl": KLPenalty(0.3, "reward", discount=0.5)},
        "refresh": {"kl": KLPenalty(0.3, estimator="k2", refresh_every=2)},
        "stale": {"max_staleness": 1, "kl": KLPenalty(0.1)},
        "resampled": {"resample_groups": 2, "importance_weights": ImportanceWeights("sequence", "mask", 0.5, 2.0)},
    }
    return found[name]


def few_vowels(completions: list[str]) -> list[float]:
    """A reward with many ties."""
    return [float(sum(letter in "aeiou" for letter in text) > 1) for text in completions]


def thirds(completions: list[str]) -> list[float]:
    """Rewards that bfloat16 cannot represent."""
    return [len(text) / 3 + 0.001 for text in completions]


def module_and_data(kind: str, base: str, **options: Any) -> tuple[Any, Any]:
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3), **options}
    if kind == "sft":
        return SFTModule(base, **options), SFTDataModule(chats(8), batch_size=4, show_example=False)
    if kind == "preference":
        return PreferenceModule(base, **options), PreferenceDataModule(pairs(8), batch_size=4, show_example=False)
    common = {"rewards": [FunctionReward(thirds)], "kl": KLPenalty(0.1), "sampler": Sampler(max_tokens=8)}
    options = {**common, "critic": Critic(), "advantage": GAE(), **options}
    return PolicyRLModule(base, **options), PromptDataModule(prompts(4), prompts_per_round=2, group_size=3)
