"""A model object with embeddings resized for new tokens, trained with LoRA: the saved folder can be loaded."""

from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import SFTDataModule, SFTModule
from rlhf_lightning.models.loading import Start
from rlhf_lightning.models.lora import LoRA
from tests.helpers.training import trainer


def test_resized_object_with_lora(base: str, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_tokens(["<unit>", "</unit>"])
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():  # the new tokens begin as two of the old ones
        model.get_input_embeddings().weight[-2:] = 3 * model.get_input_embeddings().weight[[30, 40]]
    rows = [{"prompt": f"Length {i}?", "completion": f"<unit>{i} m</unit>"} for i in range(8)]
    module = SFTModule(model, lora=LoRA(rank=4), tokenizer=tokenizer, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    trainer(tmp_path, max_steps=10, max_epochs=-1).fit(module, SFTDataModule(rows, batch_size=8, show_example=False))
    folder = tmp_path / "adapter"
    module.save_pretrained(folder)
    ids = torch.tensor([tokenizer("Length 3? <unit>3 m</unit>")["input_ids"]])
    with torch.no_grad():
        wanted = module.model(ids).logits
        assert torch.allclose(AutoPeftModelForCausalLM.from_pretrained(folder)(ids).logits, wanted, atol=1e-4)
        assert torch.allclose(Start(str(folder)).load()(ids).logits, wanted, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
