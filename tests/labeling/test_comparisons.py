"""Comparisons from files of answers."""

import logging
from pathlib import Path

import pytest

from rlhf_lightning.errors import DataError
from rlhf_lightning.labeling.comparisons import (
    Candidate,
    Comparison,
    Question,
    distinct,
    given_answers,
    pairs_of_answers,
)
from rlhf_lightning.types import Row
from tests.helpers.labels import comparison
from tests.helpers.rows import write_rows


def texts(found: Comparison) -> list[str | None]:
    return [candidate.messages[0]["content"] for candidate in found.candidates]


def test_rows_with_the_same_prompt_belong_together_over_all_files(tmp_path: Path) -> None:
    """Files as `rlhf generate --json` writes them."""
    one = write_rows(
        tmp_path / "one.jsonl",
        [{"prompt": [{"role": "user", "content": f"Count {i}"}], "sample": 0, "response": "one"} for i in range(2)],
    )
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "Count 1", "response": "two", "model": "other"}])
    (found,) = pairs_of_answers(given_answers([one, other]))
    assert found.question.messages == [{"role": "user", "content": "Count 1"}]
    assert texts(found) == ["one", "two"]
    assert [candidate.source for candidate in found.candidates] == [
        {"file": one, "sample": 0},
        {"file": other, "model": "other"},
    ]


def test_every_pair_of_several_answers_is_compared(tmp_path: Path) -> None:
    row = {"prompt": "Count", "responses": ["one", "two", "three"], "models": ["a", "b", "c"], "scores": [1, 1, 1]}
    found = pairs_of_answers(given_answers([write_rows(tmp_path / "a.jsonl", [row])]))
    assert [texts(one) for one in found] == [["one", "two"], ["one", "three"], ["two", "three"]]
    assert [one.candidates[1].source["model"] for one in found] == ["b", "c", "c"]


def test_pairs_are_compared_again(tmp_path: Path) -> None:
    tool: Row = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    rows = [
        {"prompt": "Count", "system": "Brief.", "chosen": "one", "rejected": "two", "category": "easy", "tools": [tool]}
    ]
    (found,) = pairs_of_answers(given_answers([write_rows(tmp_path / "pairs.jsonl", rows)]))
    assert [message["role"] for message in found.question.messages] == ["system", "user"]
    assert found.question.category == "easy"
    assert found.question.tools == [tool]
    assert [candidate.source["column"] for candidate in found.candidates] == ["chosen", "rejected"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Count"}, "answers.jsonl:1: the row has no 'response'"),
        ({"response": "one"}, "answers.jsonl:1: the row has no 'prompt'"),
        ({"prompt": "Count", "responses": ["one"]}, "at least two responses"),
        ({"prompt": "Count", "responses": ["one", "two"], "models": ["a"]}, "'models' has 1 names, but there are 2"),
        ({"prompt": "Count", "response": "one", "image": "a.png"}, "only text is supported"),
    ],
)
def test_bad_rows_are_refused(row: Row, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        pairs_of_answers(given_answers([write_rows(tmp_path / "answers.jsonl", [row])]))


def test_equal_blank_and_repeated_comparisons_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    given = [
        comparison(),
        comparison(answers=("two", "one")),
        comparison(1, ("one", "one")),
        comparison(2, ("one", " ")),
    ]
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        assert distinct(given) == given[:1]
    assert [record.getMessage() for record in caplog.records] == [
        "1 comparisons are left out, because they have two equal answers",
        "1 comparisons are left out, because they have an empty answer",
        "1 comparisons are left out, because they occur twice",
    ]


def test_record_is_read_back() -> None:
    call = {"id": "0", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    answers = (
        Candidate(
            [{"role": "assistant", "content": None, "tool_calls": [call]}], {"model": "m", "sampling": {"top_p": 0.9}}
        ),
        Candidate([{"role": "assistant", "content": "2\u202e\x1b"}]),
    )
    tools: list[Row] = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
    given = Comparison(Question([{"role": "user", "content": "1 + 1?"}], tools, "sums"), answers, 0.25)
    assert Comparison.of_record(given.record()) == given
    assert not answers[0].is_blank
