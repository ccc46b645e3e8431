"""The base class of `data.filter`, which leaves out rows before they are rendered, and the counts of what it found."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Protocol, TypedDict

from rlhf_lightning.data.records import LocatedRow
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.imports import imported
from rlhf_lightning.settings import Settings
from rlhf_lightning.types import JSON, FilterDecision

log = logging.getLogger(__name__)
CHUNK = 512
"""Number of rows that are decided together."""


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

    def check_streaming(self, workers: int) -> None:
        """Raise `ConfigError` if the filter cannot decide about streamed rows, one at a time and again after a resume.

        Args:
            workers: Number of forked processes per rank that read rows; 0 if the training process does.
        """


def row_filter_of(chosen: JSON) -> RowFilter | None:
    """The filter that a config names; None without one.

    Args:
        chosen: The value of `data.filter`, with `class_path` and `init_args`.

    Raises:
        ConfigError: If the filter cannot be made.
    """
    if not chosen:
        return None
    settings = chosen if isinstance(chosen, dict) else {"class_path": chosen}
    given = settings.get("init_args")
    arguments = given if isinstance(given, dict) else {}
    kind = imported(str(settings.get("class_path")), "data.filter")
    try:
        made: RowFilter = kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"data.filter: init_args do not fit {settings.get('class_path')}: {error}") from error
    return made


def filter_fingerprint(chosen: JSON) -> str | None:
    """The fingerprint of the filter that a config names, see `row_filter_of`; None without one."""
    row_filter = row_filter_of(chosen)
    return None if row_filter is None else row_filter.fingerprint()


class FilterTotals(TypedDict):
    """What a filter found in a source, as plain values for records and checkpoints; see `FilterCounts`."""

    rows: int
    marked: int
    dropped: int
    rules: dict[str, int]


@dataclass
class FilterCounts:
    """What a filter found in a source.

    Args:
        rows: Number of rows that it looked at.
        marked: Number of rows that are kept although a rule matches.
        dropped: Number of rows that are left out.
        rules: Number of rows by rule; a row counts for each rule that it matches.

    Example:
        >>> FilterCounts(rows=10, dropped=3).kept
        7
    """

    rows: int = 0
    marked: int = 0
    dropped: int = 0
    rules: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Number of rows that are not left out."""
        return self.rows - self.dropped

    @classmethod
    def sum(cls, totals: "Iterable[FilterTotals]") -> "FilterCounts":
        """The counts of several readers of a source.

        Args:
            totals: The counts of each.
        """
        found = cls()
        for one in totals:
            found.rows, found.marked = found.rows + one["rows"], found.marked + one["marked"]
            found.dropped += one["dropped"]
            found.rules.update(one["rules"])
        return found

    def add(self, decision: FilterDecision) -> None:
        """Count a row."""
        self.rows += 1
        self.rules.update(decision.rules)
        self.dropped += decision.action == "drop"
        self.marked += bool(decision.matches) and decision.action == "mark"

    def __str__(self) -> str:
        rules = "".join(f"; rule {rule}: {count}" for rule, count in self.rules.items())
        return f"{self.rows} rows, {self.dropped} dropped, {self.marked} marked{rules}"

    def totals(self) -> FilterTotals:
        """The counts as plain values."""
        return {"rows": self.rows, "marked": self.marked, "dropped": self.dropped, "rules": dict(self.rules)}

    def as_json(self) -> dict[str, JSON]:
        """The counts, for records and the model card."""
        return {**vars(self), "rules": {**self.rules}}


class CountingFilter:
    """A filter at work: it leaves out rows of the sources of `data.train`, and counts them.

    Args:
        row_filter: The filter.
        columns: `data.columns`.

    Attributes:
        counts: What it found in each source, by name.

    Example:
        >>> counting = CountingFilter(RuleFilter("rules.yaml"), columns=None)  # doctest: +SKIP
        >>> rows = list(counting.kept(rows, "data.train"))  # doctest: +SKIP
    """

    def __init__(self, row_filter: RowFilter, columns: Mapping[str, str | None] | None) -> None:
        self._filter, self.columns = row_filter, columns
        self.counts: dict[str, FilterCounts] = {}

    @cached_property
    def _decider(self) -> RowDecider:
        """Built for the first row, because rows from a cache are not decided again."""
        return self._filter.build()

    def decide(self, rows: Sequence[LocatedRow]) -> list[FilterDecision]:
        """A decision for each row.

        Args:
            rows: The rows.

        Raises:
            DataError: If a row is blocked.
        """
        decisions = self._decider.decide(rows, self.columns)
        for row, decision in zip(rows, decisions, strict=True):
            if decision.action == "block":
                raise DataError(
                    f"{row.where}: data.filter blocks this row ({decision.summary}). Remove it from the data, or "
                    "change the action of the rule: drop leaves such rows out"
                )
        return decisions

    def kept(self, rows: Iterable[LocatedRow], name: str) -> Iterator[LocatedRow]:
        """The rows of a source that are not dropped; the log has the counts once all are read.

        Args:
            rows: The rows.
            name: Name of the source.

        Raises:
            DataError: If a row is blocked, or all are dropped.
        """
        counts, dropped, left = FilterCounts(), "", iter(rows)
        while chunk := list(islice(left, CHUNK)):
            for row, decision in zip(chunk, self.decide(chunk), strict=True):
                counts.add(decision)
                if decision.action == "drop":
                    dropped = dropped or f"{row.where} ({decision.summary})"
                else:
                    yield row
        if not counts.kept:
            raise DataError(f"data.filter drops all {counts.rows} rows of {name}; the first is {dropped}")
        self.counts[name] = counts
        log.info("data.filter: %s: %s%s", name, counts, f". The first dropped row is {dropped}" if dropped else "")

    @property
    def dropped(self) -> int:
        """Number of rows that were left out of all sources."""
        return sum(counts.dropped for counts in self.counts.values())
