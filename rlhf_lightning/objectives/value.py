"""Losses and measures of a critic."""

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, clip: float | None = 0.2
) -> Tensor:
    """½·max((v - R)², (clamp(v, v_old - clip, v_old + clip) - R)²) of each token; ½·(v - R)² without a clip.

    Source: openai/lm-human-preferences; Huang et al., "The N+ implementation details of RLHF with PPO" (2024).

    Args:
        values: what the critic says now; old_values: what it said when the rows were sampled; returns: what it is to
            say; mask: 0/1. All `[B, T]`.

    Returns:
        `[B, T]`, zero where the mask is 0.
    """
    loss = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return torch.where(loss_mask.bool(), 0.5 * loss, 0.0)


def explained_variance(residual_sums: tuple[float, float], return_sums: tuple[float, float], count: float) -> float:
    """1 - Var(R - v) / Var(R): 1 for a perfect critic, 0 for one that knows the mean alone, below 0 for a worse one.

    Args:
        residual_sums, return_sums: sum and sum of squares of R - v and of R, over the tokens of all ranks.
        count: of these tokens. 0 where the returns do not vary.
    """
    variance = return_sums[1] / count - (return_sums[0] / count) ** 2 if count else 0.0
    if variance <= 1e-12:
        return 0.0
    return 1 - (residual_sums[1] / count - (residual_sums[0] / count) ** 2) / variance
