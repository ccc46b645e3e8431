"""Case system-column: a `system` column works with every row format."""

from typing import Any

import pytest

from rlhf_lightning import PreferenceDataModule, PromptDataModule, SFTDataModule

SYSTEM = {"system": "Answer in French."}
CHATS = [
    {"messages": [{"role": "user", "content": "Name a tree."}, {"role": "assistant", "content": "Chêne."}]},
    {"prompt": "Name a tree.", "completion": "Chêne."},
    {"conversations": [{"from": "human", "value": "Name a tree."}, {"from": "gpt", "value": "Chêne."}]},
    {"instruction": "Name a tree.", "output": "Chêne."},
]


@pytest.mark.parametrize("row", CHATS)
def test_conversations(tokenizer: Any, row: dict[str, Any]) -> None:
    data = SFTDataModule([{**SYSTEM, **row}], tokenizer=tokenizer, show_example=False)
    data.setup("fit")
    assert "Answer in French." in data.prepared["train"].rows[0].show(tokenizer)


def test_pairs(tokenizer: Any) -> None:
    row = {**SYSTEM, "prompt": "Name a tree.", "chosen": "Chêne.", "rejected": "Oak."}
    data = PreferenceDataModule([row], tokenizer=tokenizer, show_example=False)
    data.setup("fit")
    assert "Answer in French." in data.prepared["train"].rows[0].show(tokenizer)


def test_prompts(tokenizer: Any) -> None:
    data = PromptDataModule(None, [{**SYSTEM, "prompt": "Name a tree."}], tokenizer=tokenizer, show_example=False)
    data.setup("validate")
    assert "Answer in French." in data.prepared["validation"].rows[0].show(tokenizer)
