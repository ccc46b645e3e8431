"""Rows: their formats, their errors, and the batches made from them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.data.batching import RowLoader, ShardSpec, mix_seeds, split_evenly
from rlhf_lightning.data.conversations import conversation
from rlhf_lightning.data.preference import PreferenceDataModule, split_pair
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.records import Reading, RowError, fingerprint, read_rows
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.errors import ConfigError, DataError
from tests.helpers.rows import chats, prompts, ready, write_rows

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "data",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": ["Hi", "Hello"]},
        {"messages": [{"content": "Hi"}, {"content": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": ["Hi", "Hello"]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
    ],
)
def test_every_row_format_gives_the_same_conversation(data: dict[str, Any]) -> None:
    assert conversation(data) == [USER, ASSISTANT]


def test_missing_roles_are_filled_in_after_a_system_message() -> None:
    said = conversation({"messages": [{"role": "system", "content": "s"}, "a", "b", "c"]})
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user"]
    assert (
        conversation({"instruction": "Do", "input": "this", "output": "ok", "system": "s"})[1]["content"]
        == "Do\n\nthis"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"question": "Hi"}, "the row has no conversation: its columns are 'question'"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "Hi"}, None),
        ({"messages": [1]}, "message 0 is int 1"),
        ({"messages": [{"role": "user"}]}, r"message 0 \(user\) has no content"),
        ({"messages": [{"role": 5, "content": "x"}]}, "role is int 5"),
        ({"messages": [{"role": "user", "content": 5}]}, "content is int 5"),
        ({"instruction": 3, "output": "x"}, "'instruction' is int 3"),
    ],
)
def test_malformed_conversations(data: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert conversation(data) == [{"role": "user", "content": "Hi"}]
        return
    with pytest.raises(RowError, match=message):
        conversation(data)


def test_files_of_every_kind(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = chats(3)
    lines = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "b.json", "a.parquet"):
        assert [row.data for row in read_rows(tmp_path / name)] == rows
    assert [row.where for row in read_rows(lines)] == [f"{lines}:{i}" for i in (1, 2, 3)]
    assert [row.where for row in read_rows(rows)] == ["list[0]", "list[1]", "list[2]"]
    assert len(read_rows([lines, lines])) == 6


def test_plain_prompt_lines_and_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("First\n\n  \nSecond {x}\n")
    reading = Reading()
    rows = read_rows(path, "prompt", reading)
    assert [row.data for row in rows] == [{"prompt": "First"}, {"prompt": "Second {x}"}]
    assert rows[1].where.endswith(":4")
    assert reading.blank == 2
    assert len(read_rows([str(path), str(path)], "prompt")) == 4
    with pytest.raises(DataError, match="no such file"):
        read_rows(["missing.jsonl"], "prompt")


def test_unicode_line_separators_do_not_end_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read_rows(path)[0].data == {"text": "a\u2028b\x85c"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "there are no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ":2: not valid JSON"),
        ("a.jsonl", b"[1]\n", ":1: this is a JSON list"),
        ("a.jsonl", b'{"a": 1}\n\xff\xfe\n', ":2: not UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', ":2: not valid JSON"),
        ("a.json", b"3", "contains a int"),
        ("a.json", b"[1]", r"\[0\]: the row is a int"),
        ("a.parquet", b"nonsense", "not a readable Parquet file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n", "git lfs pull"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n", "git lfs pull"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_rows(path)
    assert name in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file"):
        read_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="this is a folder; give a file"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="neither a local file nor a dataset on the Hub"):
        read_rows("owner/surely-not-there")


def test_fingerprints_depend_on_the_bytes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(2))
    before = fingerprint(path)
    assert before == fingerprint(write_rows(tmp_path / "b.jsonl", chats(2)))
    write_rows(tmp_path / "a.jsonl", chats(3))
    assert fingerprint(path) != before


# -- data modules -----------------------------------------------------------------------------------------------------


def test_columns_and_bad_rows(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": "Hi", "a": "Hello"}, {"q": "Hi"}, {"q": "Hi", "a": ""}, {"q": "Ho", "a": "Hey"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row has no column 'a'") as error:
        ready(SFTDataModule(path, tokenizer=tokenizer, columns=columns))
    assert "on_bad_row: skip" in str(error.value)
    with caplog.at_level(logging.INFO):
        data = ready(SFTDataModule(path, tokenizer=tokenizer, columns=columns, on_bad_row="skip"))
    assert len(data.prepared["train"].rows) == 2
    assert "4 rows read, 2 examples" in caplog.text
    assert "skipped 2" in caplog.text
    assert "⟦Hello<|im_end|>⟧" in caplog.text
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        ready(SFTDataModule([{"x": 1}], tokenizer=tokenizer, on_bad_row="skip"))


def test_long_rows_are_counted(tokenizer: Any) -> None:
    rows = [{"prompt": "Hi", "completion": "word " * 50}, {"prompt": "Hi", "completion": "Hello"}]
    data = ready(SFTDataModule(rows, tokenizer=tokenizer, max_length=20))
    assert data.prepared["train"].truncated == 1
    assert len(data.prepared["train"].rows[0].ids) == 20
    data = ready(SFTDataModule(rows, tokenizer=tokenizer, max_length=20, overlong="skip"))
    assert len(data.prepared["train"].rows) == 1
    with pytest.raises(DataError, match=r"exceed data\.max_length 20"):
        ready(SFTDataModule(rows, tokenizer=tokenizer, max_length=20, overlong="error"))
    with pytest.raises(DataError, match="no token is trained: the prompt alone exceeds"):
        ready(SFTDataModule([{"prompt": "word " * 50, "completion": "x"}], tokenizer=tokenizer, max_length=20))


def test_text_column_next_to_a_conversation_is_ignored(tokenizer: Any) -> None:
    rows = [{"instruction": "Hi", "output": "Hello", "text": "### Hi ### Hello"}]
    (row,) = ready(SFTDataModule(rows, tokenizer=tokenizer)).prepared["train"].rows
    assert tokenizer.decode(row.ids).endswith("assistant\nHello<|im_end|>")


def test_text_rows_end_with_the_stop_token(tokenizer: Any) -> None:
    data = ready(SFTDataModule([{"text": "one two"}], tokenizer=tokenizer))
    (row,) = data.prepared["train"].rows
    assert tokenizer.decode(row.ids) == "one two<|im_end|>"
    assert row.loss_mask == [0] + [1] * (len(row.ids) - 1)
    with pytest.raises(DataError, match="must not be blank"):
        ready(SFTDataModule([{"text": " "}], tokenizer=tokenizer))


def test_validation_is_held_out(tokenizer: Any) -> None:
    data = ready(SFTDataModule(chats(20), tokenizer=tokenizer, validation_split=0.25, seed=3))
    train, held = data.prepared["train"].rows, data.prepared["validation"].rows
    assert (len(train), len(held)) == (15, 5)
    assert not [row for row in held if row in train]
    again = ready(SFTDataModule(chats(20), tokenizer=tokenizer, validation_split=0.25, seed=3))
    assert again.prepared["validation"].rows == held


def test_pairs(tokenizer: Any) -> None:
    prompt, chosen, rejected = split_pair({"prompt": "Hi", "chosen": "yes", "rejected": "no"})
    assert [m["role"] for m in (prompt[0], chosen[0], rejected[0])] == ["user", "assistant", "assistant"]
    whole = {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "No"}]}
    assert split_pair(whole) == ([USER], [ASSISTANT], [{"role": "assistant", "content": "No"}])
    assert split_pair({"prompt": [USER], **whole}) == split_pair(whole)
    assert split_pair({"prompt": "Hi", **whole}) == split_pair(whole)
    data = ready(
        PreferenceDataModule(
            [{"prompt": "Hi", "chosen": "yes it is", "rejected": "no", "margin": 2}], tokenizer=tokenizer
        )
    )
    (pair,) = data.prepared["train"].rows
    batch = data.collate([pair], [1.0])
    assert batch["input_ids"].shape[0] == 2
    assert batch["margin"].tolist() == [2.0]
    assert batch["lengths"].tolist() == [pair.chosen.tokens, pair.rejected.tokens]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "a"}, "no 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "no 'prompt'"),
        ({"chosen": [USER], "rejected": [ASSISTANT]}, "do not begin with the same messages"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "Hi", "chosen": "a", "rejected": " "}, "rejected: no token is trained"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "x"}, "'margin' is 'x'"),
        ({"prompt": "Hi", "chosen": "word " * 90, "rejected": "b"}, "exceed data.max_length 40"),
    ],
)
def test_malformed_pairs(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        ready(PreferenceDataModule([row], tokenizer=tokenizer, max_length=40))
    assert "list[0]" in str(error.value)


def test_long_pairs_lose_the_same_part_of_the_prompt(tokenizer: Any) -> None:
    row = {"prompt": "word " * 60, "chosen": "one", "rejected": "one two three"}
    data = ready(PreferenceDataModule([row], tokenizer=tokenizer, max_length=40, overlong="truncate"))
    (pair,) = data.prepared["train"].rows
    assert max(pair.chosen.tokens, pair.rejected.tokens) == 40
    assert pair.chosen.loss_mask.index(1) == pair.rejected.loss_mask.index(1)
    assert data.prepared["train"].truncated == 1


def test_prompts(tokenizer: Any) -> None:
    data = PromptDataModule(validation=[*prompts(3), "a plain line"], tokenizer=tokenizer)
    data.setup("validate")
    rows = data.prepared["validation"].rows
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert rows[2].row["wanted"] == 2
    assert tokenizer.decode(rows[3].ids).endswith("a plain line<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "no 'prompt'"),
        ({"prompt": [USER, ASSISTANT]}, "ends with an assistant message"),
        ({"prompt": "word " * 90}, "exceed data.max_prompt_tokens 30"),
    ],
)
def test_malformed_prompts(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    data = PromptDataModule(validation=[row], tokenizer=tokenizer, max_prompt_tokens=30)
    with pytest.raises(DataError, match=message):
        data.setup("validate")


def test_invalid_settings_are_refused(tokenizer: Any) -> None:
    for options, message in (
        ({"train_on": "some"}, "train_on is 'some'"),
        ({"overlong": "cut"}, "overlong is 'cut'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"format": "html"}, "format is 'html'"),
    ):
        with pytest.raises(ConfigError, match=message):
            ready(SFTDataModule(chats(1), tokenizer=tokenizer, **options))
    with pytest.raises(ConfigError, match=r"data\.train is not set"):
        ready(SFTDataModule(tokenizer=tokenizer))
    with pytest.raises(ConfigError, match="group_size is 0"):
        PromptDataModule(["x"], group_size=0)


# -- the loader -------------------------------------------------------------------------------------------------------


class Item:
    def __init__(self, number: int) -> None:
        self.number, self.tokens, self.trained = number, 1 + number % 5, 1

    def counts(self) -> dict[str, float]:
        return {"tokens": float(self.number)}


def loader(size: int, batch: int, **layout: Any) -> RowLoader:
    def collate(rows: list[Item], weights: list[float]) -> dict[str, Any]:
        return {"numbers": [row.number for row, weight in zip(rows, weights, strict=True) if weight]}

    items = [Item(i) for i in range(size)]
    return RowLoader(items, collate, batch, shuffle=True, seed=1, shard_spec=lambda: ShardSpec(**layout))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "batch", "world", "accumulate"), [(10, 2, 1, 1), (11, 2, 2, 2), (3, 2, 2, 4), (7, 1, 3, 2)]
)
def test_each_row_is_loaded_once_with_the_counts_of_its_step(
    size: int, batch: int, world: int, accumulate: int
) -> None:
    ranks = [list(loader(size, batch, rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(loader(size, batch, world=world))
    seen = [number for batches in ranks for b in batches for number in b["numbers"]]
    assert sorted(seen) == list(range(size))
    for start in range(0, len(ranks[0]), accumulate):
        step = [b for batches in ranks for b in batches[start : start + accumulate]]
        total = sum(number for b in step for number in b["numbers"])
        assert {b["denominators"]["tokens"] for b in step} == {total}


def test_order_is_seeded_and_differs_between_epochs() -> None:
    orders = [[b["numbers"] for b in loader(12, 3, epoch=epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_loader_resumes_at_its_position(accumulate: int) -> None:
    whole = [b["numbers"] for b in loader(17, 2, accumulate=accumulate)]
    for stop in range(1, len(whole)):
        first, second = loader(17, 2, accumulate=accumulate), loader(17, 2, accumulate=accumulate)
        iterator = iter(first)
        taken = [next(iterator)["numbers"] for _ in range(stop)]
        second.load_state_dict(first.state_dict())
        assert taken + [b["numbers"] for b in second] == whole


def test_position_at_the_end_of_an_epoch_is_zero() -> None:
    one = loader(6, 2)
    list(one)
    assert one.state_dict() == {"position": 0}


def test_counts_of_a_limited_epoch_include_only_loaded_rows() -> None:
    batches = list(loader(12, 2, accumulate=2, limit=3))
    assert len(batches) == 3
    assert batches[2]["denominators"]["tokens"] == sum(batches[2]["numbers"])


def test_small_helpers() -> None:
    assert split_evenly([1, 2, 3], 2) in ([[1, 2], [3]], [[1], [2, 3]])
    assert split_evenly([1], 3).count([]) == 2
    assert len({mix_seeds(a, b) for a in range(10) for b in range(10)}) == 100
    torch.Generator().manual_seed(mix_seeds(2**70, -1))  # any integers make a valid seed
