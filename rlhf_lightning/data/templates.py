"""Finds where a turn begins and ends in the text of any chat template.

The only assumption about a template is that it renders. The start of an assistant turn is found by rendering the
conversation before it with the generation prompt: the text that the turn adds is what a model has to produce. The end
is found by rendering the same turn with a sentinel as content: the text after the sentinel closes a turn.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from rlhf_lightning.data.call_forms import CallForms
from rlhf_lightning.data.contents import ContentForms, joined
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.template_budget import Budget, OverBudgetError
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.types import JSON, Message, Row, TemplateMessage, Tokenizer, ToolCall, ToolSchema

if TYPE_CHECKING:
    from jinja2 import Template

log = logging.getLogger(__name__)
TEMPLATE_DATE = "2025-01-01"
RECENT = 4  # cached renderings: a turn, the text before it with and without generation prompt, and the sentinel
# A macro of the same name hides transformers' own function.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(
        f"|replace('%{code}', '{datetime.fromisoformat(TEMPLATE_DATE).strftime('%' + code)}')"
        for code in "dmYyBbAajHMSIp"
    )
    + " }}{%- endmacro -%}\n"
)
_SENTINEL = "\ue000sentinel\ue001"
_USER_TURN: list[Message] = [{"role": "user", "content": "Hello"}]
# Arguments of `apply_chat_template` that are not variables of the template.
_RESERVED = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}

TEMPLATE_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
Tools = list[ToolSchema] | None


class _TemplateKey(str):
    """The key of a template: an empty template that transformers compiles in its sandbox, and that is then filled.

    transformers must not compile the text itself, because Jinja evaluates constant expressions of any size while it
    compiles.
    """


def _compiled(source: str) -> "Template":
    """Compile a template as transformers does, in a separate sandbox; cached by its text."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)


@lru_cache(maxsize=16)
def _filled(source: str) -> tuple[_TemplateKey, Budget]:
    """Compile a template with a budget and a fixed date, and return the key by which `apply_chat_template` finds it.

    Raises:
        TemplateSyntaxError: If the text is not a valid template.
    """
    name = _TemplateKey(f"{{# {hashlib.sha256(source.encode(errors='surrogatepass')).hexdigest()} #}}")
    template = _compiled(name)
    # `apply_chat_template` passes only data to templates, so the function is replaced in the environment.
    template.environment.globals["strftime_now"] = _fixed_now
    return name, Budget(template, source)


def _fixed_now(format: str) -> str:
    return datetime.fromisoformat(TEMPLATE_DATE).strftime(format)


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.
        options: Arguments of the template, for example `{"enable_thinking": False}`.

    Raises:
        ConfigError: If the template is invalid, does not render messages, or an option is reserved.

    Example:
        ```python
        template = ChatTemplate(AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"))
        text = template.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        template.turn_end  # '<|im_end|>'
        ```
    """

    def __init__(self, tokenizer: Tokenizer, options: Row | None = None) -> None:
        self.tokenizer, self.given = tokenizer, options or {}
        # Some templates begin with a bos_token even if their tokenizer has none.
        self.options = {
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            **(options or {}),
        }
        self.forms = CallForms(lambda messages, tools: self._rendered(self.contents.fit(messages), tools))
        self._recent: dict[str, str] = {}
        self.contents = ContentForms(lambda messages: self._rendered(self.forms.fit(messages, None), None))
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.markers = sorted(special, key=len, reverse=True)
        self._check_options(options or {})
        self._check_prints()
        self.turn_end: str | None = None
        """Text that closes an assistant turn; None if the template expects other roles."""
        self._ending = ""
        """The part of that text that ends the turn, up to its last special token; the rest ends the conversation."""
        with suppress(RowError):
            self.turn_end = self.closing(_USER_TURN, "assistant").strip()
            self._ending = self._ends_with(self.turn_end)
        self.ends_turns = self.turn_end != ""
        self.end_markers = self._find_ends()

    @property
    def after_turn(self) -> str:
        """Text that the template writes after the end of the last turn, such as an end-of-text token."""
        return (self.turn_end or "").removeprefix(self._ending).strip() if self._ending else ""

    def _check_prints(self) -> None:
        """Refuse a template that does not render messages, because all prompts would be the same."""
        if self._prints():
            return
        self.contents.only_parts = True
        self._recent.clear()
        if not self._prints():
            raise ConfigError(
                "the chat template does not render user messages. Fix chat_template.jinja in the model "
                "folder, or set another with model.chat_template."
            )

    def _prints(self) -> bool:
        """True if two user messages render differently, alone or after a system message (some templates need one)."""
        befores: list[list[Message]] = [[], [{"role": "system", "content": "Be kind."}]]
        for before in befores:
            said: list[list[Message]] = [[*before, {"role": "user", "content": text}] for text in ("Hello", "Goodbye")]
            try:
                if self.render(said[0]) != self.render(said[1]):
                    return True
            except RowError:
                return True  # the template expects other roles; rendering the rows shows whether it works
        return False

    def render(self, messages: list[Message], tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """Render a conversation as text.

        Args:
            messages: The conversation.
            tools: Tools of the conversation.
            add_generation_prompt: Append the generation prompt.

        Raises:
            RowError: If the template refuses the conversation.
            ConfigError: If the template is invalid or exceeds its budget.
        """
        # The two sides of a pair, and the steps of `span`, render the same prompts, so recent renderings are cached.
        # The key is the content of the messages, because a caller may change a message in place.
        key = repr((messages, tools, add_generation_prompt))
        if key not in self._recent:
            fitted = self.contents.fit(self.forms.fit([joined(message) for message in messages], tools))
            text = self._rendered(fitted, tools, add_generation_prompt)
            self._recent = dict([*self._recent.items()][-RECENT + 1 :]) | {key: text}
        return self._recent[key]

    def _rendered(self, messages: list[TemplateMessage], tools: Tools, add_generation_prompt: bool = False) -> str:
        """Render messages with the template, which may change them."""
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._source(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is not valid Jinja: {error} (line {error.lineno}). Fix chat_template.jinja in the "
                "model folder, or set another with model.chat_template."
            ) from None
        except OverBudgetError as error:
            raise ConfigError(f"{error}. Fix it, or set another with model.chat_template.") from None
        except (TemplateError, *TEMPLATE_FAILURES) as error:
            roles = " ".join(str(message.get("role")) for message in messages) or "none"
            raise RowError(f"the chat template rejects the conversation (roles: {roles}): {error}") from None

    def _source(self, tools: Tools) -> str:
        """Key of the template, with its budget reset."""
        text = self.tokenizer.get_chat_template(None, tools)
        name, budget = _filled(text.removeprefix("\ufeff"))  # the byte order mark of a file is not part of the template
        budget.begin()
        return name

    def _check_options(self, options: Row) -> None:
        """Refuse options that belong to the rendering itself, and true and false as text; warn about unread options."""
        from jinja2 import TemplateError
        from jinja2.meta import find_undeclared_variables

        if taken := sorted(set(options) & _RESERVED):
            raise ConfigError(f"data.template_kwargs has {taken[0]!r}, which is set automatically; leave it out")
        for name, value in options.items():
            if isinstance(value, str) and value.strip().lower() in ("true", "false"):
                raise ConfigError(
                    f"data.template_kwargs: {name} is the text {value!r}, and a template takes every text as true; "
                    f"write {value.strip().lower()} without quotes"
                )
        given = self.tokenizer.chat_template if options else None
        sources = [*given.values()] if isinstance(given, dict) else [given] if given else []
        if not sources:
            return
        read: set[str] = set()
        for source in sources:
            try:
                read |= find_undeclared_variables(_compiled("").environment.parse(source))
            except TemplateError:
                return  # reported when it renders
        if unread := sorted(set(options) - read):
            known = sorted(read - {"messages", "tools", "add_generation_prompt", "documents"})
            log.warning(
                "data.template_kwargs: the chat template does not read %s; it reads %s",
                ", ".join(unread),
                ", ".join(known) or "no such settings",
            )

    def spans(
        self, messages: list[Message], tools: Tools, selected: list[bool]
    ) -> list[tuple[str, list[tuple[int, int]], bool]]:
        """Find the selected messages in the rendered text.

        Args:
            messages: The conversation.
            tools: Tools of the conversation.
            selected: For each message, True if it is selected.

        Returns:
            Texts, each with the (start, end) of its selected messages, and whether it ends its turns. There is one text
            if possible. If an earlier turn renders differently once more turns follow (templates that drop earlier
            reasoning or move a marker), there is one text for each selected message, rendered up to it. The same is
            true if the template does not end turns: each text then ends with its turn, so that an end token can be
            appended.
        """
        text, found = "", []
        for i in (i for i, chosen in enumerate(selected) if chosen):
            upto = self.render(messages[: i + 1], tools)
            start, end = self.span(messages, i, upto, tools)
            if messages[i]["role"] == "assistant" and (asked := self._dropped_prompt(messages[:i], upto, start, tools)):
                upto, start, end = asked + upto[start:], len(asked), len(asked) + end - start
            ended = self.ends_turns and self._ended(messages[i]["role"], upto[:end])
            # The end token is appended to the text, so white space before it must be trained, too.
            end = end if ended or upto[end:].strip() else len(upto)
            found.append((upto, [(start, end)], ended))
            text = upto
        if all(ended and text.startswith(upto[: span[1]]) for upto, (span,), ended in found):
            return [(text, [span for _, (span,), _ in found], True)]
        return found

    def _ended(self, role: str, upto: str) -> bool:
        """True if a text ends its turn; some templates do not end a turn with tool calls."""
        if role != "assistant" or self.turn_end is None:
            return True
        return upto.endswith((*self.end_markers, self.turn_end))

    def span(self, messages: list[Message], i: int, upto: str, tools: Tools) -> tuple[int, int]:
        """Start and end of a message in a text, including its closing marker.

        Args:
            messages: The conversation.
            i: Index of the message.
            upto: The conversation up to this message, as text.
            tools: Tools of the conversation.
        """
        before, message = messages[:i], messages[i]
        try:
            closing = self.closing(before, message["role"], tools)
        except RowError:
            closing = ""
        tail, shown = closing.rstrip(), upto.rstrip()
        end = len(shown)
        if self._ending and tail.startswith(self._ending):
            rest = tail[len(self._ending) :].strip()  # this ends the conversation, not the turn
            end = len(shown.removesuffix(rest).rstrip()) if rest else end
        elif tail and shown.endswith(tail):
            marker = self.first_marker(tail)
            end -= len(tail) - (tail.index(marker) + len(marker) if marker else len(tail))
        return min(self._start(before, message["role"], upto, tools), end), end

    def _start(self, before: list[Message], role: str, upto: str, tools: Tools) -> int:
        """Start of the last message in the text `upto`."""
        if role != "assistant":
            return common_prefix(self._with_sentinel(before, role, tools), upto)
        try:
            prompt = self.render(before, tools, add_generation_prompt=True)
        except RowError:
            prompt = ""  # the conversation begins with the assistant, and many templates do not allow that
        shared = common_prefix(prompt, upto)
        if prompt and shared == len(prompt):
            return shared
        spoken = common_prefix(self._with_sentinel(before, role, tools), upto)
        opening = prompt[len(self._conversation_part(before, prompt, tools)) :].lstrip()
        opened = upto.find(opening, shared, spoken) if opening else -1
        if opened >= 0:  # the text differs from the prompt only before the opening
            return opened + len(opening)
        if prompt and not opening:
            bare, asked = upto[:spoken].rstrip(), prompt.rstrip()
            return len(bare) + common_prefix(prompt[len(asked) :], upto[len(bare) : spoken])
        # The generation prompt has text that the turn lacks (an opened <think>). Their common prefix might reach into
        # the content by chance; the common prefix with another content cannot.
        return min(shared or len(upto), spoken)

    def _conversation_part(self, before: list[Message], prompt: str, tools: Tools) -> str:
        """The part of a prompt that is the conversation, without the opening of the answer."""
        try:
            return prompt[: common_prefix(self.render(before, tools), prompt)]
        except RowError:
            return prompt

    def _dropped_prompt(self, before: list[Message], upto: str, start: int, tools: Tools) -> str:
        """The prompt of a turn, if the template leaves out a part of it once the answer follows; else an empty text.

        Some templates put the system message or tools into the user's message only if it is the last one (Mistral).
        """
        try:
            prompt = self.render(before, tools, add_generation_prompt=True)
        except RowError:
            return ""
        shared = common_prefix(prompt, upto)
        said = self._conversation_part(before, prompt, tools) if shared < min(start, len(prompt)) else ""
        return prompt if said[shared:].strip() else ""

    def _with_sentinel(self, before: list[Message], role: str, tools: Tools, prompts: bool = False) -> str:
        """Render the conversation with the sentinel as the content of a last message."""
        return self.render([*before, {"role": role, "content": _SENTINEL}], tools, prompts)

    def closing(self, before: list[Message], role: str, tools: Tools = None, prompts: bool = False) -> str:
        """Text that the template writes after the content of a message.

        Args:
            before: Messages before it.
            role: Role of the message.
            tools: Tools of the conversation.
            prompts: Add the generation prompt.

        Raises:
            RowError: If the template does not render the content.
        """
        _, found, closing = self._with_sentinel(before, role, tools, prompts).rpartition(_SENTINEL)
        if not found:
            raise RowError(f"the chat template does not render the content of role {role!r}")
        return closing

    def _ends_with(self, closing: str) -> str:
        """The part of a conversation's closing text that ends the assistant turn; empty without a special token.

        At the end of a conversation, a template may close more than the turn (with an end-of-text token). The turn
        itself is closed by the text that also appears if another turn follows, up to the last special token that both
        have.
        """
        first = self.first_marker(closing)
        if first is None:
            return ""
        end = closing.index(first) + len(first)
        if self.render(_USER_TURN) != self.render(_USER_TURN, add_generation_prompt=True):  # else it may always prompt
            with suppress(RowError):
                followed = self.closing(_USER_TURN, "assistant", prompts=True).lstrip()
                shared = closing[: common_prefix(closing, followed)]
                end = max([end, *(shared.rindex(m) + len(m) for m in self.markers if m in shared)])
        return closing[:end]

    def _find_ends(self) -> list[str]:
        """Special tokens that end assistant turns: plain turns, turns with reasoning, and turns with tool calls.

        A token that also appears within a turn (between two calls) does not end a turn.
        """
        ends, inside = [], []
        for messages, tools in _turns():
            with suppress(RowError):
                upto = self.render(messages, tools)
                start, end = self.span(messages, len(messages) - 1, upto, tools)
                marker = next((marker for marker in self.markers if upto[start:end].endswith(marker)), "")
                ends.append(marker)
                inside.append(upto[start : end - len(marker)])
        plain = next((marker for marker in self.markers if self._ending.endswith(marker)), "")
        within = {marker for marker in ends if marker and any(marker in text for text in inside)}
        return sorted({marker for marker in (plain, *ends) if marker and (marker == plain or marker not in within)})

    def first_marker(self, closing: str) -> str | None:
        """The first special token in a closing text, or None."""
        found = [(closing.index(marker), -len(marker), marker) for marker in self.markers if marker in closing]
        return min(found)[2] if found else None

    def content_bytes(self, text: str) -> int:
        """Number of UTF-8 bytes of a text without its special tokens."""
        for marker in self.markers:
            if marker in text:
                text = text.replace(marker, "")
        return len(text.encode())


def _turns() -> Iterator[tuple[list[Message], Tools]]:
    """Conversations that end with each kind of assistant turn; templates refuse those that they do not support."""
    schema: ToolSchema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    weather: JSON = {"name": "weather", "description": "Weather", "parameters": schema}
    tools: Tools = [{"type": "function", "function": weather}]
    plain: Message = {"role": "assistant", "content": "Hi"}
    silent: Message = {"role": "assistant", "content": ""}
    yield [*_USER_TURN, plain], None
    yield [*_USER_TURN, {**plain, "reasoning_content": "Hm."}], None
    # Most templates expect arguments as an object and some as JSON text; some check ids.
    spellings: list[JSON] = [{"city": "Oslo"}, '{"city": "Oslo"}']
    for arguments in spellings:
        calls: list[ToolCall] = [
            {"type": "function", "id": f"call0000{i}", "function": {"name": "weather", "arguments": arguments}}
            for i in range(2)
        ]
        for called in (calls[:1], calls):
            yield [*_USER_TURN, {**silent, "tool_calls": called}], tools
            yield [*_USER_TURN, {**silent, "reasoning_content": "Hm.", "tool_calls": called}], tools
        result: Message = {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": "Rain"}
        yield [*_USER_TURN, {**silent, "tool_calls": calls[:1]}, result, plain], tools


def common_prefix(a: str, b: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # binary search, because comparing slices is much faster than comparing characters
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
