"""The base class of `data.filter`, which leaves out rows before they are rendered, and the counts of what it found."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_lightning.data.records import LocatedRow
from rlhf_lightning.errors import DataError
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import JSON, FilterDecision

log = logging.getLogger(__name__)


class RowDecider(Protocol):
    """Decides about rows; what the `build` of a `RowFilter` returns."""

    def decide(self, rows: Sequence[LocatedRow], columns: Mapping[str, str | None] | None) -> list[FilterDecision]:
        """A decision for each row.

        Args:
            rows: The rows.
            columns: `data.columns`.
        """


class RowFilter(Settings):
    """Base class of `data.filter`; `rlhf_lightning.filtering.RuleFilter` is the one of this package.

    Example:
        See `rlhf_lightning.filtering.RuleFilter`.
    """

    def build(self) -> RowDecider:
        """Load what the filter needs; called once for each source that is filtered."""
        raise NotImplementedError(f"{type(self).__name__} does not implement build")

    def fingerprint(self) -> str:
        """SHA-256 of everything that its decisions depend on, so that a run is not resumed with another filter."""
        raise NotImplementedError(f"{type(self).__name__} does not implement fingerprint")


@dataclass
class FilterCounts:
    """What a filter found in a source.

    Args:
        rows: Number of rows that it looked at.

    Example:
        >>> FilterCounts(rows=10).kept
        10
    """

    rows: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    """Number of rows by action; `pass` is not counted."""
    rules: Counter[str] = field(default_factory=Counter)
    """Number of rows by rule; a row counts for each rule that it matches."""

    @property
    def kept(self) -> int:
        """Number of rows that are not removed."""
        return self.rows - self.actions["drop"] - self.actions["block"]

    def add(self, decision: FilterDecision) -> None:
        """Count a row."""
        self.rows += 1
        self.rules.update(decision.rules)
        if decision.matches:
            self.actions[decision.action] += 1

    def __str__(self) -> str:
        rules = "".join(f"; rule {rule}: {count}" for rule, count in self.rules.items())
        return f"{self.rows} rows, {self.actions['drop']} dropped, {self.actions['mark']} marked{rules}"

    def as_json(self) -> dict[str, JSON]:
        """The counts, for records and the model card."""
        rules: dict[str, JSON] = {**self.rules}
        return {"rows": self.rows, "marked": self.actions["mark"], "dropped": self.actions["drop"], "rules": rules}


def filtered(
    sources: Sequence[Sequence[LocatedRow]],
    names: Sequence[str],
    row_filter: RowFilter,
    columns: Mapping[str, str | None] | None,
) -> tuple[list[list[LocatedRow]], dict[str, FilterCounts]]:
    """Leave out the rows that a filter drops.

    Args:
        sources: The rows of each source.
        names: Name of each source.
        row_filter: The filter.
        columns: `data.columns`.

    Returns:
        The other rows of each source, and the counts by source.

    Raises:
        DataError: If a row is blocked, or a source has no row left.
    """
    decider = row_filter.build()
    kept: list[list[LocatedRow]] = []
    counted: dict[str, FilterCounts] = {}
    for name, rows in zip(names, sources, strict=True):
        counts, dropped = FilterCounts(), ""
        kept.append([])
        for row, decision in zip(rows, decider.decide(rows, columns), strict=True):
            counts.add(decision)
            if decision.action == "block":
                raise DataError(
                    f"{row.where}: data.filter blocks this row ({decision.summary}). Remove it from the data, or "
                    "change the action of the rule: drop leaves such rows out"
                )
            if decision.action == "drop":
                dropped = dropped or f"{row.where} ({decision.summary})"
            else:
                kept[-1].append(row)
        if not kept[-1]:
            raise DataError(f"data.filter drops all {len(rows)} rows of {name}; the first is {dropped}")
        counted[name] = counts
        log.info("data.filter: %s: %s%s", name, counts, f". The first dropped row is {dropped}" if dropped else "")
    return kept, counted
