"""The text of a response while it is sampled."""

from collections.abc import Sequence

from rlhf_lightning.data.rendering import Renderer

INCOMPLETE = "\ufffd"
"""What tokenizers decode the first bytes of a character to."""


class TextStream:
    """Decodes the tokens of a response, and gives out text as soon as it is final.

    The pieces together are the text that `Renderer.decode` gives, up to the first stop text. Incomplete characters,
    white space that may be at the end, and text that may begin a stop text are held back. Tokens are decoded together
    with those of the piece before, because some tokenizers drop a space at the beginning of a text.

    Args:
        renderer: The renderer, whose stop tokens are not part of the text.
        stops: Texts that end the response.
        strip: Leave out white space at the beginning and the end, as `Renderer.decode` does.

    Attributes:
        text: The text so far.

    Example:
        >>> stream = TextStream(renderer)  # doctest: +SKIP
        >>> pieces = [stream.add(token) for token in completion.ids] + [stream.finish()]  # doctest: +SKIP
        >>> "".join(pieces) == renderer.decode(completion.ids)  # doctest: +SKIP
        True
    """

    def __init__(self, renderer: Renderer, stops: Sequence[str] = (), strip: bool = True) -> None:
        self.stops, self.strip = stops, strip
        self.text = ""
        self._tokenizer, self._end_ids = renderer.tokenizer, frozenset(renderer.stop_token_ids)
        self._context: list[int] = []
        self._new: list[int] = []
        """Tokens whose text is not decoded yet."""
        self._held = ""
        """Decoded text that is held back."""
        self._stopped = False

    def add(self, token: int) -> str:
        """Add a token.

        Args:
            token: Token id.

        Returns:
            The text that is now final; empty if there is none.
        """
        if self._stopped or token in self._end_ids:
            return ""
        self._new.append(token)
        known, text = self._decode(self._context), self._decode([*self._context, *self._new])
        if text.endswith(INCOMPLETE) or not text.startswith(known) or len(text) == len(known):
            return ""
        self._context, self._new = self._new, []
        self._held += text[len(known) :]
        return self._give_out()

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if not self._stopped:
            known = self._decode(self._context)
            self._held += self._decode([*self._context, *self._new])[len(known) :]
        piece = self._give_out()
        if not self._stopped:
            rest = self._held.rstrip() if self.strip else self._held
            piece, self.text = piece + rest, self.text + rest
        return piece

    def _give_out(self) -> str:
        """Move the final part of the held text to the text."""
        if self.strip and not self.text:
            self._held = self._held.lstrip()
        place = min((i for stop in self.stops if (i := self._held.find(stop)) >= 0), default=None)
        if place is not None:
            self._held, self._stopped = self._held[:place], True
        starts = (n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        end = len(self._held) - (0 if self._stopped else max(starts, default=0))
        if self.strip:
            end = len(self._held[:end].rstrip())
        piece, self._held = self._held[:end], self._held[end:]
        self.text += piece
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
