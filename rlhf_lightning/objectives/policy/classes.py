"""Policy objectives: a loss with its options and its aggregation, for `PolicyRLModule(objective=...)`."""

from abc import ABC, abstractmethod
from math import inf
from typing import Any

from torch import Tensor

from rlhf_lightning.objectives.aggregate import MODES
from rlhf_lightning.objectives.kl import beyond
from rlhf_lightning.objectives.policy import losses
from rlhf_lightning.objectives.policy.importance import (
    importance_weights,
    sequence_log_ratio,
    sequence_ratio,
    token_log_ratio,
    token_ratio,
)


class PolicyObjective(ABC):
    """Base class of the policy losses with their options and aggregation.

    Subclasses implement `__call__`, which returns the per-token loss; `PolicyRLModule` aggregates it.

    Args:
        aggregation: A mode of `objectives.aggregate.aggregate`.
        length: Tokens per sequence; required by the aggregation `constant`.

    Raises:
        ValueError: If `aggregation` is unknown, or is `constant` without `length`.

    Example:
        >>> class SquaredRatio(PolicyObjective):
        ...     def __call__(self, logprobs, old_logprobs, advantages, loss_mask):
        ...         return (self.ratio(logprobs, old_logprobs, loss_mask) - 1 - advantages).square() * loss_mask
        >>> SquaredRatio(aggregation="sequence_mean").aggregation
        'sequence_mean'
    """

    corrects = True
    """True if a ratio or an anchor keeps the loss valid after the policy moved; needed for several epochs per round."""
    bounds: tuple[float, float] = (0.0, inf)
    """Bounds of the ratio; tokens outside them are clipped."""
    sequence_level = False
    """True if the whole response is one action, so that all its tokens must share one advantage."""

    def __init__(self, aggregation: str = "token_mean", length: int | None = None) -> None:
        if aggregation not in MODES:
            raise ValueError(f"aggregation is {aggregation!r}; one of {', '.join(MODES)}")
        if aggregation == "constant" and not length:
            raise ValueError("aggregation 'constant' needs length, the tokens each sequence is divided by")
        self.aggregation, self.length = aggregation, length

    @abstractmethod
    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Compute the per-token loss.

        Args:
            logprobs: Log-probability of each token under the current policy, in nats, `[B, T]`.
            old_logprobs: The same under the policy that sampled, `[B, T]`.
            advantages: `[B, T]` or `[B, 1]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

        Returns:
            Loss to minimize, `[B, T]`, 0 where the mask is 0.
        """

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """The importance ratio that the loss uses, `[B, T]`."""
        return token_ratio(logprobs, old_logprobs, loss_mask)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """True where the logarithm of that ratio is clamped to ±20, bool `[B, T]`."""
        return beyond(token_log_ratio(logprobs, old_logprobs, loss_mask))

    def clipped(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """1 at tokens whose update the bounds clip, 0 elsewhere, `[B, T]`."""
        ratio, (low, high) = self.ratio(logprobs, old_logprobs, loss_mask), self.bounds
        cut = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
        return cut * loss_mask


def _bounds(low: float, high: float) -> tuple[float, float]:
    """Return `(low, high)` after checking 0 ≤ low ≤ 1 ≤ high."""
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"the ratio's bounds are [{low}, {high}]; they must contain 1 and not be negative")
    return low, high


class Reinforce(PolicyObjective):
    """REINFORCE: no ratio and no clipping, for a single pass over freshly sampled responses (`losses.reinforce`).

    Args:
        aggregation: See `PolicyObjective`.
        length: See `PolicyObjective`.

    Example:
        >>> Reinforce(aggregation="sequence_mean").corrects
        False
    """

    corrects = False

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.reinforce(logprobs, old_logprobs, advantages, loss_mask)


class ImportanceSampling(PolicyObjective):
    """The importance-weighted policy gradient, without clipping (`losses.importance_sampling`).

    Args:
        aggregation: See `PolicyObjective`.
        length: See `PolicyObjective`.

    Example:
        >>> objective = ImportanceSampling(aggregation="token_sum")
    """

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.importance_sampling(logprobs, old_logprobs, advantages, loss_mask)


class Clipped(PolicyObjective):
    """Base class of the losses whose ratio is clipped.

    Args:
        clip_low: Where the advantage is negative, the ratio is clipped below 1 - clip_low.
        clip_high: Where the advantage is positive, the ratio is clipped above 1 + clip_high.
        **kwargs: Arguments of `PolicyObjective`.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bounds = _bounds(1 - clip_low, 1 + clip_high)
        self.clip_low, self.clip_high = clip_low, clip_high


class PPO(Clipped):
    """PPO's clipped surrogate loss (`losses.ppo`).

    Args:
        clip_low: See `Clipped`.
        clip_high: See `Clipped`.
        dual_clip: Where the advantage is negative, the ratio is also clipped above this; None for no such bound. The
            paper (arXiv 1912.09729) uses 3.
        **kwargs: Arguments of `PolicyObjective`.

    Raises:
        ValueError: If `dual_clip` is not above 1 + clip_high.

    Example:
        >>> import torch
        >>> objective = PPO(clip_low=0.2, clip_high=0.28)
        >>> logprobs, old_logprobs = torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)
        >>> objective(logprobs, old_logprobs, advantages=torch.ones(1, 1), loss_mask=torch.ones(1, 2))
        tensor([[-1.2800, -1.0000]])
    """

    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(clip_low, clip_high, **kwargs)
        if dual_clip is not None and dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip is {dual_clip}; it must be above 1 + clip_high ({1 + self.clip_high})")
        self.dual_clip = dual_clip

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.ppo(logprobs, old_logprobs, advantages, loss_mask, self.clip_low, self.clip_high, self.dual_clip)

    def clipped(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """1 at tokens whose update the bounds or the dual clip cut off, 0 elsewhere, `[B, T]`."""
        cut = super().clipped(logprobs, old_logprobs, advantages, loss_mask)
        if self.dual_clip is None:
            return cut
        return cut + (self.ratio(logprobs, old_logprobs, loss_mask) > self.dual_clip) * (advantages < 0) * loss_mask


class GRPO(PPO):
    """PPO's loss, averaged over each sequence first (GRPO, arXiv 2402.03300 eq. 3).

    Use it with the advantage `GroupCentered(scale: std)`.

    Args:
        aggregation: See `PolicyObjective`.
        **kwargs: Arguments of `PPO`.

    Example:
        >>> GRPO().aggregation
        'sequence_mean'
    """

    def __init__(self, aggregation: str = "sequence_mean", **kwargs: Any) -> None:
        super().__init__(aggregation=aggregation, **kwargs)


class DrGRPO(PPO):
    """PPO's loss with each sequence divided by the same `length` (Dr. GRPO, arXiv 2503.20783).

    Use it with the advantage `GroupCentered`.

    Args:
        length: Tokens that each sequence is divided by, usually the longest response allowed.
        aggregation: See `PolicyObjective`.
        **kwargs: Arguments of `PPO`.

    Example:
        >>> objective = DrGRPO(length=1024)
    """

    def __init__(self, length: int, aggregation: str = "constant", **kwargs: Any) -> None:
        super().__init__(length=length, aggregation=aggregation, **kwargs)


class DAPO(PPO):
    """PPO's loss averaged over all tokens of the step, with a higher upper clip (DAPO, arXiv 2503.14476 eq. 8).

    Use it with the advantage `GroupCentered(scale: std)`.

    Args:
        clip_high: See `Clipped`.
        **kwargs: Arguments of `PPO`.

    Example:
        >>> DAPO().bounds
        (0.8, 1.28)
    """

    def __init__(self, clip_high: float = 0.28, **kwargs: Any) -> None:
        super().__init__(clip_high=clip_high, **kwargs)


class BNPO(PPO):
    """PPO's loss averaged over the tokens of the batch, as in TRL (arXiv 2506.02864). The batch is the optimizer step.

    Example:
        >>> BNPO().aggregation
        'token_mean'
    """


class ReinforcePlusPlus(PPO):
    """PPO's loss averaged over all tokens, for `GlobalWhitened` advantages (REINFORCE++, arXiv 2501.03262).

    Example:
        >>> ReinforcePlusPlus().aggregation
        'token_mean'
    """


class RLOO(Clipped):
    """The clipped surrogate with the whole response as one action, for `LeaveOneOut` advantages (`losses.rloo`).

    Args:
        aggregation: See `PolicyObjective`.
        **kwargs: Arguments of `Clipped`.

    Example:
        >>> RLOO().sequence_level
        True
    """

    sequence_level = True

    def __init__(self, aggregation: str = "sequence_mean", **kwargs: Any) -> None:
        super().__init__(aggregation=aggregation, **kwargs)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """The response's ratio at all its tokens, `[B, T]`."""
        return sequence_ratio(logprobs, old_logprobs, loss_mask, normalized=False)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """True at all tokens of a response whose log-ratio is clamped to ±20, bool `[B, T]`."""
        return beyond(sequence_log_ratio(logprobs, old_logprobs, loss_mask, normalized=False)) & (loss_mask != 0)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.rloo(logprobs, old_logprobs, advantages, loss_mask, self.clip_low, self.clip_high)


class GSPO(Clipped):
    """The clipped surrogate with a length-normalized sequence ratio (`losses.gspo`).

    Args:
        clip_low: See `Clipped`. The ratio is a geometric mean over the sequence, so its bounds are far narrower than
            those of a token ratio.
        clip_high: See `Clipped`.
        aggregation: See `PolicyObjective`.
        **kwargs: Arguments of `PolicyObjective`.

    Example:
        >>> GSPO().bounds
        (0.9997, 1.0004)
    """

    sequence_level = True

    def __init__(
        self, clip_low: float = 3e-4, clip_high: float = 4e-4, aggregation: str = "sequence_mean", **kwargs: Any
    ) -> None:
        super().__init__(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation, **kwargs)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """The geometric mean of the response's token ratios at all its tokens, `[B, T]`."""
        return sequence_ratio(logprobs, old_logprobs, loss_mask, normalized=True)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """True at all tokens of a response whose log-ratio is clamped to ±20, bool `[B, T]`."""
        return beyond(sequence_log_ratio(logprobs, old_logprobs, loss_mask, normalized=True)) & (loss_mask != 0)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.gspo(logprobs, old_logprobs, advantages, loss_mask, self.clip_low, self.clip_high)


class CISPO(PolicyObjective):
    """CISPO: clips the importance weight and keeps the gradient of every token (`losses.cispo`).

    Args:
        ratio_min: Lower bound of a token's weight.
        ratio_max: Upper bound of a token's weight.
        **kwargs: Arguments of `PolicyObjective`.

    Example:
        >>> CISPO(ratio_max=5.0).bounds
        (0.0, 5.0)
    """

    def __init__(self, ratio_min: float = 0.0, ratio_max: float = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bounds = _bounds(ratio_min, ratio_max)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.cispo(logprobs, old_logprobs, advantages, loss_mask, *self.bounds)


class DRO(PolicyObjective):
    """DRO: a policy gradient with a squared log-ratio penalty in place of clipping (`losses.dro`).

    Args:
        beta: Weight of the squared log-ratio, in reward units; above 0.
        **kwargs: Arguments of `PolicyObjective`.

    Raises:
        ValueError: If `beta` is not above 0.

    Example:
        >>> DRO(beta=0.1).beta
        0.1
    """

    def __init__(self, beta: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if beta <= 0:
            raise ValueError(
                f"beta is {beta}; it must be above 0, or nothing keeps the policy close to the one that sampled"
            )
        self.beta = beta

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.dro(logprobs, old_logprobs, advantages, loss_mask, self.beta)


class SAPO(PolicyObjective):
    """SAPO: a sigmoid gate in place of a hard clip (`losses.sapo`).

    Args:
        temperature_positive: τ where the advantage is positive: how fast the gate closes as the ratio leaves 1.
        temperature_negative: τ where the advantage is negative.
        aggregation: See `PolicyObjective`.
        **kwargs: Arguments of `PolicyObjective`.

    Raises:
        ValueError: If a temperature is not above 0.

    Example:
        >>> SAPO().temperatures
        (1.0, 1.05)
    """

    def __init__(
        self,
        temperature_positive: float = 1.0,
        temperature_negative: float = 1.05,
        aggregation: str = "sequence_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(aggregation=aggregation, **kwargs)
        if min(temperature_positive, temperature_negative) <= 0:
            raise ValueError("the temperatures of SAPO must be above 0")
        self.temperatures = temperature_positive, temperature_negative

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.sapo(logprobs, old_logprobs, advantages, loss_mask, *self.temperatures)


class ImportanceWeights:
    """Correction for tokens sampled from another distribution: a stale policy, another engine, or another precision.

    With it, `PolicyRLModule` recomputes log-probabilities at the start of each round. The loss's ratio is taken to
    those, and this weight corrects from those to the sampler's (`importance_weights`).

    Args:
        level: `token` or `sequence`.
        mode: `truncate` clamps weights to the bounds; `mask` drops tokens whose weight is outside them.
        low: Lower bound of the weight, at most 1.
        high: Upper bound of the weight, at least 1.

    Raises:
        ValueError: If `level`, `mode` or the bounds are invalid.

    Example:
        >>> import torch
        >>> weights = ImportanceWeights(mode="truncate", high=2.0)
        >>> weights(torch.tensor([[0.0, -1.0]]), torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2))
        tensor([[2., 1.]])
    """

    def __init__(self, level: str = "token", mode: str = "truncate", low: float = 0.0, high: float = 2.0) -> None:
        if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
            raise ValueError(f"level {level!r} must be 'token' or 'sequence', mode {mode!r} 'truncate' or 'mask'")
        _bounds(low, high)
        self.options: dict[str, Any] = {"level": level, "mode": mode, "low": low, "high": high}

    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """Compute the weights.

        Args:
            old_logprobs: The trainer's at the start of the round, in nats, `[B, T]`.
            sampling_logprobs: The sampler's, in nats, `[B, T]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

        Returns:
            Factors for the per-token loss, `[B, T]`, without gradient.
        """
        return importance_weights(old_logprobs, sampling_logprobs, loss_mask, **self.options)
