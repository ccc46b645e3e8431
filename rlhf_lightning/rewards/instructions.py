"""A verifier for instructions that a program can check, in rows like those of IFEval (Zhou et al. 2023)."""

import re
from collections.abc import Callable, Mapping, Sequence

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.types import JSON, Episode, Row

Arguments = Mapping[str, JSON]
Checker = Callable[[str, Arguments], bool]


def _text(arguments: Arguments, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} is {value!r}; it must be text")
    return value.strip()


def _texts(arguments: Arguments, name: str) -> list[str]:
    value = arguments.get(name)
    texts = [one for one in value if isinstance(one, str) and one] if isinstance(value, list) else []
    if not isinstance(value, list) or not texts or len(texts) < len(value):
        raise RowError(f"{name} is {value!r}; it must be a list of texts")
    return texts


def _count(arguments: Arguments, name: str) -> int:
    value = arguments.get(name)
    # Rows from Parquet or pandas may hold whole numbers as floating-point numbers.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise RowError(f"{name} is {value!r}; it must be a whole number of at least 0")
    return int(value)


def count_words(text: str) -> int:
    r"""Number of words of a text as IFEval counts them: runs of `\w`, so that "don't" has two."""
    return len(re.findall(r"\w+", text))


def _number_words(text: str, arguments: Arguments) -> bool:
    relation, count = arguments.get("relation"), _count(arguments, "num_words")
    if relation not in ("less than", "at least"):
        raise RowError(f"relation is {relation!r}; it must be 'less than' or 'at least'")
    return count_words(text) < count if relation == "less than" else count_words(text) >= count


def _bullets(text: str, arguments: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == _count(arguments, "num_bullets")


def _first_word(text: str, arguments: Arguments) -> bool:
    wanted, words = _text(arguments, "first_word"), re.findall(r"\w+", text)
    return bool(words) and words[0].lower() == wanted.lower()


def _quoted(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _title(text: str, arguments: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


CHECKERS: dict[str, Checker] = {
    "change_case:english_capital": lambda text, arguments: text.isupper(),
    "change_case:english_lowercase": lambda text, arguments: text.islower(),
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:title": _title,
    "first_word:first_word_answer": _first_word,
    "keywords:existence": lambda text, arguments: all(
        re.search(re.escape(word), text, re.IGNORECASE) for word in _texts(arguments, "keywords")
    ),
    "keywords:forbidden_words": lambda text, arguments: (
        not any(
            re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in _texts(arguments, "forbidden_words")
        )
    ),
    "length_constraints:number_words": _number_words,
    "punctuation:no_comma": lambda text, arguments: "," not in text,
    "startend:end_checker": lambda text, arguments: (
        text.strip().strip('"').lower().endswith(_text(arguments, "end_phrase").lower())
    ),
    "startend:quotation": _quoted,
}
"""Checkers by kind. Names and arguments are those of IFEval; `first_word:first_word_answer` is one of IFTrain (Pyatkin
et al. 2025, arXiv:2507.02833). Unlike IFEval, the two of `change_case` accept every language, and words are not regular
expressions."""


def followed(response: str, row: Row) -> list[bool]:
    """Whether a response follows each instruction of a row. An empty response follows none, as in IFEval.

    Args:
        response: The response.
        row: A row with `instruction_id_list` (kinds, see `CHECKERS`) and `kwargs` (one mapping of arguments each).

    Raises:
        RowError: If a kind is unknown or its arguments are wrong.

    Example:
        >>> followed("yes it is", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
        [True]
    """
    kinds, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(kinds, list) or not kinds:
        raise RowError("the row has no instruction_id_list: kinds of instructions, with kwargs, as in IFEval")
    found = []
    for number, kind in enumerate(kinds):
        if not isinstance(kind, str) or kind not in CHECKERS:
            raise RowError(f"no checker for the instruction {kind!r}; there are {', '.join(CHECKERS)}")
        given = arguments[number] if isinstance(arguments, list) and number < len(arguments) else {}
        try:
            right = CHECKERS[kind](response, given if isinstance(given, dict) else {})
        except RowError as error:
            raise RowError(f"the instruction {kind}: {error}") from None
        found.append(right and bool(response.strip()))
    return found


class InstructionReward(Reward):
    """The fraction of a row's instructions that the response follows, each checked by a program.

    Rows are like those of IFEval: `instruction_id_list` has the kinds (see `CHECKERS`), `kwargs` their arguments. The
    instructions themselves are part of the prompt. The reward does not apply to rows without `instruction_id_list`.

    A response can follow most instructions without answering the question. Add a reward for content, such as
    `ModelReward`, and a smallest length (`LengthReward`).

    Args:
        weight: Weight of this term; at 0 it is only logged.
        name: Name that it is logged under.

    Example:
        >>> reward = InstructionReward()
        >>> reply = [{"role": "assistant", "content": "use a sharp knife, and cut slowly"}]
        >>> row = {"instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"], "kwargs": [{}, {}]}
        >>> reward.score([Episode(prompt=[], row=row, group=0, responses=reply)])
        [0.5]
    """

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)

    def check(self, prompts: Sequence[Prompt]) -> None:
        super().check(prompts)
        if prompts and not any(prompt.row.get("instruction_id_list") for prompt in prompts):
            columns = sorted({key for prompt in prompts for key in prompt.row})
            raise ConfigError(
                f"the reward {self.name}: no row has the column 'instruction_id_list', so it would never apply; the "
                f"data has {', '.join(columns)}"
            )

    def check_row(self, row: Row) -> None:
        if row.get("instruction_id_list"):
            followed("", row)

    def score_one(self, episode: Episode) -> float | None:
        if not episode.row.get("instruction_id_list"):
            return None
        found = followed(self.text(episode), episode.row)
        return sum(found) / len(found)
