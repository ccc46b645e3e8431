"""Verifiers: rewards that compare a response with the correct answer in the row."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction

import regex

from rlhf_lightning.data.prompts import Prompt
from rlhf_lightning.data.records import RowError, located
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.rewards.base import Reward, check_finite
from rlhf_lightning.rewards.required_literals import required_literal
from rlhf_lightning.types import JSON, Episode, Row


class _Verifier(Reward):
    """Base class of rewards whose score is either `hit` or `miss`."""

    def __init__(
        self,
        column: str,
        pattern: str,
        flags: int,
        hit: float,
        miss: float,
        weight: float,
        name: str | None,
        skip_special_tokens: bool,
    ) -> None:
        super().__init__(weight, name)
        self.skip_special_tokens = skip_special_tokens
        check_finite(f"the hit of the reward {self.name}", hit)
        check_finite(f"the miss of the reward {self.name}", miss)
        if hit == miss:
            raise ConfigError(
                f"the reward {self.name}: hit and miss are both {hit}, so all responses would get the same score"
            )
        self.column, self.hit, self.miss = column, hit, miss
        self.pattern = compiled(pattern, f"the reward {self.name}: pattern", flags) if pattern else None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `ConfigError` if no row has the column, `DataError` for one with an unsuitable value in it."""
        super().check(prompts)
        if self.column and prompts and all(absent(prompt.row.get(self.column)) for prompt in prompts):
            columns = sorted({key for prompt in prompts for key in prompt.row})
            raise ConfigError(
                f"the reward {self.name}: no row has the column {self.column!r}, so it would never apply; "
                f"the data has {', '.join(columns)}"
            )

    def score_one(self, episode: Episode) -> float | None:
        right = self.is_right(episode)
        return None if right is None else self.hit if right else self.miss

    @abstractmethod
    def is_right(self, episode: Episode) -> bool | None:
        """True for a hit, False for a miss; None where the reward does not apply."""


class ExactAnswer(_Verifier):
    """`hit` if the answer in the response equals the answer in the row, else `miss`.

    Args:
        column: Column with the correct answer: a text, a number, or a list of acceptable answers. The reward does not
            apply to rows where it is missing, null or empty.
        pattern: Regular expression that finds the answer in the response: its last match, or that match's first group.
            No match is a miss. By default the whole response is the answer.
        answer_pattern: The same for the column, if it contains more than the answer.
        ignore_case: Compare ignoring case.
        ignore_space: Collapse whitespace, and strip it at both ends, before comparing.
        numbers: Compare numbers by value (1,000 = 1000.0, 1/2 = 0.5, $5 = 5, 50% = 50); anything else as text.
        hit: Score of a correct answer.
        miss: Score of any other response.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.
        skip_special_tokens: If False, responses are read exactly as sampled: with special tokens (`<|im_end|>`), the
            text that ended them, and leading and trailing whitespace.

    Raises:
        ConfigError: If a pattern is invalid, or `hit` equals `miss`.

    Example:
        >>> reward = ExactAnswer(pattern="#### (.*)", numbers=True)
        >>> reply = [{"role": "assistant", "content": "2 * 500 is #### 1,000"}]
        >>> reward.score([Episode(prompt=[], row={"answer": 1000}, group=0, responses=reply)])
        [1.0]
    """

    def __init__(
        self,
        column: str = "answer",
        pattern: str = "",  # not None: for `str | None`, jsonargparse reads '#### (.*)' as a YAML comment, hence None
        answer_pattern: str = "",
        ignore_case: bool = False,
        ignore_space: bool = True,
        numbers: bool = False,
        hit: float = 1.0,
        miss: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(column, pattern, 0, hit, miss, weight, name, skip_special_tokens)
        self.answer_pattern = (
            compiled(answer_pattern, f"the reward {self.name}: answer_pattern") if answer_pattern else None
        )
        self.ignore_case, self.ignore_space, self.numbers = ignore_case, ignore_space, numbers

    def check_hidden(self, texts: Sequence[str], rows: Sequence[tuple[Row, str]] = ()) -> None:
        if self.pattern is not None:
            self.refuse_hidden(f"its pattern {self.pattern.pattern!r}", required_literal(self.pattern, texts))

    def check_row(self, row: Row) -> None:
        self._answers(row)

    def is_right(self, episode: Episode) -> bool | None:
        right = self._answers(episode.row)
        if right is None:
            return None
        given = find_answer(self.pattern, self.text(episode))
        return given is not None and self._normal(given) in right

    def _answers(self, row: Row) -> set[str | Fraction] | None:
        """The correct answers of a row, normalized; None if it has none."""
        value = row.get(self.column)
        if absent(value):
            return None
        answers = value if isinstance(value, list) else [value]
        if not all(isinstance(answer, str | int | float) for answer in answers):
            raise RowError(f"{self.column!r} is {value!r}; it must be text, a number, or a list of them")
        found = [find_answer(self.answer_pattern, str(answer)) for answer in answers]
        if None in found:
            raise RowError(f"the reward {self.name}: answer_pattern does not match {self.column!r} {value!r}")
        return {self._normal(answer) for answer in found if answer is not None}

    def _normal(self, text: str) -> str | Fraction:
        """The form in which answers are compared."""
        if self.numbers and (number := as_number(text)) is not None:
            return number
        if self.ignore_space:
            text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


MATCH_SECONDS = 5.0
"""Seconds that a regular expression may take on one response."""


class RegexReward(_Verifier):
    """`hit` if a regular expression matches the response, else `miss`: a format check, or a verifier per row.

    Set exactly one of `pattern` and `column`. A dot also matches line breaks.

    Args:
        pattern: The expression, the same for every row.
        column: Column with the expression of each row. The reward does not apply to rows without one.
        whole: The expression must match the whole response rather than a part of it.
        ignore_case: Match ignoring case.
        hit: Score if the expression matches.
        miss: Score if it does not match.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.
        skip_special_tokens: If False, responses are read exactly as sampled: with special tokens (`<|im_end|>`), the
            text that ended them, and leading and trailing whitespace.

    Raises:
        ConfigError: If both or neither of `pattern` and `column` are set, the pattern is invalid, or `hit` equals
            `miss`.

    Example:
        >>> reward = RegexReward(pattern="<think>.*</think>.+", whole=True)
        >>> reply = [{"role": "assistant", "content": "<think>2 + 2</think>4"}]
        >>> reward.score([Episode(prompt=[], row={}, group=0, responses=reply)])
        [1.0]
    """

    def __init__(
        self,
        pattern: str = "",
        column: str = "",
        whole: bool = False,
        ignore_case: bool = False,
        hit: float = 1.0,
        miss: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        # A dot matches line breaks, because responses often have several lines.
        flags = re.DOTALL | (re.IGNORECASE if ignore_case else 0)
        super().__init__(column, pattern, flags, hit, miss, weight, name, skip_special_tokens)
        if bool(pattern) == bool(column):
            raise ConfigError(
                f"the reward {self.name} needs a pattern (not empty) or a column with patterns; set one of them"
            )
        self.flags, self.whole = flags, whole

    def check_hidden(self, texts: Sequence[str], rows: Sequence[tuple[Row, str]] = ()) -> None:
        if self.pattern is not None:
            self.refuse_hidden(f"the pattern {self.pattern.pattern!r}", required_literal(self.pattern, texts))
        for row, where in rows if self.column else ():
            with located(where):
                pattern = self._of(row)
                if pattern is None:
                    continue
                try:
                    self.refuse_hidden(f"the pattern {pattern.pattern!r}", required_literal(pattern, texts))
                except ConfigError as error:
                    raise RowError(str(error)) from None

    def check_row(self, row: Row) -> None:
        self._of(row)

    def is_right(self, episode: Episode) -> bool | None:
        pattern = self._of(episode.row)
        return None if pattern is None else self._matches(pattern, self.text(episode))

    def _matches(self, pattern: re.Pattern[str], text: str) -> bool:
        """True if the pattern matches; raises `DataError` after `MATCH_SECONDS`."""
        # An expression from the data may backtrack forever; unlike `re`, `regex` has a timeout.
        limited = regex.compile(pattern.pattern, pattern.flags & (re.DOTALL | re.IGNORECASE))
        match = limited.fullmatch if self.whole else limited.search
        try:
            return match(text, timeout=MATCH_SECONDS) is not None
        except TimeoutError:
            raise RowError(
                f"the expression {pattern.pattern[:80]!r} of the reward {self.name} takes longer than "
                f"{MATCH_SECONDS:g} s on a response; avoid nested repetition in it"
            ) from None

    def _of(self, row: Row) -> re.Pattern[str] | None:
        """The row's pattern; None if it has none."""
        if not self.column:
            return self.pattern
        value = row.get(self.column)
        if absent(value):
            return None
        if not isinstance(value, str):
            raise RowError(f"{self.column!r} is {value!r}; it must be a regular expression")
        try:
            return compiled(value, f"{self.column!r}", self.flags)
        except ConfigError as error:
            raise RowError(str(error)) from None


# Exponents have at most three digits, because evaluating a huge exponent written by the policy would take forever.
_WHOLE = r"(\d{1,3}(,\d{3})+|\d+)"
_NUMBER = re.compile(rf"([+-]?\$?|\$[+-])({_WHOLE}(\.\d*)?|\.\d+)([eE][+-]?\d{{1,3}})?|[+-]?\d+/\d+", re.ASCII)


def compiled(pattern: str, setting: str, flags: int = 0) -> re.Pattern[str]:
    """Compile a regular expression.

    Args:
        pattern: The expression.
        setting: Where it comes from, for the message.
        flags: Flags of `re`.

    Raises:
        ConfigError: If it is invalid, or empty, so that it would match everything.
    """
    try:
        found = re.compile(pattern, flags)
    except re.error as error:
        raise ConfigError(f"{setting} {pattern!r} is not a valid regular expression: {error}") from None
    if found.fullmatch("") and found.pattern.strip("^$()") == "":
        raise ConfigError(f"{setting} {pattern!r} is empty; it would match everything")
    return found


def as_number(text: str) -> Fraction | None:
    """The value of a number as people write it; None if the text is not a number.

    Example:
        >>> as_number("$1,000.50"), as_number("1/2"), as_number("ten")
        (Fraction(2001, 2), Fraction(1, 2), None)
    """
    text = text.strip().removesuffix("%").rstrip(" .,").replace(" ", "")
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > 100:
        return None
    try:
        return Fraction(text.replace("$", "").replace(",", ""))
    except ZeroDivisionError:
        return None


def find_answer(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """The pattern's last match, or that match's first group; the whole text without a pattern."""
    if pattern is None:
        return text
    match = None
    for match in pattern.finditer(text):  # noqa: B007 - the last is wanted
        pass
    if match is None:
        return None
    return match.group(1) if pattern.groups else match.group()


def absent(value: JSON) -> bool:
    """True for null, empty text and the empty list."""
    return value is None or value in ("", [])
