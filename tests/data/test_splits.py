"""Held-out rows, and rows that are in both training and evaluation data."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule
from rlhf_lightning.data.records import read_rows
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.data.splits import held_out, is_blank, leaks, opening, row_key, said
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.quickstart.run import QuickstartSettings, _split
from tests.helpers.rows import chats, pairs, prompts, write_rows


def ready(data: Any, stage: str = "fit") -> Any:
    data.setup(stage)
    return data


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(1, 28), st.integers(0, 99))
def test_whole_prompts_are_held_out(prompts: list[int], wanted: int, seed: int) -> None:
    keys = [bytes([prompt]) for prompt in prompts]
    wanted = min(wanted, len(keys) - 1)
    held = held_out(keys, wanted, seed)
    kept = [row for row in range(len(keys)) if row not in held]
    assert len(held) == len(set(held))
    assert not {keys[row] for row in held} & {keys[row] for row in kept}
    if len(set(keys)) == 1:
        assert not held
        return
    assert held
    assert kept
    sizes = [keys.count(key) for key in set(keys)]
    assert len(held) <= wanted or len(held) == min(sizes)
    # No other prompt would have fit.
    assert all(len(held) + keys.count(keys[row]) > wanted for row in kept)


@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(st.integers(2, 200), st.integers(0, 10**9), st.data())
def test_split_of_distinct_prompts_is_a_permutation(size: int, seed: int, data: Any) -> None:
    wanted = data.draw(st.integers(1, size - 1))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    assert held_out([str(i).encode() for i in range(size)], wanted, seed) == order[:wanted]


def test_split_of_distinct_rows_is_unchanged(tokenizer: Any) -> None:
    whole = ready(SFTDataModule(chats(20), tokenizer=tokenizer, seed=3)).prepared["train"].rows
    data = ready(SFTDataModule(chats(20), tokenizer=tokenizer, validation_split=5, seed=3))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()
    assert data.prepared["validation"].rows == [whole[i] for i in order[:5]]
    assert data.prepared["train"].rows == [whole[i] for i in sorted(order[5:])]


def conversation(*contents: str, system: str | None = None) -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return {"messages": first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.mark.parametrize(
    ("module", "rows"),
    [
        (SFTDataModule, [conversation(f"q{i % 6}", f"answer {i}", "more?", "yes") for i in range(18)]),
        (SFTDataModule, [{"prompt": f"q{i % 6}", "completion": f"answer {i % 9}"} for i in range(18)]),
        (SFTDataModule, [{"text": f"text {i % 6}"} for i in range(18)]),
        (PreferenceDataModule, [{**pairs(6)[i % 6], "chosen": f"one {i} two"} for i in range(18)]),
        (PromptDataModule, [{**prompts(6)[i % 6], "number": i} for i in range(18)]),
    ],
)
def test_rows_of_a_prompt_stay_together(
    module: Any, rows: list[dict[str, Any]], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = ready(module(rows, tokenizer=tokenizer, validation_split=7))
    assert "validation: 6 of 18 rows held out of the training data (6 examples, 2 prompts)" in caplog.text
    assert "7 were requested, but the rows of a prompt stay together" in caplog.text
    numbers = [{int(row.where[5:-1]) % 6 for row in data.prepared[name].rows} for name in ("train", "validation")]
    assert [len(found) for found in numbers] == [4, 2]
    assert not numbers[0] & numbers[1]
    assert "are also training rows" not in caplog.text, "nothing leaks from what was held out"


def test_prompt_of_a_conversation() -> None:
    def rows(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": "x"} for role in roles]

    assert opening(rows("system", "user", "assistant", "user", "assistant")) == 2
    assert opening(rows("assistant", "user", "assistant")) == 2, "a greeting answers nobody"
    assert opening(rows("system", "assistant")) == 2
    assert said([{"role": "user", "content": " a\n", "weight": 0}]) == said([{"role": "user", "content": "a"}])
    assert is_blank([{"role": "system", "content": "s"}, {"role": "user", "content": " "}])
    assert not is_blank([{"role": "user", "content": "a"}])
    assert row_key("", "a", blank=True).prompt != row_key("", "b", blank=True).prompt


def test_different_system_messages_are_different_prompts(tokenizer: Any) -> None:
    rows = [conversation("q", f"a{i}", system=f"s{i % 2}") for i in range(6)]
    data = ready(SFTDataModule(rows, tokenizer=tokenizer, validation_split=3))
    assert len({int(row.where[5:-1]) % 2 for row in data.prepared["validation"].rows}) == 1


def test_one_prompt_cannot_be_split(tokenizer: Any) -> None:
    rows = [conversation("q", f"a{i}") for i in range(6)]
    with pytest.raises(ConfigError, match=r"all 6 rows have the same prompt.*give rows .* as data\.validation"):
        ready(SFTDataModule(rows, tokenizer=tokenizer, validation_split=2))


def test_mismatched_responses_stay_in_their_split(tokenizer: Any) -> None:
    """KTO's KL estimate uses responses to other prompts; it must not bring held-out responses into training."""
    from rlhf_lightning.objectives.preference import KTO

    class Labels(PreferenceDataModule):
        loss = KTO()  # type: ignore[assignment]

    for split in (6, 1):
        data = ready(Labels(pairs(12), tokenizer=tokenizer, validation_split=split, seed=1))
        held = {tuple(row.sides[0].ids[row.sides[0].loss_mask.index(1) :]) for row in data.prepared["validation"].rows}
        own = {tuple(row.sides[0].ids[row.sides[0].loss_mask.index(1) :]) for row in data.prepared["train"].rows}
        assert len(data.prepared["validation"].rows) == 2 * split
        for name in ("train", "validation"):
            for row in data.prepared[name].rows:
                other = row.sides[1]
                response = tuple(other.ids[other.loss_mask.index(1) :])
                assert response in (own if name == "train" or split == 1 else held)


# -- leakage ----------------------------------------------------------------------------------------------------------


def test_leaks_are_reported_with_their_first_rows(tokenizer: Any, tmp_path: Any, caplog: Any) -> None:
    train, held = chats(8), [conversation("Other", "one"), chats(3)[2], conversation("Count 5", "no"), chats(2)[1]]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("held", held))]
    ready(SFTDataModule(*files, tokenizer=tokenizer, show_example=False))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(
        f"leakage between data.train and data.validation: 2 of 4 rows are also training rows (the first: {files[1]}:2 "
        f"and {files[0]}:3), 3 of 4 rows have the prompt of a training row (the first: {files[1]}:2 and {files[0]}:3)"
    )
    caplog.clear()
    ready(SFTDataModule(files[0], [held[0]], tokenizer=tokenizer, show_example=False))
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("before", [True, False])
def test_rows_of_test_are_compared(tokenizer: Any, before: bool, caplog: Any) -> None:
    data = PreferenceDataModule(pairs(4), test=[*pairs(2), *pairs(6)[4:]], tokenizer=tokenizer, show_example=False)
    if before:
        data.setup("fit")
    data.setup("test")
    assert (
        "data.train and data.test: 2 of 4 rows are also training rows (the first: list[0] and list[0])" in caplog.text
    )
    caplog.clear()
    data = PreferenceDataModule("missing.jsonl", test=pairs(2), tokenizer=tokenizer, show_example=False)
    data.setup("test")
    assert "are also training rows" not in caplog.text, "training data that is not here is not needed to test"


def test_prompts_of_recorded_episodes_are_compared(tokenizer: Any) -> None:
    data = PromptDataModule(episodes=[{}], validation=prompts(3), tokenizer=tokenizer, show_example=False)
    ready(data, "validate")
    ids = data.prepared["validation"].rows[1].ids
    sampled = {"response_tokens": [1], "logprobs": [-1.0], "advantage": 1.0}
    keys = [
        data.key({"prompt_tokens": ids, **sampled}),
        data.key({"tokens": [*ids, 1], "loss_mask": [0] * len(ids) + [1]}),
    ]
    for key in keys:
        assert len(leaks([key], data.prepared["validation"].keys).prompts) == 1


@pytest.mark.parametrize("name", ["sft", "prompts"])
def test_quickstart_holds_out_whole_prompts(name: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 12}", "completion": f"a{i}"} for i in range(60)]
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "data").mkdir()
    paths = _split(QuickstartSettings(root=tmp_path, seed=3), name, str(tmp_path / "rows.csv"))
    train, held = ([row.data for row in read_rows(paths[f"{name}_{part}"])] for part in ("train", "validation"))
    assert len(held) == 5
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in train}
    assert sorted(row["completion"] for row in train + held) == sorted(row["completion"] for row in rows)


@pytest.mark.parametrize("kind", ["preference", "policy"])
def test_rows_with_turns_of_one_conversation_stay_together(kind: str, tokenizer: Any, caplog: Any) -> None:
    """Each turn of a conversation is a row. Conversations that share only their first turns (examples) are separate."""

    def row(*turns: str) -> dict[str, Any]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        return {"prompt": messages} if kind == "policy" else {"prompt": messages, "chosen": "a", "rejected": "b"}

    rows = [row(*[f"{c} {t}" for t in range(2 * n + 1)]) for c in range(9) for n in range(3)]
    make = PromptDataModule if kind == "policy" else PreferenceDataModule
    stage = "validate" if kind == "policy" else "fit"
    data = ready(make(rows, tokenizer=tokenizer, validation_split=6, show_example=False), stage)
    sides = [{int(r.where[5:-1]) // 3 for r in data.prepared[name].rows} for name in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [7, 2]
    examples = [row("example", "answer", f"question {i}") for i in range(9)]
    data = ready(make(examples, tokenizer=tokenizer, validation_split=2, show_example=False), stage)
    assert len(data.prepared["validation"].rows) == 2
    ready(make(rows[1:2], [rows[0], rows[2], rows[4]], tokenizer=tokenizer, show_example=False), stage)
    assert "2 of 3 rows belong to a conversation of the training data" in caplog.text


def test_prompts_as_text_are_compared(tokenizer: Any, caplog: Any) -> None:
    ready(PromptDataModule(["hi\r\nyou"], [{"prompt": "hi\nyou"}], tokenizer=tokenizer), "validate")
    assert "1 of 1 rows are also training rows" in caplog.text
