"""Finds the form in which a chat template renders tool calls, their results and reasoning correctly.

Templates differ in what they expect: arguments as an object or as text, ids or none, `reasoning_content` or `thinking`.
The form is found by rendering probes; the source of a template is never parsed for this.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.tool_calls import Written, as_text, holds_json, shown, with_ids
from rlhf_lightning.types import JSON, Message, ReasoningKey, TemplateMessage, ToolCall, ToolSchema

log = logging.getLogger(__name__)
Render = Callable[[list[TemplateMessage], list[ToolSchema] | None], str]
REASONING: tuple[ReasoningKey, ...] = ("reasoning_content", "thinking", "reasoning")
PROBES: tuple[dict[str, JSON], ...] = (
    {"first_key": "first value", "size": 7},
    {"second_key": "second value", "size": 8},
)
RESULT: JSON = {"result_key": "result value"}
NAMES = ("probe_first", "probe_second")
WORD, ID = "Sentinel word.", "abc123456"
SCHEMA: ToolSchema = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Another word.",
        "parameters": {"type": "object", "properties": {"other_key": {"type": "string", "description": "A key."}}},
    },
}


@dataclass(frozen=True)
class Forms:
    """How a template expects the tool calls of a turn.

    Example:
        >>> Forms(shown=0).ids
        'given'
    """

    shown: int
    """How the template shows arguments: `AS_JSON`, `BY_KEY`, `AS_REPR`, or 0 if it shows no calls."""
    as_text: bool = False
    """True if arguments must be text."""
    blank: str | None = None
    """Content of a turn without text: None or an empty text."""
    several: bool = True
    """True if the template shows all calls of a turn, not only the first."""
    with_text: bool = True
    """True if the template shows the text next to calls."""
    needs_ids: bool = False
    """True if the template shows ids, or refuses calls without ids."""
    ids: str = "given"
    """Ids as `given`, of `nine` letters and digits (Mistral), or `named` after the function (Kimi)."""


class CallForms:
    """Converts messages to the form that a template shows correctly.

    Args:
        render: Renders messages and tools with the template; raises `RowError`.

    Example:
        ```python
        forms = CallForms(template.render)
        messages = forms.fit(messages, tools)
        ```
    """

    def __init__(self, render: Render) -> None:
        self.render = render
        self._forms: dict[bool, Forms] = {}
        self._told: set[str] = set()
        self._tools: bool | None = None
        self._roles: dict[tuple[str, bool], bool | None] = {}
        self._results: dict[type, bool] = {}
        self._reasoning_keys: dict[ReasoningKey, ReasoningKey | None] = {}
        """Results of the probes."""

    def fit(
        self, messages: Sequence[Message | TemplateMessage], tools: list[ToolSchema] | None
    ) -> list[TemplateMessage]:
        """Copy messages in the form that the template shows correctly."""
        # Copies, because templates may change their input (some pop keys).
        fitted = [self._plain(message, first=not i) for i, message in enumerate(messages)]
        if not any(message.get("tool_calls") for message in fitted):
            return fitted
        forms = self.forms(bool(tools))
        if forms.ids != "given" or forms.needs_ids:
            fitted = with_ids(fitted, forms.ids)
        return [self._calls(message, forms) if message.get("tool_calls") else message for message in fitted]

    def _plain(self, message: Message | TemplateMessage, first: bool) -> TemplateMessage:
        """Copy a message, with reasoning and results that are objects under the keys that the template reads."""
        changed: TemplateMessage = {**message, "role": self._role(message["role"], first)}
        content = changed.get("content")
        if message.get("role") == "tool" and isinstance(content, Written):
            changed["content"] = content.value if self._shows_result(type(content.value)) else str(content)
        if given := _reasoning(message):
            key = self._reasoning_key(given)
            if key not in (None, given):
                changed[key] = changed.pop(given)
        texts = all(isinstance(value, str) for value in changed.values())
        return changed if texts else copy.deepcopy(changed)  # a deep copy only if there is something mutable

    def _role(self, role: str, first: bool) -> str:
        """The role under which the template shows a message: `developer` becomes `system` if only that is supported."""
        if role in ("user", "assistant") or self._shows_role(role, first) is True:
            return role
        if role == "developer" and self._shows_role("system", first):
            return "system"
        return role

    def _calls(self, message: TemplateMessage, forms: Forms) -> TemplateMessage:
        """A message with tool calls in the template's form."""
        content = message.get("content")
        said = isinstance(content, str) and not isinstance(content, Written) and content.strip()
        if not forms.shown:
            if not isinstance(content, Written):
                return message
            # The row stores the call as the text of a turn, so that text is shown.
            return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": str(content)}
        calls = message["tool_calls"]
        if forms.as_text:
            calls = [
                {**call, "function": {**call["function"], "arguments": as_text(call["function"]["arguments"])}}
                for call in calls
            ]
        return {**message, "tool_calls": calls, "content": content if said else forms.blank}

    def left_out(self, messages: list[Message], tools: list[ToolSchema] | None) -> str | None:
        """A message about the part of a conversation that the template omits; None if it shows everything."""
        if tools and not self.shows_tools():
            return (
                "the row has tools, but the chat template does not render tools. Set another template with "
                "model.chat_template, or ignore the column with columns: {tools: null}"
            )
        for i, message in enumerate(messages):
            role = self._role(message["role"], first=not i)
            if role not in ("user", "assistant") and self._shows_role(role, not i) is False:
                place = "after the first message" if i else "at the beginning"
                return (
                    f"the chat template leaves out a message of role {role!r} {place}, because it does not support "
                    "that role. Set another template with model.chat_template, or change the role"
                )
            if (given := _reasoning(message)) and self._reasoning_key(given) is None:
                return (
                    f"the chat template does not render {given!r} of a message. Write it into the content between the "
                    "model's thinking tags, or remove it from the rows"
                )
            if (calls := message.get("tool_calls")) and (found := self._left_out_calls(message, calls, bool(tools))):
                return found
        return None

    def _left_out_calls(self, message: Message, calls: list[ToolCall], tools: bool) -> str | None:
        forms = self.forms(tools)
        if not forms.shown and not isinstance(message["content"], Written):
            return (
                "the chat template does not render tool calls. Set another template with model.chat_template, or write "
                "the calls into the content of the message"
            )
        if forms.shown and len(calls) > 1 and not forms.several:
            return (
                f"the chat template renders only the first tool call of a message, but this message has {len(calls)}. "
                "Put each call into a separate message, before its result"
            )
        content = message["content"]
        if forms.shown and not forms.with_text and content and not isinstance(content, Written):
            self.once("text", "the chat template leaves out the text of messages that have tool calls")
        return None

    def once(self, key: str, text: str) -> None:
        """Log a warning once per template and key."""
        if key not in self._told:
            log.warning(text)
        self._told.add(key)

    # -- probes ---------------------------------------------------------------------------------------------------

    def forms(self, tools: bool) -> Forms:
        """The form that the template expects, with or without tools."""
        if tools not in self._forms:
            self._forms[tools] = self._find([SCHEMA] if tools else None)
        return self._forms[tools]

    def shows_tools(self) -> bool:
        """True if the template shows tools."""
        if self._tools is None:
            text = self._try([{"role": "user", "content": "Hello"}], [SCHEMA])
            self._tools = text is None or "probe_tool" in text
        return self._tools

    def _find(self, tools: list[ToolSchema] | None) -> Forms:
        """Find the best form by rendering probes."""
        best = Forms(0)
        for text in (False, True):
            for blank in (None, ""):
                shown = self._shown(tools, text, blank)
                if shown > best.shown:
                    best = Forms(shown, text, blank)
        if not best.shown:
            return best
        probe = partial(self._probe, tools, best)
        both, with_text, with_id, without = probe(count=2), probe(content=WORD), probe(), probe(ids=None)
        needs_ids = without is None or ID in (with_id or "")
        ids = "given"
        if (long := probe(ids="call_12345678")) is None:
            ids = "nine"
        elif "call_12345678" in long and NAMES[0] not in long:
            ids = "named"
        return Forms(
            best.shown,
            best.as_text,
            best.blank,
            both is None or "second value" in both,
            with_text is None or WORD in with_text,
            needs_ids,
            ids,
        )

    def _shown(self, tools: list[ToolSchema] | None, as_text: bool, blank: str | None) -> int:
        """How the template shows arguments in a form; 0 if it does not."""
        text = self._probe(tools, Forms(0, as_text, blank))
        if text is None or (blank is None and "None" in text):
            return 0
        return shown(text, PROBES[0])

    def _probe(
        self, tools: list[ToolSchema] | None, forms: Forms, count: int = 1, content: str = "", ids: str | None = ID
    ) -> str | None:
        """Rendering of a turn with calls, and results if the template accepts them; None if it refuses the turn."""
        calls: list[ToolCall] = []
        results: list[TemplateMessage] = []
        for name, arguments in [*zip(NAMES, PROBES, strict=True)][:count]:
            # Ids differ in their last character.
            known = {"id": f"{ids[:-1]}{len(calls)}" if calls else ids} if ids else {}
            function: JSON = {"name": name, "arguments": as_text(arguments) if forms.as_text else arguments}
            calls.append({**known, "type": "function", "function": function})
            results.append({"role": "tool", "content": "Found."} | ({"tool_call_id": known["id"]} if known else {}))
        turn: TemplateMessage = {"role": "assistant", "content": content or forms.blank, "tool_calls": calls}
        said: list[TemplateMessage] = [{"role": "user", "content": "Hello"}, turn]
        found = self._try([*said, *results], tools)
        return self._try(said, tools) if found is None else found

    def _shows_role(self, role: str, first: bool) -> bool | None:
        """True if the template shows a message of a role at this position; None if it refuses the probe."""
        if (role, first) not in self._roles:
            user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}
            one = {"role": role, "content": WORD}
            said = [one, user] if first else [user, answer, one, *([] if role == "tool" else [user])]
            try:
                self._roles[role, first] = WORD in self.render(copy.deepcopy(said), None)
            except RowError:
                self._roles[role, first] = None
        return self._roles[role, first]

    def _shows_result(self, kind: type) -> bool:
        """True if the template shows a result that is an object (or a list of them) as JSON."""
        if kind not in (dict, list):
            return False
        if kind not in self._results:
            call = {"id": ID, "type": "function", "function": {"name": NAMES[0], "arguments": {}}}
            content: JSON = [RESULT, RESULT] if kind is list else RESULT
            said: list[TemplateMessage] = [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": ID, "name": NAMES[0], "content": content},
            ]
            self._results[kind] = holds_json(self._try(said, None) or "", content)
        return self._results[kind]

    def _reasoning_key(self, given: ReasoningKey) -> ReasoningKey | None:
        """The key under which the template shows reasoning: the given key or another common name, or None."""
        if given not in self._reasoning_keys:
            names = [given, *(name for name in REASONING if name != given)]
            said = {"role": "user", "content": "Hello"}
            texts = {
                name: self._try([said, {"role": "assistant", "content": "Yes.", name: WORD}], None) for name in names
            }
            refused = texts[given] is None  # it expects other messages than the probe; the rows show whether it works
            shown = next((name for name in names if WORD in (texts[name] or "")), None)
            self._reasoning_keys[given] = given if refused else shown
        return self._reasoning_keys[given]

    def _try(self, messages: list[TemplateMessage], tools: list[ToolSchema] | None) -> str | None:
        """Render the messages, alone or after a system message; None if the template refuses both."""
        for before in ([], [{"role": "system", "content": "Be kind."}]):
            try:
                return self.render(copy.deepcopy([*before, *messages]), tools)
            except RowError:
                continue
        return None


def _reasoning(message: Message | TemplateMessage) -> ReasoningKey | None:
    """The key that holds a message's reasoning, if it has any."""
    if message["role"] != "assistant":
        return None
    return next((key for key in REASONING if isinstance(said := message.get(key), str) and said.strip()), None)
