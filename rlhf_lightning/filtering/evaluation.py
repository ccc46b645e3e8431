"""Measures a filter on labeled rows: false positives and negatives, precision and recall."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_lightning.data.records import LocatedRow
from rlhf_lightning.errors import DataError, short
from rlhf_lightning.objectives.intervals import wilson
from rlhf_lightning.types import JSON, FilterDecision


@dataclass
class Confusion:
    """Decisions by label. Positive is a row that the filter matches, whatever the action.

    Example:
        >>> counts = Confusion(true_positives=3, false_positives=1, false_negatives=0, true_negatives=6)
        >>> counts.precision, counts.recall, counts.false_positive_rate
        (0.75, 1.0, 0.14285714285714285)
    """

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0
    true_negatives: int = 0

    def add(self, is_unsafe: bool, is_matched: bool) -> None:
        """Count a row."""
        self.true_positives += is_unsafe and is_matched
        self.false_positives += is_matched and not is_unsafe
        self.false_negatives += is_unsafe and not is_matched
        self.true_negatives += not is_unsafe and not is_matched

    @property
    def precision(self) -> float | None:
        """Fraction of the matched rows that are unsafe; None if no row is matched."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        """Fraction of the unsafe rows that are matched; None if no row is unsafe."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def false_positive_rate(self) -> float | None:
        """Fraction of the safe rows that are matched; None if no row is safe."""
        return _ratio(self.false_positives, self.false_positives + self.true_negatives)

    def as_json(self) -> dict[str, JSON]:
        """Counts and rates, each rate with its 95% Wilson interval; None where a rate is not defined."""
        found: dict[str, JSON] = {
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "false_negatives": self.false_negatives,
            "true_negatives": self.true_negatives,
        }
        for name, rate, count in (
            ("precision", self.precision, self.true_positives + self.false_positives),
            ("recall", self.recall, self.true_positives + self.false_negatives),
            ("false_positive_rate", self.false_positive_rate, self.false_positives + self.true_negatives),
        ):
            low, high = (None, None) if rate is None else wilson(rate, count)
            found |= {name: rate, f"{name}_low": low, f"{name}_high": high}
        return found


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass
class FilterEvaluation:
    """How the decisions of a filter compare with labels.

    Attributes:
        overall: A row counts as matched if any rule matches it.
        rules: The same for each rule alone. The recall of a rule is the part of all unsafe rows that it finds.
        errors: The false positives and false negatives, in the order of the rows.

    Example:
        See `evaluate`.
    """

    overall: Confusion = field(default_factory=Confusion)
    rules: dict[str, Confusion] = field(default_factory=dict)
    errors: list[tuple[LocatedRow, bool, FilterDecision]] = field(default_factory=list)
    """Row, label and decision."""


def evaluate(
    rows: Sequence[LocatedRow], decisions: Sequence[FilterDecision], names: Sequence[str], column: str
) -> FilterEvaluation:
    """Compare decisions with labels.

    Args:
        rows: The rows.
        decisions: The filter's decision about each row. It must not have seen the column with the labels.
        names: Names of the rules.
        column: Column with the label: true or 1 for a row that should be matched, false or 0 for any other.

    Raises:
        DataError: If a row has no label.

    Example:
        >>> rows = [LocatedRow({"text": text, "unsafe": text == "spam"}, text) for text in ("spam", "ham")]
        >>> decisions = [FilterDecision((FilterMatch("spam", "drop", "spam"),)), FilterDecision()]
        >>> evaluate(rows, decisions, ["spam"], "unsafe").overall.recall
        1.0
    """
    found = FilterEvaluation(rules={name: Confusion() for name in names})
    for row, decision in zip(rows, decisions, strict=True):
        is_unsafe = _label(row, column)
        is_matched = bool(decision.matches)
        found.overall.add(is_unsafe, is_matched)
        for name, counts in found.rules.items():
            counts.add(is_unsafe, name in decision.rules)
        if is_unsafe != is_matched:
            found.errors.append((row, is_unsafe, decision))
    return found


def _label(row: LocatedRow, column: str) -> bool:
    value = row.data.get(column)
    known = {"1": True, "true": True, "0": False, "false": False}  # cells of CSV files are text
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    if value not in (0, 1):
        raise DataError(
            f"{row.where}: {column} is {short(value)}; it must be true (or 1) for a row that the filter should match, "
            "false (or 0) for any other. --label names another column"
        )
    return bool(value)
