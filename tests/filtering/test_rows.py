"""Filters of rows: which texts of a row are looked at, and what follows for training and for rewards."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.filtering import FilterReward, RuleFilter
from rlhf_lightning.filtering.rows import row_texts
from rlhf_lightning.models.model_card import card
from rlhf_lightning.rewards import RewardTerm
from rlhf_lightning.types import Episode
from tests.helpers.cli import mistake, rlhf_in_process, stage_config, write_yaml
from tests.helpers.rows import chats, pairs, ready

CALL = {
    "id": "secret1",
    "type": "function",
    "function": {"name": "pay", "arguments": {"card": 4111, "to": {"a": "Ann"}}},
}
USER = {"role": "user", "content": [{"type": "text", "text": "credit "}, {"type": "text", "text": "card"}]}


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "p", "completion": "c", "note": "n"}, {"user": ["p"], "assistant": ["c"], "other": ["n"]}),
        ({"messages": ["q", "a", "q2"]}, {"user": ["q", "q2"], "assistant": ["a"]}),
        ({"text": "t", "score": 3}, {"other": ["t"]}),
        ({"instruction": "i", "input": "in", "output": "o", "system": "s", "history": [["q", "a"]]},
         {"user": ["i", "in", "q"], "assistant": ["o", "a"], "system": ["s"]}),
        ({"messages": [USER, {"role": "assistant", "content": None, "reasoning_content": "why", "tool_calls": [CALL]},
                       {"role": "tool", "content": "done", "tool_call_id": "secret1"}]},
         {"user": ["credit card"], "assistant": ["why", "pay", "card", "4111", "to", "a", "Ann"], "tool": ["done"]}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         {"user": ["q"], "assistant": ["a"]}),
        ({"messages": json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}])},
         {"user": ["hi"], "assistant": ["a"]}),
        ({"prompt": "p", "chosen": [{"role": "assistant", "content": "c"}], "rejected": "r"},
         {"user": ["p"], "assistant": ["c"], "rejected": ["r"]}),
        ({"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": [{"from": "gpt", "value": "r"}]},
         {"user": ["p"], "assistant": ["c"], "rejected": ["r"]}),
        ({"prompt": "p", "response": "r", "label": 0}, {"user": ["p"], "rejected": ["r"]}),
        ({"prompt": "p", "responses": ["a", "b"]}, {"user": ["p"], "assistant": ["a", "b"]}),
        ({"completion": '{"a": "b\\u0061d"}'}, {"assistant": ['{"a": "b\\u0061d"}', "bad"]}),
    ],
)  # fmt: skip
def test_texts_of_a_row_have_the_roles_of_those_who_said_them(row: Any, texts: Any) -> None:
    found: dict[str, list[str]] = {}
    for one in row_texts(row, "a.jsonl:1"):
        found.setdefault(str(one.role), []).append(one.text)
        assert one.label == f"a.jsonl:1 {one.where}"
    assert {role: sorted(said) for role, said in found.items()} == {role: sorted(said) for role, said in texts.items()}


def test_columns_of_other_names_have_the_roles_of_their_mapping() -> None:
    found = row_texts({"question": "q", "better": "b", "worse": "w"}, "", {"prompt": "question", "rejected": "worse"})
    assert [one.role for one in found] == ["user", "other", "rejected"]


RULES = """rules:
  five: {terms: [five], action: drop}
  three: {terms: [three], action: mark}
"""


@pytest.fixture
def rules(tmp_path: Path) -> str:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return str(path)


def test_training_rows_are_dropped_and_marked_and_others_are_not(rules: str, tokenizer: Any) -> None:
    given: dict[str, Any] = {"tokenizer": tokenizer, "filter": RuleFilter(rules)}
    data = ready(SFTDataModule(chats(14), chats(14), **given))
    kept = [row for row in chats(14) if "five" not in row["messages"][1]["content"]]
    assert len(data.prepared["train"].rows) == len(kept) == 8
    assert len(data.prepared["validation"].rows) == 14
    counts = data.row_counts()["train"]
    assert (counts["rows"], counts["examples"]) == (14, 8)
    assert counts["filter"] == {
        "data.train": {"rows": 14, "marked": 4, "dropped": 6, "rules": {"five": 6, "three": 10}}
    }
    mixed = {"a": {"source": chats(7), "weight": 2}, "b": {"source": chats(14)}}
    data = ready(SFTDataModule(mixed, **given))
    assert [data.filter_counts[name].actions["drop"] for name in "ab"] == [3, 6]
    assert [len(one) for one in data.prepared["train"].order(data.mixture, 0).examples] == [4, 8]


def test_rejected_answers_are_looked_at_unless_roles_leave_them_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*pairs(3), {"prompt": "Count", "chosen": "one", "rejected": "a bomb"}]
    for roles, left in (("", 3), (", roles: [user, assistant]", 4)):
        path = tmp_path / "rules.yaml"
        path.write_text(f"rules: {{bomb: {{terms: [bomb]{roles}}}}}")
        data = ready(PreferenceDataModule(rows, tokenizer=tokenizer, filter=RuleFilter(str(path))))
        assert len(data.prepared["train"].rows) == left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: {all: {pattern: Count}}", r"data.filter drops all 3 rows of data.train; the first is list\[0\]"),
        ("rules: {two: {terms: [two], action: block}}", r"list\[1\]: data.filter blocks this row \(rule two: 'two'\)"),
    ],
)
def test_nothing_left_and_blocked_rows_are_errors(text: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        ready(SFTDataModule(chats(3), tokenizer=tokenizer, filter=RuleFilter(str(tmp_path / "rules.yaml"))))


def test_filters_that_cannot_work_are_refused(rules: str) -> None:
    with pytest.raises(ConfigError, match=r"in Python pass an object, for example RuleFilter"):
        SFTDataModule(chats(3), filter=rules)  # type: ignore[arg-type]
    for other in ({"streaming": True}, {"cache": "cache"}):
        with pytest.raises(ConfigError, match=r"cannot be combined with data.streaming or data.cache"):
            SFTDataModule(chats(3), filter=RuleFilter(rules), **other)
    with pytest.raises(ConfigError, match=r"recorded episodes .* consist of tokens"):
        PromptDataModule(episodes="episodes.jsonl", filter=RuleFilter(rules))


def test_a_run_has_the_counts_in_its_records_and_is_not_resumed_with_other_rules(
    rules: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage_config("sft", base, tmp_path)
    config["data"]["filter"] = {"class_path": "rlhf_lightning.filtering.RuleFilter", "init_args": {"rules": rules}}
    args = [
        "sft",
        "fit",
        "-c",
        write_yaml(tmp_path / "c.yaml", config),
        "--trainer.default_root_dir",
        str(tmp_path / "r"),
    ]
    rlhf_in_process(*args)
    facts = json.loads((tmp_path / "r" / "stage.json").read_text())
    assert facts["rows"]["train"]["filter"]["data.train"]["dropped"] == 4
    text = card(tmp_path / "r" / "model", facts, {})
    assert "A filter dropped 4 of 12 rows of data.train and marked 4; its rules matched: three in 8, five in 4" in text
    assert "may have left other unsafe text" in text
    rlhf_in_process(*args)
    assert "already finished" in capsys.readouterr().err
    Path(rules).write_text(RULES.replace("five]", "six]"))
    assert "the rules of data.filter" in mistake(args, capsys)


def test_reward_is_the_penalty_of_responses_that_are_dropped(
    rules: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from rlhf_lightning.data.rendering import Renderer

    def episode(*answers: str) -> Episode:
        replies = [{"role": "assistant", "content": answer} for answer in answers]
        return Episode(prompt=[{"role": "user", "content": "five"}], row={}, group=0, responses=replies)  # type: ignore

    term = RewardTerm(FilterReward(rules, penalty=-2.0), Renderer(tokenizer))
    episodes = [episode("three"), episode("five", "one"), episode("one")]
    assert term.score(episodes) == [0.0, -2.0, 0.0]
    assert episodes[0].details == {"filter_filtered": 0, "filter_marked": 1, "filter_five": 0, "filter_three": 1}
    assert [one.details["filter_filtered"] for one in episodes] == [0, 1, 0]
    with pytest.raises(ConfigError, match="below 0"):
        FilterReward(rules, penalty=1.0)
    Path(rules).write_text("rules: {call: {terms: ['a <|im_end|>']}}")
    RewardTerm(FilterReward(rules), Renderer(tokenizer))
    assert "the term 'a <|im_end|>' of the rule call matches no response" in caplog.text
