"""Losses of pairs as classes that YAML names."""

import math
from typing import Any

from torch import Tensor

from rlhf_lightning.objectives.preference.base import PairLoss
from rlhf_lightning.objectives.preference.pair_losses import (
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bradley_terry,
    centering,
    davidson,
    discopop,
    exo,
    hinge,
    ipo,
    nca,
    orpo,
    rao_kupper,
    robust,
    simpo,
    sppo,
)


def _smoothing(value: float, least: float = 0.0) -> float:
    if not least <= value < 0.5:
        raise ValueError(f"label_smoothing is {value}; it must be in [{least:g}, 0.5)")
    return value


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


class BradleyTerry(PairLoss):
    """-log σ(c - r - margin): a reward model's loss; DPO with `ImplicitReward`. A `margin` column is subtracted.

    A pair that is a tie (`tie: true`) counts half each way.

    Args:
        label_smoothing: probability that a label is wrong, in [0, 0.5): conservative DPO.
        centering: weight of (c + r)², which keeps the mean score near 0 (arXiv 2312.09244); 0 for none.
    """

    def __init__(self, label_smoothing: float = 0.0, centering: float = 0.0) -> None:
        if not 0 <= centering < math.inf:
            raise ValueError(f"centering is {centering}; it must not be negative: it would drive the scores apart")
        self.label_smoothing, self.centering = _smoothing(label_smoothing), centering

    def __call__(
        self, chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, ties: Tensor | float = 0.0, **_: Any
    ) -> Tensor:
        """Loss `[B]`."""
        loss = bradley_terry(chosen, rejected, margin, self.label_smoothing + ties * (0.5 - self.label_smoothing))
        return loss + self.centering * centering(chosen, rejected) if self.centering else loss


class Robust(PairLoss):
    """Bradley-Terry made unbiased for flipped labels (arXiv 2403.00409).

    Args:
        label_smoothing: the part of labels that are flipped, in [0, 0.5).
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return robust(chosen, rejected, self.label_smoothing)


class Hinge(PairLoss):
    """max(0, 1 - (c - r)): a pair that is told apart by 1 is left alone (SLiC, arXiv 2305.10425)."""

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return hinge(chosen, rejected)


class IPO(PairLoss):
    """(c - r - ½)² / beta²: a margin is aimed at rather than pushed without end (arXiv 2310.12036).

    Use `ImplicitReward(length_normalised=True)` for the form whose beta does not depend on lengths.
    """

    def __call__(self, chosen: Tensor, rejected: Tensor, *, beta: float, **_: Any) -> Tensor:
        return ipo(chosen, rejected, beta)


class SimPO(PairLoss):
    """-log σ(c - r - γ), for `SequenceLogprob(length_normalised=True, beta=2)`: no reference (arXiv 2405.14734).

    Args:
        gamma: the margin that is aimed at.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return simpo(chosen, rejected, self.gamma)


class ORPO(PairLoss):
    """SFT on the chosen response and an odds ratio, for `SequenceLogprob(length_normalised=True)` (arXiv 2403.07691).

    Args:
        weight: of the odds ratio.
    """

    scores = "mean_logprob"

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return orpo(chosen, rejected, self.weight)


class EXO(PairLoss):
    """The reverse KL to the preferences (arXiv 2402.00856).

    Args:
        label_smoothing: probability that a label is wrong, in (0, 0.5).
    """

    def __init__(self, label_smoothing: float = 1e-3) -> None:
        _positive(label_smoothing=label_smoothing)
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return exo(chosen, rejected, self.label_smoothing)


class NCA(PairLoss):
    """Noise-contrastive alignment: each response by itself, so that the chosen one stays likely (arXiv 2402.05369)."""

    scores = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return nca(chosen, rejected)


class SPPO(PairLoss):
    """Self-play preference optimisation with hard labels: ±½ is aimed at (arXiv 2405.00675)."""

    scores = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor, *, beta: float, **_: Any) -> Tensor:
        return sppo(chosen, rejected, beta)


class APOZero(PairLoss):
    """1 - σ(c) + σ(r): where chosen responses are better than the policy's own (arXiv 2408.06266)."""

    scores = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return apo_zero(chosen, rejected)


class APODown(PairLoss):
    """σ(c) + 1 - σ(c - r): where chosen responses are worse than the policy's own (arXiv 2408.06266)."""

    scores = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return apo_down(chosen, rejected)


class DiscoPOP(PairLoss):
    """A blend of logistic and exponential loss that was found by search (arXiv 2406.08414).

    Args:
        temperature: of the blend.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        _positive(temperature=temperature)
        self.temperature = temperature

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return discopop(chosen, rejected, self.temperature)


class AOT(PairLoss):
    """Alignment by optimal transport (arXiv 2406.05882): margins of policy and reference, each sorted over the step.

    Args:
        label_smoothing: as in `BradleyTerry`.
    """

    couples = True
    scores = "log_ratio"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        *,
        chosen_reference_scores: Tensor,
        rejected_reference_scores: Tensor,
        **_: Any,
    ) -> Tensor:
        return aot(chosen, rejected, chosen_reference_scores - rejected_reference_scores, self.label_smoothing)


class AOTUnpaired(PairLoss):
    """Sorted scores of all chosen against those of all rejected responses of the optimizer step (arXiv 2406.05882).

    Args:
        label_smoothing: as in `BradleyTerry`.
    """

    couples = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(self, chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
        return aot_unpaired(chosen, rejected, self.label_smoothing)


class Davidson(PairLoss):
    """Bradley-Terry with ties (`tie: true` in the data) as a third outcome (Davidson 1970; arXiv 2409.17431).

    Args:
        nu: how likely ties are.
    """

    def __init__(self, nu: float = 1.0) -> None:
        _positive(nu=nu)
        self.nu = nu

    def __call__(self, chosen: Tensor, rejected: Tensor, *, ties: Tensor | float = 0.0, **_: Any) -> Tensor:
        return davidson(chosen, rejected, ties, self.nu)


class RaoKupper(PairLoss):
    """Bradley-Terry with ties (`tie: true`) where scores are near each other (Rao & Kupper 1967; arXiv 2409.17431).

    Args:
        nu: above 1; a difference under log ν is seen as a tie.
    """

    def __init__(self, nu: float = 3.0) -> None:
        if nu <= 1:
            raise ValueError(f"nu is {nu}; it must be above 1")
        self.nu = nu

    def __call__(self, chosen: Tensor, rejected: Tensor, *, ties: Tensor | float = 0.0, **_: Any) -> Tensor:
        return rao_kupper(chosen, rejected, ties, self.nu)
