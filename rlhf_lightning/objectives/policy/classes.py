"""Policy objectives: the losses with their options and aggregation, as `PolicyRLModule(objective=...)` takes them."""

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
    """A policy loss with its options and its aggregation, for `PolicyRLModule(objective=...)`.

    Args:
        aggregation: a mode of `objectives.aggregate`.
        length: tokens per sequence, for `constant`.
    """

    corrects = True
    """Whether a ratio or an anchor keeps the loss right once the policy has moved: several epochs need that."""
    bounds: tuple[float, float] = (0.0, inf)
    """Of the ratio; outside of them a token is clipped."""
    whole_response = False
    """Whether the response is one action: then all its tokens have one advantage."""

    def __init__(self, aggregation: str = "token_mean", length: int | None = None) -> None:
        if aggregation not in MODES:
            raise ValueError(f"aggregation is {aggregation!r}; one of {', '.join(MODES)}")
        if aggregation == "constant" and not length:
            raise ValueError("aggregation 'constant' needs length, the tokens each sequence is divided by")
        if length is not None and (length < 1 or aggregation != "constant"):
            raise ValueError(f"length is {length}; the tokens (at least 1) that aggregation 'constant' divides by")
        self.aggregation, self.length = aggregation, length

    @abstractmethod
    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The ratio that the loss uses, `[B, T]`."""
        return token_ratio(logprobs, old_logprobs, mask)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Where the logarithm of that ratio is cut off at ±20, bool `[B, T]`."""
        return beyond(token_log_ratio(logprobs, old_logprobs, mask))

    def clipped(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """1 at the tokens whose update the bounds cut off, `[B, T]`."""
        ratio, (low, high) = self.ratio(logprobs, old_logprobs, mask), self.bounds
        cut = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
        return cut * mask


def _bounds(low: float, high: float) -> tuple[float, float]:
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"the ratio would be kept in [{low}, {high}]: that must hold 1, and nothing below 0")
    return low, high


class Reinforce(PolicyObjective):
    """The `reinforce` loss: no ratio and no clip, for one pass over what the policy itself has just drawn."""

    corrects = False

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.reinforce(logprobs, old_logprobs, advantages, mask)


class ImportanceSampling(PolicyObjective):
    """The `importance_sampling` loss."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.importance_sampling(logprobs, old_logprobs, advantages, mask)


class Clipped(PolicyObjective):
    """A loss whose ratio is clipped.

    Args:
        clip_low: the ratio is cut off below 1 - clip_low where the advantage is negative.
        clip_high: and above 1 + clip_high where it is positive.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (0 <= clip_low <= 1 and clip_high >= 0):
            raise ValueError(f"clip_low is {clip_low} (0 to 1), clip_high {clip_high} (0 or more): bounds must hold 1")
        self.bounds = _bounds(1 - clip_low, 1 + clip_high)
        self.clip_low, self.clip_high = clip_low, clip_high


class PPO(Clipped):
    """The `ppo` loss.

    Args:
        clip_low: see `Clipped`.
        clip_high: see `Clipped`.
        dual_clip: the ratio is also cut off here where the advantage is negative; none by default, 3 in the paper.
    """

    def __init__(
        self, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(clip_low, clip_high, **kwargs)
        if dual_clip is not None and not dual_clip > 1 + self.clip_high:
            raise ValueError(f"dual_clip is {dual_clip}; it must be above 1 + clip_high ({1 + self.clip_high})")
        self.dual_clip = dual_clip

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.ppo(logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high, self.dual_clip)

    def clipped(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The dual clip's too, `[B, T]`."""
        cut = super().clipped(logprobs, old_logprobs, advantages, mask)
        if self.dual_clip is None:
            return cut
        return cut + (self.ratio(logprobs, old_logprobs, mask) > self.dual_clip) * (advantages < 0) * mask


class GRPO(PPO):
    """PPO's loss, averaged over each sequence first (arXiv 2402.03300 eq. 3); with `GroupCentered(scale: std)`."""

    def __init__(self, aggregation: str = "sequence_mean", **kwargs: Any) -> None:
        super().__init__(aggregation=aggregation, **kwargs)


class DrGRPO(PPO):
    """PPO's loss, each sequence divided by the same `length` (arXiv 2503.20783); with `GroupCentered`."""

    def __init__(self, length: int, aggregation: str = "constant", **kwargs: Any) -> None:
        super().__init__(length=length, aggregation=aggregation, **kwargs)


class DAPO(PPO):
    """PPO's loss over all tokens of the step, clipped higher (arXiv 2503.14476 eq. 8); `GroupCentered(scale: std)`."""

    def __init__(self, clip_high: float = 0.28, **kwargs: Any) -> None:
        super().__init__(clip_high=clip_high, **kwargs)


class BNPO(PPO):
    """PPO's loss over the tokens of the batch, as in TRL (arXiv 2506.02864); the batch is the optimizer step."""


class ReinforcePlusPlus(PPO):
    """PPO's loss over all tokens, with `GlobalWhitened` advantages (REINFORCE++, arXiv 2501.03262)."""


class RLOO(Clipped):
    """The `rloo` loss: the response is one action; with `LeaveOneOut`."""

    whole_response = True

    def __init__(self, aggregation: str = "sequence_mean", **kwargs: Any) -> None:
        super().__init__(aggregation=aggregation, **kwargs)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Of the whole response, `[B, T]`."""
        return sequence_ratio(logprobs, old_logprobs, mask, normalised=False)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """All tokens of such a response, bool `[B, T]`."""
        return beyond(sequence_log_ratio(logprobs, old_logprobs, mask, normalised=False)) & (mask != 0)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.rloo(logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high)


class GSPO(Clipped):
    """The `gspo` loss.

    Args:
        clip_low: see `Clipped`; the ratio is the geometric mean over the sequence, so that bounds are far narrower.
        clip_high: see `Clipped`.
    """

    whole_response = True

    def __init__(
        self, clip_low: float = 3e-4, clip_high: float = 4e-4, aggregation: str = "sequence_mean", **kwargs: Any
    ) -> None:
        super().__init__(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation, **kwargs)

    def ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The mean of the response's, `[B, T]`."""
        return sequence_ratio(logprobs, old_logprobs, mask, normalised=True)

    def clamped(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """All tokens of such a response, bool `[B, T]`."""
        return beyond(sequence_log_ratio(logprobs, old_logprobs, mask, normalised=True)) & (mask != 0)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.gspo(logprobs, old_logprobs, advantages, mask, self.clip_low, self.clip_high)


class CISPO(PolicyObjective):
    """The `cispo` loss.

    Args:
        ratio_min: the weight of a token is no less.
        ratio_max: and no more.
    """

    def __init__(self, ratio_min: float = 0.0, ratio_max: float = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bounds = _bounds(ratio_min, ratio_max)

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.cispo(logprobs, old_logprobs, advantages, mask, *self.bounds)


class DRO(PolicyObjective):
    """The `dro` loss.

    Args:
        beta: weight of the squared log-ratio, in reward units.
    """

    def __init__(self, beta: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not beta > 0:
            raise ValueError(f"beta is {beta}; it must be above 0, or nothing keeps the policy near the one that drew")
        self.beta = beta

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.dro(logprobs, old_logprobs, advantages, mask, self.beta)


class SAPO(PolicyObjective):
    """The `sapo` loss.

    Args:
        temperature_positive: how fast the gate closes as the ratio leaves 1, where the advantage is positive.
        temperature_negative: the same where it is negative.
    """

    def __init__(
        self,
        temperature_positive: float = 1.0,
        temperature_negative: float = 1.05,
        aggregation: str = "sequence_mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(aggregation=aggregation, **kwargs)
        if not (temperature_positive > 0 and temperature_negative > 0):
            raise ValueError("the temperatures of SAPO must be above 0")
        self.temperatures = temperature_positive, temperature_negative

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Per-token loss `[B, T]`."""
        return losses.sapo(logprobs, old_logprobs, advantages, mask, *self.temperatures)


class ImportanceWeights:
    """Weights of tokens that another distribution drew: a stale policy, another engine, another precision.

    The loss's ratio is then to the trainer's own log-probabilities at the start of the round, computed again, and the
    weight corrects from these to the sampler's (`importance_weights`).

    Args:
        level: `token` or `sequence`.
        mode: `truncate` to the bounds, or `mask` what is outside.
        low: bound of the weight.
        high: bound of the weight.
    """

    def __init__(self, level: str = "token", mode: str = "truncate", low: float = 0.0, high: float = 2.0) -> None:
        if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
            raise ValueError(f"level {level!r} must be 'token' or 'sequence', mode {mode!r} 'truncate' or 'mask'")
        _bounds(low, high)
        self.options: dict[str, Any] = {"level": level, "mode": mode, "low": low, "high": high}

    def __call__(self, old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
        """`[B, T]`."""
        return importance_weights(old_logprobs, sampler_logprobs, mask, **self.options)
