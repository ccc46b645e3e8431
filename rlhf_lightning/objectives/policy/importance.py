"""Importance ratios: how much more likely a token or a sequence is now than at the start of the round.

Tensors are float `[B, T]` unless noted, log-probabilities are in nats, and `loss_mask` is 1 at the policy's tokens and
0 elsewhere. p is the current policy (`logprobs`), q the old one (`old_logprobs`): the policy at the start of the round,
according to the trainer if `ImportanceWeights` are used, otherwise according to the sampler.
"""

import torch
from torch import Tensor

from rlhf_lightning.objectives.kl import bounded


def token_log_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """log p - log q of each token, `[B, T]`, 0 where the mask is 0.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

    Returns:
        Log-ratios in nats, `[B, T]`.
    """
    # Masked positions hold arbitrary numbers: their exp may overflow, and 0 * inf is NaN.
    return torch.where(loss_mask.bool(), logprobs - old_logprobs, 0.0)


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor, normalized: bool) -> Tensor:
    """Σ_t (log p - log q) of each row.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        normalized: If True, the mean over the row's tokens instead of the sum.

    Returns:
        Log-ratios in nats, `[B, 1]`.
    """
    total = token_log_ratio(logprobs, old_logprobs, loss_mask).sum(-1, keepdim=True)
    return total / loss_mask.sum(-1, keepdim=True).clamp(min=1) if normalized else total


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """r = exp(log p - log q) of each token, `[B, T]`, 1 where the mask is 0. The exponent is clamped to ±20.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

    Returns:
        Ratios, `[B, T]`.
    """
    return bounded(token_log_ratio(logprobs, old_logprobs, loss_mask)).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor, normalized: bool) -> Tensor:
    """exp(Σ_t (log p - log q)) of each row, repeated at all its positions, `[B, T]`; exp of the mean if `normalized`.

    The exponent is clamped to ±20 (`bounded`).

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        normalized: If True, the mean over the row's tokens instead of the sum.

    Returns:
        Ratios, `[B, T]`.
    """
    ratio = bounded(sequence_log_ratio(logprobs, old_logprobs, loss_mask, normalized)).exp()
    return ratio.expand_as(logprobs)


def masked(loss: Tensor, loss_mask: Tensor) -> Tensor:
    """`loss` where the mask is 1, 0 elsewhere, even over inf or NaN.

    Args:
        loss: Loss of each token, `[B, T]`.
        loss_mask: 1 where a token counts, 0 elsewhere, `[B, T]`.

    Returns:
        The masked loss, `[B, T]`.
    """
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
    """Weights w = exp(old_logprobs - sampling_logprobs) that correct for rows sampled from another distribution.

    Args:
        old_logprobs: Under the policy in the denominator of the loss's ratio, `[B, T]`.
        sampling_logprobs: Under the distribution that sampled the tokens, `[B, T]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        level: `token` for a weight per token, `sequence` for the product over the row at all its tokens.
        mode: `truncate` clamps w to [low, high] (truncated importance sampling, Ionides 2008, eq. 2); `mask` sets w
            to 0 outside [low, high] (IcePop, arXiv 2510.18855 eq. 3).
        low: Lower bound of w.
        high: Upper bound of w.

    Returns:
        Factors for the per-token loss, `[B, T]`, without gradient, 0 where the mask is 0.

    Raises:
        ValueError: If `level` or `mode` is unknown.
    """
    if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
        raise ValueError(
            f"level is {level!r} and mode is {mode!r}; level must be 'token' or 'sequence', and mode 'truncate' or "
            "'mask'"
        )
    if level == "token":
        weight = token_ratio(old_logprobs, sampling_logprobs, loss_mask)
    else:
        weight = sequence_ratio(old_logprobs, sampling_logprobs, loss_mask, normalized=False)
    inside = (weight >= low) & (weight <= high)
    weight = weight.clamp(low, high) if mode == "truncate" else torch.where(inside, weight, 0.0)
    return masked(weight.detach(), loss_mask)
