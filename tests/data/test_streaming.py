"""Streaming of rows: the same rows as other readers give, resumed at every row, split by rank and by worker."""

import gzip
import json
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset, load_dataset

from benchmarks.streaming import memory
from rlhf_lightning import (
    PolicyRLModule,
    PreferenceDataModule,
    PreferenceModule,
    PromptDataModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.data import spans
from rlhf_lightning.data.files import Wanted
from rlhf_lightning.data.mixing import Mixture, WeightedSource
from rlhf_lightning.data.records import read_rows
from rlhf_lightning.data.row_streams import Reader, RowStream, StreamedSource, Streaming
from rlhf_lightning.data.stream_loader import StreamLoader
from rlhf_lightning.errors import ConfigError, DataError, UserError
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.scorers import ImplicitReward
from rlhf_lightning.modules.schedules import Warmup
from rlhf_lightning.objectives.preference import KTO
from rlhf_lightning.rewards import KeywordReward
from rlhf_lightning.rollout.curriculum import Curriculum
from tests.helpers.rows import chats, labeled, pairs, prompts, write_rows
from tests.helpers.runs import Forked, in_ranks
from tests.helpers.training import trainer

SMALL = Streaming(shuffle_buffer=4)
ALONE = Mixture([WeightedSource("a", None)])


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SIZE", 300)


def jsonl(path: Path, rows: list[Any]) -> str:
    """JSON lines with blank lines, both kinds of line ends, and byte order marks."""
    lines = [json.dumps(row, ensure_ascii=False) + ("\n\r\n" if i % 7 == 0 else "\r\n") for i, row in enumerate(rows)]
    path.write_bytes(("\ufeff" + "".join(lines[:9]) + "\ufeff" + "".join(lines[9:])).encode())
    return str(path)


def zipped(path: Path, rows: list[Any]) -> str:
    path = path.with_suffix(".json.gz")
    path.write_bytes(gzip.compress(Path(jsonl(path.with_suffix(".plain"), rows)).read_bytes()))
    return str(path)


def table(path: Path, rows: list[Any]) -> str:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    return str(path)


FILES: dict[str, Callable[[Path, list[Any]], str]] = {"jsonl": jsonl, "json.gz": zipped, "parquet": table}
ROWS = [{"prompt": f"Ünï {i}", "completion": "x" * (i % 5), "more": [{"a": i}, {"b": None}]} for i in range(40)]


@pytest.mark.parametrize("kind", FILES)
def test_streamed_rows_and_their_places_are_those_of_other_readers(kind: str, tmp_path: Path) -> None:
    file = FILES[kind](tmp_path / "rows.jsonl", ROWS)
    source = StreamedSource("a", file, Wanted())
    found = [(spans.parsed(raw, Wanted()), raw.where) for raw in spans.span_rows(source.spans)]
    assert found == [(row.data, row.where) for row in read_rows(file)]
    assert len(source.spans) == {"jsonl": 11, "json.gz": 1, "parquet": 5}[kind]
    assert source.counted() == 40


def stream(source: StreamedSource, seed: int | None, reader: Reader, state: Any = None) -> tuple[list[str], list[Any]]:
    """The places of a reader's rows, and the state before and after each, as a checkpoint stores it."""
    rows = RowStream([source], ALONE, SMALL, seed, reader, state)
    places, states = [], [rows.state()]
    for _, raw in rows:
        places.append(raw.where)
        states.append(rows.state())
    return places, json.loads(json.dumps(states))


@pytest.mark.parametrize("kind", [*FILES, "dataset"])
def test_rows_are_shuffled_split_and_resumed_at_each(kind: str, tmp_path: Path) -> None:
    if kind == "dataset":
        file = write_rows(tmp_path / "rows.jsonl", ROWS)
        given: Any = load_dataset("json", data_files=file, streaming=True, split="train", cache_dir=str(tmp_path))
    else:
        given = FILES[kind](tmp_path / "rows.jsonl", ROWS)
    source = StreamedSource("a", given, Wanted())
    orders = []
    for seed in (None, 1, 2):
        split = [stream(source, seed, Reader(index, 3)) for index in range(3)]
        assert Counter(place for places, _ in split for place in places) == Counter(
            place for place in stream(source, None, Reader())[0]
        )
        assert {len(places) for places, _ in split} == {13, 14}
        places, states = split[1]
        for number in range(0, len(states), 3):
            assert stream(source, seed, Reader(1, 3), states[number])[0] == places[number:]
        orders.append(places)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert stream(source, 1, Reader(1, 3))[0] == orders[1]


def loader_of(data: Any, base: str) -> StreamLoader[Any, Any]:
    data.tokenizer = base
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, StreamLoader)
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_at_each_batch(workers: int, base: str, tmp_path: Path) -> None:
    def make() -> StreamLoader[Any, Any]:
        sources = {"a": {"source": write_rows(tmp_path / "a.jsonl", chats(11)), "weight": 2}, "b": {"source": file}}
        streaming = Streaming(3, workers)
        return loader_of(
            SFTDataModule(
                sources, batch_size=3, stopping_strategy="all_exhausted_without_replacement", streaming=streaming
            ),
            base,
        )

    file = write_rows(tmp_path / "b.jsonl", chats(8))
    loader = make()
    batches, states = [], []
    for batch in loader:
        batches.append(batch["where"])
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert len({place for places in batches for place in places}) == 19
    assert len(batches) == 7
    for number, state in enumerate(states[:-1] if not workers else states[1::3]):
        again = make()
        again.load_state_dict(state)
        begun = number + 1 if not workers else 3 * number + 2
        assert [batch["where"] for batch in again] == batches[begun:]
        assert again.drawn() == [11, 8]


def test_ranks_take_every_row_once_and_the_same_number_of_steps(base: str, tmp_path: Path) -> None:
    """With 11 rows on two ranks in batches of 4, the second rank's last batch has one row less."""

    def run() -> None:
        data = SFTDataModule(write_rows(tmp_path / "a.jsonl", chats(11)), batch_size=4, streaming=SMALL)
        seen = []

        class Seen(SFTModule):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                seen.append((batch["where"], batch["denominators"]["tokens"]))
                return super().training_step(batch, batch_idx)

        one = trainer(tmp_path, devices=2, strategy="ddp", max_epochs=2)
        one.fit(Seen(base), data)
        counts: Any = data.row_counts()["train"]
        facts = {"seen": seen, "drawn": counts["sources"]["train"]["drawn"]}
        (tmp_path / f"{one.global_rank}.json").write_text(json.dumps(facts))

    in_ranks(2, run, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for epoch in (slice(0, 2), slice(2, 4)):
        places = [place for rank in (first, second) for where, _ in rank["seen"][epoch] for place in where]
        assert len(places) == len(set(places)) == 11
    assert [tokens for _, tokens in first["seen"]] == [tokens for _, tokens in second["seen"]]
    assert len(first["seen"]) == len(second["seen"]) == 4
    assert first["drawn"] == second["drawn"] == 22


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SIZE", 1 << 20)
    file = tmp_path / "rows.jsonl"
    with file.open("w") as out:
        for i in range(2000):
            out.write(json.dumps({"prompt": f"{i}", "completion": "Yes.", "notes": "x" * 60_000}) + "\n")

    def growth(read: Callable[[], int]) -> float:
        """Growth of the peak memory of a process while it reads the file, as a multiple of the file's size."""
        found = tmp_path / "growth"

        def measure() -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert read() == 2000
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            found.write_text(str(grown * 1024 / file.stat().st_size))

        process = Forked(measure, tmp_path / "out.txt")
        while process.poll() is None:
            time.sleep(0.01)
        assert process.code == 0, (tmp_path / "out.txt").read_text()
        return float(found.read_text())

    def streamed() -> int:
        rows = RowStream([StreamedSource("a", str(file), Wanted())], ALONE, Streaming(100), 1, Reader())
        return sum(len(spans.parsed(raw, Wanted())) == 3 for _, raw in rows)

    assert growth(streamed) < 0.4
    assert growth(lambda: len(read_rows(str(file)))) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_on_5_gb_stays_below_2_gb(tmp_path: Path) -> None:
    """Three to five minutes; 5 GB of disk."""
    found = memory(5.0, tmp_path)
    assert found["file_gb"] >= 5
    assert found["peak_gb"] < 2


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])  # 5 s until the worker has ended
def test_bad_row_in_the_middle_names_file_and_line(workers: int, base: str, tmp_path: Path) -> None:
    rows = [*chats(150), {"messages": [{"role": "user", "content": "Hi"}]}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    loader = loader_of(SFTDataModule(file, batch_size=8, streaming=Streaming(10, workers)), base)
    with pytest.raises(DataError, match=rf"{file}:151: there is no assistant turn"):
        list(loader)
    skipping = loader_of(SFTDataModule(file, batch_size=8, streaming=SMALL, on_bad_row="skip"), base)
    assert sum(len(batch["where"]) for batch in skipping) == 150
    totals = skipping.totals()[0]
    assert (totals["rows"], totals["examples"], totals["skipped"], totals["truncated"]) == (151, 150, 1, 0)
    with open(file, "a") as more:
        more.write('{"messages": \n')
    with pytest.raises(DataError, match=rf"{file}:152: not valid JSON"):
        list(loader_of(SFTDataModule(file, batch_size=8, streaming=SMALL, on_bad_row="skip"), base))


def test_rows_that_give_several_examples_are_resumed_within(thinker: str, tmp_path: Path) -> None:
    """The template drops earlier thoughts, so each assistant turn is an example."""
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 5)
    loader = loader_of(SFTDataModule(file, batch_size=2, streaming=SMALL), thinker)
    ids, states = [], []
    for batch in loader:
        ids.append(batch["input_ids"].tolist())
        states.append(loader.state_dict())
    assert len(ids) == 8
    for number, state in enumerate(states[:-1], 1):
        again = loader_of(SFTDataModule(file, batch_size=2, streaming=SMALL), thinker)
        again.load_state_dict(state)
        assert [batch["input_ids"].tolist() for batch in again] == ids[number:]


@pytest.mark.parametrize("kind", ["preference", "policy"])
def test_other_modules_train_on_streams(kind: str, base: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, max_epochs=2)
    data: Any
    if kind == "preference":
        rows = [{**row, "category": "even" if i % 2 else "odd"} for i, row in enumerate(pairs(9))]
        data = PreferenceDataModule(zipped(tmp_path / "p.jsonl", rows), batch_size=4, streaming=SMALL)
        one.fit(PreferenceModule(base), data)
        assert one.global_step == 6
    else:
        mixture = {
            "a": {"source": zipped(tmp_path / "a.jsonl", prompts(6)), "weight": 2},
            "b": {"source": write_rows(tmp_path / "b.jsonl", prompts(3))},
        }
        data = PromptDataModule(mixture, prompts_per_round=3, group_size=2, streaming=SMALL)
        module = PolicyRLModule(base, rewards=[KeywordReward(["a"], min_words=1)], sampler=Sampler(max_tokens=2))
        one.fit(module, data)
        assert one.global_step == 6
        assert {name: source["drawn"] for name, source in data.row_counts()["train"]["sources"].items()} == {
            "a": 12,
            "b": 6,
        }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[\n{"text": "Hi"}]', "a JSON list, but streaming reads JSON lines"),
        ("a.json", '{\n"text": "Hi"}', "not a JSON object on one line"),
        ("a.csv", "text\nHi\n", "a table of text .* cannot be streamed"),
        ("a.jsonl", "\n \n", "there are no rows"),
        ("a.zip", "PK\x03\x04", "an archive"),
    ],
)
def test_files_that_cannot_be_streamed_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        StreamedSource("a", str(tmp_path / name), Wanted())


def test_what_needs_all_rows_is_refused(base: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", chats(8))
    asks, told = write_rows(tmp_path / "p.jsonl", prompts(8)), write_rows(tmp_path / "l.jsonl", labeled(8))

    def fit(module: Any, data: Any, message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, **options).fit(module, data)

    with pytest.raises(ConfigError, match="validation_split needs all rows"):
        SFTDataModule(file, streaming=True, validation_split=0.5)
    with pytest.raises(ConfigError, match="they cannot be streamed"):
        PromptDataModule(episodes=file, streaming=True)
    with pytest.raises(DataError, match="a list cannot be streamed"):
        loader_of(SFTDataModule([chats(3)], streaming=True), base)
    schedule: Any = lambda optimizer: Warmup(optimizer, "linear")  # noqa: E731
    fit(SFTModule(base, lr_scheduler=schedule), SFTDataModule(file, streaming=True), "set trainer.max_steps")
    fit(
        PreferenceModule(base, scorer=ImplicitReward(), loss=KTO()),
        PreferenceDataModule(told, streaming=True),
        "KTO pairs each prompt",
    )
    rewards = [KeywordReward(["a"], min_words=1)]
    module = PolicyRLModule(base, rewards=rewards, curriculum=Curriculum())
    fit(module, PromptDataModule(asks, streaming=True), "curriculum needs all prompts")
    rows: Any = IterableDataset.from_generator(lambda: iter(prompts(8)))
    fit(
        PolicyRLModule(base, rewards=rewards),
        PromptDataModule(rows, streaming=True),
        "the number of rows .* is unknown",
    )


def test_nulls_of_a_file_from_arrow_are_dropped_as_by_other_readers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rlhf_lightning")
    calls = [{"role": "user", "content": "x", "name": None}, {"role": "user", "content": "y", "name": "n"}]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [call]} for call in calls])
    source = StreamedSource("a", file, Wanted())
    assert [spans.parsed(raw, Wanted()) for raw in spans.span_rows(source.spans)] == [
        row.data for row in read_rows(file)
    ]
    assert caplog.text.count("seems to come from an Arrow table") == 2
