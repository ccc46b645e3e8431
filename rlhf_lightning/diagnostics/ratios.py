"""Checks of importance ratios: disagreement of sampler and trainer, extreme ratios, and clipping."""

from typing import TYPE_CHECKING

from rlhf_lightning.diagnostics.check import Check, MedianAbove, Numbers, positive
from rlhf_lightning.diagnostics.curves import Curves
from rlhf_lightning.diagnostics.invariants import logprob_bound

if TYPE_CHECKING:
    from rlhf_lightning.modules.policy_rl import PolicyRLModule

SMALLEST_GAP = 0.02
"""Mean |log ratio| before the first update of a round that is a warning in every precision, in nats per token."""


class LogprobGap(MedianAbove):
    """Sampler and trainer disagree on the log-probabilities of sampled tokens.

    Args:
        limit: Mean |log ratio| before the first update of a round, in nats per token; by default 0.02 or, if it is
            larger, the bound of `models.precision.logprob_rounding` for the precision of the run.
        rounds: Number of rounds for the median.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> LogprobGap(limit=0.02, rounds=1).severity(Curves.of(logprob_gap=[0.04]))
        2.0
    """

    name, watched = "logprob_gap", ("logprob_gap",)
    meaning = (
        "Before the first update of a round, sampler and trainer already assign different probabilities to tokens."
    )
    remedy = (
        "Usual remedy: the same precision and weights in sampler and trainer, and no dropout; for an external engine, "
        "truncated or masked importance weights."
    )

    def __init__(self, limit: float | None = None, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", SMALLEST_GAP if limit is None else limit)
        self._given = limit is not None

    def fitted(self, module: "PolicyRLModule") -> "Check":
        if self._given:
            return self
        return LogprobGap(max(SMALLEST_GAP, logprob_bound(module) or 0.0), self.rounds)

    def applies(self, module: "PolicyRLModule") -> bool:
        # Recorded episodes, and those sampled with stale weights, differ by design.
        return module.samples_rollouts and not module.max_staleness


class WildRatios(MedianAbove):
    """The importance ratio of a token is extreme.

    Args:
        limit: Largest |log ratio| of a round, in nats; 5 is a ratio of 148.
        rounds: Number of rounds for the median.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> WildRatios(limit=5.0, rounds=1).severity(Curves.of(log_ratio_max=[10.0]))
        2.0
    """

    name, watched = "wild_ratios", ("log_ratio_max",)
    meaning = "The policy changes so much within a round that single tokens dominate the gradient or have none."
    remedy = "Usual remedy: fewer update_epochs, a lower learning rate, or an objective that clips or truncates ratios."

    def __init__(self, limit: float = 5.0, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class ClampedRatios(Check):
    """Log-ratios of the last round are beyond ±20, where the loss clamps them.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> ClampedRatios().severity(Curves.of(log_ratio_clamped=[0.01]))
        1.0
    """

    name, watched = "clamped_ratios", ("log_ratio_clamped",)
    meaning = (
        "The log-ratios of some tokens are beyond ±20 nats: the old or the reference log-probabilities come from stale "
        "or wrong weights, or the weights are damaged. These ratios are clamped and give no gradient."
    )
    remedy = (
        "Usual remedy: the same model, precision and temperature for sampler, recorded episodes and reference; or a "
        "lower learning rate, or an earlier checkpoint."
    )

    def __init__(self) -> None:
        super().__init__(rounds=1)

    def severity(self, curves: Curves) -> float | None:
        level = curves.level(self.watched[0], self.rounds)
        return None if level is None else float(level > 0)

    def numbers(self, curves: Curves) -> Numbers:
        return {self.watched[0]: curves[self.watched[0]].level(self.rounds) or 0.0}


class Clipping(MedianAbove):
    """The objective clips a large fraction of the tokens; 0.1 to 0.2 is usual for PPO.

    Args:
        limit: Fraction of the sampled tokens.
        rounds: Number of rounds for the median.

    Example:
        >>> from rlhf_lightning.diagnostics.curves import Curves
        >>> Clipping(limit=0.25, rounds=1).severity(Curves.of(clip_fraction=[0.5]))
        2.0
    """

    name, watched = "clipping", ("clip_fraction",)
    meaning = "Many tokens are clipped and give no gradient: the policy has moved too far from the one that sampled."
    remedy = "Usual remedy: a lower learning rate, fewer update_epochs, or larger mini-batches."

    def __init__(self, limit: float = 0.3, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)
