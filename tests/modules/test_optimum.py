"""A task with a known best policy: one token is sampled and rewarded, with a penalty on the KL from the start.

Under reward - beta·KL(policy ‖ start) it is start·exp(reward / beta), normalized; under plain k3 in the loss, whose
gradient is that of KL(start ‖ policy), it is beta·start / (λ - reward), with the λ that normalizes it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.learning.graph_walk import word_tokenizer
from rlhf_lightning import PolicyRLModule, PromptDataModule
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.critic import Critic
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.objectives import policy
from rlhf_lightning.rewards import FunctionReward
from rlhf_lightning.rollout.advantages import GAE, GroupCentered, LeaveOneOut
from rlhf_lightning.rollout.kl import KLPenalty
from tests.helpers.training import trainer

WORDS = ["<pad>", "<end>", *"abcdefgh"]
REWARDS = torch.tensor([0.0, 0.2, 1.0, 0.9, 0.0, 0.5, -0.5, 0.3, 0.8, -1.0], dtype=torch.float64)
BETA, ROUNDS, DRAWS = 0.5, 120, 256


def bandit_model() -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )


def earned(episodes: list[Any]) -> list[float]:
    return [float(REWARDS[episode.training_samples[-1].ids[-1]]) for episode in episodes]


def distribution(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2]])).logits[0, -1].double().softmax(-1)


def best(start: torch.Tensor, forward: bool) -> torch.Tensor:
    """The optimum; with `forward`, for the penalty KL(start ‖ policy)."""
    if not forward:
        return (start.log() + REWARDS / BETA).softmax(-1)
    low, high = float(REWARDS.max()), float(REWARDS.max()) + 10 * BETA
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * start / (middle - REWARDS)).sum() > 1 else (low, middle)
    return BETA * start / (high - REWARDS)


def variation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().sum() / 2)


def learned(root: Path, updates: int = 4, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy before and after training."""
    model = bandit_model()
    start = distribution(model)
    options.setdefault("kl", KLPenalty(BETA))
    module = PolicyRLModule(
        model,
        tokenizer=word_tokenizer(WORDS),
        rewards=[FunctionReward(earned)],
        sampler=Sampler(max_tokens=1),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        lr_scheduler=lambda optimizer: Warmup(optimizer, shape="linear"),
        **options,
    )
    source = PromptDataModule([{"prompt": "a"}], group_size=DRAWS, minibatches=updates)
    trainer(root, max_epochs=ROUNDS).fit(module, source)
    return start, distribution(module.model)


QUICK = "importance sampling"
CASES: dict[str, dict[str, Any]] = {
    QUICK: {"objective": policy.ImportanceSampling()},
    "ppo with a critic": {
        "objective": policy.ClippedSurrogate(),
        "critic": Critic(learning_rate=1e-2, coefficient=0.5),
        "advantage": GAE(whiten=False),
        "kl": KLPenalty(BETA, "reward"),
    },
    "ppo": {"objective": policy.ClippedSurrogate()},
    "ppo with a shared backbone": {
        "objective": policy.ClippedSurrogate(),
        "critic": Critic(shared=True, coefficient=0.5),
        "advantage": GAE(whiten=False),
        "kl": KLPenalty(BETA, "reward"),
    },
    "grpo": {"objective": policy.ClippedSurrogate(aggregation="sequence_mean")},
    "dr_grpo": {"objective": policy.ClippedSurrogate(aggregation="constant", length=1)},
    "dapo": {"objective": policy.ClippedSurrogate(clip_high=0.28)},
    "bnpo": {"objective": policy.ClippedSurrogate()},
    "reinforce++": {"objective": policy.ClippedSurrogate(), "advantage": GroupCentered()},
    "rloo": {
        "objective": policy.SequenceClippedSurrogate(normalized=False),
        "advantage": LeaveOneOut(),
        "kl": KLPenalty(BETA, "reward"),
    },
    "gspo": {"objective": policy.SequenceClippedSurrogate(clip_low=0.2, clip_high=0.2)},
    "cispo": {"objective": policy.CISPO()},
    "sapo": {"objective": policy.SAPO()},
    "dro": {"objective": policy.DRO(beta=0.01)},
    "reinforce": {"objective": policy.Reinforce(), "updates": 1},
    "kl as k2": {"kl": KLPenalty(BETA, estimator="k2"), "updates": 1},
    "kl in the reward": {"kl": KLPenalty(BETA, "reward")},
    "kl in the reward, as Tinker": {"kl": KLPenalty(BETA, "reward", discount=0.0)},
    "kl in the reward, plain": {"kl": KLPenalty(BETA, "reward", centered=False)},
    "a stale round": {"max_staleness": 1, "objective": policy.ClippedSurrogate()},
}


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_policy_approaches_the_optimum(name: str, tmp_path: Path) -> None:
    start, end = learned(tmp_path, **CASES[name])
    assert variation(start, best(start, forward=False)) > 0.2
    assert variation(end, best(start, forward=False)) < 0.05


@pytest.mark.slow
def test_plain_k3_approaches_its_own_optimum(tmp_path: Path) -> None:
    start, end = learned(tmp_path, updates=1, kl=KLPenalty(BETA, estimator="k3"))
    assert variation(best(start, forward=True), best(start, forward=False)) > 0.1
    assert variation(end, best(start, forward=True)) < 0.05
