"""Pair losses as classes for configs. `pair_losses` has the functions, and defines c, r and d."""

import math

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
    """Return `value` after checking that it is in [least, 0.5)."""
    if not least <= value < 0.5:
        raise ValueError(f"label_smoothing is {value}; it must be in [{least:g}, 0.5)")
    return value


def _positive(**values: float) -> None:
    """Raise ValueError unless every value is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


class BradleyTerry(PairLoss):
    """-log σ(c - r - margin): the loss of a reward model, and DPO with the scorer `ImplicitReward`.

    A `margin` column of the data is subtracted. A tie (`tie: true`) counts as half a win for each side.

    Args:
        label_smoothing: Probability that a label is wrong, in [0, 0.5) (conservative DPO).
        centering: Weight of (c + r)², which keeps the mean score near 0 (arXiv 2312.09244); 0 for none.

    Raises:
        ValueError: If `label_smoothing` or `centering` is out of range.

    Example:
        >>> import torch
        >>> BradleyTerry()(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor([0.3133, 0.6931])
    """

    def __init__(self, label_smoothing: float = 0.0, centering: float = 0.0) -> None:
        if not 0 <= centering < math.inf:
            raise ValueError(
                f"centering is {centering}; it must be finite and not negative (a negative weight would drive the mean "
                "score away from 0)"
            )
        self.label_smoothing, self.centering = _smoothing(label_smoothing), centering

    def __call__(
        self, chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, ties: Tensor | float = 0.0
    ) -> Tensor:
        """Loss `[B]`."""
        loss = bradley_terry(chosen, rejected, margin, self.label_smoothing + ties * (0.5 - self.label_smoothing))
        return loss + self.centering * centering(chosen, rejected) if self.centering else loss


class Robust(PairLoss):
    """Bradley-Terry, corrected to be unbiased under flipped labels (robust DPO, arXiv 2403.00409).

    Args:
        label_smoothing: Fraction of labels that are flipped, in [0, 0.5).

    Raises:
        ValueError: If `label_smoothing` is out of range.

    Example:
        >>> import torch
        >>> Robust(0.1)(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([0.6931])
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return robust(chosen, rejected, self.label_smoothing)


class Hinge(PairLoss):
    """max(0, 1 - (c - r)): no gradient once a pair is separated by 1 (SLiC, arXiv 2305.10425).

    Example:
        >>> import torch
        >>> Hinge()(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor([0., 1.])
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return hinge(chosen, rejected)


class IPO(PairLoss):
    """(c - r - ½)² / beta²: regresses to a fixed margin instead of pushing it up without limit (arXiv 2310.12036).

    Use `ImplicitReward(length_normalized=True)` for the form whose beta does not depend on lengths.

    Example:
        >>> import torch
        >>> IPO()(torch.tensor([0.5]), torch.tensor([0.0]), beta=0.1)
        tensor([0.])
    """

    def __call__(self, chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
        return ipo(chosen, rejected, beta)


class SimPO(PairLoss):
    """-log σ(c - r - γ), for `SequenceLogprob(length_normalized=True, beta=2)`; needs no reference (arXiv 2405.14734).

    Args:
        gamma: γ, the target margin.

    Example:
        >>> import torch
        >>> SimPO(gamma=1.0)(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([0.6931])
    """

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return simpo(chosen, rejected, self.gamma)


class ORPO(PairLoss):
    """SFT on the chosen response plus an odds ratio, for `SequenceLogprob(length_normalized=True)` (arXiv 2403.07691).

    Args:
        weight: Weight of the odds ratio.

    Example:
        >>> loss = ORPO(weight=0.1)
    """

    score_type = "mean_logprob"

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return orpo(chosen, rejected, self.weight)


class EXO(PairLoss):
    """The reverse KL to the preference distribution (arXiv 2402.00856).

    Args:
        label_smoothing: Probability that a label is wrong, in (0, 0.5).

    Raises:
        ValueError: If `label_smoothing` is out of range.

    Example:
        >>> loss = EXO(label_smoothing=1e-3)
    """

    def __init__(self, label_smoothing: float = 1e-3) -> None:
        _positive(label_smoothing=label_smoothing)
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return exo(chosen, rejected, self.label_smoothing)


class NCA(PairLoss):
    """Noise-contrastive alignment: scores each response on its own, which keeps the chosen one likely.

    Source: arXiv 2402.05369.

    Example:
        >>> import torch
        >>> NCA()(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.3863])
    """

    score_type = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return nca(chosen, rejected)


class SPPO(PairLoss):
    """Self-play preference optimization with hard labels: regresses scores to ±½ (arXiv 2405.00675).

    Example:
        >>> import torch
        >>> SPPO()(torch.tensor([0.5]), torch.tensor([-0.5]), beta=0.1)
        tensor([0.])
    """

    score_type = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
        return sppo(chosen, rejected, beta)


class APOZero(PairLoss):
    """1 - σ(c) + σ(r), for chosen responses better than the policy's own (arXiv 2408.06266).

    Example:
        >>> import torch
        >>> APOZero()(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.])
    """

    score_type = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return apo_zero(chosen, rejected)


class APODown(PairLoss):
    """σ(c) + 1 - σ(c - r), for chosen responses worse than the policy's own (arXiv 2408.06266).

    Example:
        >>> import torch
        >>> APODown()(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([1.])
    """

    score_type = "log_ratio"

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return apo_down(chosen, rejected)


class DiscoPOP(PairLoss):
    """A mixture of the logistic and the exponential loss, discovered by an LLM-driven search (arXiv 2406.08414).

    Args:
        temperature: τ of the mixture, above 0.

    Raises:
        ValueError: If `temperature` is not above 0.

    Example:
        >>> loss = DiscoPOP(temperature=0.05)
    """

    def __init__(self, temperature: float = 0.05) -> None:
        _positive(temperature=temperature)
        self.temperature = temperature

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return discopop(chosen, rejected, self.temperature)


class AOT(PairLoss):
    """Alignment by optimal transport: margins of policy and reference, each sorted over the step (arXiv 2406.05882).

    Args:
        label_smoothing: As in `BradleyTerry`.

    Raises:
        ValueError: If `label_smoothing` is out of range.

    Example:
        >>> AOT().batch_coupled
        True
    """

    batch_coupled = True
    score_type = "log_ratio"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        *,
        chosen_reference_scores: Tensor,
        rejected_reference_scores: Tensor,
    ) -> Tensor:
        return aot(chosen, rejected, chosen_reference_scores - rejected_reference_scores, self.label_smoothing)


class AOTUnpaired(PairLoss):
    """Sorted scores of all chosen against those of all rejected responses of the optimizer step (arXiv 2406.05882).

    Args:
        label_smoothing: As in `BradleyTerry`.

    Raises:
        ValueError: If `label_smoothing` is out of range.

    Example:
        >>> import torch
        >>> AOTUnpaired()(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.6931, 0.6931])
    """

    batch_coupled = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = _smoothing(label_smoothing)

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return aot_unpaired(chosen, rejected, self.label_smoothing)


class Davidson(PairLoss):
    """Bradley-Terry with ties (`tie: true` in the data) as a third outcome (Davidson 1970; arXiv 2409.17431).

    Args:
        nu: ν, the weight of ties, above 0.

    Raises:
        ValueError: If `nu` is not above 0.

    Example:
        >>> import torch
        >>> Davidson(nu=1.0)(torch.zeros(2), torch.zeros(2), ties=torch.tensor([0.0, 1.0]))
        tensor([1.3863, 0.6931])
    """

    def __init__(self, nu: float = 1.0) -> None:
        _positive(nu=nu)
        self.nu = nu

    def __call__(self, chosen: Tensor, rejected: Tensor, *, ties: Tensor | float = 0.0) -> Tensor:
        return davidson(chosen, rejected, ties, self.nu)


class RaoKupper(PairLoss):
    """Bradley-Terry in which a small difference is a tie (`tie: true`; Rao & Kupper 1967; arXiv 2409.17431).

    Args:
        nu: ν, above 1; a tie becomes likely when the scores differ by less than log ν.

    Raises:
        ValueError: If `nu` is not above 1.

    Example:
        >>> loss = RaoKupper(nu=3.0)
    """

    def __init__(self, nu: float = 3.0) -> None:
        if nu <= 1:
            raise ValueError(f"nu is {nu}; it must be above 1")
        self.nu = nu

    def __call__(self, chosen: Tensor, rejected: Tensor, *, ties: Tensor | float = 0.0) -> Tensor:
        return rao_kupper(chosen, rejected, ties, self.nu)
