"""The objectives alone in a plain PyTorch loop: no Lightning, no model, a policy over four answers.

Each answer is one token with a fixed reward, so that the best policy under a KL penalty is known:
π* ∝ π_ref · exp(reward / β). The loop reaches it with any objective; here PPO's, with k1 in the reward.
"""

import torch
from torch import Tensor

from rlhf_lightning.objectives.advantage import group_centered
from rlhf_lightning.objectives.aggregate import aggregate
from rlhf_lightning.objectives.kl import k1
from rlhf_lightning.objectives.policy import clipped_surrogate

REWARDS = torch.tensor([0.0, 0.5, 1.0, 0.2])
BETA = 0.5


def train(rounds: int = 300, answers: int = 256, seed: int = 0) -> Tensor:
    """The final probabilities of the policy, `[4]`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(4, requires_grad=True)
    reference = torch.zeros(4).log_softmax(-1)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    loss_mask, group = torch.ones(answers, 1), torch.zeros(answers, dtype=torch.long)
    for _ in range(rounds):
        with torch.no_grad():
            old = logits.log_softmax(-1)
            sampled = torch.multinomial(old.exp(), answers, replacement=True, generator=generator)
            rewards = REWARDS[sampled] - BETA * k1(old[sampled], reference[sampled])
            advantages = group_centered(rewards, group)[:, None]
        for _ in range(2):
            logprobs = logits.log_softmax(-1)[sampled][:, None]
            total, count = aggregate(
                clipped_surrogate(logprobs, old[sampled][:, None], advantages, loss_mask), loss_mask, "token_mean"
            )
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
    return logits.detach().softmax(-1)


def optimum() -> Tensor:
    """The best policy, `[4]`."""
    return (REWARDS / BETA).softmax(-1)


if __name__ == "__main__":
    print("found", train(), "best", optimum())
