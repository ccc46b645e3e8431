"""Losses of your own, one of policy RL and one of pairs, and an advantage. Each is a class that YAML can name.

In YAML for example `objective: {class_path: examples.objectives.TOPR}` and
`advantage: {class_path: examples.objectives.RoundCentered}`.
"""

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from rlhf_lightning import PolicyRLModule, PreferenceDataModule, PreferenceModule, PromptDataModule
from rlhf_lightning.distributed import gather
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives.policy import PolicyObjective
from rlhf_lightning.objectives.policy.importance import masked, token_ratio
from rlhf_lightning.objectives.preference import PairLoss, bradley_terry
from rlhf_lightning.rewards import LengthReward
from rlhf_lightning.rollout.advantages import Advantage


class TOPR(PolicyObjective):
    """Tapered off-policy REINFORCE (arXiv 2503.14286), with the ratio r of each token.

    -A·log p where A > 0, -clamp(r, 0, ratio_max)·A·log p elsewhere, without a gradient through r. Good tokens are
    learned even if they have become unlikely; bad ones are unlearned only as far as the policy still samples them.

    Args:
        ratio_max: Largest weight of a token with a negative advantage.
    """

    def __init__(self, ratio_max: float = 1.0, aggregation: str = "token_mean", length: int | None = None) -> None:
        super().__init__(aggregation, length)
        self.ratio_max = ratio_max

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        ratio = token_ratio(logprobs, old_logprobs, loss_mask).detach().clamp(max=self.ratio_max)
        weight = torch.where(advantages > 0, 1.0, ratio)
        return masked(-weight * advantages * logprobs, loss_mask)


class RoundCentered(Advantage):
    """Reward minus the mean reward of the round, over the episodes of all ranks."""

    def __call__(self, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """Advantage of each episode of this rank, `[N]`."""
        sums = gather((float(rewards.sum()), len(rewards)))  # of each rank
        total, count = (sum(column) for column in zip(*sums, strict=True))
        return rewards - total / max(1, count)


class RDPO(PairLoss):
    """Length-regularized DPO: -log σ(c - r + α·(|c| - |r|)), lengths in tokens (arXiv 2403.19159).

    The optimal policy for reward - α·length implies the reward β·log(π / π_ref) + α·length.

    Args:
        alpha: Cost of a token, in reward units.
    """

    def __init__(self, alpha: float = 0.01) -> None:
        self.alpha = alpha

    def __call__(self, chosen: Tensor, rejected: Tensor, *, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
        """Loss per pair, `[B]`. The lengths are passed because the signature names them."""
        return bradley_terry(chosen + self.alpha * chosen_lengths, rejected + self.alpha * rejected_lengths)


def main(model: str, folder: str = "runs/examples") -> tuple[pl.Trainer, pl.Trainer]:
    """Train with each of them."""
    flags: dict[str, Any] = {"default_root_dir": folder, "logger": False, "enable_checkpointing": False}
    policy = pl.Trainer(max_epochs=1, **flags)
    policy.fit(
        PolicyRLModule(
            model,
            TOPR(),
            advantage=RoundCentered(),
            rewards=[LengthReward(target=8)],
            sampler=Sampler(max_tokens=16),
        ),
        # Two passes over each round's answers: in the second the ratio is no longer 1.
        PromptDataModule(["Count to three.", "Say hello."], prompts_per_round=2, group_size=4, update_epochs=2),
    )
    pairs = [{"prompt": "Is it raining?", "chosen": "Yes, take a coat.", "rejected": "Weather is a big topic."}]
    dpo = pl.Trainer(max_epochs=1, **flags)
    dpo.fit(PreferenceModule(model, ImplicitReward(beta=0.1), RDPO()), PreferenceDataModule(pairs))
    return policy, dpo


if __name__ == "__main__":
    main(*sys.argv[1:])
