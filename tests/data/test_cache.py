"""The cache of tokenized rows: the same examples as without it, a new entry for whatever changes them, two writers."""

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PreferenceDataModule, PreferenceModule, PromptDataModule, SFTDataModule, SFTModule
from rlhf_lightning.data import cache as cached
from rlhf_lightning.data.preference_rows import Labeled
from rlhf_lightning.errors import ConfigError, DataError, UserError
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.objectives.preference import KTO
from tests.helpers.rows import chats, labeled, pairs, rankings, ready, write_rows
from tests.helpers.runs import Forked, in_ranks
from tests.helpers.training import trainer

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (SFTDataModule, chats, {"max_length": 17}),
    "pairs": (PreferenceDataModule, lambda n: [{**row, "margin": 0.5, "category": "a"} for row in pairs(n)], {}),
    "labels": (PreferenceDataModule, labeled, {"kind": "labels"}),
    "rankings": (PreferenceDataModule, rankings, {"kind": "rankings"}),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "PER_BATCH", 7)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []


def comparable(example: Any) -> Any:
    """Without messages, which are only needed to pair prompts with other responses."""
    return replace(example, messages=([], [], None)) if isinstance(example, Labeled) else example


@pytest.mark.parametrize("kind", KINDS)
def test_cached_examples_are_those_of_the_rows(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    module, rows, options = KINDS[kind]
    file, held = write_rows(tmp_path / "a.jsonl", rows(23)), write_rows(tmp_path / "b.jsonl", rows(6))
    mixture = {"a": {"source": file, "weight": 2}, "b": {"source": held}}
    for source, further in ((file, {"validation": held}), (file, {"validation_split": 5}), (mixture, {})):
        common = {"tokenizer": tokenizer, "batch_size": 4, "seed": 1, **options, **further}
        plain = ready(module(source, **common))
        for _ in range(2):  # written, then read
            found = ready(module(source, **common, cache=tmp_path / "cache"))
            for name, prepared in plain.prepared.items():
                other = found.prepared[name]
                assert [comparable(row) for row in other.rows] == [comparable(row) for row in prepared.rows]
                assert [row.where for row in other.rows] == [row.where for row in prepared.rows]
                assert (other.reading.rows, other.truncated) == (prepared.reading.rows, prepared.truncated)
                assert other.totals() == prepared.totals()
            assert found.shared == plain.shared
            assert [batch["where"] for batch in found.train_dataloader()] == [
                batch["where"] for batch in plain.train_dataloader()
            ]
            counts = found.row_counts(), plain.row_counts()
            assert counts[0] == counts[1]
    assert len(entries(tmp_path / "cache")) == 3  # a as train, b as validation, and the mixture


def test_whatever_changes_the_examples_makes_another_entry(
    tokenizer: Any, session_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rlhf_lightning")
    file = write_rows(tmp_path / "a.jsonl", chats(5))
    made = 0

    def expect(new: bool, **options: Any) -> None:
        nonlocal made
        ready(SFTDataModule(file, **{"tokenizer": tokenizer, "cache": tmp_path / "cache", **options}))
        made += new
        assert len(entries(tmp_path / "cache")) == made

    expect(True)
    expect(False)
    expect(False, batch_size=2, seed=5, tokenizer=session_tokenizer)  # an equal tokenizer
    for setting in (
        {"max_length": 99},
        {"train_on": "everything"},
        {"system": "Be brief."},
        {"columns": {"tools": None}},
    ):
        expect(True, **setting)
        expect(False, **setting)
    os.utime(file, ns=(1, 1))
    expect(True)
    write_rows(tmp_path / "a.jsonl", chats(6))
    expect(True)
    tokenizer.chat_template = tokenizer.chat_template + " "
    expect(True)
    tokenizer.add_tokens(["more"])
    expect(True)
    assert "tokenized rows are read from" in caplog.text


def fill(file: str, tokenizer: Any, folder: Path, before: Callable[[], None] = lambda: None) -> None:
    """Read rows with the cache; `before` is called at the last row."""

    class Data(SFTDataModule):
        def key(self, data: Any) -> Any:
            if "Count 39" in str(data):
                before()
            return super().key(data)

    ready(Data(file, tokenizer=tokenizer, cache=folder))


def test_second_process_waits_and_a_killed_one_leaves_no_entry(tokenizer: Any, tmp_path: Path) -> None:
    file, folder, mark = write_rows(tmp_path / "a.jsonl", chats(40)), tmp_path / "cache", tmp_path / "mark"

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def slow() -> None:
        mark.touch()
        time.sleep(0.5)

    one = Forked(lambda: fill(file, tokenizer, folder, killed), tmp_path / "1.txt")
    while one.poll() is None:
        time.sleep(0.01)
    assert one.code == -signal.SIGKILL
    assert entries(folder) == []
    assert list(folder.glob(".*.partial"))

    def refuse() -> None:
        raise AssertionError("the rows are read again")

    first = Forked(lambda: fill(file, tokenizer, folder, slow), tmp_path / "1.txt")
    while not mark.exists():
        assert first.poll() is None, (tmp_path / "1.txt").read_text()
        time.sleep(0.01)
    second = Forked(lambda: fill(file, tokenizer, folder, refuse), tmp_path / "2.txt")
    while first.poll() is None or second.poll() is None:
        time.sleep(0.01)
    assert (first.code, second.code) == (0, 0), (tmp_path / "2.txt").read_text()
    assert len(entries(folder)) == 1
    assert not list(folder.glob(".*.partial"))


def test_damaged_entry_is_made_again(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, folder = write_rows(tmp_path / "a.jsonl", chats(20)), tmp_path / "cache"
    data = ready(SFTDataModule(file, tokenizer=tokenizer, cache=folder))
    expected = list(data.prepared["train"].rows)
    (path,) = folder.glob("*/examples.arrow")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-50])
    again = ready(SFTDataModule(file, tokenizer=tokenizer, cache=folder))
    assert list(again.prepared["train"].rows) == expected
    assert "the cached rows are damaged" in caplog.text


def test_training_from_the_cache_equals_training_from_memory(base: str, tmp_path: Path) -> None:
    file, losses = write_rows(tmp_path / "a.jsonl", chats(12)), []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        module = SFTModule(base)
        one = trainer(tmp_path, max_epochs=2)
        one.fit(module, SFTDataModule(file, batch_size=4, cache=cache, seed=2))
        losses.append([value.tolist() for value in module.parameters()])
    assert losses[0] == losses[1] == losses[2]


def test_ranks_share_an_entry(base: str, tmp_path: Path) -> None:
    file, folder = write_rows(tmp_path / "a.jsonl", chats(12)), tmp_path / "cache"

    def run() -> None:
        one = trainer(tmp_path, devices=2, strategy="ddp")
        one.fit(SFTModule(base), SFTDataModule(file, batch_size=3, cache=folder))
        assert one.global_step == 2

    in_ranks(2, run, tmp_path)
    assert len(entries(folder)) == 1


def test_what_the_cache_does_not_support_is_refused(base: str, tokenizer: Any, tmp_path: Path) -> None:
    file, folder = write_rows(tmp_path / "a.jsonl", labeled(4)), tmp_path / "cache"
    with pytest.raises(ConfigError, match="both set"):
        SFTDataModule(file, streaming=True, cache=folder)
    with pytest.raises(ConfigError, match="no use in policy stages"):
        PromptDataModule(file, cache=folder)
    with pytest.raises(UserError, match="KTO pairs each prompt"):
        trainer(tmp_path).fit(
            PreferenceModule(base, scorer=ImplicitReward(), loss=KTO()), PreferenceDataModule(file, cache=folder)
        )
    bad = write_rows(tmp_path / "bad.jsonl", [*chats(3), {"messages": []}])
    with pytest.raises(DataError, match=r"bad\.jsonl:4"):
        ready(SFTDataModule(bad, tokenizer=tokenizer, cache=folder))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        ready(SFTDataModule(write_rows(tmp_path / "c.jsonl", chats(3)), tokenizer=tokenizer, cache=tmp_path / "file"))
    assert entries(folder) == []
