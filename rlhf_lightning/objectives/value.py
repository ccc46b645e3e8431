"""The critic's loss and its explained variance."""

import torch
from torch import Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, clip: float | None = 0.2
) -> Tensor:
    """Clipped squared error of each value: ½·max((v - R)², (clamp(v, v_old - clip, v_old + clip) - R)²).

    Without a clip it is ½·(v - R)². Sources: openai/lm-human-preferences; Huang et al., "The N+ Implementation Details
    of RLHF with PPO" (2024).

    Args:
        values: v, the critic's current estimates, float `[B, T]`.
        old_values: v_old, the estimates at the start of the round, float `[B, T]`.
        returns: R, the targets, float `[B, T]`.
        loss_mask: 1 where a token counts, 0 elsewhere, `[B, T]`.
        clip: Largest step away from `old_values`, in reward units; None for no clipping.

    Returns:
        Loss of each token, `[B, T]`, 0 where the mask is 0.
    """
    loss = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return torch.where(loss_mask.bool(), 0.5 * loss, 0.0)


def explained_variance(residual_sums: tuple[float, float], return_sums: tuple[float, float], count: float) -> float:
    """1 - Var(R - v) / Var(R): 1 for a perfect critic, 0 for one that predicts the mean, negative for a worse one.

    Takes sums so that ranks can add theirs up first.

    Args:
        residual_sums: Sum and sum of squares of R - v over the tokens of all ranks.
        return_sums: Sum and sum of squares of R over the same tokens.
        count: Number of these tokens.

    Returns:
        Explained variance; 0 if the returns do not vary.
    """
    variance = return_sums[1] / count - (return_sums[0] / count) ** 2 if count else 0.0
    if variance <= 1e-12:
        return 0.0
    return 1 - (residual_sums[1] / count - (residual_sums[0] / count) ** 2) / variance
