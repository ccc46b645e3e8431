"""The texts of a data row, with their roles and places: what a filter looks at."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from rlhf_lightning.data.conversations import ROLES, SPEAKERS
from rlhf_lightning.data.tables import MESSAGE_LIST
from rlhf_lightning.filtering.rules import FilterText
from rlhf_lightning.types import JSON, Message, ReasoningKey, Row

COLUMNS = {
    **dict.fromkeys(("system", "system_prompt", "system_message", "tools", "functions"), "system"),
    **dict.fromkeys(("prompt", "instruction", "input"), "user"),
    **dict.fromkeys(("completion", "output", "response", "responses", "chosen"), "assistant"),
    "rejected": "rejected",
}
"""Role of a column whose text is no list of messages."""
REASONING: tuple[ReasoningKey, ...] = ("reasoning_content", "thinking", "reasoning")
CONVERSATIONS = ("messages", "conversations", "history")
"""Columns whose texts without a role alternate between user and assistant."""
_NAMES = ("role", "from", "type", "id", "tool_call_id", "trainable", "train", "weight")
"""Keys of messages, parts, calls and tools whose values are no texts."""


def row_texts(data: Row, label: str, columns: Mapping[str, str | None] | None = None) -> list[FilterText]:
    """All texts of a row: of messages, with reasoning, parts and tool calls, and of the other columns.

    Numbers in messages are texts, too, for example in the arguments of a tool call. Texts that are JSON are also read
    as what they contain, because `\\\\u0061` in JSON is the letter a.

    Args:
        data: The row.
        label: File and line.
        columns: `data.columns`, for the roles of columns with other names.

    Example:
        >>> [(text.role, text.where) for text in row_texts({"prompt": "Hi", "completion": "Hello!"}, "a.jsonl:1")]
        [('user', 'prompt'), ('assistant', 'completion')]
    """
    ours = {theirs: name for name, theirs in (columns or {}).items() if theirs is not None}
    found: list[FilterText] = []
    undesirable = data.get(_theirs("label", columns)) in (0, False, "0", "false")
    for column, value in data.items():
        name = ours.get(column, column)
        role = "user" if name in CONVERSATIONS else COLUMNS.get(name, "other")
        if undesirable and name in ("response", "completion"):
            role = "rejected"  # a response with the label 0, for KTO
        for text, said_by, where in _walk(value, role, column):
            found.append(FilterText(text, said_by, where, f"{label} {where}"))
    return found


def message_texts(messages: Sequence[Message], label: str) -> list[FilterText]:
    """All texts of messages, as `row_texts` reads them.

    Args:
        messages: The messages.
        label: Name of the conversation, for error messages.
    """
    rows: list[JSON] = []
    for message in messages:
        row: Row = {"role": message["role"], "content": message["content"]}
        row["tool_calls"] = [*message.get("tool_calls", [])]
        for key in REASONING:
            row[key] = message.get(key)
        rows.append(row)
    return row_texts({"messages": rows}, label)


def _theirs(name: str, columns: Mapping[str, str | None] | None) -> str:
    return (columns or {}).get(name) or name


def _walk(value: JSON, role: str, where: str) -> Iterator[tuple[str, str, str]]:
    """Texts in a value, each with role and place."""
    if isinstance(value, str):
        inner = _contained(value)
        if inner is not None and MESSAGE_LIST.match(value):
            yield from _walk(inner, role, where)
            return
        if value:
            yield value, role, where
        for text, said_by, place in _walk(inner, role, where):
            if text not in value:
                yield text, said_by, place
    elif isinstance(value, list) and value and all(map(_is_part, value)):
        # Joined as for the template, so that no match is split.
        yield "".join(str(part["text"]) for part in value if isinstance(part, dict)), role, where
    elif isinstance(value, list):
        previous = None
        for index, item in enumerate(value):
            given = _role(item)
            # Answers that are messages keep their column's role, so that those of the rejected side stay apart.
            own = role if given is None or (given == "assistant" and role == "rejected") else given
            if isinstance(item, str) and role == "user" and previous == "user":
                own = "assistant"
            previous = own
            yield from _walk(item, own, f"{where}[{index}]")
    elif isinstance(value, dict):
        free = re.search(r"\.(arguments|input)(\.|\[|$)", where)
        for key, item in value.items():
            if free:  # the model wrote the keys, too
                yield key, role, f"{where} (key)"
            elif key in _NAMES and role != "other":
                continue
            yield from _walk(item, role, f"{where}.{key}")
    elif value is not None and not isinstance(value, bool) and role != "other":
        yield str(value), role, where


def _role(value: JSON) -> str | None:
    """Role of a message; None for anything else."""
    if not isinstance(value, dict):
        return None
    given = value.get("role") or value.get("from")
    if not isinstance(given, str) or not ({"content", "value", "tool_calls"} & value.keys()):
        return None
    role = SPEAKERS.get(given.lower(), given.lower())
    return {"developer": "system"}.get(role, role if role in ROLES else "other")


def _is_part(value: JSON) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str)


def _contained(text: str) -> JSON:
    """The list or object that a text is as JSON; None for other texts."""
    if text.lstrip().startswith(("{", "[")):
        with suppress(ValueError, RecursionError):
            value: JSON = json.loads(text)
            return value if isinstance(value, list | dict) else None
    return None
