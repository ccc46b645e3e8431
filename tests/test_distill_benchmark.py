"""The benchmark of distillation: its page, and the student that it makes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import distill
from tests.helpers.models import build_model


def test_the_page_says_what_the_result_says() -> None:
    assert distill.page() == distill.PAGE.read_text(encoding="utf-8")


def test_student_is_the_teacher_without_some_layers(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    build_model(tokenizer, architecture="llama", num_hidden_layers=4).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(distill, "REMOVED", [1, 2])
    folder = distill.make_student(str(tmp_path / "teacher"), tmp_path / "student")
    teacher, student = (AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "teacher", folder))
    assert len(student.model.layers) == student.config.num_hidden_layers == 2
    for mine, its in ((0, 0), (1, 3)):
        for ours, theirs in zip(
            student.model.layers[mine].parameters(), teacher.model.layers[its].parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert student(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_rows_are_prompts_with_answers() -> None:
    rows = distill.rows()
    assert len(rows) > distill.HELD_OUT + 30 * distill.BATCH
    assert all(row["completion"][0]["role"] == "assistant" for row in rows)
