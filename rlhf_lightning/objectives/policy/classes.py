"""Policy objectives: a loss with its options and its aggregation, for `PolicyRLModule(objective=...)`."""

from abc import ABC, abstractmethod
from math import inf

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
from rlhf_lightning.settings import Settings


class PolicyObjective(Settings, ABC):
    """Base class of the policy losses with their options and aggregation.

    Subclasses implement `__call__`, which returns the per-token loss; `PolicyRLModule` aggregates it.

    Args:
        aggregation: A mode of `objectives.aggregate.aggregate`.
        length: Number of tokens that the aggregation `constant` divides each sequence by. With None, `PolicyRLModule`
            uses the sampler's `max_tokens`.

    Raises:
        ValueError: If `aggregation` is unknown, `length` is below 1, or `length` is given for an aggregation other
            than `constant`.

    Example:
        >>> class SquaredRatio(PolicyObjective):
        ...     def __call__(self, logprobs, old_logprobs, advantages, loss_mask):
        ...         return (self.ratio(logprobs, old_logprobs, loss_mask) - 1 - advantages).square() * loss_mask
        >>> SquaredRatio(aggregation="sequence_mean").aggregation
        'sequence_mean'
    """

    valid_off_policy = True
    """True if the loss is valid for tokens of an older policy, through a ratio or an anchor.

    Required for more than one update per round, and for recorded or stale episodes without importance weights.
    """
    bounds: tuple[float, float] = (0.0, inf)
    """Bounds of the ratio: a token that its advantage would push further beyond them is clipped."""
    sequence_level = False
    """True if a whole sequence (row) is one action, so that all its tokens must share one advantage."""

    def __init__(self, aggregation: str = "token_mean", length: int | None = None) -> None:
        if aggregation not in MODES:
            raise ValueError(f"aggregation is {aggregation!r}; it must be one of {', '.join(MODES)}")
        if length is not None and (aggregation != "constant" or length < 1):
            raise ValueError(f"length is {length}; it must be at least 1, and is only for aggregation 'constant'")
        self.aggregation, self.length = aggregation, length

    @abstractmethod
    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Compute the per-token loss.

        Args:
            logprobs: Log-probability of each token under the current policy, in nats, `[B, T]`.
            old_logprobs: The same under the policy at the start of the round, `[B, T]`.
            advantages: `[B, T]` or `[B, 1]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

        Returns:
            Loss to minimize, `[B, T]`, 0 where the mask is 0.
        """

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """The importance ratio that the loss uses, `[B, T]`.

        Args:
            logprobs: Log-probability of each token under the current policy, in nats, `[B, T]`.
            old_logprobs: The same under the policy at the start of the round, `[B, T]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        """
        return token_ratio(logprobs, old_logprobs, loss_mask)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """True where the logarithm of that ratio is clamped to ±20, bool `[B, T]`.

        Args:
            logprobs: Log-probability of each token under the current policy, in nats, `[B, T]`.
            old_logprobs: The same under the policy at the start of the round, `[B, T]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        """
        return beyond(token_log_ratio(logprobs, old_logprobs, loss_mask))

    def clipped(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """1 at tokens whose update the bounds clip, 0 elsewhere, `[B, T]`.

        Args:
            logprobs: Log-probability of each token under the current policy, in nats, `[B, T]`.
            old_logprobs: The same under the policy at the start of the round, `[B, T]`.
            advantages: `[B, T]` or `[B, 1]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.
        """
        ratio, (low, high) = self.ratio(logprobs, old_logprobs, loss_mask), self.bounds
        cut = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
        return cut * loss_mask


def _bounds(low: float, high: float) -> tuple[float, float]:
    """Return `(low, high)` after checking 0 ≤ low ≤ 1 ≤ high."""
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"the bounds of the ratio are [{low}, {high}]; they must contain 1 and not be negative")
    return low, high


def _clip_bounds(low: float, high: float) -> tuple[float, float]:
    """Return `(1 - low, 1 + high)` after checking that the bounds contain 1 and are not negative."""
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(
            f"clip_low is {low} and clip_high is {high}; clip_low must be in [0, 1], and clip_high at least 0"
        )
    return 1 - low, 1 + high


class Reinforce(PolicyObjective):
    """REINFORCE: no ratio and no clipping, for a single pass over freshly sampled responses (`losses.reinforce`).

    Args:
        aggregation: See `PolicyObjective`.
        length: See `PolicyObjective`.

    Example:
        >>> Reinforce(aggregation="sequence_mean").valid_off_policy
        False
    """

    valid_off_policy = False

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


class ClippedSurrogate(PolicyObjective):
    """The clipped surrogate loss of PPO (`losses.clipped_surrogate`).

    GRPO, Dr. GRPO, DAPO, REINFORCE++ and TRL's BNPO use it too. They differ in the clip, the aggregation, the advantage
    and the KL penalty; see the recipes of `PolicyRLModule`.

    Args:
        clip_low: Where the advantage is negative, the ratio is clipped below 1 - clip_low.
        clip_high: Where the advantage is positive, the ratio is clipped above 1 + clip_high.
        dual_clip: Where the advantage is negative, the ratio is also clipped above this; None for no such bound. The
            paper (arXiv 1912.09729) uses 3.
        aggregation: See `PolicyObjective`.
        length: See `PolicyObjective`.

    Raises:
        ValueError: If `clip_low` or `clip_high` is out of range, or `dual_clip` is not above 1 + clip_high.

    Example:
        >>> import torch
        >>> objective = ClippedSurrogate(clip_low=0.2, clip_high=0.28)
        >>> logprobs, old_logprobs = torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)
        >>> objective(logprobs, old_logprobs, advantages=torch.ones(1, 1), loss_mask=torch.ones(1, 2))
        tensor([[-1.2800, -1.0000]])
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        aggregation: str = "token_mean",
        length: int | None = None,
    ) -> None:
        super().__init__(aggregation, length)
        self.bounds = _clip_bounds(clip_low, clip_high)
        if dual_clip is not None and not dual_clip > 1 + clip_high:
            raise ValueError(f"dual_clip is {dual_clip}; it must be above 1 + clip_high ({1 + clip_high})")
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        clips = self.clip_low, self.clip_high, self.dual_clip
        return losses.clipped_surrogate(logprobs, old_logprobs, advantages, loss_mask, *clips)

    def clipped(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """1 at tokens whose update the bounds or the dual clip cut off, 0 elsewhere, `[B, T]`."""
        cut = super().clipped(logprobs, old_logprobs, advantages, loss_mask)
        if self.dual_clip is None:
            return cut
        return cut + (self.ratio(logprobs, old_logprobs, loss_mask) > self.dual_clip) * (advantages < 0) * loss_mask


class SequenceClippedSurrogate(PolicyObjective):
    """The clipped surrogate with the whole sequence as one action (`losses.sequence_clipped_surrogate`).

    Normalized it is the loss of GSPO, otherwise that of RLOO; see the recipes of `PolicyRLModule`.

    Args:
        normalized: If True, the ratio is the geometric mean of the sequence's token ratios, else their product.
        clip_low: See `ClippedSurrogate`. By default 3e-4 if normalized, since a mean stays near 1, else 0.2.
        clip_high: See `ClippedSurrogate`. By default 4e-4 if normalized, else 0.2.
        aggregation: See `PolicyObjective`.
        length: See `PolicyObjective`.

    Raises:
        ValueError: If `clip_low` or `clip_high` is out of range.

    Example:
        >>> SequenceClippedSurrogate().bounds
        (0.9997, 1.0004)
        >>> SequenceClippedSurrogate(normalized=False).bounds
        (0.8, 1.2)
    """

    sequence_level = True

    def __init__(
        self,
        normalized: bool = True,
        clip_low: float | None = None,
        clip_high: float | None = None,
        aggregation: str = "sequence_mean",
        length: int | None = None,
    ) -> None:
        super().__init__(aggregation, length)
        low, high = (3e-4, 4e-4) if normalized else (0.2, 0.2)
        self.normalized = normalized
        self.clip_low = low if clip_low is None else clip_low
        self.clip_high = high if clip_high is None else clip_high
        self.bounds = _clip_bounds(self.clip_low, self.clip_high)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """The sequence's ratio at all its tokens, `[B, T]`."""
        return sequence_ratio(logprobs, old_logprobs, loss_mask, self.normalized)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """True at all tokens of a sequence whose log-ratio is clamped to ±20, bool `[B, T]`."""
        return beyond(sequence_log_ratio(logprobs, old_logprobs, loss_mask, self.normalized)) & (loss_mask != 0)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        options = self.normalized, self.clip_low, self.clip_high
        return losses.sequence_clipped_surrogate(logprobs, old_logprobs, advantages, loss_mask, *options)


class CISPO(PolicyObjective):
    """CISPO: clips the importance weight and keeps the gradient of every token (`losses.cispo`).

    Args:
        ratio_min: Lower bound of a token's weight.
        ratio_max: Upper bound of a token's weight.
        aggregation: See `PolicyObjective`.
        length: See `PolicyObjective`.

    Example:
        >>> CISPO(ratio_max=5.0).bounds
        (0.0, 5.0)
    """

    def __init__(
        self,
        ratio_min: float = 0.0,
        ratio_max: float = 4.0,
        aggregation: str = "token_mean",
        length: int | None = None,
    ) -> None:
        super().__init__(aggregation, length)
        self.bounds = _bounds(ratio_min, ratio_max)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.cispo(logprobs, old_logprobs, advantages, loss_mask, *self.bounds)


class DRO(PolicyObjective):
    """DRO: a policy gradient with a squared log-ratio penalty in place of clipping (`losses.dro`).

    Args:
        beta: Weight of the squared log-ratio, in reward units; above 0.
        aggregation: See `PolicyObjective`.
        length: See `PolicyObjective`.

    Raises:
        ValueError: If `beta` is not above 0.

    Example:
        >>> DRO(beta=0.1).beta
        0.1
    """

    def __init__(self, beta: float = 0.05, aggregation: str = "token_mean", length: int | None = None) -> None:
        super().__init__(aggregation, length)
        if not beta > 0:
            raise ValueError(
                f"beta is {beta}; it must be above 0, because only the penalty keeps the policy close to the one that "
                "sampled the responses"
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
        length: See `PolicyObjective`.

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
        length: int | None = None,
    ) -> None:
        super().__init__(aggregation, length)
        if not (temperature_positive > 0 and temperature_negative > 0):
            raise ValueError(
                f"temperature_positive is {temperature_positive} and temperature_negative is {temperature_negative}; "
                "both must be above 0"
            )
        self.temperatures = temperature_positive, temperature_negative

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.sapo(logprobs, old_logprobs, advantages, loss_mask, *self.temperatures)


class ImportanceWeights(Settings):
    """Correction for tokens sampled from another distribution: a stale policy, another engine, or another precision.

    With it, `PolicyRLModule` recomputes the log-probabilities of all sampled tokens at the start of each round. They
    become the denominator of the loss's ratio, and these weights correct their difference from the log-probabilities of
    the sampler (`importance_weights`).

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
            raise ValueError(
                f"level is {level!r} and mode is {mode!r}; level must be 'token' or 'sequence', and mode 'truncate' or "
                "'mask'"
            )
        _bounds(low, high)
        self.level, self.mode, self.low, self.high = level, mode, low, high

    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """Compute the weights.

        Args:
            old_logprobs: Log-probabilities computed by the trainer at the start of the round, in nats, `[B, T]`.
            sampling_logprobs: Log-probabilities recorded by the sampler, in nats, `[B, T]`.
            loss_mask: 1 at the policy's tokens, 0 elsewhere, `[B, T]`.

        Returns:
            Factors for the per-token loss, `[B, T]`, without gradient.
        """
        options = self.level, self.mode, self.low, self.high
        return importance_weights(old_logprobs, sampling_logprobs, loss_mask, *options)
