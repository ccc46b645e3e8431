"""Which annotator compares what."""

import os
from pathlib import Path

import pytest

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.labeling.queue import LEASE, Assignment, LabelQueue
from rlhf_lightning.labeling.store import LabelStore
from tests.helpers.labels import comparison, new_queue


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of decisions would wait for the disk; tests/labeling/test_store.py shows that each one is synced."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def shown(queue: LabelQueue, annotator: str) -> str | None:
    found = queue.show(annotator)
    return found.comparison.id if found else None


def finish(queue: LabelQueue, annotator: str) -> list[str]:
    """Decide everything that an annotator is shown."""
    seen = []
    while (current := shown(queue, annotator)) is not None:
        seen.append(current)
        assert queue.decide(annotator, current, "A")
    return seen


def test_shared_queue_shows_each_comparison_to_one_annotator(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 4, overlap=0.0)
    first, second = shown(queue, "Ann"), shown(queue, "Ben")
    assert first != second
    assert shown(queue, "Ann") == first  # also after a reload
    assert queue.decide("Ann", str(first), "A")
    assert not queue.decide("Ann", str(first), "B")  # sent twice
    assert not queue.decide("Ann", str(second), "B")  # not the one that Ann sees
    others = finish(queue, "Ann")
    assert len(others) == 2
    assert second not in others
    assert queue.decide("Ben", str(second), "tie")
    assert shown(queue, "Ben") is None


def test_skipped_comparison_goes_to_another_annotator(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 1, overlap=0.0)
    (one,) = queue.store.comparisons
    assert shown(queue, "Ann") == one
    assert shown(queue, "Ben") is None
    queue.decide("Ann", one, "skip")
    assert shown(queue, "Ann") is None
    assert shown(queue, "Ben") == one


def test_reservation_ends(tmp_path: Path) -> None:
    now = [0.0]
    store = LabelStore(tmp_path / "pairs.jsonl", {})
    queue = LabelQueue(store, Assignment(overlap=0.0), clock=lambda: now[0])
    queue.add([comparison()])
    assert shown(queue, "Ann") is not None
    now[0] = LEASE - 1
    assert shown(queue, "Ben") is None
    now[0] = LEASE + 1
    assert shown(queue, "Ben") == comparison().id
    # Ann's page is still open: the decision counts, and Ben's does too.
    assert queue.decide("Ann", comparison().id, "A")
    assert queue.decide("Ben", comparison().id, "B")
    assert [made.seconds for by in store.decisions.values() for made in by.values()] == [LEASE + 1, 0]


def test_overlap_is_decided_by_everyone(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 400, overlap=0.25)
    common = {one for one in queue.store.comparisons if queue.assignment.is_shared_by_all(one)}
    assert 70 < len(common) < 130  # 100 ± 3.5 standard deviations
    finish(queue, "Ann")
    assert set(finish(queue, "Ben")) == common


def test_separate_queues_divide_the_rest(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 300, overlap=0.1, annotators=("Ann", "Ben", "Cleo"), separate=True)
    common = {one for one in queue.store.comparisons if queue.assignment.is_shared_by_all(one)}
    parts = [set(finish(queue, name)) for name in ("Ann", "Ben", "Cleo")]
    assert parts[0] & parts[1] == parts[1] & parts[2] == common
    assert set().union(*parts) == set(queue.store.comparisons)
    assert all(60 < len(part - common) < 120 for part in parts)
    # Another annotator takes from the others, and moves nothing between them.
    more = Assignment(annotators=("Ann", "Ben", "Cleo", "Dan"), separate=True)
    for one in queue.store.comparisons:
        assert more.owner(one) in (queue.assignment.owner(one), "Dan")


def test_undo_shows_the_comparison_again(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 2, overlap=0.0)
    first = shown(queue, "Ann")
    assert first is not None
    queue.decide("Ann", first, "A")
    second = shown(queue, "Ann")
    assert queue.undo("Ann") is not None
    assert shown(queue, "Ann") == first
    assert shown(queue, "Ben") == second  # Ann no longer sees it
    assert queue.undo("Ben") is None
    queue.decide("Ann", first, "B")
    assert [made.choice for made in queue.store.decisions["Ann"].values()] == ["B"]


def test_order_of_the_answers_is_random_repeated_and_recorded(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 200, overlap=1.0)
    orders: dict[str, list[int]] = {}
    for name in ("Ann", "Ben"):
        while (found := queue.show(name)) is not None:
            again = queue.show(name)
            assert again is not None
            assert again.answers == found.answers
            first = found.comparison.candidates.index(found.answers[0])
            queue.decide(name, found.comparison.id, "A")
            assert queue.store.decisions[name][found.comparison.id].shown_first == first
            assert queue.store.decisions[name][found.comparison.id].preferred == first
            orders.setdefault(name, []).append(first)
    assert all(70 < sum(found) < 130 for found in orders.values())
    assert 70 < sum(one == other for one, other in zip(*orders.values(), strict=True)) < 130


def test_uncertain_comparisons_come_first(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "pairs.jsonl", {})
    queue = LabelQueue(store, Assignment(uncertain=True))
    given = [comparison(index, disagreement=value) for index, value in enumerate((0.01, 0.2, 0.1))]
    queue.add(given)
    assert finish(queue, "Ann") == [given[1].id, given[2].id, given[0].id]


def test_more_answers_are_wanted_when_an_annotator_runs_short(tmp_path: Path) -> None:
    queue = new_queue(tmp_path, 3, overlap=1.0)
    assert not queue.wait_until_short(3, 0)
    assert queue.wait_until_short(4, 0)
    queue.decide("Ann", str(shown(queue, "Ann")), "A")
    assert queue.wait_until_short(3, 0)
    assert not queue.wait_until_short(2, 0)
    assert (queue.progress("Ann").decided, queue.progress("Ann").remaining) == (1, 2)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--annotators"):
        Assignment(separate=True)
    with pytest.raises(ConfigError, match="--overlap is 120"):
        Assignment(overlap=1.2)
