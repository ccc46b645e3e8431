"""A reward model's folder in stock transformers and peft, which do not know this package, gives the same score.

Their input is that of every user: `apply_chat_template` of user and assistant, unchanged, padded on either side.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import PreferenceModule
from rlhf_lightning.data.ended_templates import ended, unwrapped
from rlhf_lightning.data.rendering import Renderer
from rlhf_lightning.data.templates import ChatTemplate
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.export import export_model
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.reward_model import RewardModel
from rlhf_lightning.models.scorers import RewardHead
from tests.helpers.models import build_model
from tests.helpers.paths import CHAT_TEMPLATES

TEMPLATES = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)
TALKS = [
    [{"role": "user", "content": "How are you?"}],
    [{"role": "user", "content": "one two"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "one two three"},
    ],
]
ANSWERS = ["I am fine, thank you.", "three\n\nfour", "four five."]


def tokenizer_for(tokenizer: Any, source: str) -> Any:
    """A small tokenizer with the special tokens of a template."""
    tokenizer.chat_template = source
    names = set(re.findall(r"<[|｜][^<>\s{}'\"]+[|｜]>|<(?:start|end)_of_turn>", source)) | {"<|endoftext|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(names), "bos_token": "<|endoftext|>"})
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def saved(tokenizer: Any, root: Path, lora: LoRA | None) -> PreferenceModule:
    """A reward model with random weights, saved as a stage saves it."""
    base = root / "base"
    build_model(tokenizer, architecture="llama").save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    module = PreferenceModule(str(base), RewardHead(), lora=lora)
    module.configure_model()
    with torch.no_grad():
        for name, weight in module.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    module.save_pretrained(root / "model")
    return module


def stock_scores(folder: Path, lora: bool, side: str) -> torch.Tensor:
    """Scores as computed without this package."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    auto: Any = AutoPeftModelForSequenceClassification if lora else AutoModelForSequenceClassification
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = side
    talks = [[*talk, {"role": "assistant", "content": answer}] for talk, answer in zip(TALKS, ANSWERS, strict=True)]
    batch = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model(**batch).logits[:, 0]


def cases() -> list[Any]:
    """Every template, with all weights and with LoRA; some run with the fast tests."""
    names = [*TEMPLATES, "chatml", "endless"]
    fast = ("chatml", "llama3_2", "phi3")
    return [pytest.param(name, None) for name in names] + [
        pytest.param(name, LoRA(rank=2), marks=[] if name in fast else [pytest.mark.slow]) for name in names
    ]


@pytest.mark.parametrize(("name", "lora"), cases())
def test_stock_libraries_give_our_score(name: str, lora: LoRA | None, tokenizer: Any, tmp_path: Path) -> None:
    sources = {
        "chatml": CHATML,
        "endless": "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    }
    source = sources.get(name) or (CHAT_TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = tokenizer_for(tokenizer, source)
    module = saved(tokenizer, tmp_path, lora)
    wanted = module.score(TALKS, ANSWERS)
    assert float(wanted.std()) > 1e-3
    for side in ("right", "left"):
        torch.testing.assert_close(
            stock_scores(tmp_path / "model", lora is not None, side), wanted, rtol=1e-5, atol=1e-5
        )
    # This package reads the folder as in training: the same rows, and the policy's tokens unchanged.
    judge = RewardModel(str(tmp_path / "model"))
    torch.testing.assert_close(judge.score(TALKS, ANSWERS), wanted, rtol=1e-6, atol=1e-6)
    assert judge.tokenizer.chat_template == source
    assert judge.same_tokens(module.renderer)


def test_exported_model_has_the_wrapped_template(tokenizer: Any, tmp_path: Path) -> None:
    module = saved(tokenizer_for(tokenizer, CHATML), tmp_path, LoRA(rank=2))
    wanted = module.score(TALKS, ANSWERS)
    export_model(str(tmp_path / "model"), tmp_path / "exported")
    again = PreferenceModule(str(tmp_path / "exported"), RewardHead())
    again.save_pretrained(tmp_path / "again")
    for folder in ("exported", "again"):
        torch.testing.assert_close(stock_scores(tmp_path / folder, False, "right"), wanted, rtol=1e-5, atol=1e-5)
    # The folder of a policy keeps the original template, because turns may follow.
    assert load_tokenizer(str(tmp_path / "again")).chat_template == CHATML


def test_saved_template_contains_the_template_kwargs(tokenizer: Any, tmp_path: Path) -> None:
    """Stock libraries do not know `template_kwargs`, so the saved template contains them."""
    source = "{% if mood is defined %}{{ mood.name ~ (mood.calm | string) }}{% endif %}" + CHATML
    tokenizer = tokenizer_for(tokenizer, source)
    options = {"mood": {"name": 'so "so"', "calm": True, "more": [1, None, 0.5]}}
    template = Renderer(tokenizer, template_kwargs=options).template
    talk = [*TALKS[0], {"role": "assistant", "content": "Fine."}]
    with ended(tokenizer, template):
        assert tokenizer.apply_chat_template(talk, tokenize=False) == template.render(talk).rstrip("\n")
        assert tokenizer.apply_chat_template(TALKS[0], tokenize=False) == template.render(TALKS[0])
    assert tokenizer.chat_template == source


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "  ", "\n  ", "{% if true %}\n{% endif %}\n"])
@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  {% if true %}\n {% endif %}"])
def test_wrapped_template_renders_as_before(start: str, end: str, tokenizer: Any) -> None:
    """Including white space at its ends; unwrapping restores the original."""
    source = start + CHATML.removesuffix("\n") + end
    tokenizer = tokenizer_for(tokenizer, source)
    template = ChatTemplate(tokenizer)
    for messages in (TALKS[0], TALKS[2]):
        whole, asked = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            for prompt in (False, True)
        )
        with ended(tokenizer, template):
            assert tokenizer.chat_template != source
            assert unwrapped(tokenizer.chat_template) == source
            assert tokenizer.apply_chat_template(messages, tokenize=False) == whole
            assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == asked


def test_template_that_cannot_be_wrapped_is_kept(tokenizer: Any, caplog: Any) -> None:
    source = CHATML + "{% if rlhf_text is defined %}{{ raise_exception('no') }}{% endif %}"
    source = source.replace("{% for m", "{% if template_is_wrapped is defined %}x{% endif %}{% for m", 1)
    tokenizer = tokenizer_for(tokenizer, source)
    template = ChatTemplate(tokenizer)
    template.options["template_is_wrapped"] = True  # what stock libraries do not say, and nobody has given
    caplog.set_level("WARNING", "rlhf_lightning")
    with ended(tokenizer, template):
        assert tokenizer.chat_template == source
    assert "cannot be changed to end with the turn" in caplog.text


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "gemma", "endless"])
def test_other_reward_models_are_scored_at_the_end_of_the_template(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """It was trained with stock pooling on whole texts, including ChatML's line break; the score is the same."""
    endless = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
    endless += "{% if add_generation_prompt %}[assistant]{% endif %}"
    own = {"chatml": CHATML, "endless": endless}
    tokenizer = tokenizer_for(tokenizer, own.get(name) or (CHAT_TEMPLATES / f"{name}.jinja").read_text())
    tokenizer.pad_token = tokenizer.pad_token or "<pad>"
    model = build_model(tokenizer, architecture="llama", task="SEQ_CLS")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wanted = stock_scores(tmp_path / "model", False, "right")
    judge = RewardModel(str(tmp_path / "model"))
    torch.testing.assert_close(judge.score(TALKS, ANSWERS), wanted, rtol=1e-5, atol=1e-5)
    rows = [
        judge.renderer.exchange(t, [{"role": "assistant", "content": a}]) for t, a in zip(TALKS, ANSWERS, strict=True)
    ]
    sampled = judge.score_tokens([row.ids for row in rows], [row.loss_mask for row in rows])
    torch.testing.assert_close(sampled, wanted, rtol=1e-5, atol=1e-5)


def test_reward_model_without_a_template_gives_a_warning(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    saved(tokenizer, tmp_path, None).save_pretrained(tmp_path / "model")
    RewardModel(str(tmp_path / "model"))
    assert "has no chat template" not in caplog.text
    model = build_model(tokenizer, architecture="llama", task="SEQ_CLS")
    model.save_pretrained(tmp_path / "other")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "other")
    RewardModel(str(tmp_path / "other"))
    assert caplog.text.count("has no chat template, so it scores the texts of a conversation") == 1


CLASSIFIERS = {
    "bert": {},
    "roberta": {},
    "deberta-v2": {},
    "modernbert": {"global_attn_every_n_layers": 1},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48},
    "t5": {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 48, "d_kv": 8, "decoder_start_token_id": 0},
}
"""Architectures whose classifiers do not read the last token."""


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_classifiers_that_do_not_read_the_last_token_are_refused(
    architecture: str, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "num_labels": 1}
    config = AutoConfig.for_model(architecture, **{**sizes, **ids, **CLASSIFIERS[architecture]})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is no reward model of a supported kind"):
        RewardModel(str(tmp_path))


def test_training_does_not_start_from_an_encoder(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"RobertaClassificationHead.* is not a linear layer"):
        PreferenceModule(str(tmp_path)).configure_model()


def test_head_wider_than_the_model_is_accepted(tokenizer: Any) -> None:
    """A reward model in bfloat16 has its head in float32 after it was used once."""
    model = build_model(tokenizer, architecture="llama", task="SEQ_CLS").bfloat16()
    for _ in range(2):
        PreferenceModule(model, tokenizer=tokenizer).configure_model()
        assert model.score.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["v_head.weight", "reward_head.weight", "score.0.weight", "classifier.weight"])
def test_head_under_another_name_is_not_replaced_by_a_random_one(name: str, tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build_model(tokenizer, architecture="llama", task="SEQ_CLS").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "score.bias": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"transformers does not load score\.bias of the reward model"):
        RewardModel(str(tmp_path))
    weights[name] = weights.pop("score.weight")
    save_file(weights, file, metadata={"format": "pt"})
    message = rf"has no weights named score\.weight.* not used: {re.escape(name)}\. A new head would give random scores"
    with pytest.raises(ConfigError, match=message):
        RewardModel(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        PreferenceModule(str(tmp_path)).configure_model()
