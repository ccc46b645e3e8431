"""Case template-kwargs-forgotten: `rlhf evaluate` and `generate` use the template_kwargs of `rlhf sft fit`."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rows import write_rows
from tests.helpers.runs import complete
from tests.helpers.templates import QUIET

ANSWERS = {"Hi": "Hello.", "Bye": "See you.", "Thanks": "Welcome.", "Why": "Because."}


def test_commands_prompt_with_the_template_kwargs_of_the_stage(thinker: str, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ANSWERS.items()
    ]
    file, root = write_rows(tmp_path / "chats.jsonl", rows), tmp_path / "sft"
    fit = ["sft", "fit", "--model.model", thinker, "--data.train", file, "--data.validation", file]
    fit += ["--data.template_kwargs", json.dumps(QUIET), "--data.batch_size", "4", "--model.optimizer", "AdamW"]
    fit += ["--model.optimizer.lr", "3e-2", "--trainer.max_steps", "30", "--trainer.check_val_every_n_epoch", "15"]
    complete([*fit, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root)], tmp_path / "fit.txt")
    with open(root / "metrics.csv") as stream:
        wanted = [float(row["val/perplexity"]) for row in csv.DictReader(stream) if row.get("val/perplexity")][-1]
    model, summary = str(root / "model"), tmp_path / "summary.json"
    said = complete(["evaluate", model, file, "--temperature", "0", "--summary", str(summary)], tmp_path / "eval.txt")
    found: dict[str, Any] = json.loads(summary.read_text())["policy"]
    assert found["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert found["rougeL"] == 1.0, "it answers what it was trained to"
    assert f"prompting as in the training of {model}: template_kwargs" in said
    said = complete(
        ["generate", model, "--prompt", "Hi", "--temperature", "0", "--max_tokens", "24"], tmp_path / "g.txt"
    )
    assert said.splitlines()[-1] == "Hello."
