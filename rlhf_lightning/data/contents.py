"""Message contents in parts, `[{type: text, text: …}]`: kept for templates that support them, else joined to text."""

from collections.abc import Callable

from rlhf_lightning.data.records import RowError
from rlhf_lightning.types import JSON, Message, TemplateMessage

Render = Callable[[list[TemplateMessage]], str]
_FIRST, _SECOND = "Alpha,", "beta."


class ContentParts(str):
    """Text of a content in parts. Templates that support parts get `parts`; all other code reads the text.

    Example:
        >>> content = ContentParts([{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}])
        >>> str(content), len(content.parts)
        ('Hello world', 2)
    """

    parts: list[dict[str, JSON]]

    def __new__(cls, parts: list[dict[str, JSON]]) -> "ContentParts":
        self = super().__new__(cls, "".join(str(part["text"]) for part in parts))
        self.parts = parts
        return self

    def __reduce__(self) -> tuple[type["ContentParts"], tuple[list[dict[str, JSON]]]]:
        return ContentParts, (self.parts,)

    def __repr__(self) -> str:
        return f"ContentParts({self.parts!r})"  # with the parts, because a template may trim each one


def joined(message: Message | TemplateMessage) -> Message | TemplateMessage:
    """Convert the content of a message to `ContentParts` if it is a list of text parts."""
    content = message.get("content")
    if not isinstance(content, list) or not content or not all(_is_text(part) for part in content):
        return message
    return {**message, "content": ContentParts(content)}


def _is_text(part: JSON) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


class ContentForms:
    """Converts message contents to the form that a template shows.

    Args:
        render: Renders messages with the template; raises `RowError`.

    Example:
        >>> forms = ContentForms(lambda messages: "".join(str(message["content"]) for message in messages))
        >>> forms.shows_parts("user")
        False
    """

    def __init__(self, render: Render) -> None:
        self.render = render
        self.only_parts = False
        """True if the template shows contents only in parts."""
        self._known: dict[str, bool] = {}

    def fit(self, messages: list[TemplateMessage]) -> list[TemplateMessage]:
        """The messages, with contents in the form that the template shows."""
        if not self.only_parts and not any(isinstance(message.get("content"), ContentParts) for message in messages):
            return messages
        return [self._fitted(message) for message in messages]

    def _fitted(self, message: TemplateMessage) -> TemplateMessage:
        content = message.get("content")
        if isinstance(content, ContentParts) and (self.only_parts or self.shows_parts(message["role"])):
            return {**message, "content": content.parts}
        if self.only_parts and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def shows_parts(self, role: str) -> bool:
        """True if the template shows all parts of a message of this role, as text and in order."""
        if role not in self._known:
            self._known[role] = self._probe(role)
        return self._known[role]

    def _probe(self, role: str) -> bool:
        asked: TemplateMessage = {"role": "user", "content": "Hello"}
        call = {"type": "function", "id": "abc123456", "function": {"name": "probe_tool", "arguments": {}}}
        called: TemplateMessage = {"role": "assistant", "content": "", "tool_calls": [call]}
        before: list[TemplateMessage] = {"assistant": [asked], "tool": [asked, called]}.get(role, [])
        after: list[TemplateMessage] = [] if before or role == "user" else [asked]
        parts = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
        try:
            in_parts, as_text = (
                self.render([*before, {"role": role, "content": content}, *after])
                for content in (parts, _FIRST + _SECOND)
            )
        except RowError:
            return False
        start, first, rest = in_parts.partition(_FIRST)
        between, second, end = rest.partition(_SECOND)
        around = as_text.split(_FIRST + _SECOND)
        return bool(first and second) and not between.strip() and [start, end] == around
