"""Policy-gradient losses.

Every function takes `(logprobs, old_logprobs, advantages, mask, **options)`: float tensors `[B, T]`, log-probabilities
in nats, mask 0/1, advantages `[B, T]` or `[B, 1]`. It returns the per-token loss `[B, T]`, to be minimised, zero where
the mask is 0. r = exp(logprobs - old_logprobs) is the importance ratio; old_logprobs and advantages carry no gradient.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rlhf_lightning.objectives.aggregate import MODES


def _ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    # Masked positions hold arbitrary numbers: exp of them may overflow and 0 * inf is NaN.
    return torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()


def _masked(loss: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.bool(), loss, 0.0)


def importance_sampling(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-r·A. On-policy its gradient is REINFORCE's. Source: Tinker's `importance_sampling` loss."""
    return _masked(-_ratio(logprobs, old_logprobs, mask) * advantages, mask)


def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """-min(r·A, clamp(r, 1 - clip_low, 1 + clip_high)·A). Source: PPO, arXiv 1707.06347 eq. 7; two bounds: DAPO."""
    ratio = _ratio(logprobs, old_logprobs, mask)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return _masked(-torch.minimum(ratio * advantages, clipped * advantages), mask)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ratio_min: float = 0.0,
    ratio_max: float = 4.0,
) -> Tensor:
    """-sg(clamp(r, ratio_min, ratio_max))·A·log p, sg = no gradient. Source: MiniMax-M1, arXiv 2506.13585 eq. 4."""
    weight = _ratio(logprobs, old_logprobs, mask).clamp(ratio_min, ratio_max).detach()
    return _masked(-weight * advantages * logprobs, mask)


def dro(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, beta: float) -> Tensor:
    """-(log p·A - ½·beta·(log p - log q)²), q the sampler's. Source: Tinker's `dro`, after arXiv 2405.19107."""
    gap = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    return _masked(-(logprobs * advantages - 0.5 * beta * gap.square()), mask)


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """-min(s·A, clamp(s)·A) at every token, s = exp(mean over the sequence of log p - log q).

    Aggregate with `sequence_mean` to get the paper's objective. Source: GSPO, arXiv 2507.18071 eq. 5-7.
    """
    gap = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = (gap.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp().expand_as(gap)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return _masked(-torch.minimum(ratio * advantages, clipped * advantages), mask)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """-(4/τ)·σ(τ·(r - 1))·A, τ by the sign of A: a soft clip. Source: SAPO, arXiv 2511.20347 eq. 5-6."""
    ratio = _ratio(logprobs, old_logprobs, mask)
    positive = torch.full_like(ratio, temperature_positive)
    temperature = torch.where(advantages > 0, positive, temperature_negative)
    return _masked(-torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages, mask)


class PolicyObjective(ABC):
    """A policy loss with its options and its aggregation, for `PolicyRLModule(objective=...)`."""

    def __init__(self, aggregation: str = "token_mean", length: int | None = None) -> None:
        if aggregation not in MODES:
            raise ValueError(f"aggregation is {aggregation!r}; one of {', '.join(MODES)}")
        if aggregation == "constant" and not length:
            raise ValueError("aggregation 'constant' needs length, the tokens each sequence is divided by")
        self.aggregation, self.length = aggregation, length

    @abstractmethod
    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""


class ImportanceSampling(PolicyObjective):
    """The `importance_sampling` loss.

    Args:
        aggregation: a mode of `objectives.aggregate`.
        length: tokens per sequence, for `constant`.
    """

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return importance_sampling(logprobs, old_logprobs, advantages, mask)
