"""Files of prompts other than JSON lines are read by their content, or refused by name."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PromptDataModule

SUMS = ["What is 2 + 3?", "What is 4 + 4?"]
FILES = {
    "prompts.csv": (
        'prompt,answer\n"What is 2 + 3?",5\n"Name two colors,\nplease.",red\n',
        [SUMS[0], "Name two colors,\nplease."],
    ),
    "prompts.tsv": ("prompt\tanswer\nWhat is 2 + 3?\t5\nWhat is 4 + 4?\t8\n", SUMS),
    "array.jsonl": ('[{"prompt": "What is 2 + 3?", "answer": "5"}, {"prompt": "What is 4 + 4?", "answer": "8"}]', SUMS),
    "strings.jsonl": ('"What is 2 + 3?"\n"What is 4 + 4?"\n', SUMS),
    "joined.jsonl": ('\ufeff{"prompt": "What is 2 + 3?"}\n\ufeff{"prompt": "What is 4 + 4?"}\n', SUMS),
}


@pytest.mark.parametrize("name", FILES)
def test_csv_and_arrays_of_prompts(name: str, tmp_path: Path, tokenizer: Any) -> None:
    text, wanted = FILES[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    data = PromptDataModule(None, tmp_path / name, tokenizer=tokenizer, show_example=False)
    data.setup("validate")
    rows = data.prepared["validation"].rows
    assert [row.messages for row in rows] == [[{"role": "user", "content": prompt}] for prompt in wanted]
    for row, prompt in zip(rows, wanted, strict=True):
        shown = row.show(tokenizer)
        assert prompt in shown
        assert not any(text in shown for text in ("prompt", '"', "\ufeff", ",5", "\t"))
