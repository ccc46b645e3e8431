"""How a model was asked in training is kept in its folder: every command and the next stage ask it so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import (
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.callbacks.export import ExportModel
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.pipeline.exporting import export_model
from rlhf_lightning.pipeline.policies import Policy
from tests.conftest import build_model, chats, sgd, trainer, write_rows
from tests.test_commands_models import rlhf

QUIET = {"enable_thinking": False}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}]
THINKING = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.last and message.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen3's: the last answer carries an empty thought, which the generation prompt has where thinking is off."""


@pytest.fixture
def thinker(tmp_path: Path, tokenizer: Any) -> str:
    """A folder with such a template."""
    tokenizer.chat_template = THINKING
    build_model(tokenizer).save_pretrained(tmp_path / "thinker")
    tokenizer.save_pretrained(tmp_path / "thinker")
    return str(tmp_path / "thinker")


def sft(start: str, root: Path, lora: LoRA | None = None, rows: Any = None, **data: Any) -> tuple[str, float]:
    """A stage as the driver runs it; its model folder and its perplexity of what it was trained on."""
    torch.manual_seed(0)
    rows = rows or chats(6)
    module = SFTModule(start, lora=lora, optimizer=sgd(0.3))
    run = trainer(root, callbacks=[ExportModel()], max_epochs=2)
    run.fit(module, SFTDataModule(rows, rows, batch_size=3, show_example=False, **data))
    return str(root / "model"), float(run.callback_metrics["val/perplexity"])


def evaluated(capsys: Any, *args: str) -> tuple[float, str]:
    """The perplexity that `rlhf evaluate` finds, and what it says on the side."""
    capsys.readouterr()
    rlhf("evaluate", *args, "--max_tokens", "2", "--temperature", "0", "--json")
    out, said = capsys.readouterr()
    return json.loads(out)["policy"]["perplexity"], said


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, target=["attention"])])
def test_evaluate_finds_the_perplexity_of_validation(lora: Any, thinker: str, tmp_path: Path, capsys: Any) -> None:
    """Of the stage's folder and of an export of it; with a flag against the record, another one."""
    file = write_rows(tmp_path / "chats.jsonl", chats(6))
    folder, wanted = sft(thinker, tmp_path / "sft", lora, file, template_kwargs=QUIET)
    found, said = evaluated(capsys, folder, file)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert f"asks as {folder} was trained: template_kwargs {QUIET}" in said
    export_model(folder, tmp_path / "exported")
    assert evaluated(capsys, str(tmp_path / "exported"), file)[0] == pytest.approx(wanted, rel=1e-4)
    other, said = evaluated(capsys, folder, file, "--template_kwargs", "{}")
    assert abs(other / wanted - 1) > 0.01
    assert f"template_kwargs none (trained with {QUIET})" in said.replace("{}", "none")


def test_a_template_of_ones_own_goes_with_the_model(base: str, tmp_path: Path) -> None:
    """Through an adapter's folder, what it is merged into for the next adapter, and an export."""
    file = tmp_path / "own.jinja"
    file.write_text(THINKING)
    small, other = LoRA(rank=2, target=["attention"]), LoRA(rank=3, target=["mlp"])
    for start, name, lora in ((base, "one", small), (None, "two", other)):
        start = start or str(tmp_path / "one" / "model")
        template = str(file) if name == "one" else None
        module = SFTModule(start, lora=lora, chat_template=template, optimizer=sgd(0.1))
        data = SFTDataModule(chats(4), batch_size=4, show_example=False, template_kwargs=QUIET if template else None)
        trainer(tmp_path / name, callbacks=[ExportModel()]).fit(module, data)
    export_model(str(tmp_path / "two" / "model"), tmp_path / "exported")
    wanted = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for folder in (tmp_path / "one" / "model", tmp_path / "two" / "merged", tmp_path / "exported"):
        assert Policy(str(folder)).renderer.prompt_text([{"role": "user", "content": "Hi"}]) == wanted, folder
