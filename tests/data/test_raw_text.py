"""Raw text begins and ends with the tokens that the tokenizer adds by itself."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers.processors import TemplateProcessing

from rlhf_lightning.data.preference import PreferenceDataModule
from rlhf_lightning.data.prompts import Prompt, PromptDataModule
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.rollout.episode_state import EpisodeState
from tests.helpers.rows import ready
from tests.helpers.templates import TEMPLATES

FRAMES = {
    "none": "$A",  # GPT-2, Qwen
    "bos": "<|im_start|> $A",  # Llama, Gemma, Mistral
    "both": "<|im_start|> $A <|im_end|>",  # T5 and others that put their eos_token there
    "bert": "<|im_start|> $A <|pad|>",  # an end that is not the eos_token
}
TEXTS = ["one two three", " Hello\nthere", "é😀", "one<|im_end|>", "<|im_start|>one", "<|im_start|>one two<|im_end|>"]


def framed(tokenizer: Any, frame: str) -> Any:
    """A tokenizer with a post-processor like those of real models."""
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "<|im_start|>"
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=FRAMES[frame], special_tokens=[(t, changed.convert_tokens_to_ids(t)) for t in changed.all_special_tokens]
    )
    return changed


def oracle(tokenizer: Any, text: str) -> list[int]:
    """The tokenizer's ids of a text with its eos_token; tokens that the text itself contains are not added again."""
    ids = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if ids[:2] == [bos, bos]:
        ids = ids[1:]
    while ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    if text.endswith(tokenizer.eos_token):
        return ids[: len(ids) - ids[::-1].index(eos)]
    return ids if ids[-1] == eos else [*ids, eos]


@pytest.mark.parametrize("frame", FRAMES)
def test_raw_text_has_the_ids_of_the_tokenizer(tokenizer: Any, frame: str) -> None:
    tokenizer = framed(tokenizer, frame)
    data = ready(SFTDataModule([{"text": text} for text in TEXTS], tokenizer=tokenizer))
    for text, row in zip(TEXTS, data.prepared["train"].rows, strict=True):
        assert row.ids == oracle(tokenizer, text), text
        assert row.loss_mask == [0] + [1] * (len(row.ids) - 1)


@pytest.mark.parametrize("frame", FRAMES)
def test_raw_rows_of_every_kind_have_the_same_prefix(tokenizer: Any, frame: str) -> None:
    tokenizer = framed(tokenizer, frame)
    begin = [tokenizer.bos_token_id] * (frame != "none")
    plain = tokenizer("one two", add_special_tokens=False)["input_ids"]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "format": "raw"}

    prompt = ready(PromptDataModule([{"prompt": "one two"}], **settings)).prepared["train"].rows[0]
    assert prompt.ids == [*begin, *plain]
    pair = {"prompt": "one two", "chosen": " three", "rejected": " four"}
    rows = list(ready(PreferenceDataModule([pair], **settings)).prepared["train"].rows[0].sides)
    rows += ready(SFTDataModule([{"prompt": "one two", "completion": " three"}], **settings)).prepared["train"].rows
    for row, answer in zip(rows, (" three", " four", " three"), strict=True):
        assert row.ids == oracle(tokenizer, f"one two{answer}")
        assert row.ids[: row.loss_mask.index(1)] == prompt.ids, "a response follows the prompt as the sampler has it"


@pytest.mark.parametrize("frame", ["none", "bos"])
def test_truncated_prompt_keeps_the_prefix(tokenizer: Any, frame: str) -> None:
    tokenizer = framed(tokenizer, frame)
    pair = {"prompt": "one two " * 20, "chosen": " three", "rejected": " four"}
    settings: dict[str, Any] = {"tokenizer": tokenizer, "format": "raw"}
    (whole,) = ready(PreferenceDataModule([pair], **settings)).prepared["train"].rows
    settings |= {"overlong": "truncate", "max_length": whole.tokens - 5}
    (cut,) = ready(PreferenceDataModule([pair], **settings)).prepared["train"].rows
    for side, before in zip(cut.sides, whole.sides, strict=True):
        begin = 1 if frame == "bos" else 0
        assert side.ids == before.ids[:begin] + before.ids[begin + 5 :]
        assert side.trained == before.trained


@pytest.mark.parametrize("frame", FRAMES)
def test_prefix_is_not_added_to_chat_templates(tokenizer: Any, frame: str) -> None:
    """As in `apply_chat_template` of transformers, a template without a prefix has none."""
    tokenizer = framed(tokenizer, frame)
    said = [{"role": "user", "content": "one two"}]
    for template in ("[bos]" + TEMPLATES["text end"], TEMPLATES["text end"]):
        tokenizer.chat_template = template.replace("[bos]", "{{ bos_token }}")
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert Renderer(tokenizer).prompt(said) == ids


def test_eos_in_the_answer_is_not_repeated(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES["endless"]
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two<|im_end|>"}]
    (row,) = Renderer(tokenizer).conversation(said)
    assert tokenizer.decode(row.ids) == "[user]one[assistant]two<|im_end|>"
    assert row.loss_mask[-1]


def test_environment_prompt_has_the_same_prefix(tokenizer: Any) -> None:
    renderer = Renderer(framed(tokenizer, "bos"), format="raw")
    running = EpisodeState(Prompt([], [], {}), sample_index=0)
    running.env = cast(Any, object())
    running.episode.prompt = [{"role": "user", "content": "one two"}]
    assert running.next_prompt(renderer) == (renderer.tokenizer("one two")["input_ids"], False)


def test_real_tokenizers(shared: Path) -> None:
    from transformers import AutoTokenizer

    for folder in sorted((shared / "tokenizers").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for text in ("Once upon a time", "Es war einmal é😀\n"):
            assert Renderer(tokenizer).text(text).ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
