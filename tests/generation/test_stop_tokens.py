"""Ends of responses: the template's ends of turns, the tokenizer's eos_token, the model's generation config."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.sft import SFTDataModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.generation.sampler import Sampler
from rlhf_lightning.models.export import export_model
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.modules.policy_rl import PolicyRLModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout.episode_state import _split_ending
from rlhf_lightning.types import Completion
from tests.helpers.models import build_model
from tests.helpers.rows import chats
from tests.helpers.training import trainer

NAMES = ["<|end_of_text|>", "<|eom_id|>"]


@pytest.fixture
def several(tokenizer: Any, tmp_path: Path) -> tuple[str, Any, list[int]]:
    """A folder like Llama 3.1's: its generation config has three ends, and its template shows one of them."""
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES})
    ends = sorted([tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(NAMES)])
    model = build_model(tokenizer)
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path / "several")
    tokenizer.save_pretrained(tmp_path / "several")
    return str(tmp_path / "several"), tokenizer, ends


def saved_ends(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_all_users_of_a_model_stop_at_all_its_stop_tokens(several: tuple[str, Any, list[int]], tmp_path: Path) -> None:
    folder, tokenizer, ends = several
    assert Renderer(tokenizer).stop_token_ids == [tokenizer.eos_token_id]
    policy = Policy(folder)
    module = PolicyRLModule(folder, rewards=[])
    module.configure_model()
    plain = Renderer(tokenizer)
    Sampler().build(AutoModelForCausalLM.from_pretrained(folder), plain)
    for renderer in (policy.renderer, module.renderer, plain):
        assert renderer.stop_token_ids == ends
        assert renderer.turn_end_ids == [tokenizer.eos_token_id]
    assert list(module.model_sampler.params.stop_token_ids) == ends
    assert end_token_ids(AutoModelForCausalLM.from_pretrained(folder)) == ends
    export_model(folder, tmp_path / "exported")
    assert saved_ends(tmp_path / "exported") == ends


@pytest.mark.parametrize("by_hand", [False, True])
def test_training_keeps_the_stop_tokens_of_the_start_model(
    several: tuple[str, Any, list[int]], tmp_path: Path, by_hand: bool
) -> None:
    folder, tokenizer, ends = several
    data = SFTDataModule(chats(4), tokenizer=tokenizer if by_hand else None, batch_size=4)
    if by_hand:
        assert data.renderer.stop_token_ids == [tokenizer.eos_token_id], "no model is known yet"
    module = SFTModule(folder)
    trainer(tmp_path, max_steps=1).fit(module, data)
    assert module.stage_facts()["stop_token_ids"] == data.renderer.stop_token_ids == ends
    module.save_pretrained(tmp_path / "trained")
    assert GenerationConfig.from_pretrained(tmp_path / "trained").eos_token_id == ends


def test_adapter_has_the_stop_tokens_of_its_base(several: tuple[str, Any, list[int]], tmp_path: Path) -> None:
    folder, tokenizer, ends = several
    module = SFTModule(folder, lora=LoRA(rank=2))
    module.configure_model()
    module.save_pretrained(tmp_path / "adapter")
    assert end_token_ids(tmp_path / "adapter", tokenizer) == ends
    # Its own generation config adds to that of the base.
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert end_token_ids(str(tmp_path / "adapter"), tokenizer) == sorted([*ends, 3])


def test_reward_model_pads_with_a_token_that_ends_no_turn(several: tuple[str, Any, list[int]], tmp_path: Path) -> None:
    # Qwen's padding token is a stop token of its generation config, which needs no other padding token.
    _, tokenizer, ends = several
    tokenizer.pad_token = NAMES[0]
    model = build_model(tokenizer, task="SEQ_CLS")
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    judge = RewardModel(str(tmp_path / "reward"))
    assert judge.renderer.stop_token_ids == ends
    assert judge.tokenizer.pad_token == NAMES[0]


def test_response_stops_at_each_stop_token(several: tuple[str, Any, list[int]]) -> None:
    folder, tokenizer, ends = several
    policy = Policy(folder)
    sampler = Sampler(max_tokens=40).build(policy.model, policy.renderer)
    prompts = [policy.renderer.prompt([{"role": "user", "content": f"Count {i}"}]) for i in range(200)]
    samples = sampler.generate(prompts, range(200))
    assert {sample.ids[-1] for sample in samples if sample.stop_reason == "stop"} == set(ends)
    for sample in samples:
        assert (sample.stop_reason == "stop") == (sample.ids[-1] in ends)
        assert not set(sample.ids[:-1]) & set(ends)
    # As in a rollout: the token that ended the response is not part of its text, special or not.
    word = tokenizer("one", add_special_tokens=False)["input_ids"]
    policy.renderer.also_stop_at([5])
    assert policy.renderer.decode([*word, 5]) == "one"
    assert _split_ending(Completion([*word, 5], [0.0] * 9, "stop"), policy.renderer, ()) == (
        "one",
        tokenizer.decode([5]),
    )


@pytest.mark.parametrize(
    ("written", "ends", "said"),
    [
        (None, [], ""),
        (3, [3], ""),
        ([3, 3, 2], [2, 3], ""),
        ([2, 128009], [2], "128009 is outside the vocabulary"),
        (-1, [], "-1 is outside the vocabulary"),
        (True, None, "True is not a token id"),
        ([2, None], None, "None is not a token id"),
        (["2"], None, "'2' is not a token id"),
        (2.0, None, "2.0 is not a token id"),
    ],
)
def test_generation_config_variants(
    base: str, written: Any, ends: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(base) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": written}))
    if ends is None:
        with pytest.raises(ConfigError, match=said):
            end_token_ids(base)
        return
    with caplog.at_level(logging.WARNING):
        assert end_token_ids(base) == ends
        # A loaded model gives the same; without a generation config, transformers uses the model's config.
        assert set(ends) <= set(end_token_ids(AutoModelForCausalLM.from_pretrained(base)))
    assert said in caplog.text


def test_model_config_is_used_without_a_generation_config(base: str, tokenizer: Any) -> None:
    (Path(base) / "generation_config.json").unlink()
    config = json.loads((Path(base) / "config.json").read_text())
    for said, ends in (([7, 8], [7, 8]), (None, [])):
        (Path(base) / "config.json").write_text(json.dumps({**config, "eos_token_id": said}))
        assert end_token_ids(base) == ends == end_token_ids(AutoModelForCausalLM.from_pretrained(base))
    nested = {**config, "eos_token_id": None, "text_config": {"eos_token_id": 4, "vocab_size": 9}, "vocab_size": None}
    (Path(base) / "config.json").write_text(json.dumps(nested))
    assert end_token_ids(base) == [4]


def test_template_without_a_stop_token_is_rejected(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no eos_token"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, stop_token_ids=[3]).stop_token_ids == [3]


def test_stop_texts_of_the_generation_config(tokenizer: Any) -> None:
    model = build_model(tokenizer)
    for named, own, wanted in (
        ("one", None, ["one"]),
        (["one", "two"], None, ["one", "two"]),
        (["one"], ["two"], ["two"]),
    ):
        model.generation_config.stop_strings = named
        sampler = Sampler(max_tokens=4, stop=own).build(model, Renderer(tokenizer))
        assert list(sampler.stop) == wanted
        assert set(wanted) <= set(sampler.params.stop_strings)
    sampler = Sampler(max_tokens=4).build(model, Renderer(tokenizer, stop=["one"]))
    assert list(sampler.stop) == ["one"]
