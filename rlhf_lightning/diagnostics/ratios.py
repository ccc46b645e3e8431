"""Sampler, trainer and updates disagree on log-probabilities: gaps, wild ratios, clipping."""

from typing import Any

from rlhf_lightning.diagnostics.check import Check, MedianAbove, Numbers, positive
from rlhf_lightning.diagnostics.curves import Curves


class LogprobGap(MedianAbove):
    """Sampler and trainer disagree on what was sampled.

    0.02 nats a token is what bf16 kernels of equal weights differ by at most in the mean.

    Args:
        limit: mean |log ratio| before the first update of a round. rounds: of which the median is taken.
    """

    name, watched = "logprob_gap", ("logprob_gap",)
    meaning = "Before any update of a round, trainer and sampler already give the sampled tokens other probabilities."
    remedy = (
        "Usual remedy: the same precision and weights in both, no dropout; where another engine samples by choice, "
        "truncated or masked importance weights."
    )

    def __init__(self, limit: float = 0.02, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)

    def applies(self, module: Any) -> bool:
        # What was recorded, or sampled with the weights of a round ago, is meant to differ.
        return getattr(module, "samples_rollouts", True) and not getattr(module, "staleness", 0)


class WildRatios(MedianAbove):
    """Some token's importance ratio is enormous.

    Args:
        limit: largest |log ratio| of a round, nats; 5 is a ratio of 148. rounds: of which the median is taken.
    """

    name, watched = "wild_ratios", ("log_ratio_max",)
    meaning = "Within a round the policy moves so far that single tokens outweigh all others, or count for nothing."
    remedy = "Usual remedy: fewer update_epochs, a lower learning rate, an objective that clips or truncates ratios."

    def __init__(self, limit: float = 5.0, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class ClampedRatios(Check):
    """Log ratios of the last round are beyond ±20, where the loss cuts them off."""

    name, watched = "clamped_ratios", ("log_ratio_clamped",)
    meaning = (
        "Log ratios of some tokens are beyond ±20 nats: the log-probabilities that they are measured from come from "
        "stale or wrong weights, or the weights are lost. Ratios are cut off there and give no gradient."
    )
    remedy = (
        "Usual remedy: check that sampler, recorded episodes and reference are of this model, precision and "
        "temperature; else a lower learning rate, or an earlier checkpoint."
    )

    def __init__(self) -> None:
        super().__init__(rounds=1)

    def severity(self, curves: Curves) -> float | None:
        level = curves.level(self.watched[0], self.rounds)
        return None if level is None else float(level > 0)

    def numbers(self, curves: Curves) -> Numbers:
        return {self.watched[0]: curves[self.watched[0]].level(self.rounds) or 0.0}


class Clipping(MedianAbove):
    """The objective clips much of what it is given; 0.1 to 0.2 is usual for PPO.

    Args:
        limit: part of the sampled tokens. rounds: of which the median is taken.
    """

    name, watched = "clipping", ("clip_fraction",)
    meaning = "Many tokens are clipped and give no gradient: the policy has moved too far from what sampled them."
    remedy = "Usual remedy: a lower learning rate, fewer update_epochs, larger mini-batches."

    def __init__(self, limit: float = 0.3, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)
