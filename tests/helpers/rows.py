"""Rows of every kind of data, and prepared data modules."""

import json
from pathlib import Path
from typing import Any


def labeled(count: int) -> list[dict[str, Any]]:
    """Labeled responses of different lengths."""
    return [
        {"prompt": f"Count {i}", "response": " ".join(WORDS[: 1 + (3 * i) % 7]), "label": int(i % 3 > 0)}
        for i in range(count)
    ]


def rankings(count: int) -> list[dict[str, Any]]:
    """Two to four answers to each prompt, with scores, some of them equal."""
    return [
        {
            "prompt": f"Count {i}",
            "responses": [" ".join(WORDS[k : k + 1 + i % 4]) for k in range(2 + i % 3)],
            "scores": [k % 3 + (i % 2) * k for k in range(2 + i % 3)],
        }
        for i in range(count)
    ]


def ready(data: Any) -> Any:
    data.setup("fit")
    return data


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of different lengths."""
    rows = []
    for i in range(count):
        answer = " ".join(WORDS[: 1 + i % 7])
        rows.append({"messages": [{"role": "user", "content": f"Count {i}"}, {"role": "assistant", "content": answer}]})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Pairs whose chosen side counts further."""
    return [
        {"prompt": f"Count {i}", "chosen": " ".join(WORDS[: 3 + i % 6]), "rejected": " ".join(WORDS[: 1 + i % 3])}
        for i in range(count)
    ]


def prompts(count: int) -> list[dict[str, Any]]:
    """Prompts with another column."""
    return [{"prompt": f"Count {i}", "wanted": i % 5} for i in range(count)]
