"""The files of a labeling session: comparisons, decisions, and the pairs that people chose.

The folder `pairs.labeling` beside `pairs.jsonl` has three files. `comparisons.jsonl` has every comparison,
`decisions.jsonl` every decision and every undo. Both are only appended to, and each row is on the disk before it is
confirmed. `session.json` has the settings. `pairs.jsonl` follows from these files: a row is appended with each choice,
and the file is written again after an undo and at every start.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeGuard, TypeVar

from rlhf_lightning.data.records import Reading, RowError, convert_rows, read_rows
from rlhf_lightning.errors import ConfigError, short
from rlhf_lightning.files import FORMAT, as_json, is_file, read_record, write_json, write_text
from rlhf_lightning.labeling.comparisons import Comparison
from rlhf_lightning.run_folder import claim
from rlhf_lightning.types import JSON, Row

T = TypeVar("T")
log = logging.getLogger(__name__)
Choice = Literal["A", "B", "tie", "both_bad", "skip"]
CHOICES: tuple[Choice, ...] = ("A", "B", "tie", "both_bad", "skip")


def is_choice(text: JSON) -> TypeGuard[Choice]:
    """True if a value is one of `CHOICES`."""
    return text in CHOICES


@dataclass(frozen=True)
class Decision:
    """What an annotator decided about a comparison.

    Attributes:
        comparison: Id of the comparison.
        annotator: Name of the annotator.
        choice: What was chosen: `A` is the answer that was shown first.
        shown_first: Index of the answer that was shown as A, 0 or 1; the other one was B.
        seconds: Time from when the comparison was shown to the decision.
        note: Text that the annotator added.
        time: When the decision was made, in UTC.

    Example:
        >>> Decision("7c2f", "Ann", "A", shown_first=1, seconds=4.2).preferred
        1
    """

    comparison: str
    annotator: str
    choice: Choice
    shown_first: int
    seconds: float
    note: str = ""
    time: str = ""

    @property
    def preferred(self) -> int | None:
        """Index of the preferred answer; None for a tie, two bad answers, and a skip."""
        return {"A": self.shown_first, "B": 1 - self.shown_first}.get(self.choice)

    @property
    def verdict(self) -> int | None:
        """The decision without the order on the page: index of the preferred answer, 2 tie, 3 both bad, None skip."""
        return {"tie": 2, "both_bad": 3}.get(self.choice, self.preferred)


class Journal:
    """A file of JSON lines that is only appended to; a row is on the disk when `append` returns.

    A process that was killed while it wrote leaves a partial last line. It was never confirmed, and is removed when
    the file is opened.

    Args:
        path: The file.

    Example:
        >>> journal = Journal(Path("decisions.jsonl"))  # doctest: +SKIP
        >>> journal.append({"annotator": "Ann", "choice": "A"})  # doctest: +SKIP
    """

    def __init__(self, path: Path) -> None:
        is_file(path)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._file, self._size)
        _sync_folder(path.parent)

    def append(self, *rows: Mapping[str, object]) -> None:
        """Append rows and wait until they are on the disk.

        Args:
            *rows: The rows.

        Raises:
            OSError: If they cannot be written. The file is then as it was before.
        """
        lines = "".join(f"{as_json(row)}\n" for row in rows).encode()
        try:
            left = lines
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):  # the first error says more
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(lines)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class LabelStore:
    """The comparisons and decisions of a labeling session, in memory and on the disk.

    Args:
        out: The file of pairs.
        settings: Settings that all answers of the session share, such as models and sampling settings.
        ties: Write ties to the file of pairs, as rows with `tie: true`.

    Raises:
        ConfigError: If the file of pairs is not one of a labeling session, the session has other settings, or another
            process writes to it.

    Example:
        >>> store = LabelStore(Path("pairs.jsonl"), {"seed": 0})  # doctest: +SKIP
    """

    def __init__(self, out: Path, settings: Mapping[str, JSON], ties: bool = False) -> None:
        self.out, self.ties = out, ties
        self.folder = session_folder(out)
        new = not (self.folder / "session.json").exists()
        if new and os.path.lexists(out):
            raise ConfigError(
                f"{out} exists, but rlhf label did not write it: there is no {self.folder}. Give another file"
            )
        claim(self.folder, ("comparisons.jsonl", "decisions.jsonl", "session.json"))
        if new:
            write_json(self.folder / "session.json", {"format": FORMAT, "settings": dict(settings)})
        elif differing := _differing(read_record(self.folder / "session.json").get("settings"), settings):
            raise ConfigError(
                f"{self.folder} was begun with other settings ({differing}). Continue with the same settings, or give "
                "another --out"
            )
        self._comparisons = Journal(self.folder / "comparisons.jsonl")
        self._decisions = Journal(self.folder / "decisions.jsonl")
        self.comparisons, self.decisions = read_session(self.folder)
        self._pairs = self._rewritten()
        self._behind = False

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """Store comparisons, except those that are already there.

        Args:
            comparisons: The comparisons.
        """
        new = {one.id: one for one in comparisons if one.id not in self.comparisons}
        self._comparisons.append(*(one.record() for one in new.values()))
        self.comparisons |= new

    def decide(self, decision: Decision) -> None:
        """Store a decision. It is on the disk when this returns.

        Args:
            decision: The decision.

        Raises:
            OSError: If it cannot be written; it is then not stored.
        """
        self._decisions.append(asdict(decision))
        self.decisions.setdefault(decision.annotator, {})[decision.comparison] = decision
        if (row := self.pair(decision)) is not None:
            self._follow(row)

    def undo(self, annotator: str, time: str) -> Decision | None:
        """Take back the last decision of an annotator.

        Args:
            annotator: The annotator.
            time: When this was asked for, in UTC.

        Returns:
            The decision; None if there is none.
        """
        if not (made := self.decisions.get(annotator)):
            return None
        last = list(made.values())[-1]
        self._decisions.append({"undo": last.comparison, "annotator": annotator, "time": time})
        del made[last.comparison]
        if self.pair(last) is not None:
            self._follow(None)
        return last

    def pair(self, decision: Decision) -> Row | None:
        """The row that `rlhf preference` trains on; None for a decision that gives none.

        Args:
            decision: The decision.
        """
        chosen = decision.preferred
        if chosen is None and not (self.ties and decision.choice == "tie"):
            return None
        comparison = self.comparisons[decision.comparison]
        record, index = comparison.record(), chosen or 0
        responses, sources = record["responses"], record["sources"]
        assert isinstance(responses, list)
        assert isinstance(sources, list)
        row: Row = {
            "prompt": record["prompt"],
            "chosen": responses[index],
            "rejected": responses[1 - index],
            **({"tie": True} if chosen is None else {}),
            **{name: record[name] for name in ("tools", "category") if name in record},
            "chosen_source": sources[index],
            "rejected_source": sources[1 - index],
            **asdict(decision),
        }
        return row

    def close(self) -> None:
        """Close the files."""
        for journal in (self._comparisons, self._decisions, self._pairs):
            journal.close()

    def _follow(self, row: Row | None) -> None:
        """Append a row to the file of pairs, or write the file again if a row was removed or is missing.

        An error is logged only: the decision itself is stored, and the next decision writes the whole file again.
        """
        try:
            if row is not None and not self._behind:
                self._pairs.append(row)
            else:
                pairs = self._rewritten()
                self._pairs.close()
                self._pairs = pairs
            self._behind = False
        except (OSError, ConfigError) as error:
            self._behind = True
            log.error("%s lacks the last decision, which is in %s (%s)", self.out, self.folder, error)

    def _rewritten(self) -> Journal:
        """Write the file of pairs from the decisions, and open it for appending."""
        made = sorted((one for by in self.decisions.values() for one in by.values()), key=lambda one: one.time)
        rows = [row for decision in made if (row := self.pair(decision)) is not None]
        write_text(self.out, "".join(as_json(row) + "\n" for row in rows))
        return Journal(self.out)


Decisions = dict[str, dict[str, Decision]]
"""Decisions by annotator and comparison, in the order in which they were made."""


def session_folder(out: Path) -> Path:
    """The folder of the session that writes a file of pairs: `pairs.labeling` for `pairs.jsonl`."""
    return out.with_name(f"{out.stem}.labeling")


def session_settings(out: Path) -> Mapping[str, JSON] | None:
    """The settings of the session that writes a file of pairs; None if there is no such session."""
    path = session_folder(out) / "session.json"
    settings = read_record(path).get("settings") if path.exists() else None
    return settings if isinstance(settings, dict) else None


def read_session(folder: Path) -> tuple[dict[str, Comparison], Decisions]:
    """The comparisons of a session by id, and its decisions.

    Args:
        folder: The folder of the session.

    Raises:
        DataError: If a row is not one that `rlhf label` writes; with file and line.
    """
    comparisons = {one.id: one for one in _converted(folder / "comparisons.jsonl", Comparison.of_record)}
    decisions: Decisions = {}
    for made in _converted(folder / "decisions.jsonl", lambda row: _decision(row, comparisons)):
        if isinstance(made, Decision):
            decisions.setdefault(made.annotator, {})[made.comparison] = made
        else:
            decisions.get(made[0], {}).pop(made[1], None)
    return comparisons, decisions


def _converted(path: Path, convert: Callable[[Row], T]) -> Iterator[T]:
    if path.stat().st_size:
        yield from convert_rows(read_rows(path), lambda row: [convert(row)], Reading())


def _decision(row: Row, comparisons: Mapping[str, Comparison]) -> Decision | tuple[str, str]:
    """The decision of a row of `decisions.jsonl`; for an undo, annotator and comparison."""
    annotator, undone = row.get("annotator"), row.get("undo")
    if isinstance(annotator, str) and isinstance(undone, str):
        return annotator, undone
    comparison, choice, first, seconds = (row.get(name) for name in ("comparison", "choice", "shown_first", "seconds"))
    if not (
        isinstance(annotator, str)
        and isinstance(comparison, str)
        and is_choice(choice)
        and (first == 0 or first == 1)
        and isinstance(seconds, int | float)
    ):
        raise RowError("the row is not a decision that rlhf label wrote")
    if comparison not in comparisons:
        raise RowError(f"the comparison {comparison} is not in comparisons.jsonl; restore the file")
    note, time = str(row.get("note") or ""), str(row.get("time") or "")
    return Decision(comparison, annotator, choice, int(first), float(seconds), note, time)


def _differing(before: JSON, now: Mapping[str, JSON]) -> str:
    """The settings that differ, for a message."""
    before = before if isinstance(before, dict) else {}
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {short(before.get(name))}, now {short(now.get(name))}" for name in names)


def _sync_folder(folder: Path) -> None:
    """Make the names of new files durable."""
    if os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
