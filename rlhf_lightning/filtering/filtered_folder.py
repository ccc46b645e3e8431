"""The folder of `rlhf filter apply`: rows that are kept, rows that are removed, and a summary that is written last."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rlhf_lightning.data.records import LocatedRow, Reading, fingerprint, located, read_rows, rename_columns
from rlhf_lightning.data.row_filter import FilterCounts, RowDecider
from rlhf_lightning.data.tables import Cells
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.files import FORMAT, is_file, read_record, real_path, replacing, write_json
from rlhf_lightning.types import JSON, FilterDecision, FilterMatch, Row

ROWS, REMOVED, SUMMARY = "rows.jsonl", "removed.jsonl", "summary.json"
MARKS = "filtered_by"
"""Column with the names of the rules that mark a row."""


class FilteredFolder:
    """A folder with the result of filtering files.

    `summary.json` says what the folder is made from. It is written first, without counts, and again at the end, so that
    an interrupted run is told from a finished one, and neither from files of somebody else.

    Args:
        folder: The folder.
        files: The files of rows, in order.
        inputs: What else the result depends on, for example the hash of the rules.

    Example:
        >>> FilteredFolder(Path("clean"), ["chats.jsonl"], {"rules": "…"}).finished()  # doctest: +SKIP
    """

    def __init__(self, folder: Path, files: Sequence[str], inputs: Mapping[str, JSON]) -> None:
        self.folder, self.files = folder, files
        self.inputs: dict[str, JSON] = {**inputs, "files": {file: fingerprint(file) for file in files}}
        results = {real_path(folder / name) for name in (ROWS, REMOVED, SUMMARY)}
        for file in files:
            if real_path(file) in results:
                raise ConfigError(f"{file} would be overwritten by the result in {folder}; give another --output")

    def finished(self, overwrite: bool = False) -> dict[str, JSON] | None:
        """The summary, if the folder has the result of the same inputs; None if it is to be made.

        Args:
            overwrite: Replace any earlier result.

        Raises:
            ConfigError: If the folder has a finished result of other inputs, or files without a summary.
        """
        there = [name for name in (ROWS, REMOVED, SUMMARY) if (self.folder / name).exists()]
        if overwrite or not there:
            return None
        if not is_file(self.folder / SUMMARY):
            raise ConfigError(f"{self.folder / there[0]} exists; give another --output, or replace it with --overwrite")
        summary = read_record(self.folder / SUMMARY)
        if summary.get("counts") is None:
            return None  # interrupted, or refused because of blocked rows
        if summary.get("inputs") != self.inputs:
            raise ConfigError(
                f"{self.folder} has the result of other files, rules or settings; give another --output, or replace it "
                "with --overwrite"
            )
        return summary

    def write(self, decider: RowDecider, columns: Mapping[str, str | None] | None) -> dict[str, JSON]:
        """Filter the files, and return the summary.

        Args:
            decider: Decides about rows.
            columns: See `RowDecider`.

        Raises:
            DataError: If a file cannot be read, or rows are blocked. No file of rows is then written.
        """
        record: dict[str, JSON] = {"format": FORMAT, "inputs": self.inputs}
        counts: dict[str, FilterCounts] = {}
        blocked: list[str] = []
        reading = Reading()
        only_rejected = 0
        with ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SUMMARY, record)
            rows_path, removed_path = (stack.enter_context(replacing(self.folder / name)) for name in (ROWS, REMOVED))
            kept_file, removed_file = (
                # An unpaired surrogate becomes its JSON escape.
                stack.enter_context(open(path, "w", encoding="utf-8", errors="backslashreplace"))
                for path in (rows_path, removed_path)
            )
            for file in self.files:
                rows = [_converted(row) for row in read_rows(file, "prompt", reading)]
                found = counts[file] = FilterCounts()
                for row, decision in zip(rows, decider.decide(rows, columns), strict=True):
                    found.add(decision)
                    if decision.action == "block":
                        blocked.append(f"{row.where} ({decision.summary})")
                    if decision.withheld:
                        removed_file.write(_line(_removed(file, row, decision)))
                        only_rejected += all(match.role == "rejected" for match in decision.matches)
                    else:
                        kept_file.write(_line(marked(row, decision)))
            if blocked:
                raise DataError(
                    f"{len(blocked)} rows are blocked, so nothing is written; the first: {'; '.join(blocked[:3])}. "
                    "Remove them from the data, or change the action of the rules: drop leaves such rows out"
                )
        record |= {
            "counts": {file: found.as_json() for file, found in counts.items()},
            "blank_lines": reading.blank,
            "only_rejected": only_rejected,
        }
        write_json(self.folder / SUMMARY, record)
        return record


def marked(row: LocatedRow, decision: FilterDecision) -> Row:
    """A row with the names of the rules that mark it, in addition to those of an earlier filter.

    Raises:
        DataError: If its column for them has something else.
    """
    if not decision.matches:
        return row.data
    earlier = row.data.get(MARKS) or []
    if not isinstance(earlier, list):
        raise DataError(f"{row.where}: the column {MARKS} is not a list of rules; rename it")
    return {**row.data, MARKS: [*earlier, *(rule for rule in decision.rules if rule not in earlier)]}


def match_json(match: FilterMatch) -> dict[str, JSON]:
    """A match as an object, without what it lacks."""
    found: dict[str, JSON] = {"rule": match.rule, "action": match.action, "text": match.text, "where": match.where}
    if match.score is not None:
        found["score"] = match.score
    if match.failure:
        found["failure"] = match.failure
    return found


def _converted(row: LocatedRow) -> LocatedRow:
    """A row with the cells of a table as numbers, messages or tools, which JSON lines can keep."""
    if not isinstance(row.data, Cells):
        return row
    with located(row.where):
        return rename_columns(row, None)


def _removed(file: str, row: LocatedRow, decision: FilterDecision) -> Row:
    matches: list[JSON] = [match_json(match) for match in decision.matches]
    return {"source": file, "where": row.where, "action": decision.action, "matches": matches, "row": row.data}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
