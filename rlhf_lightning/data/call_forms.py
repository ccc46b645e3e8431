"""The form in which a chat template shows tool calls, their results and reasoning right, found out by rendering.

Templates differ in what they take: arguments as an object or as text, ids or none, `reasoning_content` or `thinking`.
What a template prints of a probe says which; nothing is read from its source.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf_lightning.data.conversations import Message
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.tool_calls import Written, as_text

log = logging.getLogger(__name__)
Render = Callable[[list[Message], list[Any] | None], str]
REASONING = ("reasoning_content", "thinking", "reasoning")
PROBES: tuple[dict[str, Any], ...] = (
    {"first_key": "first value", "size": 7},
    {"second_key": "second value", "size": 8},
)
RESULT = {"result_key": "result value"}
NAMES = ("probe_first", "probe_second")
WORD, ID = "Sentinel word.", "abc123456"
SCHEMA = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "Another word.",
        "parameters": {"type": "object", "properties": {"other_key": {"type": "string", "description": "A key."}}},
    },
}
REPR, KEYED, JSON = 1, 2, 3  # how an object is shown: as Python prints it, key by key, as JSON


@dataclass(frozen=True)
class Forms:
    """What a template takes of the calls of a turn."""

    shown: int
    """How it shows arguments; 0 where it shows no calls."""
    as_text: bool = False
    """Arguments are text."""
    blank: str | None = None
    """The content of a turn that has none."""
    several: bool = True
    """It shows all calls of a turn, not the first alone."""
    beside: bool = True
    """It shows the text beside calls."""
    needs_ids: bool = False
    """It shows ids, or refuses calls without."""
    ids: str = "given"
    """Ids as they are given, of `nine` letters and digits (Mistral), or `named` by the function (Kimi)."""


class CallForms:
    """Brings messages to the form of one template.

    Args:
        render: the template's own rendering of messages and tools; raises `RowError`.
    """

    def __init__(self, render: Render) -> None:
        self.render = render
        self._forms: dict[bool, Forms] = {}
        self._known: dict[Any, Any] = {}

    def fit(self, messages: list[Message], tools: list[Any] | None) -> list[Message]:
        """Copies of messages, as the template shows them right; raises `RowError` where it leaves something out."""
        # A template may change what it is given (some pop keys).
        messages = [self._plain(message) for message in messages]
        if not any(message.get("tool_calls") for message in messages):
            return messages
        forms = self.forms(bool(tools))
        if forms.ids != "given" or forms.needs_ids:
            messages = with_ids(messages, forms)
        return [self._calls(message, forms) if message.get("tool_calls") else message for message in messages]

    def _plain(self, message: Message) -> Message:
        """A message with its reasoning, and a result that is an object, where the template looks for them."""
        changed = dict(message)
        content = changed.get("content")
        if message.get("role") == "tool" and isinstance(content, Written):
            changed["content"] = content.value if self._shows_result(type(content.value)) else str(content)
        given = next((key for key in REASONING if isinstance(message.get(key), str) and message[key].strip()), None)
        if given and message.get("role") == "assistant":
            key = self._reasoning_key(given)
            if key is None:
                raise RowError(
                    f"the chat template shows no {given!r} of a message: write it into the content, between the marks "
                    "that the model thinks in, or leave it out of the rows"
                )
            if key != given:
                changed[key] = changed.pop(given)
        return copy.deepcopy(changed)

    def _calls(self, message: Message, forms: Forms) -> Message:
        content = message.get("content")
        said = isinstance(content, str) and not isinstance(content, Written) and content.strip()
        if not forms.shown:
            if not isinstance(content, Written):
                raise RowError(
                    "the chat template shows no tool calls. Name one that does with model.chat_template, or write the "
                    "calls into the content of the message."
                )
            # The row has its call as the text of a turn; that is shown.
            return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": str(content)}
        calls = message["tool_calls"]
        if len(calls) > 1 and not forms.several:
            raise RowError(
                f"the chat template shows the first of a message's tool calls only, and this one has {len(calls)}: "
                "give each call a message of its own, before its result"
            )
        if said and not forms.beside:
            self._once("beside", "the chat template leaves out the text of a message beside its tool calls")
        if forms.as_text:
            calls = [
                {**call, "function": {**call["function"], "arguments": as_text(call["function"]["arguments"])}}
                for call in calls
            ]
        return {**message, "tool_calls": calls, "content": content if said else forms.blank}

    def _once(self, key: Any, text: str) -> None:
        if key not in self._known:
            log.warning(text)
        self._known[key] = True

    # -- probes ---------------------------------------------------------------------------------------------------

    def forms(self, tools: bool) -> Forms:
        """What the template takes, with tools beside the messages or without."""
        if tools not in self._forms:
            self._forms[tools] = self._find([SCHEMA] if tools else None)
        return self._forms[tools]

    def shows_tools(self) -> bool:
        """Whether the template shows tools at all."""
        if "tools" not in self._known:
            said = [{"role": "user", "content": "Hello"}]
            text = self._try(said, [SCHEMA])
            self._known["tools"] = text is None or "probe_tool" in text
        return bool(self._known["tools"])

    def _find(self, tools: list[Any] | None) -> Forms:
        best = Forms(0)
        for text in (False, True):
            for blank in (None, ""):
                shown = self._shown(tools, text, blank)
                if shown > best.shown:
                    best = Forms(shown, text, blank)
        if not best.shown:
            return best
        probe = partial(self._probe, tools, best)
        both, beside, with_id, without = probe(count=2), probe(content=WORD), probe(), probe(ids=None)
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
            beside is None or WORD in beside,
            needs_ids,
            ids,
        )

    def _shown(self, tools: list[Any] | None, as_text: bool, blank: str | None) -> int:
        text = self._probe(tools, Forms(0, as_text, blank))
        if text is None or (blank is None and "None" in text):
            return 0
        return shown(text, PROBES[0])

    def _probe(
        self, tools: list[Any] | None, forms: Forms, count: int = 1, content: str = "", ids: str | None = ID
    ) -> str | None:
        """A turn of calls, with its results where the template takes them."""
        calls: list[dict[str, Any]] = []
        results: list[Message] = []
        for name, arguments in [*zip(NAMES, PROBES, strict=True)][:count]:
            # The second id differs in its last character.
            known = {"id": f"{ids[:-1]}{len(calls)}" if calls else ids} if ids else {}
            function = {"name": name, "arguments": as_text(arguments) if forms.as_text else arguments}
            calls.append({**known, "type": "function", "function": function})
            results.append({"role": "tool", "content": "Found."} | ({"tool_call_id": known["id"]} if known else {}))
        turn = {"role": "assistant", "content": content or forms.blank, "tool_calls": calls}
        said: list[Message] = [{"role": "user", "content": "Hello"}, turn]
        found = self._try([*said, *results], tools)
        return self._try(said, tools) if found is None else found

    def _shows_result(self, kind: type) -> bool:
        """Whether the template shows a result that is an object (or a list of them) as JSON."""
        if kind not in (dict, list):
            return False
        key = ("result", kind)
        if key not in self._known:
            call = {"id": ID, "type": "function", "function": {"name": NAMES[0], "arguments": {}}}
            content: Any = [RESULT, RESULT] if kind is list else RESULT
            said: list[Message] = [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": ID, "name": NAMES[0], "content": content},
            ]
            self._known[key] = holds_json(self._try(said, None) or "", content)
        return bool(self._known[key])

    def _reasoning_key(self, given: str) -> str | None:
        """The key under which the template shows reasoning: the given one, or another that people use."""
        key = ("reasoning", given)
        if key not in self._known:
            names = [given, *(name for name in REASONING if name != given)]
            said = {"role": "user", "content": "Hello"}
            texts = {
                name: self._try([said, {"role": "assistant", "content": "Yes.", name: WORD}], None) for name in names
            }
            refused = texts[given] is None  # a template that wants other messages than these: its rows will show
            self._known[key] = given if refused else next((n for n in names if WORD in (texts[n] or "")), None)
        return self._known[key]

    def _try(self, messages: list[Message], tools: list[Any] | None) -> str | None:
        """A rendering, or None where the template refuses the messages, alone and after a system message."""
        for before in ([], [{"role": "system", "content": "Be kind."}]):
            try:
                return self.render(copy.deepcopy([*before, *messages]), tools)
            except RowError:
                continue
        return None


def with_ids(messages: list[Message], forms: Forms) -> list[Message]:
    """Messages with ids of the form that a template takes; those that a row lacks follow from its calls."""
    known: dict[str, str] = {}
    waiting: list[tuple[str, str]] = []
    result, number = [], 0
    for message in messages:
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = []
            for call in calls:
                given = call.get("id")
                new = _id(given, call["function"], number, forms.ids)
                known |= {given: new} if given else {}
                waiting.append((new, call["function"]["name"]))
                message["tool_calls"].append({**call, "id": new})
                number += 1
        elif message.get("role") == "tool":
            given = message.get("tool_call_id")
            name = message.get("name")
            answered = known.get(str(given)) or next(
                (new for new, called in waiting if name in (None, called)), waiting[0][0] if waiting else None
            )
            if given is None or forms.ids != "given":
                message |= {} if answered is None else {"tool_call_id": answered}
            waiting = [(new, called) for new, called in waiting if new != answered]
        result.append(message)
    return result


def _id(given: str | None, function: dict[str, Any], number: int, form: str) -> str:
    if form == "named":
        return f"functions.{function['name']}:{number}"
    if form == "given" and given:
        return given
    if given and len(given) == 9 and given.isascii() and given.isalnum():
        return given
    # Not counted up: a constant would be learnt by heart.
    source = given or f"{number} {function['name']} {as_text(function['arguments'])}"
    return hashlib.sha256(source.encode()).hexdigest()[:9]


def shown(text: str, arguments: dict[str, Any]) -> int:
    """How a text shows an object: `JSON`, `KEYED`, `REPR`, or 0 where it does not, or encodes it twice."""
    if holds_json(text, arguments):
        return JSON
    if not all(str(part) in text for pair in arguments.items() for part in pair):
        return 0
    key, value = next(iter(arguments.items()))
    if f"{key!r}: {value!r}" in text:
        return REPR
    return 0 if f'\\"{key}\\"' in text else KEYED


def holds_json(text: str, value: Any) -> bool:
    """Whether JSON of a value stands in a text."""
    decoder = json.JSONDecoder()
    opening = "[" if isinstance(value, list) else "{"
    start = text.find(opening)
    while start >= 0:
        try:
            if decoder.raw_decode(text, start)[0] == value:
                return True
        except ValueError:
            pass
        start = text.find(opening, start + 1)
    return False
