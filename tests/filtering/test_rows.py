"""Filters of rows: which texts of a row are looked at, and what follows for training and for rewards."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PreferenceDataModule, PromptDataModule, SFTDataModule
from rlhf_lightning.data.row_streams import Streaming
from rlhf_lightning.data.stream_loader import StreamLoader
from rlhf_lightning.errors import ConfigError, DataError
from rlhf_lightning.filtering import FilterReward, RuleFilter
from rlhf_lightning.filtering.rows import row_texts
from rlhf_lightning.models.model_card import card
from rlhf_lightning.pipeline.run import run_pipeline
from rlhf_lightning.pipeline.verify import verify_run
from rlhf_lightning.rewards import RewardTerm
from rlhf_lightning.types import Episode
from tests.helpers.cli import mistake, rlhf_in_process, stage_config, write_yaml
from tests.helpers.rows import chats, pairs, ready, write_rows
from tests.helpers.runs import fork_stages

CALL = {
    "id": "secret1",
    "type": "function",
    "function": {"name": "pay", "arguments": {"card": 4111, "to": {"a": "Ann"}}},
}
OTHERS = [{"messages": [{"role": "user", "content": "Speak"}, {"role": "assistant", "content": "one"}]}] * 4
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
    assert [data.filter_counts[name].dropped for name in "ab"] == [3, 6]
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


def test_filters_that_cannot_work_are_refused(rules: str, base: str) -> None:
    with pytest.raises(ConfigError, match=r"in Python pass an object, for example RuleFilter"):
        SFTDataModule(chats(3), filter=rules)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"cannot be combined with data.streaming in policy stages"):
        PromptDataModule("prompts.jsonl", filter=RuleFilter(rules), streaming=True)
    judge = 'judge: {url: "http://127.0.0.1:1/v1", model: m, key_variable: ""}, rubric: It is rude.'
    for text, message in (
        (judge, "has a judge, which data.streaming would ask again"),
        (f"classifier: {base}, label: LABEL_0", "set data.streaming.workers: 0, or filter the data once"),
    ):
        Path(rules).write_text(f"rules: {{all: {{{text}}}}}")
        with pytest.raises(ConfigError, match=message):
            SFTDataModule("chats.jsonl", filter=RuleFilter(rules), streaming=Streaming(workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_rows_are_filtered_mixed_and_resumed(workers: int, rules: str, base: str, tmp_path: Path) -> None:
    """The rest has the weights of the mixture, and a resumed loader has the batches and counts of one that is not."""
    file = write_rows(tmp_path / "chats.jsonl", chats(42))
    mixed = {"a": {"source": file, "weight": 2}, "b": {"source": write_rows(tmp_path / "b.jsonl", chats(14))}}

    def make() -> StreamLoader[Any, Any]:
        streaming = Streaming(shuffle_buffer=4, workers=workers)
        data = SFTDataModule(
            mixed, filter=RuleFilter(rules), streaming=streaming, tokenizer=base, batch_size=2, show_example=False
        )
        data.setup("fit")
        loader = data.train_dataloader()
        assert isinstance(loader, StreamLoader)
        return loader

    loader, batches, states, totals = make(), [], [], []
    for batch in loader:
        batches.append(batch["where"])
        states.append(json.loads(json.dumps(loader.state_dict())))
        totals.append(loader.totals())
    used = [where for batch in batches for where in batch]
    lines = {where for where in used if "chats.jsonl" in where}
    rows = chats(42)
    assert all("five" not in rows[int(where.rpartition(":")[2]) - 1]["messages"][1]["content"] for where in lines)
    assert abs(len(lines) - 2 * (len(used) - len(lines))) <= 2 * max(1, workers)  # each reader mixes its own rows
    kept = [one["filtered"]["rows"] - one["filtered"]["dropped"] for one in totals[-1]]
    assert kept == [one["examples"] for one in totals[-1]]
    assert [one["skipped"] for one in totals[-1]] == [0, 0]
    assert totals[-1][0]["filtered"]["rules"]["five"] == totals[-1][0]["filtered"]["dropped"] > 0
    for number in range(0, len(batches) - 1, 3):
        resumed = make()
        resumed.load_state_dict(states[number])
        assert [batch["where"] for batch in resumed] == batches[number + 1 :]
        assert resumed.totals() == totals[-1]


def test_streamed_rows_that_are_all_dropped_or_blocked_are_errors(base: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", chats(8))
    mixed = {"a": {"source": file}, "b": {"source": write_rows(tmp_path / "b.jsonl", OTHERS)}}
    path = tmp_path / "rules.yaml"

    def train(rule: str) -> None:
        path.write_text(f"rules: {{count: {rule}}}")
        data = SFTDataModule(
            mixed, filter=RuleFilter(str(path)), streaming=True, tokenizer=base, stopping_strategy="all_exhausted"
        )
        data.setup("fit")
        list(data.train_dataloader())

    with pytest.raises(DataError, match=r"data.filter drops all rows of a; change its rules"):
        train("{pattern: Count}")
    with pytest.raises(DataError, match=r"chats.jsonl:1: data.filter blocks this row \(rule count: 'Count'\)"):
        train("{pattern: Count, action: block}")


def test_cached_rows_are_filtered_and_other_rules_make_another_entry(
    rules: str, tokenizer: Any, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "chats.jsonl", chats(14))

    def make(**options: Any) -> SFTDataModule:
        return ready(SFTDataModule(file, filter=RuleFilter(rules), tokenizer=tokenizer, **options))

    plain, cache = make(), tmp_path / "cache"
    for _ in range(2):  # written, then read
        found = make(cache=cache)
        assert [row.ids for row in found.prepared["train"].rows] == [row.ids for row in plain.prepared["train"].rows]
        assert found.row_counts() == plain.row_counts()
        assert len(list(cache.glob("[!.]*"))) == 1
    Path(rules).write_text(RULES.replace("[five]", "[six]"))
    assert make(cache=cache).row_counts() == make().row_counts() != plain.row_counts()
    ready(SFTDataModule(file, tokenizer=tokenizer, cache=cache))
    assert len(list(cache.glob("[!.]*"))) == 3


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


def test_a_pipeline_notices_other_rules(rules: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a file that the rules name, when it is run again and when it is verified."""
    fork_stages(monkeypatch)
    terms = tmp_path / "terms.txt"
    terms.write_text("five")
    Path(rules).write_text(f"rules: {{five: {{file: {terms}}}}}")
    config = stage_config("sft", base, tmp_path)
    config["data"]["filter"] = {"class_path": "rlhf_lightning.filtering.RuleFilter", "init_args": {"rules": rules}}
    stage = {"name": "sft", "kind": "sft", "config": write_yaml(tmp_path / "c.yaml", config)}
    plan = {"name": "test", "seed": 0, "root": str(tmp_path / "run"), "stages": [stage]}
    run_pipeline(plan)
    assert {one.status for one in verify_run(tmp_path / "run")} == {"same"}
    run_pipeline(plan)
    terms.write_text("six")
    with pytest.raises(ConfigError, match=r"the inputs of stage sft have changed since it ran: filter\."):
        run_pipeline(plan)
    assert [one.what for one in verify_run(tmp_path / "run") if one.status == "differs"] == ["data.filter"]
    config["data"]["filter"]["init_args"] = {"rule": rules}
    write_yaml(tmp_path / "c.yaml", config)
    with pytest.raises(ConfigError, match=r"data\.filter: init_args do not fit .*missing a required argument: 'rules'"):
        run_pipeline(plan)


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
