"""The model card: its contents, edits by people are kept, and names do not become markup."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from rlhf_lightning import LoRA, SFTModule
from rlhf_lightning.files import hash_folder
from rlhf_lightning.models.export import export_model
from rlhf_lightning.models.model_card import CARD, card, edited_card, write_card
from tests.helpers.cli import rlhf
from tests.helpers.rows import chats, pairs, write_rows

EVIL = "\x1b[31m<script>alert(1)</script>|[x](http://evil.example)`a`\n# Title\n---\n@everyone \u202eabc"
FACTS: dict[str, Any] = {
    "kind": "policy",
    "start": EVIL,
    "steps": 3,
    "seed": 0,
    "seconds": 61.0,
    "metrics": {"train/reward": 0.5, EVIL: 1.0, "train/nan": float("nan")},
    "rows": {"train": {"source": EVIL, "rows": 4, "examples": 3}},
    "versions": {"rlhf-lightning": EVIL},
    "stopped": EVIL,
    "skipped_steps": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "run" / "model"
    place.mkdir(parents=True)
    (place / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return place


def test_names_do_not_become_markup(folder: Path) -> None:
    text = card(folder, FACTS, {"model": {"system": EVIL, EVIL: 1}})
    assert not re.search(r"(?<!\\)(\[|\]\(|\|x|`a)", text)
    body = ModelCard(text).text
    for alien in ("\x1b", "\u202e", "<script", "http://", "`a`", "\n# Title", "@everyone"):
        assert alien not in text, alien
    assert body.count("\n---\n") == 0
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3, 5}
    assert r"\\x1b\[31m&lt;script&gt;" in body


def test_card_contents(folder: Path) -> None:
    write_card(folder, {**FACTS, "start": "Qwen/Qwen3-0.6B"}, {"model": {"model_options": {"token": "hf_secret"}}})
    text = (folder / CARD).read_text()
    found = ModelCard(text)
    assert found.data.to_dict() == {
        "base_model": "Qwen/Qwen3-0.6B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf-lightning", "policy"],
    }
    for part in ("| steps | 3 |", "| training time | 1 min 1 s |", "| train/reward | 0.5 |", "trained on 3 examples"):
        assert part in text
    for part in ("hf_secret", "More Information Needed", "nan"):
        assert part not in text
    assert "2 steps were skipped" in text
    assert "It was not evaluated on held-out rows." in text


def test_code_in_the_card_loads_the_model(base: str, tmp_path: Path) -> None:
    """For a full model and for an adapter."""
    for lora in (None, LoRA(rank=2)):
        place = tmp_path / str(lora is None)
        module = SFTModule(base, lora=lora)
        module.save_pretrained(place)
        text = (place / CARD).read_text()
        code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(place))
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["model"].can_generate()
        assert len(names["tokenizer"]) > 3


def test_edited_card_is_kept(base: str, tmp_path: Path) -> None:
    place = tmp_path / "model"
    SFTModule(base).save_pretrained(place)
    assert edited_card(place) is None
    own = (place / CARD).read_text()
    for edited in (own.replace("## Limits", "## Limits\n\nIt swears."), "mine", own + "\nMore.\n"):
        (place / CARD).write_text(edited)
        before = hash_folder(place)
        SFTModule(base).save_pretrained(place)
        write_card(place, FACTS)
        assert (place / CARD).read_text() == edited
        assert hash_folder(place) == before
    export_model(str(place), tmp_path / "exported")
    assert (tmp_path / "exported" / CARD).read_text() == own + "\nMore.\n"
    (place / CARD).write_text(own)
    write_card(place, {**FACTS, "start": "a/b"})
    assert "base_model: a/b" in (place / CARD).read_text()


def test_empty_card_of_peft_is_replaced(folder: Path) -> None:
    (folder / CARD).write_text("---\nlibrary_name: peft\n---\n[More Information Needed]\n")
    write_card(folder, FACTS)
    assert "More Information Needed" not in (folder / CARD).read_text()


def test_card_of_a_run(base: str, tmp_path: Path) -> None:
    """It has data with counts, settings and held-out metrics; that of a preference model explains its scores."""
    write_rows(tmp_path / "chats.jsonl", chats(10))
    write_rows(tmp_path / "pairs.jsonl", pairs(8))
    flags = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--model.model", base]
    rlhf(
        "sft", "fit", *flags, "--data.train", "chats.jsonl", "--data.validation_split", "2", "--model.lora.rank", "2",
        cwd=tmp_path,
    )  # fmt: skip
    rlhf("preference", "fit", *flags, "--data.train", "pairs.jsonl", cwd=tmp_path)
    text = (tmp_path / "runs" / "sft" / "model" / CARD).read_text()
    facts = json.loads((tmp_path / "runs" / "sft" / "stage.json").read_text())
    assert facts["model_hash"] == hash_folder(tmp_path / "runs" / "sft" / "model")
    assert facts["rows"]["train"] == {"source": "chats.jsonl", "rows": 10, "examples": 8}
    for part in (
        "| train | chats.jsonl | 10 | 8 |",
        "| model.lora.rank | 2 |",
        "| val/nll |",
        "AutoPeftModelForCausalLM",
    ):
        assert part in text
    text = (tmp_path / "runs" / "preference" / "model" / CARD).read_text()
    assert "AutoModelForSequenceClassification" in text
    assert "rlhf score FOLDER" in text
    rlhf("report", "runs/sft", cwd=tmp_path)
