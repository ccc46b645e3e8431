"""Finds literal texts that a regular expression requires, to reject expressions that can never match a response."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MOST = 200
"""Maximum number of alternatives to examine; a pattern with more is assumed to require no text."""
# A way to match is the list of texts that it requires, in order; adjacent literals are joined into one text.
_ANYTHING, _NOTHING = ["", ""], [""]


def required_literal(pattern: re.Pattern[str], texts: Iterable[str]) -> str | None:
    """Return one of `texts` if no alternative of the pattern can match without one of them, else None.

    Args:
        pattern: The compiled expression.
        texts: The candidates.

    Example:
        >>> required_literal(re.compile(r"<end>(a|b)"), ["<end>"])
        '<end>'
    """
    return _needed(pattern.pattern, pattern.flags, tuple(texts))


@lru_cache(maxsize=1024)
def _needed(pattern: str, flags: int, texts: tuple[str, ...]) -> str | None:
    """`required_literal`, cached."""
    found = _ways(_parser.parse(pattern, flags & ~re.DEBUG))
    fold = str.casefold if flags & re.IGNORECASE else str
    first: str | None = None
    for way in found or [_ANYTHING]:
        text = next((text for text in texts if any(fold(text) in fold(piece) for piece in way)), None)
        if text is None:
            return None
        first = first or text
    return first


def _ways(items: Sequence[Any]) -> list[list[str]] | None:
    """Ways in which a parsed pattern can match; None if there are too many."""
    ways: list[list[str]] = [_NOTHING]
    for item in items:
        follow = _of(*item)
        if follow is None or len(ways) * len(follow) > MOST:
            return None
        ways = [[*a[:-1], a[-1] + b[0], *b[1:]] for a in ways for b in follow]
    return ways


def _of(op: Any, value: Any) -> list[list[str]] | None:
    """Ways in which one item of a parsed pattern can match; None if there are too many."""
    if op is _constants.LITERAL:
        return [[chr(value)]]
    if op in (_constants.AT, _constants.ASSERT_NOT):
        return [_NOTHING]
    if op is _constants.SUBPATTERN:
        return _ways(value[-1])
    if op is _constants.ATOMIC_GROUP:
        return _ways(value)
    if op is _constants.BRANCH:
        branches = [_ways(branch) for branch in value[1]]
        return None if None in branches else [way for branch in branches for way in branch or ()]
    repeats = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
    if op is _constants.ASSERT or (op in repeats and value[0] >= 1):
        inner = _ways(value[-1])
        return None if inner is None else [["", *way, ""] for way in inner]
    return [_ANYTHING]
