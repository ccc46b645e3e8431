"""Two answers to one prompt that a person compares, and the files they come from."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from rlhf_lightning.data.columns import refuse_media
from rlhf_lightning.data.conversations import to_messages, tool_schemas
from rlhf_lightning.data.preference_rows import split_pair, split_ranking, split_response
from rlhf_lightning.data.records import Reading, RowError, convert_rows, read_rows, require, require_list
from rlhf_lightning.files import as_json
from rlhf_lightning.types import JSON, Message, Row, ToolSchema

log = logging.getLogger(__name__)
CARRIED = ("model", "sampling", "sample", "stop_reason", "response_tokens")
"""Columns of a row of answers that say where the answer comes from."""


@dataclass(frozen=True)
class Question:
    """What two answers respond to.

    Attributes:
        messages: The conversation up to the answer.
        tools: Tool definitions, if any.
        category: Category of the row, by which `rlhf preference` reports accuracy.

    Example:
        >>> Question([{"role": "user", "content": "2 + 2?"}]).key
        '7c2f1a24f2dd1bb7'
    """

    messages: list[Message]
    tools: list[ToolSchema] | None = None
    category: str | None = None

    @property
    def key(self) -> str:
        """A hash of messages and tools."""
        return _hash([self.messages, self.tools])


@dataclass(frozen=True)
class Candidate:
    """One of the two answers.

    Attributes:
        messages: The answer: one assistant message, or several with tool results between them.
        source: Where it comes from: model, sampling settings, stop reason, or file.

    Example:
        >>> Candidate([{"role": "assistant", "content": "4"}], {"model": "runs/sft/model"}).is_blank
        False
    """

    messages: list[Message]
    source: dict[str, JSON] = field(default_factory=dict)

    @property
    def is_blank(self) -> bool:
        """True if the answer has neither text nor tool calls; `rlhf preference` refuses such answers."""
        return not any(message.get("tool_calls") or (message["content"] or "").strip() for message in self.messages)


@dataclass(frozen=True)
class Comparison:
    """Two different answers to one prompt.

    Attributes:
        question: The prompt.
        candidates: The two answers. A page shows them in an order of its own.
        disagreement: How much an ensemble of preference models disagrees about them; None if it was not asked.
        id: A hash of prompt and answers that does not depend on the order of the answers.

    Example:
        >>> answers = [Candidate([{"role": "assistant", "content": text}]) for text in ("4", "5")]
        >>> comparison = Comparison(Question([{"role": "user", "content": "2 + 2?"}]), (answers[0], answers[1]))
        >>> comparison.id == Comparison(comparison.question, (answers[1], answers[0])).id
        True
    """

    question: Question
    candidates: tuple[Candidate, Candidate]
    disagreement: float | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            answers = sorted(messages_key(candidate.messages) for candidate in self.candidates)
            object.__setattr__(self, "id", _hash([self.question.key, answers]))

    def record(self) -> Row:
        """The comparison as a row of `comparisons.jsonl`."""
        row: dict[str, object] = {
            "id": self.id,
            "prompt": self.question.messages,
            "responses": [candidate.messages for candidate in self.candidates],
            "sources": [candidate.source for candidate in self.candidates],
        }
        for name, value in (
            ("tools", self.question.tools),
            ("category", self.question.category),
            ("disagreement", self.disagreement),
        ):
            if value is not None:
                row[name] = value
        plain: Row = json.loads(as_json(row))
        return plain

    @classmethod
    def of_record(cls, row: Row) -> "Comparison":
        """The comparison of a row that `record` made.

        Args:
            row: The row.

        Raises:
            RowError: If the row is not one.
        """
        require(row, "prompt")
        category, disagreement = row.get("category"), row.get("disagreement")
        question = Question(to_messages(row["prompt"]), tool_schemas(row), None if category is None else str(category))
        answers, sources = require_list(row, "responses"), require_list(row, "sources")
        found = [
            Candidate(to_messages(answer, "assistant"), source if isinstance(source, dict) else {})
            for answer, source in zip(answers, sources, strict=False)
        ]
        if len(found) != 2:
            raise RowError(f"a comparison has two responses and two sources, but this row has {len(found)}")
        known = float(disagreement) if isinstance(disagreement, int | float) else None
        return cls(question, (found[0], found[1]), known, str(row.get("id") or ""))


def distinct(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Comparisons without repeated ones and without two equal or blank answers; those that are left out are counted.

    Args:
        comparisons: The comparisons.
    """
    found: dict[str, Comparison] = {}
    counts = {"have two equal answers": 0, "have an empty answer": 0, "occur twice": 0}
    for comparison in comparisons:
        first, second = comparison.candidates
        if first.is_blank or second.is_blank:
            counts["have an empty answer"] += 1
        elif first.messages == second.messages:
            counts["have two equal answers"] += 1
        elif comparison.id in found:
            counts["occur twice"] += 1
        else:
            found[comparison.id] = comparison
    for reason, count in counts.items():
        if count:
            log.warning("%d comparisons are left out, because they %s", count, reason)
    return list(found.values())


def given_answers(files: Sequence[str], limit: int | None = None) -> list[tuple[Question, list[Candidate]]]:
    """Answers from files, by prompt.

    Rows have `prompt` and one of: `response` (rows with the same prompt belong together, over all files), `responses`
    (a list), or `chosen` and `rejected`. The columns `model` and `sampling` say where an answer comes from; for
    `responses`, `models` is a list of names.

    Args:
        files: Files of rows.
        limit: Largest number of prompts.

    Raises:
        DataError: If a row is unusable; with file and line.
    """
    questions: dict[str, tuple[Question, list[Candidate]]] = {}
    for file in files:
        for question, candidates in convert_rows(read_rows(file), lambda data: [_answers(data)], Reading()):
            named = [replace(one, source={"file": file, **one.source}) for one in candidates]
            questions.setdefault(question.key, (question, []))[1].extend(named)
    return list(questions.values())[:limit]


def pairs_of_answers(answers: Iterable[tuple[Question, Sequence[Candidate]]]) -> list[Comparison]:
    """Comparisons of every two different answers to a prompt.

    Args:
        answers: Prompts with their answers, as `given_answers` returns them.

    Returns:
        The comparisons, in the order of the prompts.
    """
    return distinct(
        Comparison(question, (first, second))
        for question, candidates in answers
        for first, second in combinations(candidates, 2)
    )


def _answers(data: Row) -> tuple[Question, list[Candidate]]:
    """The prompt of a row and its answers."""
    refuse_media(data)
    source: dict[str, JSON] = {name: data[name] for name in CARRIED if data.get(name) is not None}
    if data.get("responses") is not None:
        plain = {name: value for name, value in data.items() if name not in ("scores", "ranks")}
        prompt, responses, _ = split_ranking(plain)
        models = require_list(data, "models") if data.get("models") is not None else [None] * len(responses)
        if len(models) != len(responses):
            raise RowError(f"'models' has {len(models)} names, but there are {len(responses)} responses")
        sources = [source if model is None else {**source, "model": model} for model in models]
    elif data.get("chosen") is not None:
        prompt, *responses = split_pair(data)
        sources = [{**source, "column": name} for name in ("chosen", "rejected")]
    else:
        if data.get("completion") is None:
            require(data, "response")
        prompt, response = split_response(data)
        responses, sources = [response], [source]
    category = data.get("category")
    question = Question(prompt, tool_schemas(data), None if category is None else str(category))
    return question, [Candidate(*pair) for pair in zip(responses, sources, strict=True)]


def messages_key(messages: Sequence[Message]) -> str:
    """A hash of an answer's messages.

    Args:
        messages: The messages.
    """
    return _hash(messages)


def _hash(value: Sequence[object] | Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
