"""The shapes in which people store conversations, brought to one: a list of `{role, content, …}` messages."""

import json
from typing import Any

from rlhf_lightning.data.records import RowError

Message = dict[str, Any]
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
SHAPES = "messages | conversations | prompt + completion | instruction + output | text"


def to_messages(value: Any, first_role: str = "user") -> list[Message]:
    """Messages from a string, a list of strings (roles alternate) or a list of dicts (`role` or `from` completed).

    Raises:
        RowError: an empty list, or a message that has neither content nor tool calls.
    """
    if isinstance(value, str):
        return [{"role": first_role, "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError(f"a conversation must be a non-empty list of messages, this is {_short(value)}")
    messages: list[Message] = []
    for index, item in enumerate(value):
        messages.append(_message(item, index, messages[-1]["role"] if messages else None, first_role))
    return messages


def _message(item: Any, index: int, previous: str | None, first_role: str) -> Message:
    if isinstance(item, str):
        item = {"content": item}
    if not isinstance(item, dict):
        raise RowError(f"message {index} is {_short(item)}; it must be an object with role and content")
    # Parquet and Arrow fill the keys that a message lacks with None.
    message = {key: value for key, value in item.items() if value is not None and key not in ("from", "value")}
    if "content" not in message:
        message["content"] = item.get("value")
    role = item.get("role") or item.get("from")
    if role is None:
        role = first_role if previous in (None, "system") else {"user": "assistant"}.get(previous, "user")
    if not isinstance(role, str):
        raise RowError(f"message {index}: role is {_short(role)}; it must be a string")
    message["role"] = SPEAKERS.get(role, role)
    content = message["content"]
    if content is None and not message.get("tool_calls"):
        raise RowError(f"message {index} ({message['role']}) has no content")
    if isinstance(content, list):
        message["content"] = _joined(content, f"message {index} ({message['role']})")
    elif content is not None and not isinstance(content, str):
        raise RowError(f"message {index} ({message['role']}): content is {_short(content)}; it must be text")
    return message


def _joined(parts: list[Any], where: str) -> str:
    """The text of a content in parts, `[{"type": "text", "text": …}]`: most templates would print the list itself."""
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise RowError(f"{where}: content has the part {_short(part)}; parts must be {{type: text, text: …}}")
    return "".join(part["text"] for part in parts)


def has_conversation(data: dict[str, Any]) -> bool:
    """Whether a row has one of the shapes of `conversation`; beside them a `text` column is a copy."""
    shapes = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
    return any(all(data.get(key) is not None for key in shape) for shape in shapes)


def conversation(data: dict[str, Any]) -> list[Message]:
    """The messages of a supervised row, whatever its shape: messages, conversations, prompt/completion, instruction.

    Raises:
        RowError: none of the shapes fits.
    """
    if data.get("messages") is not None:
        return to_messages(data["messages"])
    if data.get("conversations") is not None:
        system = [{"role": "system", "content": data["system"]}] if isinstance(data.get("system"), str) else []
        return [message for message in system if message["content"]] + to_messages(data["conversations"])
    if data.get("prompt") is not None and data.get("completion") is not None:
        return to_messages(data["prompt"]) + to_messages(data["completion"], "assistant")
    if data.get("instruction") is not None and data.get("output") is not None:
        return _instruction(data)
    found = ", ".join(repr(key) for key in data) or "nothing"
    raise RowError(f"no conversation in the row: it has {found}; wanted {SHAPES}. Map other names with `columns:`")


def _instruction(data: dict[str, Any]) -> list[Message]:
    for key in ("instruction", "input", "output", "system"):
        if data.get(key) is not None and not isinstance(data[key], str):
            raise RowError(f"{key!r} is {_short(data[key])}; it must be text")
    question = "\n\n".join(part for part in (data["instruction"], data.get("input")) if part)
    messages = [{"role": "system", "content": data["system"]}] if data.get("system") else []
    for turn in _history(data.get("history")):
        messages += to_messages(turn)
    answer = {"role": "assistant", "content": data["output"]}
    return [*messages, {"role": "user", "content": question}, answer]


def _history(value: Any) -> list[list[str]]:
    turns = value or []
    fits = isinstance(turns, list) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    )
    if not fits:
        raise RowError(f"'history' is {_short(value)}; it must be a list of [question, answer]")
    return [list(turn) for turn in turns]


def tool_schemas(data: dict[str, Any]) -> list[Any] | None:
    """The `tools` of a row: a list, or JSON text of one; a bare function is wrapped as templates expect it."""
    tools = data.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f"'tools' is text that is not JSON ({error})") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of objects, this is {_short(tools)}")
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in tools]


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"
