"""A filter of training data by a file of rules."""

from collections.abc import Mapping, Sequence

from rlhf_lightning.data.records import LocatedRow
from rlhf_lightning.data.row_filter import RowFilter
from rlhf_lightning.distributed import rank_count
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.filtering.filter import Filter
from rlhf_lightning.filtering.rows import row_texts
from rlhf_lightning.filtering.rule_file import fingerprint, read_rules
from rlhf_lightning.filtering.rules import Classifier, JudgeRule
from rlhf_lightning.types import FilterDecision


class RuleFilter(RowFilter):
    """Leaves out the rows of `data.train` that match rules: `data.filter` in a config.

    `drop` leaves a row out, `mark` only counts it, and `block` stops the run.

    Args:
        rules: File of rules; see `read_rules`.

    Raises:
        ConfigError: If the file is wrong.

    Example:
        >>> data = SFTDataModule("chats.jsonl", filter=RuleFilter("rules.yaml"))  # doctest: +SKIP
    """

    def __init__(self, rules: str) -> None:
        self.rules = rules
        self.parsed = read_rules(rules)

    def build(self) -> "RowChecks":
        if rank_count() > 1 and any(isinstance(rule, JudgeRule) for rule in self.parsed.rules):
            raise ConfigError(
                f"{self.rules} has a judge, which every rank would ask, and the answers may differ. Filter the data "
                f"once with rlhf filter apply {self.rules} FILE --output FOLDER, and train on FOLDER/rows.jsonl"
            )
        return RowChecks(self.parsed.build())

    def fingerprint(self) -> str:
        return fingerprint(self.rules)

    def check_streaming(self, workers: int) -> None:
        once = f"filter the data once with rlhf filter apply {self.rules} FILE --output FOLDER"
        if any(isinstance(rule, JudgeRule) for rule in self.parsed.rules):
            raise ConfigError(
                f"{self.rules} has a judge, which data.streaming would ask again in each epoch and after a resume, and "
                f"the answers may differ; {once}"
            )
        if workers and any(isinstance(rule, Classifier) for rule in self.parsed.rules):
            raise ConfigError(
                f"{self.rules} has a classifier, which cannot run in the forked processes of data.streaming.workers; "
                f"set data.streaming.workers: 0, or {once}"
            )

    def __str__(self) -> str:
        return self.rules


class RowChecks:
    """Decides about rows with a filter.

    Args:
        filter: The filter.

    Example:
        >>> checks = RowChecks(read_rules("rules.yaml").build())  # doctest: +SKIP
    """

    def __init__(self, filter: Filter) -> None:
        self.filter = filter

    def decide(
        self, rows: Sequence[LocatedRow], columns: Mapping[str, str | None] | None = None
    ) -> list[FilterDecision]:
        """See `RowDecider`."""
        return self.filter.check_rows([row_texts(row.data, row.where, columns) for row in rows])
