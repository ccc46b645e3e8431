"""`rlhf filter`, and what `generate` and `chat` do with a filter."""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.data.records import read_rows
from tests.helpers.cli import mistake, rlhf_in_process
from tests.helpers.rows import chats, write_rows

RULES = """refusal: Not this.
rules:
  five: {terms: [five]}
  three: {terms: [three], action: mark}
"""


@pytest.fixture
def rules(tmp_path: Path) -> str:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return str(path)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_kept_marked_and_removed_in_their_order(
    rules: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_rows(tmp_path / "a.jsonl", chats(7))
    table = tmp_path / "b.csv"
    table.write_text('prompt,completion,label\n"Hi","five, or\nthree",1\n"Hi",one,1\n')
    out = tmp_path / "clean"
    args = ["filter", "apply", rules, first, str(table), "--output", str(out)]
    rlhf_in_process(*args)
    printed = capsys.readouterr().out
    assert [first, "7", "4", "3", "2"] in [line.split() for line in printed.splitlines()]
    kept = lines(out / "rows.jsonl")
    assert [row.get("filtered_by") for row in kept] == [None, None, ["three"], ["three"], None]
    assert [{k: v for k, v in row.items() if k != "filtered_by"} for row in kept[:4]] == chats(7)[:4]
    assert kept[-1] == {"prompt": "Hi", "completion": "one", "label": 1}
    removed = lines(out / "removed.jsonl")
    assert [(row["source"], row["where"]) for row in removed] == [
        (first, f"{first}:5"), (first, f"{first}:6"), (first, f"{first}:7"), (str(table), f"{table}:2"),
    ]  # fmt: skip
    assert removed[0]["row"] == chats(7)[4]
    assert removed[0]["matches"] == [
        {"rule": "five", "action": "drop", "text": "five", "where": "messages[1].content"},
        {"rule": "three", "action": "mark", "text": "three", "where": "messages[1].content"},
    ]
    counts = json.loads((out / "summary.json").read_text())["counts"]
    assert counts[first] == {"rows": 7, "marked": 2, "dropped": 3, "rules": {"three": 5, "five": 3}}
    assert len(read_rows(out / "rows.jsonl")) == 5
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rlhf_in_process(*args)
    assert "has this result already" in capsys.readouterr().err
    rlhf_in_process(*args, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_of_something_else_is_not_overwritten(
    rules: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write_rows(tmp_path / "a.jsonl", chats(4)), tmp_path / "out"
    args = ["filter", "apply", rules, file, "--output", str(out)]
    out.mkdir()
    (out / "rows.jsonl").write_text("mine")
    assert "exists; give another --output" in mistake(args, capsys)
    (out / "rows.jsonl").unlink()
    # Interrupted after the first of two files was put in its place: the same command begins anew.
    replace, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        rlhf_in_process(*args, code=2)
    assert "counts" not in json.loads((out / "summary.json").read_text())
    rlhf_in_process(*args)
    assert len(lines(out / "rows.jsonl")) == 4
    Path(rules).write_text(RULES.replace("five]", "one]"))
    assert "the result of other files, rules or settings" in mistake(args, capsys)
    (out / "rows.jsonl").rename(tmp_path / "kept.jsonl")
    inside = write_rows(out / "rows.jsonl", chats(2))
    assert "would be overwritten" in mistake(["filter", "apply", rules, inside, "--output", str(out)], capsys)


def test_blocked_rows_write_nothing_and_rows_with_only_bad_rejected_answers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "a bomb"}, {"prompt": "Hi", "chosen": "a", "rejected": "b"}]
    file, path, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "rules.yaml", tmp_path / "out"
    args = ["filter", "apply", str(path), file, "--output", str(out)]
    path.write_text("rules: {bomb: {terms: [bomb], action: block}}")
    message = mistake(args, capsys)
    assert f"1 rows are blocked, so nothing is written; the first: {file}:1 (rule bomb: 'bomb')" in message
    assert [item.name for item in out.iterdir()] == ["summary.json"]
    path.write_text("rules: {bomb: {terms: [bomb]}}")
    rlhf_in_process(*args)
    assert "1 rows match only in their rejected answer" in capsys.readouterr().err


def test_evaluation_counts_errors_on_labeled_rows(
    rules: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"five": 1, "three": True, "five six": 0, "two": 0, "fiver": "true", "four": False}
    file = write_rows(tmp_path / "a.jsonl", [{"text": text, "unsafe": label} for text, label in texts.items()])
    errors = tmp_path / "errors.jsonl"
    rlhf_in_process("filter", "evaluate", rules, file, "--json", "--output", str(errors))
    found = json.loads(capsys.readouterr().out)
    names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    assert [found["overall"][name] for name in names] == [2, 1, 1, 2]
    assert [found["rules"]["three"][name] for name in names] == [1, 0, 2, 3]
    assert found["overall"]["precision"] == found["overall"]["recall"] == pytest.approx(2 / 3)
    assert found["overall"]["false_positive_rate"] == pytest.approx(1 / 3)
    # Wilson's interval for 2 of 3, by hand: center 0.573, half 0.365.
    assert (found["overall"]["recall_low"], found["overall"]["recall_high"]) == pytest.approx((0.208, 0.939), abs=1e-3)
    assert [(row["error"], row["row"]["text"]) for row in lines(errors)] == [
        ("false positive", "five six"), ("false negative", "fiver"),
    ]  # fmt: skip
    rlhf_in_process("filter", "evaluate", rules, file)
    assert f"false positive: {file}:3 (rule five: 'five')" in capsys.readouterr().out
    assert "must be true (or 1)" in mistake(["filter", "evaluate", rules, file, "--label", "text"], capsys)


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answer_of(base: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """The greedy answer of a random model, by prompt."""

    def answer(prompt: str) -> str:
        rlhf_in_process("generate", base, "--prompt", prompt, "--max_tokens", "6", "--temperature", "0", "--json")
        return str(json.loads(capsys.readouterr().out)["response"])

    return answer


def test_generate_marks_and_withholds_answers(
    base: str, answer_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = answer_of("Count"), answer_of("Hello there")
    assert first != second
    rules = tmp_path / "rules.yaml"
    rule = {"pattern": re.escape(second), "normalize": False}
    rules.write_text(
        yaml.safe_dump(
            {"refusal": "Not this.", "rules": {"second": rule, "any": {"pattern": ".", "action": "mark"}}},
            sort_keys=False,
        )
    )
    args = ["generate", base, "--prompt", "Count", "--prompt", "Hello there", "--max_tokens", "6", "--temperature", "0"]
    rlhf_in_process(*args, "--filter", str(rules), "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["response"] for row in found] == [first, "Not this."]
    assert [row["filter"] for row in found] == [
        {"action": "mark", "rules": ["any"]}, {"action": "drop", "rules": ["second", "any"]},
    ]  # fmt: skip
    rlhf_in_process(*args, "--filter", str(rules))
    out = capsys.readouterr()
    assert "Not this." in out.out
    assert second not in out.out
    assert "filter: mark of list[0], sample 0" in out.err


def test_chat_withholds_messages_and_answers(base: str, answer_of: Any) -> None:
    from rlhf_lightning.evaluation.chat import Conversation
    from rlhf_lightning.evaluation.policy import Policy
    from rlhf_lightning.filtering import FilterRules, Pattern, Terms

    answer = answer_of("Count")
    rules = [
        Terms(name="asked", terms=["bomb"], roles=["user"]),
        Terms(name="stop", terms=["stop"], roles=["user"], action="block"),
        Pattern(name="said", pattern=re.escape(answer), normalize=False, roles=["assistant"]),
    ]
    checks = FilterRules(rules, "Not this.").build()
    chat = Conversation(Policy(base), max_tokens=6, temperature=0.0, filter=checks)

    def said(text: str) -> tuple[str, list[str], int]:
        shown: list[str] = []
        reply = chat.reply(text, shown.append)
        assert "".join(shown) == reply
        return reply, [decision.action for decision in chat.decisions], len(chat.messages)

    assert said("Count") == ("Not this.", ["pass", "drop"], 0), "a withheld answer is not part of the conversation"
    reply, decisions, length = said("Hello there")
    assert (reply, decisions, length) == (answer_of("Hello there"), ["pass", "pass"], 2)
    assert said("a bomb") == ("Not this.", ["drop"], 2)
    assert said("stop") == ("Not this.", ["block"], 0), "a block starts a new conversation"


def test_chat_command_says_what_a_rule_matched(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rules.yaml").write_text("rules: {asked: {terms: [bomb]}}")
    monkeypatch.setattr("sys.stdin", io.StringIO("a bomb\n"))
    rlhf_in_process("chat", base, "--max_tokens", "4", "--filter", str(tmp_path / "rules.yaml"))
    out = capsys.readouterr()
    assert out.out == "This text was withheld by a filter.\n"
    assert "filter: drop of the message (rule asked: 'bomb')" in out.err
