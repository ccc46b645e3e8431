"""Columns with a common meaning are used in every row format, or refused with file, line and a remedy."""

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_lightning.cli.score import responses
from rlhf_lightning.data.check import check
from rlhf_lightning.data.conversations import to_messages
from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.prompts import PromptDataModule, prompt_example
from rlhf_lightning.data.records import LocatedRow, Reading, RowError, convert_rows
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.data.tool_calls import read_tools
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.evaluation.text_metrics import references_of
from rlhf_lightning.rewards.normalization import _demonstration
from tests.helpers.rows import ready, write_rows
from tests.helpers.templates import trained

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "Go away"}
SYSTEM = {"role": "system", "content": "Be kind."}
SFT = {
    "messages": {"messages": [USER, ASSISTANT]},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "completion": {"prompt": "Hi", "completion": "Hello"},
    "repeated": {"prompt": "Hi", "completion": [USER, ASSISTANT]},
    "instruction": {"instruction": "Hi", "output": "Hello"},
}
PAIRS = {
    "pair": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "messages": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [BAD]},
    "whole": {"chosen": [USER, ASSISTANT], "rejected": [USER, BAD]},
    "repeated": {"prompt": "Hi", "chosen": [USER, ASSISTANT], "rejected": [USER, BAD]},
    "repeated with system": {"prompt": "Hi", "chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, BAD]},
}
WHERE = r"(list\[0\]|rows.jsonl:1): "
LABEL = {"prompt": "Hi", "response": "Hello", "label": 1}
RANKING = {"prompt": "Hi", "responses": ["Hello", "Go away"]}


def rows_of(module: type, row: dict[str, Any], tokenizer: Any, **settings: Any) -> list[Any]:
    return list(ready(module([row], tokenizer=tokenizer, **settings)).prepared["train"].rows)


READERS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any], Any], list[list[int]]]]] = {
    **{f"sft {k}": (v, lambda row, t: [r.ids for r in rows_of(SFTDataModule, row, t)]) for k, v in SFT.items()},
    **{
        f"pairs {k}": (v, lambda row, t: [s.ids for r in rows_of(PreferenceDataModule, row, t) for s in r.sides])
        for k, v in PAIRS.items()
    },
    "labels": (LABEL, lambda row, t: [rows_of(PreferenceDataModule, row, t, kind="labels")[0].sides[0].ids]),
    "rankings": (
        RANKING,
        lambda row, t: [side.ids for side in rows_of(PreferenceDataModule, row, t, kind="rankings")[0].sides],
    ),
    "prompts": ({"prompt": "Hi"}, lambda row, t: [rows_of(PromptDataModule, row, t)[0].ids]),
    **{f"prompt of {k}": (v, lambda row, t: [prompt_example(Renderer(t), row).ids]) for k, v in SFT.items()},
    **{
        f"score {k}": (v, lambda row, t: [side.ids for side in responses(Renderer(t), row).values()])
        for k, v in {**PAIRS, "label": LABEL, "ranking": RANKING, "messages of SFT": SFT["messages"]}.items()
    },
    "demonstration": (SFT["completion"], lambda row, t: [_demonstration(Renderer(t), row).training_samples[0].ids]),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, tokenizer: Any) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    row, read = READERS[request.param]

    def convert(data: dict[str, Any]) -> list[str]:
        """The text of the rows that were read, and the locations of bad rows."""
        found = convert_rows([LocatedRow(data, "rows.jsonl:1")], lambda d: read(d, tokenizer), Reading())
        return [tokenizer.decode(ids) for ids in found]

    return row, convert


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_system_column_becomes_the_first_message(reader: Any, column: str) -> None:
    row, convert = reader
    begin = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for text in convert({**row, column: "Be kind."}):
        assert text.startswith(begin)
        assert text.count("Be kind.") == text.count("Hi<") == 1
    if "chosen" not in row or "system" not in str(row):
        assert all(text.startswith("<|im_start|>user") for text in convert({**row, column: " "}))


def test_unusable_system_column_is_refused(reader: Any) -> None:
    row, convert = reader
    with pytest.raises(DataError, match=rf"{WHERE}'system' is int 3; it must be text"):
        convert({**row, "system": 3})
    with pytest.raises(DataError, match=rf"{WHERE}.*'system' and 'system_prompt', but they differ"):
        convert({**row, "system": "a", "system_prompt": "b"})


@pytest.mark.parametrize("column", ["images", "audio", "video"])
def test_media_are_refused(reader: Any, column: str) -> None:
    row, convert = reader
    assert convert({**row, column: []}) == convert(row)
    with pytest.raises(DataError, match=rf"{WHERE}.*'{column}', but only text is supported"):
        convert({**row, column: ["a.png"]})


def test_content_parts_other_than_text_are_refused(tokenizer: Any) -> None:
    for kind in ("image", "image_url", "input_audio", "video"):
        said = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": kind, kind: "x"}]}, ASSISTANT]
        with pytest.raises(DataError, match=rf"message 0 \(user\): content has a part of type '{kind}'"):
            ready(SFTDataModule([{"messages": said}], tokenizer=tokenizer))


def test_system_column_must_agree_with_the_conversation(tokenizer: Any) -> None:
    row = {"messages": [SYSTEM, USER, ASSISTANT]}
    same, alone = (rows_of(SFTDataModule, {**row, **more}, tokenizer)[0].ids for more in ({"system": "Be kind. "}, {}))
    assert same == alone
    with pytest.raises(
        DataError, match="column 'system' differs from the system message at the beginning of the conversation"
    ):
        rows_of(SFTDataModule, {**row, "system": "Be terse."}, tokenizer)


def test_tools_that_the_template_does_not_render_are_refused(reader: Any) -> None:
    row, convert = reader
    for name in ("tools", "functions"):
        with pytest.raises(DataError, match="the row has tools, but the chat template does not render tools"):
            convert({**row, name: [{"name": "f", "parameters": {}}]})
    assert convert({**row, "tools": "[]"}) == convert(row)


def test_plain_text_with_columns_of_conversations_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="plain text, but has 'system'"):
        ready(SFTDataModule([{"text": "one", "system": "a"}], tokenizer=tokenizer))
    (row,) = rows_of(SFTDataModule, {"text": "one", "system": "a"}, tokenizer, columns={"system": None})
    assert tokenizer.decode(row.ids) == "one<|im_end|>"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"trainable": False}, {"weight": 0.0, "train": 0}])
def test_turn_marked_as_not_trained_is_masked(tokenizer: Any, mark: dict[str, Any]) -> None:
    said = [USER, {**BAD, **mark}, USER, {**ASSISTANT, "weight": 1, "train": True}]
    (row,) = rows_of(SFTDataModule, {"messages": said}, tokenizer)
    assert trained(tokenizer, row) == ["Hello<|im_end|>"]
    (row,) = rows_of(SFTDataModule, {"messages": said}, tokenizer, train_on="all_messages")
    assert trained(tokenizer, row) == ["Hi<|im_end|>", "Hi<|im_end|>", "Hello<|im_end|>"]
    (row,) = rows_of(SFTDataModule, {"messages": said}, tokenizer, train_on="trainable")
    assert trained(tokenizer, row) == ["Hello<|im_end|>"]
    for settings, message in (
        ({"train_on": "everything"}, "data.train_on is everything"),
        ({"train_on": "last_assistant"}, "all turns are marked as not trained"),
        ({"format": "raw"}, "with format raw the last message"),
    ):
        with pytest.raises(DataError, match=message):
            rows_of(SFTDataModule, {"messages": [USER, {**BAD, **mark}]}, tokenizer, **settings)
    # No part of a prompt is trained; a response is scored as a whole.
    asked = [USER, {**BAD, **mark}, USER]
    pair = {"prompt": asked, "chosen": "Hello", "rejected": "No"}
    assert rows_of(PreferenceDataModule, pair, tokenizer)
    with pytest.raises(DataError, match="a response is always trained and scored as a whole"):
        rows_of(PreferenceDataModule, {**pair, "chosen": [{**ASSISTANT, **mark}]}, tokenizer)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"weight": 0.5}, "'weight' is float 0.5; it must be 0"),
        ({"train": "no"}, "'train' is str 'no'; it must be true or false"),
        ({"weight": 1, "trainable": False}, "is marked both as trained and as not trained"),
    ],
)
def test_invalid_marks_are_refused(tokenizer: Any, mark: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"list\[0\]: message 1 \(assistant\).* ?{message}"):
        rows_of(SFTDataModule, {"messages": [USER, {**ASSISTANT, **mark}]}, tokenizer)


def test_mark_that_train_on_ignores_gives_a_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    (row,) = rows_of(SFTDataModule, {"messages": [{**USER, "train": True}, ASSISTANT]}, tokenizer)
    assert trained(tokenizer, row) == ["Hello<|im_end|>"]
    assert caplog.text.count("the marks of trained messages are ignored, because data.train_on is all_assistant") == 1


@pytest.mark.parametrize("shape", SFT)
@pytest.mark.parametrize("label", [0, False, "undesirable"])
def test_row_with_a_negative_label_is_refused_for_sft(tokenizer: Any, shape: str, label: Any) -> None:
    row = {**SFT[shape], "label": label}
    with pytest.raises(DataError, match=r"list\[0\]: 'label' is .*marks a bad answer"):
        rows_of(SFTDataModule, row, tokenizer)
    with pytest.raises(DataError, match="marks a bad answer"):
        _demonstration(Renderer(tokenizer), row)
    assert rows_of(SFTDataModule, {**row, "label": 1}, tokenizer)
    assert rows_of(SFTDataModule, {**row, "label": "sports"}, tokenizer)
    assert rows_of(SFTDataModule, row, tokenizer, columns={"label": None})


def test_pairs_are_refused_for_sft(tokenizer: Any) -> None:
    pair = PAIRS["repeated"]
    with pytest.raises(DataError, match=r"list\[0\]: the row has no conversation.* This is a pair: rlhf preference"):
        rows_of(SFTDataModule, pair, tokenizer)
    with pytest.raises(DataError, match=r"list\[0\]: the row has 'chosen' and 'rejected': rlhf preference learns"):
        rows_of(SFTDataModule, {**pair, "messages": [USER, BAD]}, tokenizer)
    whole = {**pair, "messages": pair["chosen"]}  # UltraFeedback
    for row, columns in ((pair, {"completion": "chosen"}), (pair, {"messages": "chosen"}), (whole, None)):
        (found,) = rows_of(SFTDataModule, row, tokenizer, columns=columns)
        assert found == rows_of(SFTDataModule, SFT["messages"], tokenizer)[0]


def test_row_weights_are_refused(tokenizer: Any) -> None:
    for module, row in ((SFTDataModule, SFT["messages"]), (PreferenceDataModule, PAIRS["pair"])):
        assert rows_of(module, {**row, "weight": 1.0}, tokenizer)
        with pytest.raises(DataError, match=r"'weight' is 0\.5, but row weights are not supported"):
            rows_of(module, {**row, "weight": 0.5}, tokenizer)


def test_scores_that_contradict_a_pair_give_a_warning(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    given = [{**PAIRS["pair"], "score_chosen": a, "score_rejected": b} for a, b in ((8, 5.5), (2, 3), (4, 4))]
    ready(PreferenceDataModule(given, tokenizer=tokenizer))
    assert "score_rejected is higher than score_chosen in 1 pairs" in caplog.text


@pytest.mark.parametrize("name", ["score", "rating"])
def test_scores_under_names_of_other_datasets(tokenizer: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    given = [{**PAIRS["pair"], f"chosen_{name}": a, f"rejected_{name}": b} for a, b in ((1, 5), (2, 3), (5, 1))]
    ready(PreferenceDataModule(given, tokenizer=tokenizer))
    assert f"rejected_{name} is higher than chosen_{name} in 2 pairs" in caplog.text


@pytest.mark.parametrize(
    ("module", "row", "columns", "hint"),
    [
        (SFTDataModule, SFT["messages"], {"mesages": "messages"}, "did you mean messages?"),
        (
            SFTDataModule,
            {**SFT["messages"], "kind": "a"},
            {"category": "kind"},
            "columns that are used: functions, messages",
        ),
        (PreferenceDataModule, {**PAIRS["pair"], "gap": 1}, {"margins": "gap"}, "did you mean margin?"),
    ],
)
def test_mapping_to_an_unused_name_is_refused(
    module: Any, row: dict[str, Any], columns: dict[str, str], hint: str, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=f"these rows do not use a column .*{re.escape(hint)}"):
        rows_of(module, row, tokenizer, columns=columns)
    with pytest.raises(ConfigError, match="these rows do not use a column"):
        check(module([], tokenizer=tokenizer, columns=columns), [row])
    (prompt,) = rows_of(PromptDataModule, {"prompt": "Hi", "solution": "4"}, tokenizer, columns={"answer": "solution"})
    assert prompt.row["answer"] == "4", "rewards are given it"


def test_train_on_is_refused_for_raw_text(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="train_on is everything, but format raw always trains the last message"):
        rows_of(SFTDataModule, SFT["messages"], tokenizer, format="raw", train_on="everything")
    assert rows_of(SFTDataModule, {"text": "one"}, tokenizer, format="raw", train_on="everything")
    assert rows_of(SFTDataModule, SFT["messages"], tokenizer, format="raw", train_on="last_assistant")


def test_tie_is_refused_for_labels(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the pair is a tie: neither response can be labeled"):
        rows_of(PreferenceDataModule, {**PAIRS["pair"], "tie": True}, tokenizer, kind="labels")


def test_unused_columns_are_logged_once(tokenizer: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows = [{**SFT["messages"], "prompt": "Hi", "id": i, "source": "", "hint": "x"} for i in range(3)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    ready(SFTDataModule(path, tokenizer=tokenizer))
    assert caplog.text.count("train: columns not used: prompt, id, hint\n") == 1
    caplog.clear()
    ready(PreferenceDataModule([{**PAIRS["pair"], "id": 7, "category": "a"}], tokenizer=tokenizer))
    assert "train: columns not used: id\n" in caplog.text
    caplog.clear()
    (prompt,) = ready(PromptDataModule([{"prompt": "Hi", "id": 7}], tokenizer=tokenizer)).prepared["train"].rows
    assert "not used" not in caplog.text
    assert prompt.row["id"] == 7, "rewards are given the row"


def test_reference_answers_with_a_system_column(tokenizer: Any) -> None:
    for row in (*SFT.values(), LABEL, *PAIRS.values()):
        if "prompt" in row or "messages" in row:
            prompt = prompt_example(Renderer(tokenizer), {**row, "system": "Be kind."})
            assert references_of([prompt]) == [[[ASSISTANT]]]


@pytest.mark.parametrize(
    "mark", [{"loss": False}, {"training": False}, {"loss_weight": 0}, {"train": False}, {"weight": 0.0}]
)
def test_marks_in_formats_of_other_tools(tokenizer: Any, mark: dict[str, Any]) -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    data = SFTDataModule([{"messages": [said[0], {**said[1], **mark}, *said]}], tokenizer=tokenizer, show_example=False)
    data.setup("fit")
    assert data.prepared["train"].rows[0].show(tokenizer).count("⟦") == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_detail", [{"begin_offset": 0}]), ("tools", [{"name": "f"}]), ("functions", "[{}]"), ("images", ["a.png"])],
)
def test_unsupported_keys_of_a_message_are_refused(tokenizer: Any, key: str, value: Any) -> None:
    said = [{"role": "user", "content": "Q", key: value}, {"role": "assistant", "content": "A"}]
    with pytest.raises(DataError, match=rf"message 0 \(user\) has '{key}', which is not supported in a message"):
        SFTDataModule([{"messages": said}], tokenizer=tokenizer, show_example=False).setup("fit")


@pytest.mark.parametrize("column", [{"weight": "0"}, {"weight": "0.5"}, {"train": "False"}, {"loss_weight": 0}])
def test_row_weights_are_refused_for_every_kind(tokenizer: Any, column: dict[str, Any]) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "show_example": False}
    said = {"prompt": "Q", "completion": "A", "chosen": "A", "rejected": "B", **column}
    sft = {key: value for key, value in said.items() if key not in ("chosen", "rejected")}
    for module, stage in (
        (SFTDataModule([sft], **options), "fit"),
        (PreferenceDataModule([said], **options), "fit"),
        (PromptDataModule(None, [said], **options), "validate"),
    ):
        with pytest.raises(DataError, match="row weights are not supported"):
            module.setup(stage)
    for fine in ("1", "1.0", "true", "train"):  # a split's name may stand in a column of that name
        SFTDataModule([sft | {next(iter(column)): fine}], **options).setup("fit")


def test_template_settings_in_a_row_are_refused(tokenizer: Any) -> None:
    row = {"prompt": "Q", "completion": "A", "chat_template_kwargs": {"enable_thinking": False}}
    for module, stage in (
        (SFTDataModule([row], tokenizer=tokenizer, show_example=False), "fit"),
        (PromptDataModule(None, [row], tokenizer=tokenizer, show_example=False), "validate"),
    ):
        with pytest.raises(DataError, match=r"set data\.template_kwargs"):
            module.setup(stage)


def test_conversations_stored_as_text() -> None:
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "It's"}]
    for text in (json.dumps(said), str(said), json.dumps([{"from": "human", "value": "It's"}])):
        assert to_messages(text)[-1] == said[-1]
    # A printed array of numpy has no commas.
    with pytest.raises(RowError, match="a printed Python list"):
        to_messages("[{'role': 'user', 'content': 'Q'}\n {'role': 'assistant', 'content': 'A'}]")
    # Other lists are messages of a user; an answer is never parsed.
    for text in ('[{"role": "admin", "content": "x"}]', '[{"role": "user", "content": "x"}] what is this?', "[1]"):
        assert to_messages(text) == [{"role": "user", "content": text}]
    assert to_messages(json.dumps(said), "assistant")[0]["role"] == "assistant"


def test_empty_object_is_not_a_tool() -> None:
    assert read_tools({}) is None
    assert read_tools("{}") is None
