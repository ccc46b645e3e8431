"""Null keys that Arrow adds are dropped: Parquet trains the same tokens as JSON lines."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rlhf_lightning import SFTDataModule

TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool(name: str, key: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": parameters}}


def row(name: str, key: str, value: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": {key: value}}}
    messages = [
        {"role": "user", "content": f"What is the {name} of {value}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    return {"messages": messages, "tools": [tool(name, key)]}


ROWS = [row("weather", "city", "Oslo"), row("price", "item", "pears")]


def test_parquet_nested_null(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    shown = {}
    for name in ("rows.jsonl", "rows.parquet"):
        data = SFTDataModule(tmp_path / name, tokenizer=tokenizer, show_example=False)
        data.setup("fit")
        shown[name] = [example.show(tokenizer) for example in data.prepared["train"].rows]
    assert shown["rows.parquet"] == shown["rows.jsonl"]
    assert "null" not in shown["rows.parquet"][0]
    assert "Oslo" in shown["rows.parquet"][0]
