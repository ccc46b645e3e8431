"""Case several-eos: responses end at each token that the model's generation config names, before and after SFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.modules.sft import SFTModule
from tests.helpers.models import build_model
from tests.helpers.paths import CHAT_TEMPLATES
from tests.helpers.rows import chats
from tests.helpers.training import trainer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SAID = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
]


def test_sampler_and_saved_folder_keep_all_stop_tokens(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model(tokenizer)
    with torch.no_grad():  # so that the second end token, id 0, is sampled now and then
        model.get_input_embeddings().weight[0] *= 5
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 0]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = SFTModule(str(tmp_path / "model"))
    trainer(tmp_path / "run", max_steps=1).fit(module, SFTDataModule(chats(8)))
    module.save_pretrained(tmp_path / "trained")
    ends = {tokenizer.eos_token_id, 0}
    assert ends <= set(GenerationConfig.from_pretrained(tmp_path / "trained").eos_token_id)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    renderer = Renderer(AutoTokenizer.from_pretrained(tmp_path / "model"))
    sampler = Sampler(max_tokens=64).build(loaded, renderer)
    asked = [renderer.prompt([{"role": "user", "content": f"Tell me about {i}."}]) for i in range(32)]
    samples = sampler.generate(asked, list(range(32)))
    assert any(sample.ids[-1] == 0 for sample in samples)
    assert not any(ends & set(sample.ids[:-1]) for sample in samples)
    assert all(sample.stop_reason == "stop" for sample in samples if sample.ids[-1] in ends)


@pytest.mark.parametrize(
    ("name", "special", "options"),
    [
        ("gptoss", ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"], {}),
        ("llama3_1", ["<|eot_id|>", "<|eom_id|>", "<|python_tag|>"], {"builtin_tools": ["wolfram_alpha"]}),
        ("qwen2_5", [], {}),
        ("glm4moe", ["<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>"], {}),
        ("deepseekv3", ["<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"], {}),
        ("cohere", ["<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"], {}),
        ("lfm2", [], {}),
        ("nemotron_3_nano", [], {}),
        ("qwen3_6", [], {}),
    ],
)
def test_turn_with_a_tool_call_ends_with_a_stop_token(
    tokenizer: Any, name: str, special: list[str], options: dict[str, Any]
) -> None:
    """Rows made in Python, so that templates without tools only warn; from a file such a row is refused."""
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{name}.jinja").read_text()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    renderer = Renderer(tokenizer, template_kwargs=options)
    row = renderer.conversation(SAID, TOOLS)[-1]
    assert row.loss_mask[-1] == 1
    assert row.ids[-1] in renderer.stop_token_ids
