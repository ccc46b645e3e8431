"""Advantages: how much better an action was than expected. No function here propagates gradients."""

import torch
from torch import Tensor


def _group_sums(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over each row's group, size of that group, and the group's index among the sorted groups; `[N]` each."""
    _, group_index = group_ids.unique(return_inverse=True)
    size = int(group_index.max()) + 1 if group_index.numel() else 0
    sums = values.new_zeros(size).index_add(0, group_index, values)
    counts = values.new_zeros(size).index_add(0, group_index, torch.ones_like(values))
    return sums[group_index], counts[group_index], group_index


def _all_equal(values: Tensor, group_index: Tensor) -> Tensor:
    """True for rows whose group holds a single distinct value, `[N]`.

    Rounding can make the mean of equal values differ from them; their advantage must be exactly 0.
    """
    low, high = (
        values.new_zeros(len(values)).scatter_reduce(0, group_index, values, how, include_self=False)
        for how in ("amin", "amax")
    )
    return (low == high)[group_index]


def group_centered(rewards: Tensor, group_ids: Tensor, scale: str = "none", eps: float = 1e-4) -> Tensor:
    """Center each reward on the mean of its group and optionally divide by the group's standard deviation.

    Args:
        rewards: Float `[N]`.
        group_ids: Integer `[N]`; responses to the same prompt share a value.
        scale: `none` (Dr. GRPO, arXiv 2503.20783), or `std` to divide by the standard deviation plus `eps`
            (GRPO, arXiv 2402.03300). The deviation uses n - 1.
        eps: Added to the standard deviation.

    Returns:
        Advantages, float `[N]`. 0 for every row of a group whose rewards are all equal.

    Raises:
        ValueError: If `scale` is unknown.

    Example:
        >>> group_centered(torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1]))
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    if scale not in ("none", "std"):
        raise ValueError(f"unknown scale {scale!r}; it must be 'none' or 'std'")
    sums, counts, group_index = _group_sums(rewards, group_ids)
    centered = torch.where(_all_equal(rewards, group_index), 0.0, rewards - sums / counts)
    if scale == "none":
        return centered
    squares, _, _ = _group_sums(centered.square(), group_ids)
    return centered / ((squares / (counts - 1).clamp(min=1)).sqrt() + eps)


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Subtract from each reward the mean of the other rewards in its group.

    Source: RLOO, arXiv 2402.14740 eq. 8.

    Args:
        rewards: Float `[N]`.
        group_ids: Integer `[N]`; responses to the same prompt share a value.

    Returns:
        Advantages, float `[N]`. 0 for a group of one row, or of equal rewards.
    """
    sums, counts, group_index = _group_sums(rewards, group_ids)
    others = (sums - rewards) / (counts - 1).clamp(min=1)
    return torch.where((counts > 1) & ~_all_equal(rewards, group_index), rewards - others, 0.0)


def gae(rewards: Tensor, values: Tensor, loss_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438 eq. 16). The value after the last action is 0.

    Positions with mask 0 are skipped: an action's successor is the next position with mask 1, and neither `gamma`
    nor `lam` is applied in between.

    Args:
        rewards: Reward at each position, float `[B, T]`.
        values: The critic's estimate before each position, float `[B, T]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        gamma: Discount per action.
        lam: λ, the weight of longer-horizon estimates.

    Returns:
        `(advantages, returns)`, float `[B, T]` each, 0 where the mask is 0; returns = advantages + values.
    """
    next_values = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    action = loss_mask.bool()
    for t in reversed(range(values.shape[1])):
        next_values[:, t] = following
        following = torch.where(action[:, t], values[:, t], following)
    advantages = discounted_future_sum(rewards + gamma * next_values - values, loss_mask, gamma * lam)
    return advantages, torch.where(action, advantages + values, 0.0)


def whiten(x: Tensor, loss_mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Normalize to unit variance, and to mean 0 unless `shift_mean` is False, over positions with mask 1.

    Computes `(x - mean) / sqrt(var + eps)`. The variance divides by n, as in openai/lm-human-preferences.

    Args:
        x: Float `[B, T]`.
        loss_mask: 1 where a position counts, 0 elsewhere, `[B, T]`.
        shift_mean: If False, the mean is added back after scaling.
        eps: Added to the variance.

    Returns:
        Float `[B, T]`, 0 where the mask is 0.
    """
    loss_mask = loss_mask.to(x.dtype)
    count = loss_mask.sum().clamp(min=1)
    mean = (x * loss_mask).sum() / count
    variance = ((x - mean).square() * loss_mask).sum() / count
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean) * loss_mask


def discounted_future_sum(x: Tensor, loss_mask: Tensor, discount: float) -> Tensor:
    """Discounted sum of the current and later values: Σ_{s ≥ t} discount^(s - t) · x_s over positions with mask 1.

    Args:
        x: Float `[B, T]`.
        loss_mask: 1 where a position counts, 0 elsewhere, `[B, T]`. Positions with mask 0 do not discount.
        discount: Factor per action.

    Returns:
        Float `[B, T]`, 0 where the mask is 0.
    """
    result = torch.zeros_like(x)
    running = torch.zeros_like(x[:, 0])
    action = loss_mask.bool()
    for t in reversed(range(x.shape[1])):
        running = torch.where(action[:, t], x[:, t] + discount * running, running)
        result[:, t] = torch.where(action[:, t], running, 0.0)
    return result
