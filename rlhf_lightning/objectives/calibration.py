"""Calibration and ranking quality of pairwise scores, computed on all rows at once."""

import torch
from torch import Tensor


def reliability(confidence: Tensor, correct: Tensor, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Reliability diagram: accuracy by confidence, in bins of equal width over [½, 1].

    Args:
        confidence: σ(|c - r|) of each pair, float `[B]` in [½, 1].
        correct: 1 where the preferred response has the higher score, 0 elsewhere, `[B]`.
        bins: Number of bins.

    Returns:
        `(mean confidence, accuracy, count)`, float `[bins]` each; 0 in empty bins.
    """
    edges = torch.linspace(0.5, 1.0, bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1].contiguous()
    bin_index = (confidence[:, None] >= edges).sum(-1)
    count = torch.bincount(bin_index, minlength=bins).to(confidence.dtype)
    means = [
        torch.zeros_like(count).index_add(0, bin_index, value.to(count.dtype)) / count.clamp(min=1)
        for value in (confidence, correct)
    ]
    return means[0], means[1], count


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error: Σ_b n_b / n · |accuracy_b - mean confidence_b| over the bins of `reliability`.

    Source: Guo et al., arXiv 1706.04599 eq. 3.

    Args:
        confidence: σ(|c - r|) of each pair, float `[B]` in [½, 1].
        correct: 1 where the preferred response has the higher score, 0 elsewhere, `[B]`.
        bins: Number of bins.

    Returns:
        Scalar in [0, 1].
    """
    mean, accuracy, count = reliability(confidence, correct, bins)
    return (count * (accuracy - mean).abs()).sum() / count.sum().clamp(min=1)


def brier(probability: Tensor, outcome: Tensor | float = 1.0) -> Tensor:
    """Brier score, the mean of (p - o)². Source: Brier 1950.

    Args:
        probability: Predicted probabilities, float `[B]`.
        outcome: Observed outcomes, 0 or 1, `[B]`, or one outcome for all rows.

    Returns:
        Scalar in [0, 1].
    """
    return (probability - outcome).square().mean()


def area_under_curve(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve: the probability that a positive row scores above a negative one. Ties count half.

    Args:
        scores: Float `[B]`.
        labels: Above 0 for positive rows, `[B]`.

    Returns:
        Scalar in [0, 1]; 0 if one of the classes is empty.
    """
    order, scores = scores.sort().values, scores.contiguous()
    below = torch.searchsorted(order, scores) + torch.searchsorted(order, scores, right=True)
    good = labels > 0
    n_good, n_bad = good.sum(), (~good).sum()
    # Mann-Whitney U: count all rows below each positive row, then subtract the positive ones among them.
    return (below[good].to(scores.dtype).sum() - n_good**2) / 2 / (n_good * n_bad).clamp(min=1)
