"""How well scores of pairs are probabilities, and how well they order: functions of tensors of all rows."""

import torch
from torch import Tensor


def reliability(confidence: Tensor, correct: Tensor, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy and count, `[bins]` each, of equal bins of confidence in [½, 1]; 0 in empty bins.

    Args:
        confidence: σ(|c - r|) of each pair, in [½, 1], `[B]`. correct: 1 where the higher score is the better, `[B]`.
    """
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1].contiguous()
    place = (confidence[:, None] >= edges).sum(-1)
    count = torch.bincount(place, minlength=bins).to(confidence.dtype)
    means = [
        torch.zeros_like(count).index_add(0, place, value.to(count.dtype)) / count.clamp(min=1)
        for value in (confidence, correct)
    ]
    return means[0], means[1], count


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> Tensor:
    """Σ_b n_b / n · |accuracy_b - mean confidence_b| over the bins of `reliability`. Source: arXiv 1706.04599 eq. 3."""
    mean, accuracy, count = reliability(confidence, correct, bins)
    return (count * (accuracy - mean).abs()).sum() / count.sum().clamp(min=1)


def brier(probability: Tensor, outcome: Tensor | float = 1.0) -> Tensor:
    """Mean of (p - o)². Source: Brier 1950."""
    return (probability - outcome).square().mean()


def area_under_curve(scores: Tensor, labels: Tensor) -> Tensor:
    """The probability that a row of label 1 scores above one of label 0, equal scores counted half."""
    order, scores = scores.sort().values, scores.contiguous()
    below = torch.searchsorted(order, scores) + torch.searchsorted(order, scores, right=True)
    good = labels > 0
    n_good, n_bad = good.sum(), (~good).sum()
    # Mann-Whitney: what is below label 1, less what of that is its own.
    return (below[good].to(scores.dtype).sum() - n_good**2) / 2 / (n_good * n_bad).clamp(min=1)
