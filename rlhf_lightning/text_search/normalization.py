"""The form of texts in which rules search: compatible characters are one character, invisible ones are removed."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import regex

_IGNORED = regex.compile(r"[\p{Default_Ignorable_Code_Point}[\p{Cc}--\s]]", regex.V1)
"""Characters without a shape (zero width, soft hyphen, direction marks, variation selectors) and control characters."""
_SPACE = regex.compile(r"\s+")
_PIECE = regex.compile(r"\s+|[\x21-\x7e]+(?=[\x00-\x7f]|\Z)|\X")
"""White space, ASCII text, or a character with its combining marks; normal forms do not reach across these pieces."""


@dataclass(frozen=True)
class Normalizer:
    """Brings texts into the form in which a rule searches, and finds the original of a part of that form.

    The form is NFKC without invisible characters: `ｂａｄ`, `b\\u200bad` and `𝐛𝐚𝐝` become `bad`. Letters of other
    alphabets that look alike, and digits that stand for letters, stay as they are.

    Args:
        fold_case: Fold case as Unicode defines it: `STRASSE`, `Straße` and `strasse` become equal.
        join_space: Replace white space by a single space.

    Example:
        >>> normalizer = Normalizer(fold_case=True, join_space=True)
        >>> normalizer.normalized("Credit\\n Card"), normalizer.span("Credit\\n Card", 0, 8)
        ('credit card', (0, 9))
    """

    fold_case: bool
    join_space: bool

    def normalized(self, text: str) -> str:
        """The form of a text."""
        kept, _ = _visible(text)
        if kept.isascii():  # most texts; the result is that of the pieces
            kept = kept.lower() if self.fold_case else kept
            return _SPACE.sub(" ", kept) if self.join_space else kept
        return "".join(piece for _, _, piece in self._pieces(kept))

    def span(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The part of a text that a part of its form was made from.

        Args:
            text: The text.
            start: Start of the part in `normalized(text)`.
            end: End of that part.

        Returns:
            Start and end in `text`, of whole characters with their combining marks.
        """
        kept, places = _visible(text)
        first, last, position = len(kept), len(kept), 0
        for begin, stop, piece in self._pieces(kept):
            after = position + len(piece)
            one_to_one = len(piece) == stop - begin
            if position <= start < after:
                first = begin + start - position if one_to_one else begin
            if position < end <= after:
                last = begin + end - position if one_to_one else stop
                break
            position = after
        last = max(first, last) if end > start else first
        if places is None:
            return first, last
        start = places[first] if first < len(places) else len(text)
        return start, places[last - 1] + 1 if last > first else start

    def _pieces(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Pieces of the form of a text without invisible characters, each with start and end in that text."""
        for match in _PIECE.finditer(text):
            piece = match.group()
            if self.join_space and piece.isspace():
                piece = " "
            elif piece.isascii():
                piece = piece.lower() if self.fold_case else piece
            else:
                piece = unicodedata.normalize("NFKC", piece)
                if self.fold_case:
                    piece = unicodedata.normalize("NFKC", piece.casefold())
            yield (*match.span(), piece)


def _visible(text: str) -> tuple[str, list[int] | None]:
    """A text without invisible characters, and the places of its characters; None if nothing was removed."""
    if not _IGNORED.search(text):
        return text, None
    places = [i for i, character in enumerate(text) if not _IGNORED.match(character)]
    return "".join(text[i] for i in places), places
