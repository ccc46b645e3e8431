"""What can be seen to go wrong in the curves of policy RL: one small class for each failure."""

import math
from abc import ABC, abstractmethod
from typing import Any

from rlhf_lightning.diagnostics.curves import RECENT, Curves
from rlhf_lightning.errors import ConfigError

Numbers = dict[str, float]


class Check(ABC):
    """A failure, as a function of the curves of a run.

    Args:
        rounds: that the check looks at; one round in them that is unlike the others changes nothing.
    """

    name = ""
    watched: tuple[str, ...] = ()
    """The numbers whose curves it reads; without one of them it says nothing."""
    meaning = ""
    remedy = ""

    def __init__(self, rounds: int = 5) -> None:
        if not 1 <= rounds <= RECENT:
            raise ConfigError(f"{type(self).__name__}.rounds is {rounds}; between 1 and {RECENT}")
        self.rounds = rounds

    def applies(self, module: Any) -> bool:
        """Whether it makes sense of a module's episodes."""
        return True

    @abstractmethod
    def severity(self, curves: Curves) -> float | None:
        """1 or more: it happens. Below 0.8: it does not. None: cannot be told yet."""

    @abstractmethod
    def numbers(self, curves: Curves) -> Numbers:
        """What it was told from."""

    def message(self, curves: Curves) -> str:
        """The numbers, what they mean, and the usual remedy."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers(curves).items())
        return f"{self.name} ({shown}). {self.meaning} {self.remedy}"

    def __call__(self, curves: Curves) -> str | None:
        """The warning, if there is reason for one."""
        severity = self.severity(curves)
        return self.message(curves) if severity is not None and severity >= 1 else None


class _Above(Check):
    """The median of the last rounds of a curve is above a limit."""

    limit: float

    def severity(self, curves: Curves) -> float | None:
        level = curves.level(self.watched[0], self.rounds)
        return None if level is None else level / self.limit

    def numbers(self, curves: Curves) -> Numbers:
        name = self.watched[0]
        return {name: curves[name].level(self.rounds) or 0.0, "limit": self.limit}


class HighKL(_Above):
    """The policy is far from the reference.

    Learned rewards were over-optimized at some tens of nats a response (Stiennon et al. 2020, section 4.3; Gao et al.
    2023); a verifier can bear more.

    Args:
        limit: nats a response. rounds: of which the median is taken.
    """

    name, watched = "high_kl", ("kl",)
    meaning = "The policy is so far from the reference that a learned reward no longer knows what it scores."
    remedy = "Usual remedy: a higher kl coefficient, a lower learning rate, or an earlier stop."

    def __init__(self, limit: float = 50.0, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class NoSignal(_Above):
    """Most groups have one reward for all their responses.

    Args:
        limit: part of the groups. rounds: of which the median is taken.
    """

    name, watched = "no_signal", ("zero_variance_groups",)
    meaning = "In most groups all rewards are equal, so that their advantages are 0 and most of a round is wasted."
    remedy = (
        "Usual remedy: prompts that are neither too easy nor too hard, a larger group_size, a higher sampler "
        "temperature, a reward with more than two values, or dynamic sampling of groups with signal."
    )

    def __init__(self, limit: float = 0.8, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class Truncation(_Above):
    """Many responses run out of tokens.

    Args:
        limit: part of the episodes. rounds: of which the median is taken.
    """

    name, watched = "truncation", ("truncated",)
    meaning = "Many responses run out of tokens and are rewarded, or not, for what they did not finish saying."
    remedy = (
        "Usual remedy: a larger sampler.max_tokens, truncated_reward or overlong shaping; if it began high, SFT on "
        "conversations whose end token is trained."
    )

    def __init__(self, limit: float = 0.3, rounds: int = 5) -> None:
        super().__init__(rounds)
        self.limit = positive(self, "limit", limit)


class LogprobGap(_Above):
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


class WildRatios(_Above):
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


class Clipping(_Above):
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


class NotFinite(Check):
    """The last round's reward, loss, KL or entropy is NaN or infinite."""

    name, watched = "not_finite", ("loss", "reward", "kl", "entropy")
    meaning = "A number of training is not finite; the weights may be lost already."
    remedy = (
        "Usual remedy: resume from an earlier checkpoint with a lower learning rate, gradient_clip_val, and bf16 or "
        "float32 in place of 16-mixed; --trainer.detect_anomaly true finds where it began."
    )

    def __init__(self) -> None:
        super().__init__(rounds=1)

    def severity(self, curves: Curves) -> float | None:
        return float(bool(self.numbers(curves)))

    def numbers(self, curves: Curves) -> Numbers:
        newest = {name: curves[name].recent[-1] for name in self.watched if name in curves}
        return {name: value for name, value in newest.items() if value is not None and not math.isfinite(value)}


def positive(check: Check, name: str, value: float) -> float:
    if not value > 0:
        raise ConfigError(f"{type(check).__name__}.{name} is {value}; it must be above 0")
    return value
