"""Finds what a chat template or a tokenizer would not take as the author of a message meant it."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from rlhf_lightning.data.call_forms import REASONING
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.templates import ChatTemplate
from rlhf_lightning.errors import cut
from rlhf_lightning.types import Message

log = logging.getLogger(__name__)
ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "id", "trainable", *REASONING}
"""Keys of messages that are used, or whose absence from the prompt is reported by `CallForms`."""
_WORD = "Sentinel word."
_IN_ANSWERS = re.compile("think|reason|tool|call", re.IGNORECASE)


class MessageChecks:
    """Checks messages before they are rendered.

    Args:
        template: The chat template.

    Example:
        ```python
        checks = MessageChecks(template)
        checks.rendered_before([{"role": "user", "content": "<|im_start|>user\\nHi<|im_end|>"}])
        ```
    """

    def __init__(self, template: ChatTemplate) -> None:
        tokenizer = template.tokenizer
        given = tokenizer.chat_template
        self._source = "\n".join(given.values()) if isinstance(given, dict) else given or ""
        turn = ""
        with suppress(RowError):  # the template expects other messages
            turn = template.render([{"role": "user", "content": _WORD}])
        opening, _, _ = turn.partition(_WORD)
        markers = [marker for marker in template.markers if marker.strip()]
        self._openers = tuple(marker for marker in markers if marker in opening)
        """Special tokens that the template writes before the text of a user's message."""
        # Thoughts and calls are often written into the content of an answer, with their special tokens.
        controls = [marker for marker in markers if not _IN_ANSWERS.search(marker)]
        self._control = re.compile("|".join(map(re.escape, controls))) if controls else None
        self._told: set[str] = set()

    def rendered_before(self, messages: Sequence[Message]) -> str | None:
        """A message about a text that was already rendered with a chat template; None if there is none."""
        for message in messages:
            text = message["content"]
            if self._openers and isinstance(text, str) and text.lstrip().startswith(self._openers):
                return (
                    f"the text of role {message['role']!r} begins with special tokens of the chat template "
                    f"({cut(text.lstrip(), 40)!r}), so it was already rendered, and would be rendered twice. Give "
                    "messages without them, or set format: raw"
                )
        return None

    def note(self, messages: Sequence[Message]) -> None:
        """Warn once about each kind of content that is not used, or has another effect than it seems to have."""
        for message in messages:
            for kind, text in self._found(message):
                if kind not in self._told:
                    log.warning("%s", text)
                    self._told.add(kind)

    def _found(self, message: Message) -> Iterator[tuple[str, str]]:
        role, text = message["role"], message["content"] or ""
        if role not in ROLES and role not in self._source:
            yield (
                f"role {role}",
                f"a message has the role {role!r}, which the chat template does not mention; it is written as it is. "
                f"Usual roles are {', '.join(ROLES)}",
            )
        if self._control is not None and (token := self._control.search(text)):
            yield (
                "control",
                f"the text of a message contains the special token {token[0]!r} "
                f"({cut(text[max(0, token.start() - 30) :], 60)!r}). There it may end a turn, and at the end of an "
                "answer the end of the turn is trained twice. Remove it unless that is intended; if the texts are "
                "already rendered, set format: raw",
            )
        for key in message.keys() - KEYS:
            if message.get(key) not in (None, "", [], {}) and key not in self._source:
                yield f"key {key}", f"the chat template does not read {key!r} of messages, so it is not used"
