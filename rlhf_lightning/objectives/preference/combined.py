"""Losses that are made of others, terms to add to a loss, and losses of labels and rankings, as classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.objectives.preference.base import LabelLoss, PairLoss, RankingLoss
from rlhf_lightning.objectives.preference.label_losses import apo_zero_unpaired, bco_unpaired, kto, plackett_luce
from rlhf_lightning.objectives.preference.pair_losses import bco, centering, sft


class SFT(PairLoss):
    """-log π(chosen) / |chosen|, a term for `WeightedSum`: keeps the chosen response likely (RPO, arXiv 2404.19733)."""

    def __call__(
        self, chosen: Tensor, rejected: Tensor, *, chosen_logps: Tensor, chosen_lengths: Tensor, **_: Any
    ) -> Tensor:
        return sft(chosen_logps, chosen_lengths)


class KLToStart(PairLoss):
    """Σ_t ½·(log π − log π_ref)² a token, the mean of both responses: a term for `WeightedSum`.

    k2 (http://joschu.net/blog/kl-approx.html) on the tokens of the data; its gradient pulls log π back to log π_ref.
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
        **_: Any,
    ) -> Tensor:
        return 0.5 * (chosen_kl / chosen_lengths + rejected_kl / rejected_lengths)


class Centering(PairLoss):
    """(c + r)², a term for `WeightedSum` that keeps the mean score near 0 (arXiv 2312.09244)."""

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return centering(chosen, rejected)


class WeightedSum(PairLoss, nn.Module):
    """Several losses of pairs, weighted and added.

    Args:
        losses: of pairs, for example `BradleyTerry` and `SFT`.
        weights: one for each; 1 each by default.
    """

    def __init__(self, losses: Sequence[PairLoss], weights: Sequence[float] | None = None) -> None:
        nn.Module.__init__(self)
        self.losses, self.weights = list(losses), [1.0] * len(losses) if weights is None else list(weights)
        if not self.losses or len(self.weights) != len(self.losses):
            raise ValueError(f"{len(self.weights)} weights for {len(self.losses)} losses; one for each, at least one")
        # Those with a state of their own, so that it is in the checkpoint.
        self.states = nn.ModuleList([loss for loss in self.losses if isinstance(loss, nn.Module)])
        self.batch_coupled = any(loss.batch_coupled for loss in self.losses)
        wanted = {loss.scores for loss in self.losses if loss.scores}
        if len(wanted) > 1:
            raise ValueError(f"losses of different scores ({', '.join(sorted(wanted))}) cannot be added")
        self.scores = next(iter(wanted), None)  # type: ignore[misc]

    def keywords(self) -> dict[str, bool]:
        found: dict[str, bool] = {}
        for loss in self.losses:
            for name, required in loss.keywords().items():
                found[name] = found.get(name, False) or required
        return found

    def __call__(self, chosen: Tensor, rejected: Tensor, **named: Any) -> Tensor:
        """Loss `[B]`."""
        total = torch.zeros_like(chosen)
        for weight, loss in zip(self.weights, self.losses, strict=True):
            own = {name: named[name] for name in loss.keywords() if name in named}
            total = total + weight * loss(chosen, rejected, **own)
        return total


class RunningMeans(nn.Module):
    """Means of the desirable and of the undesirable scores that were seen in training; in the checkpoint.

    Plain numbers: a buffer would be rounded where the module is cast to a lower precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.totals, self.counts = [0.0, 0.0], [0, 0]

    def get_extra_state(self) -> dict[str, list[Any]]:
        return {"totals": list(self.totals), "counts": list(self.counts)}

    def set_extra_state(self, state: dict[str, list[Any]]) -> None:
        self.totals, self.counts = list(state["totals"]), list(state["counts"])

    @torch.no_grad()
    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add the scores `[B]` of a step, labels 1 or 0."""
        for side in (0, 1):
            own = scores[labels == side]
            self.totals[side] += float(own.sum())
            self.counts[side] += len(own)

    def middle(self) -> float:
        """Half-way between the two means; of the one there is, where the other is missing."""
        means = [total / count for total, count in zip(self.totals, self.counts, strict=True) if count]
        return sum(means) / len(means) if means else 0.0


class BCO(PairLoss, nn.Module):
    """Binary classification of each response around the mean reward δ so far (arXiv 2404.04656).

    δ is half-way between the means of all chosen and of all rejected scores that training has seen, this step's too.
    """

    batch_coupled = True

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.means = RunningMeans()

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        if self.training:
            self.means.update(chosen.detach(), torch.ones_like(chosen))
            self.means.update(rejected.detach(), torch.zeros_like(rejected))
        return bco(chosen, rejected, self.means.middle())


class _Labels(LabelLoss):
    def __init__(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight


class KTO(_Labels):
    """Kahneman-Tversky optimization: labels in place of pairs (arXiv 2402.01306).

    The reference point is the mean score of prompts with the response to another prompt, over the whole optimizer
    step, at least 0. The paper wants desirable_weight times the number of desirable rows to be 1 to 4/3 times the same
    of undesirable ones.

    Args:
        desirable_weight: of responses with label 1.
        undesirable_weight: of responses with label 0.
    """

    batch_coupled = True
    mismatched = True
    scores = "log_ratio"

    def __call__(self, scores: Tensor, labels: Tensor, *, mismatched: Tensor, **_: Any) -> Tensor:
        kl = mismatched.detach().mean().clamp(min=0)
        return kto(scores, labels, kl, self.desirable_weight, self.undesirable_weight)


class APOUnpaired(LabelLoss):
    """APO-zero for labels: KTO without its reference point (arXiv 2408.06266)."""

    scores = "log_ratio"

    def __call__(self, scores: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return apo_zero_unpaired(scores, labels)


class BCOUnpaired(_Labels, nn.Module):
    """`BCO` for labels (arXiv 2404.04656).

    Args:
        desirable_weight: of responses with label 1.
        undesirable_weight: of responses with label 0.
    """

    batch_coupled = True

    def __init__(self, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        nn.Module.__init__(self)
        super().__init__(desirable_weight, undesirable_weight)
        self.means = RunningMeans()

    def __call__(self, scores: Tensor, labels: Tensor, **_: Any) -> Tensor:
        if self.training:
            self.means.update(scores.detach(), labels)
        return bco_unpaired(scores, labels, self.means.middle(), self.desirable_weight, self.undesirable_weight)


class PlackettLuce(RankingLoss):
    """-log P of a ranking of K answers, divided by K - 1; with two answers it is Bradley-Terry (arXiv 2305.18290)."""

    def __call__(self, scores: Tensor, ranks: Tensor, loss_mask: Tensor, **_: Any) -> Tensor:
        return plackett_luce(scores, ranks, loss_mask) / (loss_mask.sum(-1) - 1).clamp(min=1)
