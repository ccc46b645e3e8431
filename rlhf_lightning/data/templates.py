"""Chat templates as text: where a turn begins and ends, for any template.

Nothing is assumed of a template but that it renders. Where an assistant turn begins is found by rendering the
conversation before it with the generation prompt: what the turn adds to that is what a model has to produce. Where
it ends is found by rendering the same turn with a sentinel as content: what follows the sentinel closes a turn.
"""

from datetime import datetime
from typing import Any

from rlhf_lightning.data.call_forms import CallForms
from rlhf_lightning.data.conversations import Message
from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import ConfigError

TEMPLATE_DATE = "2025-01-01"
RECENT = 4  # renderings that are kept: a turn, what comes before it with and without a prompt to go on, the sentinel
_SENTINEL = "\ue000sentinel\ue001"
# transformers hands plain data to templates, no functions: the date is fixed by a macro that shadows its own.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f"|replace('%{code}', '{datetime.fromisoformat(TEMPLATE_DATE).strftime('%' + code)}')"
        for code in "dmYyBbAajHMSIp"
    )
    + " }}{%- endmacro -%}"
)

Tools = list[Any] | None


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer. options: passed to the template (for example `enable_thinking`).
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        # Templates that begin with a bos_token are used with tokenizers that have none.
        self.options = {
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            **(options or {}),
        }
        self.forms = CallForms(self._rendered)
        self._recent: dict[str, str] = {}
        self._in_parts = False
        """Whether the template prints contents only where they come as lists of parts."""
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.markers = sorted(special, key=len, reverse=True)
        self._check_prints()
        try:
            self.turn_end: str | None = self.closing([{"role": "user", "content": "Hello"}], "assistant").strip()
        except RowError:
            self.turn_end = None  # a template that wants other roles than these; its rows will show how turns end
        self.ends_turns = self.turn_end != ""

    def _check_prints(self) -> None:
        """Refuse a template that prints nothing of what is said: prompts and answers would all be the same."""
        if self._prints():
            return
        self._in_parts = True
        if not self._prints():
            raise ConfigError(
                "the chat template prints nothing of a user's message. Mend chat_template.jinja in the model "
                "folder, or name another with model.chat_template."
            )

    def _prints(self) -> bool:
        """Whether two messages of a user are rendered unlike, alone or after a system message that some require."""
        for before in ([], [{"role": "system", "content": "Be kind."}]):
            said = [[*before, {"role": "user", "content": text}] for text in ("Hello", "Goodbye")]
            try:
                if self.render(said[0]) != self.render(said[1]):
                    return True
            except RowError:
                return True  # a template that wants other roles than these; its rows will show
        return False

    def render(self, messages: list[Message], tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; raises `RowError` where the template refuses it."""
        # The two sides of a pair ask for the same surroundings, and so do the steps of `span`. By what the messages
        # hold, not by which they are: a caller may change one in place.
        key = repr((messages, tools, add_generation_prompt))
        if key not in self._recent:
            text = self._rendered(self.forms.fit(messages, tools), tools, add_generation_prompt)
            self._recent = dict([*self._recent.items()][-RECENT + 1 :]) | {key: text}
        return self._recent[key]

    def _rendered(self, messages: list[Message], tools: Tools, add_generation_prompt: bool = False) -> str:
        """What the template itself makes of messages, which it may change."""
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self.tokenizer.apply_chat_template(
                [_in_parts(message) for message in messages] if self._in_parts else messages,
                tools=tools,
                chat_template=self._source(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is no valid Jinja: {error} (line {error.lineno}). Mend chat_template.jinja in the "
                "model folder, or name another with model.chat_template."
            ) from None
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            roles = " ".join(str(message.get("role")) for message in messages) or "none"
            raise RowError(f"the chat template refuses the conversation (roles: {roles}): {error}") from None

    def _source(self, tools: Tools) -> str:
        """The template's text. One that prints today's date would render one thing now and another tomorrow."""
        source = self.tokenizer.get_chat_template(None, tools)
        return _FIXED_DATE + source if "strftime_now" in source else source

    def spans(self, messages: list[Message], tools: Tools, selected: list[bool]) -> list[tuple[str, list[Any]]]:
        """Texts with the (start, end) of each selected message in them.

        One text, or, where an earlier turn is not rendered in the whole as it was when it was the last (templates
        that drop earlier reasoning or move a marker), one for each selected message, rendered up to it. Likewise where
        nothing ends a turn: each text then ends with its turn, and an end can be put after it.
        """
        last = max((i for i, chosen in enumerate(selected) if chosen), default=-1)
        text = self.render(messages[: last + 1], tools)
        found = []
        for i in (i for i, chosen in enumerate(selected) if chosen):
            upto = text if i == last else self.render(messages[: i + 1], tools)
            found.append((upto, self.span(messages, i, upto, tools)))
        if self.ends_turns and all(text.startswith(upto[:end]) for upto, (_, end) in found):
            return [(text, [span for _, span in found])]
        return [(upto, [span]) for upto, span in found]

    def span(self, messages: list[Message], i: int, upto: str, tools: Tools) -> tuple[int, int]:
        """Where message i, the last in the text `upto`, begins and ends; its closing marker is part of it."""
        before, message = messages[:i], messages[i]
        try:
            closing = self.closing(before, message["role"], tools)
        except RowError:
            closing = ""
        tail = closing.rstrip()
        end = len(upto.rstrip())
        if tail and upto.rstrip().endswith(tail):
            marker = self.first_marker(tail)
            end -= len(tail) - (tail.index(marker) + len(marker) if marker else len(tail))
        return min(self._start(before, message["role"], upto, tools), end), end

    def _start(self, before: list[Message], role: str, upto: str, tools: Tools) -> int:
        if role != "assistant":
            return _common_prefix(self._with_sentinel(before, role, tools), upto)
        try:
            prompt = self.render(before, tools, add_generation_prompt=True)
        except RowError:
            prompt = ""  # a conversation that opens with the assistant: many templates need a message before it
        shared = _common_prefix(prompt, upto)
        if prompt and shared == len(prompt):
            return shared
        # The generation prompt holds what the turn does not (an opened <think>): their common prefix might eat into
        # the content by accident, which the rendering with another content cannot.
        return min(shared or len(upto), _common_prefix(self._with_sentinel(before, role, tools), upto))

    def _with_sentinel(self, before: list[Message], role: str, tools: Tools) -> str:
        return self.render([*before, {"role": role, "content": _SENTINEL}], tools)

    def closing(self, before: list[Message], role: str, tools: Tools = None) -> str:
        """What the template puts after the content of a message of this role in this place."""
        _, found, closing = self._with_sentinel(before, role, tools).rpartition(_SENTINEL)
        if not found:
            raise RowError(f"the chat template does not render the content of role {role!r}")
        return closing

    def first_marker(self, closing: str) -> str | None:
        """The special token that stands first in a closing text."""
        found = [(closing.index(marker), -len(marker), marker) for marker in self.markers if marker in closing]
        return min(found)[2] if found else None

    def content_bytes(self, text: str) -> int:
        """UTF-8 bytes of a text, its special tokens left out."""
        for marker in self.markers:
            if marker in text:
                text = text.replace(marker, "")
        return len(text.encode())


def _common_prefix(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves: comparing slices is many times faster than comparing characters
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, **({} if content is None else {"content": parts})}
