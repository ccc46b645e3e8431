"""Converts the forms in which conversations are stored to a list of `{role, content, …}` messages."""

import ast
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeGuard

from rlhf_lightning.data.columns import (
    MEDIA,
    OPENING,
    PAIR_REMEDY,
    SYSTEM,
    TOOLS,
    has_pair,
    take_marks,
    unmarked,
    with_system,
)
from rlhf_lightning.data.contents import ContentParts
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.tables import MESSAGE_LIST
from rlhf_lightning.data.tool_calls import Written, as_text, described, read_calls, read_tools
from rlhf_lightning.errors import quoted
from rlhf_lightning.types import JSON, Message, Row, ToolCall, ToolSchema

SPEAKERS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
CALLERS = ("function_call", "tool_call", "tool_calls")
"""Roles of messages whose text is a tool call."""
ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_KEYS = ("type", "speaker", "author", "sender", "name")
"""Keys by which other formats say who speaks, if a message has neither `role` nor `from`."""
SHAPES = "messages | conversations | prompt + completion | instruction + output | text"


def to_messages(value: JSON | list[Message], first_role: str = "user") -> list[Message]:
    """Convert a conversation to messages. Tool calls become `tool_calls` as in OpenAI's API, with arguments as objects.

    Args:
        value: A string, a list of strings (roles alternate), or a list of dicts (a missing role is filled in).
        first_role: Role of the first message, if it has none.

    Raises:
        RowError: If the list is empty, or a message has neither content nor tool calls.

    Example:
        >>> to_messages(["Hi", "Hello!"])
        [{'content': 'Hi', 'role': 'user'}, {'content': 'Hello!', 'role': 'assistant'}]
    """
    if isinstance(value, str):
        said = _written(value) if first_role == "user" else None
        if said is None:
            return [{"role": first_role, "content": value}]
        value = said
    if not isinstance(value, list) or not value:
        raise RowError(f"a conversation must be a non-empty list of messages, but is {described(value)}")
    messages: list[Message] = []
    for index, item in enumerate(value):
        messages += _messages(item, index, messages[-1]["role"] if messages else None, first_role)
    return messages


def _written(text: str) -> list[JSON] | None:
    """The messages of a conversation that is stored as JSON text; None for other text.

    Raises:
        RowError: If the text is a printed Python list.
    """
    if not MESSAGE_LIST.match(text := text.strip()):
        return None
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
            return value if all(map(_is_message, value)) else None
    if "'" in text[: text.index(":")]:
        raise RowError(f"a conversation in a string must be JSON, but this is a printed Python list: {described(text)}")
    return None


def _is_message(item: JSON) -> bool:
    if not isinstance(item, dict) or not ("content" in item or "value" in item):
        return False
    role = item.get("role") or item.get("from")
    return isinstance(role, str) and role.lower() in (*ROLES, *SPEAKERS)


def _messages(item: JSON | Message, index: int, previous: str | None, first_role: str) -> list[Message]:
    """The messages of one item; several only if it contains the results of several calls (Anthropic)."""
    if isinstance(item, str):
        item = {"content": item}
    if not _is_object(item):
        raise RowError(f"message {index} is {described(item)}; it must be an object with role and content")
    if wrong := [key for key in item if not isinstance(key, str)]:
        raise RowError(f"message {index} has the key {wrong[0]!r}, which is not text; remove it")
    # Parquet and Arrow fill missing keys with None.
    message: Row = {key: value for key, value in item.items() if value is not None and key not in ("from", "value")}
    if "content" not in message:
        message["content"] = item.get("value")
    role = item.get("role") or item.get("from")
    if role is None:
        if speaker := next((key for key in ROLE_KEYS if isinstance(item.get(key), str)), None):
            raise RowError(
                f"message {index} has {speaker!r} ({described(item[speaker])}), but no 'role'; name that key 'role'"
            )
        if first_role == "assistant" and previous is not None:
            raise RowError(
                f"message {index} of a response has no role, and a response is one answer. Join the parts of an answer "
                "to one text, keep one of several answers, or give messages with roles"
            )
        role = first_role if previous in (None, "system") else {"user": "assistant"}.get(previous, "user")
    if not isinstance(role, str):
        raise RowError(f"message {index}: role is {described(role)}; it must be a string")
    said = plain if (plain := role.strip().lower()) in (*ROLES, *SPEAKERS) else role
    message["role"] = role = SPEAKERS.get(said, said)
    where = f"message {index} ({role})"
    take_marks(message, where)
    results = _take_calls(message, said in CALLERS, where)
    content = message["content"]
    if content is None and not message.get("tool_calls"):
        if results:
            return results
        raise RowError(f"{where} has no content")
    if isinstance(content, list) and (role != "tool" or _is_parts(content)):
        message["content"] = _joined(content, where)
    elif role == "tool" and not isinstance(content, str):
        message["content"] = Written(as_text(content), content)
    if not _has_text(message):
        raise RowError(f"{where}: content is {described(content)}; it must be text")
    return [*results, message]


def _is_object(item: JSON | Message) -> TypeGuard[dict[str, JSON]]:
    return isinstance(item, dict)


def _has_text(message: Row) -> TypeGuard[Message]:
    return isinstance(message["content"], str | None)


def _take_calls(message: Row, caller: bool, where: str) -> list[Message]:
    """Move the calls of a message to `tool_calls`, and return the results in its content (Anthropic)."""
    calls: list[ToolCall] = []
    results: list[Message] = []
    for key in ("tool_calls", "function_call", "tool_call"):
        value = message.get(key)
        if key == "tool_call" and isinstance(value, bool):
            caller = caller or value  # a flag: the text is a call
        elif value:
            found = read_calls(value, where)
            if calls and found != calls:
                raise RowError(f"{where} has different tool calls in two places, one of them {key!r}; remove one")
            calls = found
        message.pop(key, None)
    content = message["content"]
    if caller and not calls and isinstance(content, str | dict | list):
        calls = read_calls(content, where)
        message["content"] = Written(content if isinstance(content, str) else as_text(content), [*calls])
    elif isinstance(content, list):
        left: list[JSON] = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, dict) and kind == "tool_use":
                calls += read_calls(part, where)
            elif isinstance(part, dict) and kind == "tool_result":
                results.append(_result(part, where))
            else:
                left.append(part)
        if calls or results:
            message["content"] = left or None
    if calls:
        if message["role"] != "assistant":
            raise RowError(f"{where} has tool calls; only the assistant can call tools")
        message["tool_calls"] = [*calls]
    return results


def _result(part: dict[str, JSON], where: str) -> Message:
    """Convert a tool result in Anthropic's form (a part of the user's message) to a message."""
    content = part.get("content", "")
    if isinstance(content, list) and _is_parts(content):
        text = _joined(content, where)
    elif content is None or isinstance(content, str):
        text = content or ""
    else:
        text = Written(as_text(content), content)
    if part.get("tool_use_id") is None:
        return {"role": "tool", "content": text}
    return {"role": "tool", "tool_call_id": str(part["tool_use_id"]), "content": text}


def _is_parts(content: list[JSON]) -> bool:
    """True if a list is a content in parts, not a tool result that is a list."""
    return bool(content) and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)


def _joined(parts: list[JSON], where: str) -> str:
    """The text of a content in parts, `[{"type": "text", "text": …}]`; templates that show parts get the parts."""
    texts: list[dict[str, JSON]] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind.removeprefix("input_").removesuffix("_url") in MEDIA:
            raise RowError(f"{where}: content has a part of type {kind!r}, but only text is supported")
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"{where}: content has the part {described(part)}; parts must be {{type: text, text: …}}")
        # Parquet and Arrow fill missing keys with None, and templates test which keys a part has.
        texts.append({"type": "text", **{key: value for key, value in part.items() if value is not None}})
    return ContentParts(texts)


def has_conversation(data: Row) -> bool:
    """True if a row has one of the forms that `conversation` reads; a `text` column is then only a copy."""
    shapes = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
    return any(all(data.get(key) is not None for key in shape) for shape in shapes)


def conversation(data: Row) -> list[Message]:
    """The messages of a supervised row, with its `system` column as the first message.

    Reads `messages`, `conversations`, `prompt` + `completion`, or `instruction` (+ `input`) + `output`.

    Raises:
        RowError: If the row has none of these forms.

    Example:
        >>> conversation({"prompt": "Hi", "completion": "Hello!"})
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    return with_system(data, _conversation(data))


def _conversation(data: Row) -> list[Message]:
    if data.get("messages") is not None:
        return to_messages(data["messages"])
    if data.get("conversations") is not None:
        return to_messages(data["conversations"])
    if data.get("prompt") is not None and data.get("completion") is not None:
        prompt, (completion,) = apart(to_messages(data["prompt"]), [to_messages(data["completion"], "assistant")])
        return prompt + completion
    if data.get("instruction") is not None and data.get("output") is not None:
        return _instruction(data)
    pair = f". This is a pair: {PAIR_REMEDY}" if has_pair(data) else ""
    raise RowError(
        f"the row has no conversation: its columns are {quoted(data)}, but it needs {SHAPES}. Map other names with "
        f"`columns:`{pair}"
    )


def _instruction(data: Row) -> list[Message]:
    instruction, given, output = (_text(data, key) for key in ("instruction", "input", "output"))
    messages: list[Message] = []
    for turn in _history(data.get("history")):
        messages += to_messages(turn)
    messages.append({"role": "user", "content": "\n\n".join(part for part in (instruction, given) if part)})
    return [*messages, {"role": "assistant", "content": output}]


def _text(data: Row, key: str) -> str:
    """The text of a column; empty if there is none."""
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{key!r} is {described(value)}; it must be text")
    return value or ""


def _history(value: JSON) -> list[JSON]:
    turns = value or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
    ):
        raise RowError(f"'history' is {described(value)}; it must be a list of [question, answer]")
    return turns


def used_columns(data: Row) -> set[str]:
    """Columns that the conversation of a row is read from."""
    shape: tuple[str, ...] = ("text",)
    if data.get("messages") is not None:
        shape = ("messages",)
    elif data.get("conversations") is not None:
        shape = ("conversations",)
    elif data.get("prompt") is not None and data.get("completion") is not None:
        shape = ("prompt", "completion")
    elif has_conversation(data):
        shape = ("instruction", "input", "output", "history")
    return {*shape, *SYSTEM, *TOOLS}


def apart(prompt: list[Message], responses: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Remove a prompt from responses that repeat it, with or without a system message.

    Returns:
        The prompt, and the responses without the prompt.

    Raises:
        RowError: If a response continues the assistant's last message in the prompt; templates render that as two
            turns.
    """
    leads = [response[0] for response in responses if response and response[0]["role"] in OPENING]
    if len(leads) == len(responses) and all(lead == leads[0] for lead in leads) and prompt[0]["role"] not in OPENING:
        prompt = [leads[0], *prompt]
    rest = [without_prompt(response, prompt) for response in responses]
    if prompt[-1]["role"] == "assistant" and any(left and left[0]["role"] == "assistant" for left in rest):
        raise RowError(
            "the prompt ends with an assistant message, and the response begins with another one: they would become "
            "two turns. Write the whole answer into the response"
        )
    return prompt, rest


def without_prompt(response: list[Message], prompt: Sequence[Message]) -> list[Message]:
    """Remove the prompt from a response that begins with it, with or without the system message."""
    said = [list(prompt), *([list(prompt[1:])] if prompt and prompt[0]["role"] in OPENING else [])]
    for repeated in said:
        if repeated and unmarked(response[: len(repeated)]) == unmarked(repeated):
            return response[len(repeated) :]
    return response


def tool_schemas(data: Row) -> list[ToolSchema] | None:
    """The `tools` (or `functions`) of a row as templates expect them; None without any.

    Raises:
        RowError: If they are malformed, or both columns exist and differ.
    """
    tools, functions = read_tools(data.get("tools")), read_tools(data.get("functions"), "functions")
    if tools and functions and tools != functions:
        raise RowError("the row has 'tools' and 'functions', but they differ; remove one of them")
    return tools or functions
