"""Importance ratios: how much likelier a token, or a whole response, is now than it was when it was sampled.

Float tensors `[B, T]`, log-probabilities in nats, mask 0/1.
"""

import torch
from torch import Tensor

from rlhf_lightning.objectives.kl import bounded


def token_log_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """log p - log q of each token, 0 where the mask is 0."""
    # Masked positions hold arbitrary numbers: exp of them may overflow and 0 * inf is NaN.
    return torch.where(loss_mask.bool(), logprobs - old_logprobs, 0.0)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor, normalized: bool) -> Tensor:
    """Σ (log p - log q) of each row, `[B, 1]`; the mean if normalized."""
    total = token_log_ratio(logprobs, old_logprobs, loss_mask).sum(-1, keepdim=True)
    return total / loss_mask.sum(-1, keepdim=True).clamp(min=1) if normalized else total


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """r = exp(log p - log q) of each token, its logarithm within ±20 (`bounded`); 1 where the mask is 0."""
    return bounded(token_log_ratio(logprobs, old_logprobs, loss_mask)).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor, normalized: bool) -> Tensor:
    """exp(Σ (log p - log q)) of each row at all its positions, `[B, T]`; exp of the mean if normalized.

    The logarithm is kept within ±20 (`bounded`).
    """
    ratio = bounded(sequence_log_ratio(logprobs, old_logprobs, loss_mask, normalized)).exp()
    return ratio.expand_as(logprobs)


def masked(loss: Tensor, loss_mask: Tensor) -> Tensor:
    """Zero where the mask is 0, whatever stands there."""
    return torch.where(loss_mask.bool(), loss, 0.0)


def importance_weights(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    loss_mask: Tensor,
    level: str = "token",
    mode: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """w = exp(log q_old - log q_sampler), `[B, T]` without gradient, for rows that another distribution sampled.

    Args:
        level: `token`, or `sequence`: exp of the sum over the row, the same at all its tokens.
        mode: `truncate` clamps w to [low, high] (truncated importance sampling, Ionides 2008, eq. 2); `mask` sets w to
            0 outside of [low, high] (IcePop, arXiv 2510.18855 eq. 3).

    Returns:
        Weights to multiply the per-token loss with, 0 where the mask is 0.
    """
    if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
        raise ValueError(f"level {level!r} must be 'token' or 'sequence', mode {mode!r} 'truncate' or 'mask'")
    if level == "token":
        weight = token_ratio(old_logprobs, sampling_logprobs, loss_mask)
    else:
        weight = sequence_ratio(old_logprobs, sampling_logprobs, loss_mask, normalized=False)
    inside = (weight >= low) & (weight <= high)
    weight = weight.clamp(low, high) if mode == "truncate" else torch.where(inside, weight, 0.0)
    return masked(weight.detach(), loss_mask)
