"""Policy-gradient losses as pure functions.

Every function takes `(logprobs, old_logprobs, advantages, loss_mask, **options)` and returns the per-token loss to be
minimized, `[B, T]`, 0 where the mask is 0:

- `logprobs`: log-probability of each sampled token under the current policy, in nats, `[B, T]`.
- `old_logprobs`: the same under the policy at the start of the round, without gradient, `[B, T]`.
- `advantages`: without gradient, `[B, T]` or `[B, 1]`.
- `loss_mask`: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

In the formulas p is the current policy, q the old one, A the advantage, and r = p / q the importance ratio.
"""

import torch
from torch import Tensor

from rlhf_lightning.objectives.policy.importance import masked, sequence_ratio, token_ratio


def _clipped(ratio: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r·A, clamp(r, 1 - clip_low, 1 + clip_high)·A), `[B, T]`."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return masked(-torch.minimum(ratio * advantages, clipped * advantages), loss_mask)


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """REINFORCE, -A·log p. Valid only while the policy is still the one that sampled. Source: Williams 1992, eq. 7.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Not used.
        advantages: `[B, T]` or `[B, 1]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

    Returns:
        Loss of each token, `[B, T]`.
    """
    return masked(-advantages * logprobs, loss_mask)


def importance_sampling(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """-r·A. On-policy, its gradient is that of REINFORCE. Source: Tinker's `importance_sampling` loss.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        advantages: `[B, T]` or `[B, 1]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

    Returns:
        Loss of each token, `[B, T]`.
    """
    return masked(-token_ratio(logprobs, old_logprobs, loss_mask) * advantages, loss_mask)


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """The clipped surrogate of PPO, -min(r·A, clamp(r, 1 - clip_low, 1 + clip_high)·A).

    Sources: PPO, arXiv 1707.06347 eq. 7; separate bounds, DAPO, arXiv 2503.14476 eq. 10; dual clip, arXiv 1912.09729
    eq. 5.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        advantages: `[B, T]` or `[B, 1]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        dual_clip: c; where A < 0 the loss is at most -c·A. None for no such bound.

    Returns:
        Loss of each token, `[B, T]`.

    Example:
        >>> old, mask = torch.zeros(1, 3), torch.ones(1, 3)
        >>> clipped_surrogate(torch.tensor([[0.0, 0.5, -0.5]]), old, torch.tensor([[1.0]]), mask)
        tensor([[-1.0000, -1.2000, -0.6065]])
    """
    ratio = token_ratio(logprobs, old_logprobs, loss_mask)
    if dual_clip is not None:
        # c is above 1 + clip_high, so where A > 0 the upper clip binds first and this has no effect.
        ratio = ratio.clamp(max=dual_clip)
    return _clipped(ratio, advantages, loss_mask, clip_low, clip_high)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    ratio_min: float = 0.0,
    ratio_max: float = 4.0,
) -> Tensor:
    """CISPO, -sg(clamp(r, ratio_min, ratio_max))·A·log p, where sg stops the gradient.

    Source: MiniMax-M1, arXiv 2506.13585 eq. 4.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        advantages: `[B, T]` or `[B, 1]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        ratio_min: Lower bound of the weight.
        ratio_max: Upper bound of the weight.

    Returns:
        Loss of each token, `[B, T]`.
    """
    weight = token_ratio(logprobs, old_logprobs, loss_mask).clamp(ratio_min, ratio_max).detach()
    return masked(-weight * advantages * logprobs, loss_mask)


def dro(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, beta: float) -> Tensor:
    """DRO, -(log p·A - ½·beta·(log p - log q)²). Source: Tinker's `dro` loss, after arXiv 2405.19107.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        advantages: `[B, T]` or `[B, 1]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        beta: Weight of the squared log-ratio, in reward units.

    Returns:
        Loss of each token, `[B, T]`.
    """
    gap = torch.where(loss_mask.bool(), logprobs - old_logprobs, 0.0)
    return masked(-(logprobs * advantages - 0.5 * beta * gap.square()), loss_mask)


def sequence_clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    normalized: bool = True,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """The clipped surrogate of whole sequences, -min(s·A, clamp(s, 1 - clip_low, 1 + clip_high)·A) at every token.

    The whole sequence is one action with one ratio s. Aggregate with `sequence_mean` to get the papers' objectives.
    Sources: normalized, GSPO, arXiv 2507.18071 eq. 5-7; otherwise RLOO, arXiv 2402.14740 sec. 3, with PPO's clip.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        advantages: `[B, 1]`, or `[B, T]` with one value per row.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        normalized: If True, s = exp(mean over the sequence of log p - log q), else s = exp(Σ over the sequence).
        clip_low: s is clipped below 1 - clip_low.
        clip_high: s is clipped above 1 + clip_high.

    Returns:
        Loss of each token, `[B, T]`.
    """
    ratio = sequence_ratio(logprobs, old_logprobs, loss_mask, normalized)
    return _clipped(ratio, advantages, loss_mask, clip_low, clip_high)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """SAPO's soft clip, -(4/τ)·σ(τ·(r - 1))·A, where τ depends on the sign of A.

    Source: SAPO, arXiv 2511.20347 eq. 5-6.

    Args:
        logprobs: Under the current policy, `[B, T]`.
        old_logprobs: Under the old policy, `[B, T]`.
        advantages: `[B, T]` or `[B, 1]`.
        loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        temperature_positive: τ where A > 0.
        temperature_negative: τ elsewhere.

    Returns:
        Loss of each token, `[B, T]`.
    """
    ratio = token_ratio(logprobs, old_logprobs, loss_mask)
    positive = torch.full_like(ratio, temperature_positive)
    temperature = torch.where(advantages > 0, positive, temperature_negative)
    return masked(-torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages, loss_mask)
