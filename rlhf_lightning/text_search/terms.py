"""Finds terms in texts, in one pass whatever the number of terms."""

import unicodedata
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import regex

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.files import is_file
from rlhf_lightning.text_search.normalization import Normalizer

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


class TermSearch:
    """Searches texts for terms, whatever the white space between words and the spelling in Unicode (see `Normalizer`).

    Args:
        terms: The terms.
        ignore_case: Find them in any case.
        whole_words: Do not find them within longer words.

    Example:
        >>> TermSearch(["credit card"]).find("My CREDIT  card. My credit cards.")
        [(3, 15)]
    """

    def __init__(self, terms: Iterable[str], ignore_case: bool = True, whole_words: bool = True) -> None:
        self._normalizer = Normalizer(ignore_case, join_space=True)
        self._index = TermIndex([self._normalizer.normalized(term).strip() for term in terms], whole_words)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each term in a text; see `TermIndex.find`.

        Args:
            text: The text.
        """
        spans = self._index.find(self._normalizer.normalized(text))
        return [self._normalizer.span(text, *span) for span in spans]

    def occurs(self, text: str) -> bool:
        """True if a term occurs in a text.

        Args:
            text: The text.
        """
        return bool(self._index.find(self._normalizer.normalized(text)))


def is_term(term: str) -> bool:
    """True if something of a term is left to search for.

    Args:
        term: The term.
    """
    return bool(Normalizer(fold_case=False, join_space=True).normalized(term).strip())


def read_terms(file: str | Path, owner: str) -> list[str]:
    """The nonempty lines of a file of terms.

    Args:
        file: A text file with a term on each line.
        owner: What has the terms, for messages.

    Raises:
        ConfigError: If the file cannot be read.
    """
    path = Path(file).expanduser()
    try:
        is_file(path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{owner}: the file of terms {path} cannot be read: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
