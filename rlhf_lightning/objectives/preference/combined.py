"""Losses with running state, terms for `WeightedSum`, and losses of labels and rankings, as classes."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from rlhf_lightning.objectives.preference.base import LabelLoss, PairLoss, RankingLoss
from rlhf_lightning.objectives.preference.label_losses import apo_zero_unpaired, bco_unpaired, kto, plackett_luce
from rlhf_lightning.objectives.preference.pair_losses import bco, centering, sft


class SFT(PairLoss):
    """-log π(chosen) / |chosen|: a term for `WeightedSum` that keeps the chosen response likely.

    Source: RPO, arXiv 2404.19733.

    Example:
        >>> loss = WeightedSum([Centering(), SFT()], weights=[0.01, 1.0])
    """

    def __call__(self, chosen: Tensor, rejected: Tensor, *, chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
        return sft(chosen_logps, chosen_lengths)


class KLToStart(PairLoss):
    """k2 estimate of the KL to the reference per token, averaged over both responses; a term for `WeightedSum`.

    Computes ½·Σ_t ½·(log π − log π_ref)² / |y| summed over the two responses
    (k2, http://joschu.net/blog/kl-approx.html) on the tokens of the data. Its gradient pulls log π back to log π_ref.

    Example:
        >>> loss = WeightedSum([Centering(), KLToStart()], weights=[0.01, 0.1])
    """

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        *,
        chosen_kl: Tensor,
        rejected_kl: Tensor,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
    ) -> Tensor:
        return 0.5 * (chosen_kl / chosen_lengths + rejected_kl / rejected_lengths)


class Centering(PairLoss):
    """(c + r)², a term for `WeightedSum` that keeps the mean score near 0 (arXiv 2312.09244).

    Example:
        >>> Centering()(torch.tensor([1.0]), torch.tensor([-0.5]))
        tensor([0.2500])
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return centering(chosen, rejected)


class WeightedSum(PairLoss, nn.Module):
    """Weighted sum of several pair losses.

    Args:
        losses: Pair losses, for example `BradleyTerry` and `SFT`.
        weights: One per loss; all 1 by default.

    Raises:
        ValueError: If `losses` is empty, `weights` has another length, or the losses are defined for different scores.

    Example:
        >>> from rlhf_lightning.objectives.preference import BradleyTerry
        >>> loss = WeightedSum([BradleyTerry(), Centering()], weights=[1.0, 0.1])
        >>> loss(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([0.6931])
    """

    def __init__(self, losses: Sequence[PairLoss], weights: Sequence[float] | None = None) -> None:
        nn.Module.__init__(self)
        self.losses, self.weights = list(losses), [1.0] * len(losses) if weights is None else list(weights)
        if not self.losses or len(self.weights) != len(self.losses):
            raise ValueError(
                f"got {len(self.losses)} losses and {len(self.weights)} weights; give at least one loss, and one "
                "weight per loss"
            )
        # Registered as submodules, so that checkpoints contain the state of losses that have one.
        self.states = nn.ModuleList([loss for loss in self.losses if isinstance(loss, nn.Module)])
        self.batch_coupled = any(loss.batch_coupled for loss in self.losses)
        wanted = {loss.score_type for loss in self.losses if loss.score_type}
        if len(wanted) > 1:
            raise ValueError(f"losses defined for different scores ({', '.join(sorted(wanted))}) cannot be added")
        self.score_type = next(iter(wanted), None)

    def keywords(self) -> dict[str, bool]:
        """Names of the tensors that any of the losses takes, each with True if one of them requires it."""
        found: dict[str, bool] = {}
        for loss in self.losses:
            for name, required in loss.keywords().items():
                found[name] = found.get(name, False) or required
        return found

    def __call__(self, chosen: Tensor, rejected: Tensor, **named: Tensor | float) -> Tensor:
        """Weighted sum of the losses, `[B]`."""
        total = torch.zeros_like(chosen)
        for weight, loss in zip(self.weights, self.losses, strict=True):
            own = {name: named[name] for name in loss.keywords() if name in named}
            total = total + weight * loss(chosen, rejected, **own)
        return total


class RunningTotals(TypedDict):
    """State of `RunningMeans`. Each list has an entry for the undesirable scores, then one for the desirable scores.

    Attributes:
        totals: Sums of the scores.
        counts: Numbers of scores.
    """

    totals: list[float]
    counts: list[int]


class RunningMeans(nn.Module):
    """Running means of the desirable and the undesirable scores seen in training, saved in checkpoints.

    The totals are Python floats, because a buffer would be rounded when the module is cast to a lower precision.

    Example:
        >>> means = RunningMeans()
        >>> means.update(torch.tensor([3.0, -1.0]), torch.tensor([1, 0]))
        >>> means.middle()
        1.0
    """

    def __init__(self) -> None:
        super().__init__()
        self.totals, self.counts = [0.0, 0.0], [0, 0]

    def get_extra_state(self) -> RunningTotals:
        return {"totals": list(self.totals), "counts": list(self.counts)}

    def set_extra_state(self, state: RunningTotals) -> None:
        self.totals, self.counts = list(state["totals"]), list(state["counts"])

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add the scores of an optimizer step.

        Args:
            scores: Float `[B]`.
            labels: 1 for desirable, 0 for undesirable, `[B]`.
        """
        for side in (0, 1):
            own = scores[labels == side]
            self.totals[side] += float(own.sum())
            self.counts[side] += len(own)

    def middle(self) -> float:
        """Midpoint of the two means. If only one side has scores, the mean of that side; 0 without any scores."""
        means = [total / count for total, count in zip(self.totals, self.counts, strict=True) if count]
        return sum(means) / len(means) if means else 0.0


class BCO(PairLoss, nn.Module):
    """Binary classification of each response against a running mean reward δ (BCO, arXiv 2404.04656).

    δ is the midpoint of the mean chosen and the mean rejected score over all training steps so far, including the
    current one.

    Example:
        >>> BCO().eval()(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.3863])
    """

    batch_coupled = True

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.means = RunningMeans()

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.training:
            self.means.update(chosen.detach(), torch.ones_like(chosen))
            self.means.update(rejected.detach(), torch.zeros_like(rejected))
        return bco(chosen, rejected, self.means.middle())


class _Labels(LabelLoss):
    """A label loss with a weight per class."""

    def __init__(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight


class KTO(_Labels):
    """Kahneman-Tversky optimization, which learns from labels instead of pairs (KTO, arXiv 2402.01306).

    The reference point is the mean score of prompts paired with the response to another prompt, over the whole
    optimizer step, clamped to at least 0. The paper recommends weights such that desirable_weight times the number of
    desirable rows is 1 to 4/3 times undesirable_weight times the number of undesirable rows.

    Args:
        desirable_weight: Weight of responses labeled 1.
        undesirable_weight: Weight of responses labeled 0.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> KTO()(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]), mismatched=torch.tensor([-1.0, 0.5]))
        tensor([0.5000, 0.5000])
    """

    batch_coupled = True
    score_type = "log_ratio"

    def __call__(self, scores: Tensor, labels: Tensor, *, mismatched: Tensor) -> Tensor:
        kl = mismatched.detach().mean().clamp(min=0)
        return kto(scores, labels, kl, self.desirable_weight, self.undesirable_weight)


class APOUnpaired(LabelLoss):
    """APO-zero for labels: KTO without its reference point (arXiv 2408.06266).

    Example:
        >>> APOUnpaired()(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
        tensor([0.5000, 0.5000])
    """

    score_type = "log_ratio"

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        return apo_zero_unpaired(scores, labels)


class BCOUnpaired(_Labels, nn.Module):
    """`BCO` for labels (arXiv 2404.04656).

    Args:
        desirable_weight: Weight of responses labeled 1.
        undesirable_weight: Weight of responses labeled 0.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> BCOUnpaired().eval()(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
        tensor([0.6931, 0.6931])
    """

    batch_coupled = True

    def __init__(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        nn.Module.__init__(self)
        super().__init__(desirable_weight, undesirable_weight)
        self.means = RunningMeans()

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self.means.update(scores.detach(), labels)
        return bco_unpaired(scores, labels, self.means.middle(), self.desirable_weight, self.undesirable_weight)


class PlackettLuce(RankingLoss):
    """-log P(ranking) of K answers, divided by K - 1, so that two answers give Bradley-Terry (DPO, arXiv 2305.18290).

    Example:
        >>> PlackettLuce()(torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.ones(1, 2))
        tensor([0.6931])
    """

    def __call__(self, scores: Tensor, ranks: Tensor, answer_mask: Tensor) -> Tensor:
        return plackett_luce(scores, ranks, answer_mask) / (answer_mask.sum(-1) - 1).clamp(min=1)
