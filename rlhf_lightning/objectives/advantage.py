"""Advantages: how much better than expected an action was. Nothing here carries a gradient."""

import torch
from torch import Tensor


def _group_sums(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row: the sum over its group, the group's size, and the row's dense group number."""
    _, dense = group_ids.unique(return_inverse=True)
    size = int(dense.max()) + 1 if dense.numel() else 0
    sums = values.new_zeros(size).index_add(0, dense, values)
    counts = values.new_zeros(size).index_add(0, dense, torch.ones_like(values))
    return sums[dense], counts[dense], dense


def _all_equal(values: Tensor, dense: Tensor) -> Tensor:
    """For each row whether its group has one value: then the mean may differ from it by rounding, and must not."""
    low, high = (
        values.new_zeros(len(values)).scatter_reduce(0, dense, values, how, include_self=False)
        for how in ("amin", "amax")
    )
    return (low == high)[dense]


def group_centered(rewards: Tensor, group_ids: Tensor, scale: str = "none", eps: float = 1e-4) -> Tensor:
    """Reward minus the mean of its group; with `scale="std"` divided by the group's standard deviation + eps.

    Args:
        rewards: `[N]`. group_ids: integer `[N]`, equal for samples of one prompt.
        scale: `none` (Dr. GRPO, arXiv 2503.20783) or `std` (GRPO, arXiv 2402.03300; deviation over n - 1).
    """
    if scale not in ("none", "std"):
        raise ValueError(f"unknown scale {scale!r}; 'none' or 'std'")
    sums, counts, dense = _group_sums(rewards, group_ids)
    centered = torch.where(_all_equal(rewards, dense), 0.0, rewards - sums / counts)
    if scale == "none":
        return centered
    squares, _, _ = _group_sums(centered.square(), group_ids)
    return centered / ((squares / (counts - 1).clamp(min=1)).sqrt() + eps)


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Reward minus the mean of the others of its group (RLOO, arXiv 2402.14740 eq. 8); 0 for a group of one."""
    sums, counts, dense = _group_sums(rewards, group_ids)
    others = (sums - rewards) / (counts - 1).clamp(min=1)
    return torch.where((counts > 1) & ~_all_equal(rewards, dense), rewards - others, 0.0)


def gae(rewards: Tensor, values: Tensor, loss_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, arXiv 1506.02438 eq. 16; the value after the last action is 0.

    Args:
        rewards, values, loss_mask: `[B, T]`. Positions whose mask is 0 are skipped: the next action's value is that of
            the next position with mask 1, and neither gamma nor lam is applied in between.

    Returns:
        `(advantages, returns)`, `[B, T]` each, zero where the mask is 0; returns = advantages + values.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    running = torch.zeros_like(next_value)
    action = loss_mask.bool()
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(action[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(action[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(action[:, t], running, 0.0)
    return advantages, torch.where(action, advantages + values, 0.0)


def whiten(x: Tensor, loss_mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over positions with mask 1; with `shift_mean=False` the mean is added back.

    The variance is over n, as in openai/lm-human-preferences. Zero where the mask is 0.
    """
    loss_mask = loss_mask.to(x.dtype)
    count = loss_mask.sum().clamp(min=1)
    mean = (x * loss_mask).sum() / count
    variance = ((x - mean).square() * loss_mask).sum() / count
    whitened = (x - mean) * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean) * loss_mask


def discounted_future_sum(x: Tensor, loss_mask: Tensor, discount: float) -> Tensor:
    """Σ_{s ≥ t} discount^(s-t)·x_s over positions with mask 1, counted in actions; `[B, T]`, 0 where the mask is 0."""
    result = torch.zeros_like(x)
    running = torch.zeros_like(x[:, 0])
    action = loss_mask.bool()
    for t in reversed(range(x.shape[1])):
        running = torch.where(action[:, t], x[:, t] + discount * running, running)
        result[:, t] = torch.where(action[:, t], running, 0.0)
    return result
