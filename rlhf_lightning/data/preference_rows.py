"""Parses rows of preference data: pairs, labeled responses and rankings."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_lightning.data.columns import unmarked, with_system
from rlhf_lightning.data.conversations import apart, to_messages, without_prompt
from rlhf_lightning.data.records import RowError, require
from rlhf_lightning.data.rendering import Rendered
from rlhf_lightning.errors import quoted
from rlhf_lightning.types import Counts, Message, Row, Tokenizer, ToolSchema


@dataclass
class PreferenceExample(ABC):
    """Base class of pairs, labels and rankings: responses to one prompt, as token rows with mask 1 on the response.

    Example:
        >>> Ranking([Rendered([1, 2, 3], [0, 1, 1]), Rendered([1, 4], [0, 1])], ranks=[0, 1]).tokens
        3
    """

    sides: list[Rendered]
    category: str | None = None
    reference: list[list[float]] | None = field(default=None, init=False, repr=False)
    """Stored log-probabilities of the reference, in nats: a list per side, with a value for each id."""
    where: str = field(default="", init=False, compare=False, repr=False)
    """File and line of the row, if known."""

    @property
    def tokens(self) -> int:
        """Length of the longest side."""
        return max(side.tokens for side in self.sides)

    @property
    def trained(self) -> int:
        """Number of response tokens of all sides."""
        return sum(side.trained for side in self.sides)

    @abstractmethod
    def counts(self) -> Counts:
        """See `Example`."""

    @abstractmethod
    def show(self, tokenizer: Tokenizer) -> str:
        """See `Example`."""


@dataclass
class Pair(PreferenceExample):
    """A chosen and a rejected response.

    Example:
        >>> sides = [Rendered([1, 2, 3], [0, 1, 1]), Rendered([1, 4], [0, 1])]
        >>> pair = Pair(sides, margin=0.5)
        >>> pair.chosen.trained, pair.rejected.trained
        (2, 1)
    """

    margin: float = 0.0
    tie: bool = False

    @property
    def chosen(self) -> Rendered:
        """The preferred response."""
        return self.sides[0]

    @property
    def rejected(self) -> Rendered:
        """The other response."""
        return self.sides[1]

    def counts(self) -> Counts:
        """One pair."""
        return {"pairs": 1.0}

    def show(self, tokenizer: Tokenizer) -> str:
        """Text of both sides, with the responses between ⟦ and ⟧."""
        return f"chosen: {self.chosen.show(tokenizer)}\nrejected: {self.rejected.show(tokenizer)}"


@dataclass
class Labeled(PreferenceExample):
    """A response with a label. A second side, if any, is the prompt with the response to another prompt.

    Example:
        >>> Labeled([Rendered([1, 2, 3], [0, 1, 1])], label=1).counts()
        {'labels': 1.0}
    """

    label: int = 0
    messages: tuple[list[Message], list[Message], list[ToolSchema] | None] = field(default=([], [], None), repr=False)
    """Prompt, response and tools, from which mismatched sides are rendered."""

    def counts(self) -> Counts:
        """One label."""
        return {"labels": 1.0}

    def show(self, tokenizer: Tokenizer) -> str:
        """Text of the row, with the response between ⟦ and ⟧."""
        return f"label {self.label}: {self.sides[0].show(tokenizer)}"


@dataclass
class Ranking(PreferenceExample):
    """K responses with their ranks, 0 for the best.

    Example:
        >>> sides = [Rendered([1, 2], [0, 1]), Rendered([1, 3], [0, 1])]
        >>> Ranking(sides, ranks=[0, 1]).counts()
        {'rankings': 1.0}
    """

    ranks: list[int] = field(default_factory=list)

    def counts(self) -> Counts:
        """One ranking."""
        return {"rankings": 1.0}

    def show(self, tokenizer: Tokenizer) -> str:
        """Text of all sides, with the responses between ⟦ and ⟧."""
        shown = zip(self.ranks, self.sides, strict=True)
        return "\n".join(f"rank {rank}: {side.show(tokenizer)}" for rank, side in shown)


def row_kind(data: Row) -> str:
    """The kind of a row by its columns: `pairs`, `labels` or `rankings`."""
    if data.get("label") is not None:
        return "labels"
    return "rankings" if data.get("responses") is not None else "pairs"


def split_pair(data: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected messages of a row.

    Raises:
        RowError: If the row is not a valid pair.
    """
    require(data, "chosen", "rejected")
    sides = [to_messages(data[name], "assistant" if data.get("prompt") else "user") for name in ("chosen", "rejected")]
    if data.get("prompt") is not None:
        prompt, sides = _apart(data, sides)
    else:
        if not all(isinstance(data[name], list) for name in ("chosen", "rejected")):
            raise RowError(
                f"the row has no 'prompt'; its columns are {quoted(data)}. Add it, map another column with `columns: "
                "{prompt: your_name}`, or give chosen and rejected as lists of messages that begin with the prompt "
                "(dialogues as text, as in HH-RLHF, must be split into messages first)"
            )
        shared = _shared(*map(unmarked, sides))
        prompt, sides = sides[0][:shared], [side[shared:] for side in sides]
        if not prompt:
            raise RowError("the row has no 'prompt', but chosen and rejected do not begin with the same messages")
        prompt = unmarked(with_system(data, prompt))
    asked = [[m["content"] for m in side if m["role"] in ("user", "system")] for side in sides]
    if asked[0] != asked[1]:
        raise RowError(
            "chosen and rejected answer different prompts: their user messages differ. A pair needs two responses to "
            "one prompt."
        )
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        check_response(side, name)
    return prompt, sides[0], sides[1]


def split_response(data: Row) -> tuple[list[Message], list[Message]]:
    """Prompt and `response` (or `completion`) messages of a row.

    Raises:
        RowError: If one of them is missing or malformed.
    """
    require(data, "prompt")
    name = "response" if data.get("response") is not None else "completion"
    require(data, name)
    prompt, (response,) = _apart(data, [to_messages(data[name], "assistant")])
    check_response(response, name)
    return prompt, response


def split_labeled(data: Row) -> tuple[list[Message], list[Message], int]:
    """Prompt messages, response messages and label of a row.

    Raises:
        RowError: If one of them is missing or malformed.
    """
    require(data, "label")
    prompt, response = split_response(data)
    label = data["label"]
    if not (isinstance(label, bool) or (isinstance(label, int | float) and label in (0, 1))):
        raise RowError(f"'label' is {label!r}; it must be 1 or true for a desirable response, else 0 or false")
    return prompt, response, int(label)


def split_ranking(data: Row) -> tuple[list[Message], list[list[Message]], list[int]]:
    """Prompt, responses and ranks (0 for the best) of a row, by its `ranks` or `scores`; by default best first.

    Raises:
        RowError: If the row is not a valid ranking.
    """
    require(data, "prompt", "responses")
    values = data["responses"]
    if not isinstance(values, list) or len(values) < 2:
        raise RowError("'responses' must be a list of at least two responses")
    prompt, responses = _apart(data, [to_messages(value, "assistant") for value in values])
    for number, response in enumerate(responses):
        check_response(response, f"response {number}")
    if any(one == other for i, one in enumerate(responses) for other in responses[:i]):
        raise RowError("two of the responses are equal: there is nothing to prefer")
    grades = _grades(data, len(responses))
    if len(set(grades)) == 1:
        raise RowError("all responses have the same rank: there is nothing to prefer")
    order = sorted(set(grades), reverse=True)
    return prompt, responses, [order.index(grade) for grade in grades]


def _grades(data: Row, count: int) -> list[float]:
    """A number for each response, higher for better responses."""
    scores, ranks = _numbers(data, "scores", count), _numbers(data, "ranks", count)
    by_rank = None if ranks is None else [-rank for rank in ranks]
    if scores is not None and by_rank is not None:
        orders = [[(a > b) - (a < b) for a in grades for b in grades] for grades in (scores, by_rank)]
        if orders[0] != orders[1]:
            raise RowError(
                f"'scores' {scores} and 'ranks' {ranks} (0 or 1 for the best) order the responses differently; ignore "
                "one of them with columns: {ranks: null}"
            )
    return scores or by_rank or [float(-i) for i in range(count)]


def _numbers(data: Row, name: str, count: int) -> list[float] | None:
    """The numbers in a column, one for each response; None if there is none."""
    if (values := data.get(name)) is None:
        return None
    given = values if isinstance(values, list) else []
    numbers = [v for v in given if isinstance(v, int | float) and not isinstance(v, bool) and v == v]
    if not len(numbers) == len(given) == count:
        raise RowError(f"{name!r} must be a list of {count} numbers, one for each response")
    return numbers  # not floats: JSON integers may exceed their precision


def _apart(data: Row, responses: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """The prompt of a row with its `system` column, and the responses without it."""
    prompt, responses = apart(to_messages(data["prompt"]), responses)
    prompt = with_system(data, prompt)
    return unmarked(prompt), [without_prompt(response, prompt) for response in responses]


def check_response(response: list[Message], name: str) -> None:
    """Raise `RowError` for a response that does not begin with an assistant message."""
    if response and response[0]["role"] in ("user", "system"):
        raise RowError(
            f"{name} begins with a {response[0]['role']} message that is not in the prompt; it must begin with an "
            "assistant message"
        )


def _shared(a: list[Message], b: list[Message]) -> int:
    """Number of equal messages at the beginning of both conversations, excluding the last message of each."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    count = same.index(False) if False in same else min(len(a), len(b)) - 1
    # Leave at least one message for each response, even if the sides share it.
    return max(0, min(count, len(a) - 1, len(b) - 1))
