"""Losses of preference learning.

A pair loss takes the scores of the chosen and of the rejected response, `[B]` each, as the scorer returns them
(any beta included), and returns `[B]`, to be minimised.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - ε)·log σ(c - r - margin) - ε·log σ(-(c - r - margin)), ε = label_smoothing.

    Sources: Bradley & Terry 1952; as a reward-model loss Ziegler et al., arXiv 1909.08593; margin Llama 2,
    arXiv 2307.09288 eq. 2; smoothing E. Mitchell's conservative DPO (2023).
    """
    logit = chosen - rejected - margin
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def hinge(chosen: Tensor, rejected: Tensor) -> Tensor:
    """max(0, 1 - (c - r)). Source: SLiC, arXiv 2305.10425, normalised as in RSO, arXiv 2309.06657."""
    return F.relu(1 - (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """((c - r) - ½)² / beta², for scores that contain beta. Source: IPO, arXiv 2310.12036 eq. 17, scores times beta."""
    return ((chosen - rejected) - 0.5).square() / beta**2


def kto(
    scores: Tensor,
    labels: Tensor,
    kl: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w·(1 - σ(s - kl)) where the label is 1, w·(1 - σ(kl - s)) where it is 0. Source: KTO, arXiv 2402.01306 eq. 8.

    Args:
        scores: beta·(log π - log π_ref) of each response, `[B]`.
        labels: 1 for desirable, 0 for undesirable, `[B]`.
        kl: beta times the reference point, not negative, no gradient.
    """
    sign = labels.to(scores.dtype) * 2 - 1
    weight = labels * desirable_weight + (1 - labels.to(scores.dtype)) * undesirable_weight
    return weight * (1 - (sign * (scores - kl)).sigmoid())


class PairLoss(ABC):
    """A pair loss with its options, for `PreferenceModule(loss=...)`.

    `__call__(chosen, rejected, *, …)`: tensors of the batch that it names as keywords are handed to it by name.
    """

    @abstractmethod
    def __call__(self, chosen: Tensor, rejected: Tensor, **named: Any) -> Tensor:
        """Loss of each pair, `[B]`."""


class BradleyTerry(PairLoss):
    """The Bradley-Terry pair loss; a `margin` column of the data is subtracted.

    Args:
        label_smoothing: probability that a label is wrong, in [0, 0.5).
        centering: weight of (c + r)², which keeps the mean score near 0 (arXiv 2312.09244); 0 for none.
    """

    def __init__(self, label_smoothing: float = 0.0, centering: float = 0.0) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
        self.label_smoothing = label_smoothing
        self.centering = centering

    def __call__(self, chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, **_: Any) -> Tensor:
        """Loss `[B]`."""
        loss = bradley_terry(chosen, rejected, margin, self.label_smoothing)
        return loss + self.centering * (chosen + rejected).square() if self.centering else loss
