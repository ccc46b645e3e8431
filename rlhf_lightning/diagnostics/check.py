"""Base classes of the checks, each of which detects one failure of policy RL in the curves of a run."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from rlhf_lightning.diagnostics.curves import RECENT, Curves
from rlhf_lightning.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_lightning.modules.policy_rl import PolicyRLModule

Numbers = dict[str, float]


class Check(ABC):
    """Detects a failure in the curves of a run.

    Args:
        rounds: Number of rounds to consider. Checks use medians, so that a single outlier has no effect.

    Raises:
        ConfigError: If `rounds` is out of range.

    Example:
        >>> class LongResponses(Check):
        ...     name, watched = "long_responses", ("response_tokens",)
        ...     def severity(self, curves):
        ...         level = curves.level("response_tokens", self.rounds)
        ...         return None if level is None else level / 1000
        ...     def numbers(self, curves):
        ...         return {"response_tokens": curves.level("response_tokens", self.rounds)}
        >>> LongResponses(rounds=1)(Curves.of(response_tokens=[2000.0]))
        'long_responses (response_tokens 2000).  '
    """

    name = ""
    watched: tuple[str, ...] = ()
    """Names of the curves that the check reads."""
    meaning = ""
    """Sentence of the warning about what the numbers mean."""
    remedy = ""
    """Sentence of the warning about what usually helps."""

    def __init__(self, rounds: int = 5) -> None:
        if not 1 <= rounds <= RECENT:
            raise ConfigError(f"{type(self).__name__}.rounds is {rounds}; it must be between 1 and {RECENT}")
        self.rounds = rounds

    def applies(self, module: "PolicyRLModule") -> bool:
        """True if the check is meaningful for the episodes of a module."""
        return True

    def fitted(self, module: "PolicyRLModule") -> "Check":
        """The check with the limits that suit a module; by default the check itself.

        Args:
            module: A module with a Trainer.
        """
        return self

    @abstractmethod
    def severity(self, curves: Curves) -> float | None:
        """Severity of the failure: at least 1 if it occurs, below 0.8 if not, None if it cannot be decided yet."""

    @abstractmethod
    def numbers(self, curves: Curves) -> Numbers:
        """The numbers that the decision is based on, by name."""

    def message(self, curves: Curves) -> str:
        """The warning: the numbers, what they mean, and the usual remedy."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers(curves).items())
        return f"{self.name} ({shown}). {self.meaning} {self.remedy}"

    def __call__(self, curves: Curves) -> str | None:
        """The warning if the failure occurs, else None."""
        severity = self.severity(curves)
        return self.message(curves) if severity is not None and severity >= 1 else None


class MedianAbove(Check):
    """Warns if the median of the last rounds of a curve is above `limit`.

    Example:
        >>> class Long(MedianAbove):
        ...     name, watched, limit = "long", ("response_tokens",), 1000.0
        >>> Long(rounds=1).severity(Curves.of(response_tokens=[2000.0]))
        2.0
    """

    limit: float

    def severity(self, curves: Curves) -> float | None:
        level = curves.level(self.watched[0], self.rounds)
        return None if level is None else level / self.limit

    def numbers(self, curves: Curves) -> Numbers:
        name = self.watched[0]
        return {name: curves[name].level(self.rounds) or 0.0, "limit": self.limit}


class SinceStart(Check):
    """Compares the median of the last rounds of the last curve in `watched` with the mean of as many first rounds.

    Example:
        >>> class Shrinking(SinceStart):
        ...     name, watched = "shrinking", ("response_tokens",)
        ...     def severity(self, curves):
        ...         start, now = self.levels(curves)
        ...         return start / now / 2
        >>> Shrinking(rounds=1).severity(Curves.of(response_tokens=[40.0, 10.0]))
        2.0
    """

    def levels(self, curves: Curves) -> tuple[float, float] | None:
        """The levels at the start and now; None before there are enough rounds."""
        start, now = (at(self.watched[-1], self.rounds) for at in (curves.start, curves.level))
        return None if start is None or now is None else (start, now)

    def numbers(self, curves: Curves) -> Numbers:
        start, now = self.levels(curves) or (0.0, 0.0)
        return {f"{self.watched[-1]}_at_first": start, self.watched[-1]: now}


def positive(check: Check, name: str, value: float) -> float:
    """Return a setting of a check after checking that it is above 0.

    Args:
        check: The check.
        name: Name of the setting.
        value: Its value.

    Raises:
        ConfigError: If it is not above 0.
    """
    if not value > 0:
        raise ConfigError(f"{type(check).__name__}.{name} is {value}; it must be above 0")
    return value
