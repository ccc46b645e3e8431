"""Which annotator compares what: shared or separate queues, overlap, and the order of the answers."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.labeling.comparisons import Candidate, Comparison
from rlhf_lightning.labeling.store import Choice, Decision, LabelStore

LEASE = 900.0
"""Seconds for which a comparison of the shared queue is reserved for the annotator who sees it."""


@dataclass(frozen=True)
class Assignment:
    """Who compares what.

    Args:
        overlap: Fraction of the comparisons that every annotator decides, to measure agreement.
        annotators: Names of the annotators; empty if anyone may give a name.
        separate: True if the other comparisons are divided among the annotators in advance. Otherwise they are a shared
            queue, of which each annotator gets the next one.
        uncertain: Show first what an ensemble of preference models disagrees about.
        seed: Seed of overlap, division and the order of the answers.

    Raises:
        ConfigError: If separate queues have no names, or the overlap is not a fraction.

    Example:
        >>> Assignment(overlap=1.0).is_shared_by_all("7c2f")
        True
    """

    overlap: float = 0.1
    annotators: tuple[str, ...] = ()
    separate: bool = False
    uncertain: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.separate and not self.annotators:
            raise ConfigError("--queue separate needs the names of the annotators: --annotators Ann,Ben")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"--overlap is {100 * self.overlap:g}; it must be a percentage from 0 to 100")

    def is_shared_by_all(self, comparison: str) -> bool:
        """True if every annotator decides a comparison.

        Args:
            comparison: Its id.
        """
        return self._uniform("overlap", comparison) < self.overlap

    def owner(self, comparison: str) -> str | None:
        """The annotator in whose separate queue a comparison is; None in a shared queue.

        Another name added to the list takes comparisons from the other annotators, and moves none between them
        (rendezvous hashing).

        Args:
            comparison: Its id.
        """
        if not self.separate:
            return None
        return max(self.annotators, key=lambda name: self._uniform("owner", name, comparison))

    def shown_first(self, annotator: str, comparison: str) -> int:
        """Index of the answer that is shown as A; random, and the same whenever this annotator sees the comparison.

        Args:
            annotator: Name of the annotator.
            comparison: Id of the comparison.
        """
        return int(self._uniform("order", annotator, comparison) < 0.5)

    def _uniform(self, *parts: str) -> float:
        """A number in [0, 1) from a hash of seed and parts."""
        digest = hashlib.sha256("\0".join((str(self.seed), *parts)).encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56


@dataclass(frozen=True)
class Shown:
    """A comparison as an annotator sees it: without its models, and in its order."""

    comparison: Comparison
    answers: tuple[Candidate, Candidate]
    """The answers A and B."""


@dataclass(frozen=True)
class Progress:
    """An annotator's progress."""

    decided: int
    remaining: int
    """Number of comparisons that are ready for the annotator."""


class LabelQueue:
    """Gives each annotator the next comparison, and stores decisions. All methods may be called from any thread.

    Args:
        store: The files of the session.
        assignment: Who compares what.
        clock: Returns the time in seconds; for tests.

    Example:
        >>> queue = LabelQueue(store, Assignment())  # doctest: +SKIP
        >>> shown = queue.show("Ann")  # doctest: +SKIP
        >>> queue.decide("Ann", shown.comparison.id, "A")  # doctest: +SKIP
    """

    def __init__(self, store: LabelStore, assignment: Assignment, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.assignment, self._clock = store, assignment, clock
        self._changed = threading.Condition()
        self._common: set[str] = set()
        """Comparisons that every annotator decides."""
        self._owners: dict[str, str | None] = {}
        """The owner of each comparison; see `Assignment.owner`."""
        self._divide(store.comparisons)
        self._seen: dict[str, str] = {}
        """The comparison that each annotator sees."""
        self._until: dict[str, float] = {}
        """When an annotator's reservation ends."""
        self._begun: dict[tuple[str, str], float] = {}
        """When an annotator first saw a comparison."""

    def add(self, comparisons: Sequence[Comparison]) -> None:
        """Store new comparisons.

        Args:
            comparisons: The comparisons.
        """
        with self._changed:
            self.store.add(comparisons)
            self._divide(self.store.comparisons)

    def show(self, annotator: str) -> Shown | None:
        """The comparison that an annotator decides next; None if none is ready. It stays the same until it is decided.

        Args:
            annotator: Name of the annotator.
        """
        with self._changed:
            current = self._seen.get(annotator)
            if current is None or current in self._taken(annotator):
                found = self._next(annotator)
                if found is None:
                    self._release(annotator)
                    return None
                current = self._seen[annotator] = found.id
            now = self._clock()
            self._until[annotator] = now + LEASE
            self._begun.setdefault((annotator, current), now)
            comparison = self.store.comparisons[current]
            first = self.assignment.shown_first(annotator, current)
            return Shown(comparison, (comparison.candidates[first], comparison.candidates[1 - first]))

    def decide(self, annotator: str, comparison: str, choice: Choice, note: str = "") -> bool:
        """Store a decision about the comparison that an annotator sees.

        Args:
            annotator: Name of the annotator.
            comparison: Id of the comparison.
            choice: The choice.
            note: Text that the annotator added.

        Returns:
            False if the annotator does not see this comparison, for example because the page was sent twice.

        Raises:
            OSError: If the decision cannot be written.
        """
        with self._changed:
            if self._seen.get(annotator) != comparison:
                return False
            first = self.assignment.shown_first(annotator, comparison)
            seconds = round(self._clock() - self._begun[annotator, comparison], 2)
            self.store.decide(Decision(comparison, annotator, choice, first, seconds, note, _now()))
            self._release(annotator)
            self._begun.pop((annotator, comparison), None)
            self._changed.notify_all()
            return True

    def undo(self, annotator: str) -> Decision | None:
        """Take back the last decision of an annotator, who then sees its comparison again.

        Args:
            annotator: Name of the annotator.

        Returns:
            The decision; None if there is none.
        """
        with self._changed:
            last = self.store.undo(annotator, _now())
            if last is not None:
                self._seen[annotator] = last.comparison
                self._until[annotator] = self._clock() + LEASE
            return last

    def progress(self, annotator: str) -> Progress:
        """The progress of an annotator.

        Args:
            annotator: Name of the annotator.
        """
        with self._changed:
            decided = self.store.decisions.get(annotator, {})
            return Progress(len(decided), sum(1 for _ in self._open(annotator)))

    def wait_until_short(self, ahead: int, timeout: float) -> bool:
        """Wait until fewer than `ahead` comparisons are ready for some annotator.

        Args:
            ahead: Number of comparisons.
            timeout: Longest time to wait, in seconds.

        Returns:
            True if an annotator has fewer.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._ready() < ahead, timeout)

    def _divide(self, comparisons: Iterable[str]) -> None:
        new = [one for one in comparisons if one not in self._owners]
        self._common.update(one for one in new if self.assignment.is_shared_by_all(one))
        self._owners.update((one, self.assignment.owner(one)) for one in new)

    def _ready(self) -> int:
        """Smallest number of comparisons that are ready for an annotator; all undecided ones if nobody has come."""
        names = {*self.assignment.annotators, *self.store.decisions, *self._seen}
        if names:
            return min(sum(1 for _ in self._open(name)) for name in names)
        return len(self.store.comparisons)

    def _next(self, annotator: str) -> Comparison | None:
        if not self.assignment.uncertain:
            return next(self._open(annotator), None)
        return max(self._open(annotator), key=lambda one: one.disagreement or 0.0, default=None)

    def _open(self, annotator: str) -> Iterator[Comparison]:
        """Comparisons that an annotator may decide, in their order."""
        taken = self._taken(annotator)
        for comparison in self.store.comparisons.values():
            if comparison.id not in taken and self._may(annotator, comparison):
                yield comparison

    def _taken(self, annotator: str) -> set[str]:
        """Comparisons of the shared queue that another annotator sees or has decided."""
        now = self._clock()
        if self.assignment.separate:
            return set()
        seen = {
            comparison
            for name, comparison in self._seen.items()
            if name != annotator and self._until.get(name, 0.0) > now
        }
        decided = {
            made.comparison
            for name, decisions in self.store.decisions.items()
            if name != annotator
            for made in decisions.values()
            if made.choice != "skip"
        }
        return (seen | decided) - self._common

    def _may(self, annotator: str, comparison: Comparison) -> bool:
        """True if a comparison is in the annotator's queue and not yet decided by this annotator."""
        if comparison.id in self.store.decisions.get(annotator, {}):
            return False
        return self._owners[comparison.id] in (None, annotator) or comparison.id in self._common

    def _release(self, annotator: str) -> None:
        self._seen.pop(annotator, None)
        self._until.pop(annotator, None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
