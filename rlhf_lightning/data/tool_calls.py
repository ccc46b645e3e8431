"""Converts the various forms of tool calls and tool schemas to OpenAI's, with arguments as objects."""

import hashlib
import json
from typing import NoReturn

from rlhf_lightning.data.records import RowError
from rlhf_lightning.errors import cut
from rlhf_lightning.types import JSON, Message, TemplateMessage, ToolCall, ToolSchema

CALL_KEYS = ("function", "name", "arguments", "parameters", "input", "args")
AS_REPR, BY_KEY, AS_JSON = 1, 2, 3  # how a text shows an object: as Python's repr, key by key, or as JSON
SCHEMA_KEYS = ("parameters", "input_schema", "inputSchema")


class Written(str):
    """Text of an object, with the object as `value`: a tool's result, or the calls of a turn.

    Templates that support objects get the value; all other code reads the text.

    Example:
        >>> result = Written('{"city": "Oslo"}', {"city": "Oslo"})
        >>> result.value["city"], str(result)
        ('Oslo', '{"city": "Oslo"}')
    """

    value: JSON

    def __new__(cls, text: str, value: JSON) -> "Written":
        self = super().__new__(cls, text)
        self.value = value
        return self

    def __reduce__(self) -> tuple[type["Written"], tuple[str, JSON]]:
        return Written, (str(self), self.value)

    def __repr__(self) -> str:
        return f"Written({str(self)!r})"  # unlike str, because a template may render the value differently


def as_text(value: JSON) -> str:
    """Convert an object to JSON text as templates write it."""
    return json.dumps(value, ensure_ascii=False)


def read_calls(value: JSON, where: str) -> list[ToolCall]:
    """Convert the calls of a message to `{id, type, function: {name, arguments}}` each.

    Args:
        value: A call, a list of calls, or JSON text of either. A call is `{name, arguments}`, flat or under `function`;
            arguments are an object or JSON text.
        where: Location of the message, for errors.

    Raises:
        RowError: If a call is malformed.

    Example:
        >>> read_calls({"name": "add", "arguments": '{"a": 2}'}, "message 1")
        [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 2}}}]
    """
    if isinstance(value, str):
        value = _json(value, f"{where}: the tool call is text that is not JSON")
    calls = value if isinstance(value, list) else [value]
    return [_call(call, where) for call in calls]


def _call(given: JSON, where: str) -> ToolCall:
    if isinstance(given, str):
        given = _json(given, f"{where}: the tool call is text that is not JSON")
    value = given if isinstance(given, dict) else {}
    inner = value.get("function")
    function = inner if isinstance(inner, dict) else value
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(
            f"{where}: the tool call is {described(given)}; it must be an object with 'name' and 'arguments'"
        )
    found = [function[key] for key in ("arguments", "parameters", "input", "args") if function.get(key) is not None]
    call: ToolCall = {
        key: item for key, item in value.items() if key not in (*CALL_KEYS, "type", "call_id") and item is not None
    }
    if "id" not in call and value.get("call_id") is not None:
        call["id"] = value["call_id"]
    if "id" in call:
        call["id"] = str(call["id"])
    kept = {key: item for key, item in function.items() if key not in (*CALL_KEYS, *call, "type", "call_id")}
    kept = {key: item for key, item in kept.items() if item is not None}
    arguments = _arguments(found[0] if found else None, name, where)
    return {**call, "type": "function", "function": {"name": name, "arguments": arguments, **kept}}


def _arguments(value: JSON, name: str, where: str) -> dict[str, JSON]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        value = _json(value, f"{where}: the arguments of the call of {name!r} are text that is not a JSON object")
    if not isinstance(value, dict):
        raise RowError(
            f"{where}: the arguments of the call of {name!r} are {described(value)}; they must be a JSON object"
        )
    return value


def read_tools(value: JSON, name: str = "tools") -> list[ToolSchema] | None:
    """Convert function schemas to the form that templates expect, `{type: function, function: {name, …}}` each.

    Args:
        value: A list of schemas (each may be JSON text), or JSON text of one. A schema may be the bare function, flat
            next to its type, Anthropic's (`input_schema`) or Gemini's (`function_declarations`).
        name: Name of the column, for errors.

    Returns:
        The schemas; None if there are none.

    Raises:
        RowError: If the schemas are malformed.
    """
    if isinstance(value, str):
        value = _json(value, f"{name!r} is text that is not JSON") if value.strip() else None
    if isinstance(value, dict):
        value = [value] if value else None
    if not value:
        return None
    if isinstance(value, list):
        value = [
            _json(tool, f"{name!r} contains text that is not JSON") if isinstance(tool, str) else tool for tool in value
        ]
    tools = [tool for tool in value if isinstance(tool, dict)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(tools) < len(value):
        raise RowError(
            f"{name!r} is {described(value)}; it must be a list of objects. If the column has another meaning, ignore "
            f"it with columns: {{{name}: null}}"
        )
    return [schema for tool in tools for schema in _schemas(tool)]


def _schemas(tool: ToolSchema) -> list[ToolSchema]:
    for key in ("function_declarations", "functionDeclarations"):
        declared = tool.get(key)
        functions = [one for one in declared if isinstance(one, dict)] if isinstance(declared, list) else []
        if isinstance(declared, list) and len(functions) == len(declared):
            return [schema for one in functions for schema in _schemas(one)]
    if isinstance(tool.get("function"), dict):
        return [{"type": "function", **tool}]
    if not isinstance(tool.get("name"), str):
        return [tool if "type" in tool else {"type": "function", "function": tool}]
    function = {key: item for key, item in tool.items() if key not in ("type", *SCHEMA_KEYS)}
    for key in SCHEMA_KEYS:
        if tool.get(key) is not None:
            function["parameters"] = tool[key]
            break
    return [{"type": "function", "function": function}]


def _json(text: str, wrong: str) -> JSON:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{wrong} ({error}): {described(text)}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def described(value: JSON | Message | list[Message]) -> str:
    """Type and beginning of a value, for a message."""
    return f"{type(value).__name__} {cut(repr(value), 60)}"


def with_ids(messages: list[TemplateMessage], form: str) -> list[TemplateMessage]:
    """Add call ids to messages in the form that a template expects; missing ids are derived from the calls."""
    known: dict[str, str] = {}
    waiting: list[tuple[str, str]] = []
    result, number = [], 0
    for message in messages:
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = []
            for call in calls:
                given = call.get("id")
                new = _id(given, call["function"], number, form)
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
            if given is None or form != "given":
                message |= {} if answered is None else {"tool_call_id": answered}
            waiting = [(new, called) for new, called in waiting if new != answered]
        result.append(message)
    return result


def _id(given: str | None, function: dict[str, JSON], number: int, form: str) -> str:
    """The id of a call in the given form."""
    if form == "named":
        return f"functions.{function['name']}:{number}"
    if form == "given" and given:
        return given
    if given and len(given) == 9 and given.isascii() and given.isalnum():
        return given
    # A hash instead of a counter, because the model would memorize constant ids.
    source = given or f"{number} {function['name']} {as_text(function['arguments'])}"
    return hashlib.sha256(source.encode()).hexdigest()[:9]


def shown(text: str, arguments: dict[str, JSON]) -> int:
    """How a text shows an object: `AS_JSON`, `BY_KEY`, `AS_REPR`; 0 if it does not show it, or encodes it twice."""
    if holds_json(text, arguments):
        return AS_JSON
    if not all(str(part) in text for pair in arguments.items() for part in pair):
        return 0
    key, value = next(iter(arguments.items()))
    if f"{key!r}: {value!r}" in text:
        return AS_REPR
    return 0 if f'\\"{key}\\"' in text else BY_KEY


def holds_json(text: str, value: JSON) -> bool:
    """True if a text contains the JSON of a value."""
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
