"""What a check is: one failure of policy RL, told from the curves of a run."""

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


class MedianAbove(Check):
    """The median of the last rounds of a curve is above a limit."""

    limit: float

    def severity(self, curves: Curves) -> float | None:
        level = curves.level(self.watched[0], self.rounds)
        return None if level is None else level / self.limit

    def numbers(self, curves: Curves) -> Numbers:
        name = self.watched[0]
        return {name: curves[name].level(self.rounds) or 0.0, "limit": self.limit}


class SinceStart(Check):
    """Compares the median of the last rounds of its last number with the mean of as many first ones."""

    def levels(self, curves: Curves) -> tuple[float, float] | None:
        """At the start, and now."""
        start, now = (at(self.watched[-1], self.rounds) for at in (curves.start, curves.level))
        return None if start is None or now is None else (start, now)

    def numbers(self, curves: Curves) -> Numbers:
        start, now = self.levels(curves) or (0.0, 0.0)
        return {f"{self.watched[-1]}_at_first": start, self.watched[-1]: now}


def positive(check: Check, name: str, value: float) -> float:
    if not value > 0:
        raise ConfigError(f"{type(check).__name__}.{name} is {value}; it must be above 0")
    return value
