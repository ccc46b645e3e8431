"""Case tool-arguments-as-json-text: `arguments` in JSON text, as in OpenAI's API, are trained as an object."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.sft import SFTDataModule
from tests.helpers.paths import CHAT_TEMPLATES
from tests.helpers.rows import write_rows

CALL = {"id": "call_1", "type": "function", "function": {"name": "book", "arguments": '{"city": "Lyon", "guests": 2}'}}
ROW = {
    "messages": [
        {"role": "user", "content": "Book a table for two in Lyon."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"ok": true}'},
        {"role": "assistant", "content": "Done."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "book",
                "description": "Book a table.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "guests": {"type": "integer"}},
                    "required": ["city"],
                },
            },
        }
    ],
}


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1"])
def test_arguments_are_trained_as_an_object(tokenizer: Any, tmp_path: Path, template: str) -> None:
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{template}.jinja").read_text()
    data = SFTDataModule(str(write_rows(tmp_path / "rows.jsonl", [ROW])), tokenizer=tokenizer, show_example=False)
    data.setup("fit")
    trained = re.findall("⟦(.*?)⟧", data.prepared["train"].rows[0].show(tokenizer), re.DOTALL)[0]
    call = json.loads(re.search(r'\{"name".*\}', trained)[0])  # type: ignore[index]
    assert call.get("arguments", call.get("parameters")) == {"city": "Lyon", "guests": 2}
