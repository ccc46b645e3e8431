"""Losses of unpaired labels and of rankings, as functions of scores that already include any beta."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kto(
    scores: Tensor,
    labels: Tensor,
    kl: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w·(1 - σ(s - kl)) where the label is 1, w·(1 - σ(kl - s)) where it is 0. Source: KTO, arXiv 2402.01306 eq. 8.

    Args:
        scores: s = beta·(log π - log π_ref) of each response, `[B]`.
        labels: 1 for desirable, 0 for undesirable, `[B]`.
        kl: beta times the reference point, not negative, without gradient.
        desirable_weight: w where the label is 1.
        undesirable_weight: w where the label is 0.

    Returns:
        Loss of each response, `[B]`.
    """
    return _weights(scores, labels, desirable_weight, undesirable_weight) * (-_signed(scores - kl, labels)).sigmoid()


def apo_zero_unpaired(scores: Tensor, labels: Tensor) -> Tensor:
    """1 - σ(s) where the label is 1, σ(s) where it is 0: KTO with 0 as its reference point.

    Source: APO-zero, arXiv 2408.06266 eq. 7, one term per response.

    Args:
        scores: s of each response, `[B]`.
        labels: 1 for desirable, 0 for undesirable, `[B]`.

    Returns:
        Loss of each response, `[B]`.
    """
    return kto(scores, labels)


def bco_unpaired(
    scores: Tensor,
    labels: Tensor,
    shift: float | Tensor = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """-w·log σ(s - δ) where the label is 1, -w·log σ(δ - s) where it is 0. Source: BCO, arXiv 2404.04656.

    Args:
        scores: s of each response, `[B]`.
        labels: 1 for desirable, 0 for undesirable, `[B]`.
        shift: δ, the mean reward so far, without gradient.
        desirable_weight: w where the label is 1.
        undesirable_weight: w where the label is 0.

    Returns:
        Loss of each response, `[B]`.
    """
    weights = _weights(scores, labels, desirable_weight, undesirable_weight)
    return -weights * F.logsigmoid(_signed(scores - shift, labels))


def plackett_luce(scores: Tensor, ranks: Tensor, answer_mask: Tensor) -> Tensor:
    """-Σ_i (s_i - log Σ_{j: rank_j ≥ rank_i} e^(s_j)): the negative log-likelihood of a ranking.

    Each answer competes with itself and the answers ranked below it. For two answers this is Bradley-Terry. Answers of
    equal rank appear in each other's sum (Breslow's approximation). Sources: Plackett 1975; Luce 1959; for DPO, arXiv
    2305.18290, appendix A.3.

    Args:
        scores: Scores of K answers to each prompt, `[B, K]`.
        ranks: 0 for the best answer, `[B, K]`.
        answer_mask: 1 where there is an answer, `[B, K]`.

    Returns:
        Loss of each ranking, `[B]`.
    """
    present = answer_mask.bool()
    allowed = (ranks[:, None, :] >= ranks[:, :, None]) & present[:, None, :]
    # A missing answer competes only with itself, which keeps its term finite; the mask then drops it.
    allowed |= torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rivals = scores[:, None, :].expand(allowed.shape).masked_fill(~allowed, -torch.inf).logsumexp(-1)
    return ((rivals - scores) * present).sum(-1)


def _signed(scores: Tensor, labels: Tensor) -> Tensor:
    """The scores, negated where the label is 0."""
    return (labels.to(scores.dtype) * 2 - 1) * scores


def _weights(scores: Tensor, labels: Tensor, desirable: float, undesirable: float) -> Tensor:
    """The weight of each row's label, `[B]`."""
    labels = labels.to(scores.dtype)
    return labels * desirable + (1 - labels) * undesirable
