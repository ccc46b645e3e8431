"""Policy-gradient losses.

Every function takes `(logprobs, old_logprobs, advantages, mask, **options)`: float tensors `[B, T]`, log-probabilities
in nats, mask 0/1, advantages `[B, T]` or `[B, 1]`. It returns the per-token loss `[B, T]`, to be minimized, zero where
the mask is 0. r = exp(logprobs - old_logprobs) is the importance ratio; old_logprobs and advantages carry no gradient.
"""

import torch
from torch import Tensor

from rlhf_lightning.objectives.policy.importance import masked, sequence_ratio, token_ratio


def _clipped(ratio: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float) -> Tensor:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return masked(-torch.minimum(ratio * advantages, clipped * advantages), loss_mask)


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """-A·log p, right only while the policy is still the one that sampled. Source: Williams 1992, eq. 7."""
    return masked(-advantages * logprobs, loss_mask)


def importance_sampling(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
    """-r·A. On-policy its gradient is REINFORCE's. Source: Tinker's `importance_sampling` loss."""
    return masked(-token_ratio(logprobs, old_logprobs, loss_mask) * advantages, loss_mask)


def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(r·A, clamp(r, 1 - clip_low, 1 + clip_high)·A); with `dual_clip` c, where A < 0, no more than -c·A.

    Sources: PPO, arXiv 1707.06347 eq. 7; two bounds: DAPO, arXiv 2503.14476 eq. 10; dual clip: arXiv 1912.09729 eq. 5.
    """
    ratio = token_ratio(logprobs, old_logprobs, loss_mask)
    if dual_clip is not None:
        # c is above 1 + clip_high: where A > 0 the upper clip binds before it.
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
    """-sg(clamp(r, ratio_min, ratio_max))·A·log p, sg = no gradient. Source: MiniMax-M1, arXiv 2506.13585 eq. 4."""
    weight = token_ratio(logprobs, old_logprobs, loss_mask).clamp(ratio_min, ratio_max).detach()
    return masked(-weight * advantages * logprobs, loss_mask)


def dro(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, beta: float) -> Tensor:
    """-(log p·A - ½·beta·(log p - log q)²), q the sampler's. Source: Tinker's `dro`, after arXiv 2405.19107."""
    gap = torch.where(loss_mask.bool(), logprobs - old_logprobs, 0.0)
    return masked(-(logprobs * advantages - 0.5 * beta * gap.square()), loss_mask)


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """-min(s·A, clamp(s)·A) at every token, s = exp(mean over the sequence of log p - log q).

    Aggregate with `sequence_mean` to get the paper's objective. Source: GSPO, arXiv 2507.18071 eq. 5-7.
    """
    ratio = sequence_ratio(logprobs, old_logprobs, loss_mask, normalized=True)
    return _clipped(ratio, advantages, loss_mask, clip_low, clip_high)


def rloo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """-min(s·A, clamp(s)·A) at every token, s = exp(Σ over the sequence of log p - log q): the response is one action.

    Aggregate with `sequence_mean`; leave-one-out advantages. Source: RLOO, arXiv 2402.14740 sec. 3, with PPO's clip.
    """
    ratio = sequence_ratio(logprobs, old_logprobs, loss_mask, normalized=False)
    return _clipped(ratio, advantages, loss_mask, clip_low, clip_high)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """-(4/τ)·σ(τ·(r - 1))·A, τ by the sign of A: a soft clip. Source: SAPO, arXiv 2511.20347 eq. 5-6."""
    ratio = token_ratio(logprobs, old_logprobs, loss_mask)
    positive = torch.full_like(ratio, temperature_positive)
    temperature = torch.where(advantages > 0, positive, temperature_negative)
    return masked(-torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages, loss_mask)
