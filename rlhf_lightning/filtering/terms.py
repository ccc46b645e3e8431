"""Finds terms in texts, in one pass whatever the number of terms."""

import unicodedata
from collections import deque
from collections.abc import Iterable

import regex

_SCRIPTS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
_UNSPACED = regex.compile(_SCRIPTS)
"""Characters of scripts without spaces between words."""
_WORD = regex.compile(rf"[[\p{{L}}\p{{M}}\p{{N}}]--{_SCRIPTS}]+", regex.V1)
"""A word of the other scripts."""


class TermIndex:
    """An automaton that finds terms. Source: Aho and Corasick 1975, "Efficient string matching".

    Args:
        terms: The terms; neither they nor the searched texts are changed.
        whole_words: Find a term only where it is not part of a longer word. A word is a sequence of letters, marks and
            digits; scripts without spaces between words have no such limits.

    Example:
        >>> TermIndex(["new york", "new"]).find("new york is not newer")
        [(0, 8)]
    """

    def __init__(self, terms: Iterable[str], whole_words: bool = True) -> None:
        self.whole_words = whole_words
        self._next: list[dict[str, int]] = [{}]
        self._lengths: list[list[int]] = [[]]
        """For each state, the lengths of the terms that end there."""
        words: set[str | None] = set()
        for term in terms:
            first = _WORD.search(term)
            words.add(first.group() if first and whole_words else None)
            state = 0
            for character in term:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self._lengths.append([])
                state = self._next[state][character]
            if len(term) not in self._lengths[state]:
                self._lengths[state].append(len(term))
        self._words = None if None in words else words
        """The first word of each term: a text without any of them has no term. None if a term has no word."""
        self._fallback = [0] * len(self._next)
        """For each state, that of the longest proper suffix of its characters that also begins a term."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, after in self._next[state].items():
                self._fallback[after] = self._step(self._fallback[state], character)
                self._lengths[after] += self._lengths[self._fallback[after]]
                waiting.append(after)

    def _step(self, state: int, character: str) -> int:
        while character not in self._next[state] and state:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each term in a text, in order; of overlapping terms the first, and of these the longest."""
        if self._words is not None and self._words.isdisjoint(_WORD.findall(text)):
            return []
        found: list[tuple[int, int]] = []
        state = 0
        for place, character in enumerate(text):
            state = self._step(state, character)
            for length in self._lengths[state]:
                start, end = place + 1 - length, place + 1
                if not self.whole_words or (_is_limit(text, start) and _is_limit(text, end)):
                    found.append((start, end))
        chosen: list[tuple[int, int]] = []
        for start, end in sorted(found, key=lambda span: (span[0], -span[1])):
            if not chosen or start >= chosen[-1][1]:
                chosen.append((start, end))
        return chosen


def _is_limit(text: str, place: int) -> bool:
    """True if no word continues from the character before a place to the one after it."""
    sides = text[place - 1 : place], text[place : place + 1]
    return not all(side and unicodedata.category(side)[0] in "LMN" and not _UNSPACED.match(side) for side in sides)
