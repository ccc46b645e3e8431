"""The files of a labeling session."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PreferenceDataModule
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.labeling.store import Decision, Journal, LabelStore, read_session
from rlhf_lightning.run_folder import claims
from tests.helpers.labels import comparison


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def decided(index: int, choice: Any, first: int = 0, annotator: str = "Ann", **more: Any) -> Decision:
    time = f"2026-01-01T00:00:{index:02}"
    return Decision(comparison(index).id, annotator, choice, first, 1.5, time=time, **more)


def filled(folder: Path, count: int = 4, **options: Any) -> LabelStore:
    store = LabelStore(folder / "pairs.jsonl", {"seed": 0}, **options)
    store.add([comparison(index) for index in range(count)])
    return store


def test_choices_become_pairs_with_their_origin(tmp_path: Path) -> None:
    store = filled(tmp_path, 5)
    for index, (choice, first) in enumerate([("A", 0), ("A", 1), ("tie", 0), ("both_bad", 0), ("skip", 0)]):
        store.decide(decided(index, choice, first, note="why" if index == 0 else ""))
    first, second = rows(tmp_path / "pairs.jsonl")
    assert first == {
        "prompt": [{"role": "user", "content": "Count 0"}],
        "chosen": [{"role": "assistant", "content": "one"}],
        "rejected": [{"role": "assistant", "content": "two"}],
        "chosen_source": {"model": "m0", "stop_reason": "stop"},
        "rejected_source": {"model": "m1", "stop_reason": "stop"},
        "comparison": comparison(0).id,
        "annotator": "Ann",
        "choice": "A",
        "shown_first": 0,
        "seconds": 1.5,
        "note": "why",
        "time": "2026-01-01T00:00:00",
    }
    assert second["chosen"][0]["content"] == "two"  # it was shown as A
    assert second["chosen_source"]["model"] == "m1"
    assert [row["choice"] for row in rows(tmp_path / "pairs.labeling" / "decisions.jsonl")] == [
        "A",
        "A",
        "tie",
        "both_bad",
        "skip",
    ]


def test_ties_on_request(tmp_path: Path, tokenizer: Any) -> None:
    store = filled(tmp_path, ties=True)
    store.decide(decided(0, "tie"))
    store.decide(decided(1, "both_bad"))
    data = PreferenceDataModule(train=str(tmp_path / "pairs.jsonl"), tokenizer=tokenizer)
    data.setup("fit")
    (pair,) = data.prepared["train"].rows
    assert pair.tie  # type: ignore[union-attr]


def test_undo_removes_the_pair_and_keeps_the_record(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.decide(decided(0, "A"))
    store.decide(decided(1, "B"))
    store.decide(decided(2, "B", annotator="Ben"))
    undone = store.undo("Ann", "2026-01-01T00:01")
    assert undone == decided(1, "B")
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "pairs.jsonl")] == ["Count 0", "Count 2"]
    store.decide(decided(1, "tie"))
    assert store.undo("Ann", "2026-01-01T00:02") == decided(1, "tie")
    assert store.undo("Ann", "2026-01-01T00:03") == decided(0, "A")
    assert store.undo("Ann", "2026-01-01T00:04") is None
    _, decisions = read_session(store.folder)
    assert decisions == {"Ann": {}, "Ben": {comparison(2).id: decided(2, "B", annotator="Ben")}}
    assert len(rows(store.folder / "decisions.jsonl")) == 7


def test_session_is_read_again_and_pairs_are_completed(tmp_path: Path) -> None:
    """As after a kill between the decision and its pair, and in the middle of a line."""
    with claims():
        store = filled(tmp_path)
        store.decide(decided(0, "A"))
        store.decide(decided(1, "B"))
        store.close()
    pairs, journal = tmp_path / "pairs.jsonl", store.folder / "decisions.jsonl"
    whole = pairs.read_text()
    pairs.write_text(whole.splitlines(keepends=True)[0] + '{"prompt": [')
    journal.write_bytes(journal.read_bytes() + b'{"comparison": "12')
    with claims():
        again = filled(tmp_path)
        assert again.comparisons == store.comparisons
        assert again.decisions == store.decisions
        assert pairs.read_text() == whole
        again.decide(decided(2, "A"))
        again.close()
    assert len(rows(journal)) == 3
    assert len(rows(store.folder / "comparisons.jsonl")) == 4


def test_each_row_is_synced_before_it_is_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "decisions.jsonl")
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "decisions.jsonl").read_bytes()))
    journal.append({"choice": "A"})
    assert synced == [b'{"choice": "A"}\n']


def test_full_disk_leaves_neither_a_decision_nor_half_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    store.decide(decided(0, "A"))
    before = (store.folder / "decisions.jsonl").read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.decide(decided(1, "A"))
    assert (store.folder / "decisions.jsonl").read_bytes() == before
    assert list(store.decisions["Ann"]) == [comparison(0).id]
    store.decide(decided(1, "A"))
    assert len(rows(tmp_path / "pairs.jsonl")) == 2


def test_pair_that_could_not_be_written_follows_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path)
    append = Journal.append

    def full(journal: Journal, *rows: Any) -> None:
        if journal.path.name == "pairs.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(journal, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        store.decide(decided(0, "A"))
    assert "lacks the last decision" in caplog.text
    assert rows(tmp_path / "pairs.jsonl") == []
    store.decide(decided(1, "A"))
    assert len(rows(tmp_path / "pairs.jsonl")) == 2


def test_foreign_files_other_settings_and_a_second_process_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"mine.jsonl exists, but rlhf label did not write it"):
        LabelStore(tmp_path / "mine.jsonl", {})
    with claims():
        filled(tmp_path).close()
        pid = os.fork()
        if not pid:
            import rlhf_lightning.run_folder as lock

            lock._held.clear()
            try:
                LabelStore(tmp_path / "pairs.jsonl", {"seed": 0})
            except ConfigError as error:
                os._exit(7 if "is writing to it" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with pytest.raises(ConfigError, match=r"pairs.labeling was begun with other settings \(seed: 0, now 1\)"):
        LabelStore(tmp_path / "pairs.jsonl", {"seed": 1})


def test_altered_decision_is_refused_with_its_line(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    store.decide(decided(0, "A"))
    file = store.folder / "decisions.jsonl"
    file.write_text(file.read_text().replace('"choice": "A"', '"choice": "C"'))
    with pytest.raises(DataError, match=r"decisions.jsonl:1: the row is not a decision that rlhf label wrote"):
        read_session(store.folder)
