"""Adapters of every kind of peft: stock peft is the oracle, and saved adapters load with equal logits."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import PreferenceDataModule, PreferenceModule, SFTDataModule, SFTModule
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.models.export import export_model
from rlhf_lightning.models.heads import has_head
from rlhf_lightning.models.loading import Start, load_for_scoring
from rlhf_lightning.models.lora import LoRA, named_weights, simple
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.scorers import ImplicitReward, RewardHead
from tests.helpers.models import build_model
from tests.helpers.rows import chats, pairs
from tests.helpers.training import sgd, trainer

A = ["q_proj", "v_proj"]
OURS = LoRA(rank=4, alpha=8.0, target=A)
IDS = torch.arange(3, 30)[None]
BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding": {"target_modules": [*A, "embed_tokens"]},
    "head": {"target_modules": [*A, "lm_head"]},
    "save_both": {"modules_to_save": BOTH},
    "save_both_tied": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "save_embedding": {"modules_to_save": ["embed_tokens"]},
    "save_norm": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [3, 7]},
    "tokens_both": {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "all_linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.0.*(q|k)_proj"},
    "exclude": {"exclude_modules": r".*layers\.0.*"},
    "bias": {"bias": "all"},
    "layers": {"layers_to_transform": [1]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}
SHARED = ("embedding", "head", "save_both", "save_embedding", "tokens", "tokens_both")
"""Kinds that behave differently if the head is tied."""


def matrix(*fast: str) -> list[Any]:
    """Every kind, tied and untied; kinds that are not named run with the slow tests."""
    cases = [(kind, tied) for kind in KINDS for tied in (True, False)]
    return [
        pytest.param(kind, tied, marks=[] if kind in fast and (tied or kind in SHARED) else [pytest.mark.slow])
        for kind, tied in cases
    ]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-4)


def adapted(base: Any, kind: str, trained: bool = True) -> Any:
    """peft's own adapter on a model, a few steps away from its start."""
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": A, "task_type": "CAUSAL_LM", **KINDS[kind]})
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(2 * trained):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model


def folder_of(tokenizer: Any, root: Path, **options: Any) -> Path:
    architecture = options.pop("architecture", "llama")
    build_model(tokenizer, architecture=architecture, **{"attention_bias": True, **options}).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "tied"), matrix("plain", "embedding", "head", "save_both", "tokens", "dora", "pissa", "patterns", "bias")
)
def test_adapters_of_peft_have_its_logits(kind: str, tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Unmerged, merged, merged below a new adapter, exported, and in weights sent to an engine."""
    base = loaded(folder_of(tokenizer, tmp_path / "base", tie_word_embeddings=tied))
    plain = logits(base)
    model = adapted(base, kind)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(wanted, logits(model), rtol=1e-4, atol=1e-4)
    assert (wanted - plain).abs().max() > 1e-2
    close(load_for_scoring(folder, "CAUSAL_LM"), wanted)
    close(Start(folder).load(), wanted)
    start = Start(folder, lora=OURS)
    close(start.load(tmp_path / "run"), wanted)
    assert start.fresh_adapter == (kind != "plain"), "only what is ours in every setting is trained on"
    export_model(folder, tmp_path / "exported")
    close(loaded(tmp_path / "exported"), wanted)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "exported")) == len(tokenizer)
    engine = build_model(tokenizer, seed=1, architecture="llama", attention_bias=True, tie_word_embeddings=False)
    weights = dict(named_weights(AutoPeftModelForCausalLM.from_pretrained(folder)))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    engine.load_state_dict(weights)
    close(engine, wanted)


RESIZED: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding": {"target_modules": [*A, "embed_tokens"]},
    "save_both": {"modules_to_save": BOTH},
    "tokens": {"trainable_token_indices": "new"},
}


def resized(tokenizer: Any, folder: Path) -> Any:
    """A model in memory with two new embeddings that are in no file, and its tokenizer."""
    model = loaded(folder)
    tokenizer.add_tokens(["<unit>", "</unit>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:] = 3 * model.get_input_embeddings().weight[[30, 40]]
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", RESIZED)
def test_adapters_of_peft_on_a_resized_base(kind: str, tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    """The new embeddings are in the adapter's file, as peft saves them; if they are in no file, it is refused."""
    base = resized(tokenizer, folder_of(tokenizer, tmp_path / "base", tie_word_embeddings=tied))
    rows = len(tokenizer)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": A, "task_type": "CAUSAL_LM", **RESIZED[kind]}
    if kind == "tokens":
        settings["trainable_token_indices"] = [rows - 2, rows - 1]
    model = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p += 0.02
    ids = torch.tensor([[5, rows - 2, 9, rows - 1, 7]])
    wanted = model.eval()(ids).logits.detach()
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not tied and kind == "embedding":  # of such a head peft saves no new rows: they are lost
        with pytest.raises(ConfigError, match="neither contains all of the additional embeddings"):
            Start(folder).load()
        return
    stock = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    for load in (lambda: load_for_scoring(folder, "CAUSAL_LM"), lambda: Start(folder).load(), lambda: stock):
        with torch.no_grad():
            found = load().eval()(ids).logits
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    export_model(folder, tmp_path / "exported")
    exported = loaded(tmp_path / "exported")
    assert exported.config.vocab_size == rows
    # A stage that trains it further saves the whole model.
    module = SFTModule(folder, lora=OURS)
    module.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again").eval()(ids).logits
        torch.testing.assert_close(again, module.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    if kind == "embedding":
        model.save_pretrained(folder, save_embedding_layers=False)
        with pytest.raises(ConfigError, match="neither contains all of the additional embeddings"):
            Start(folder).load()


CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "resized": lambda model, tokenizer: None,
    "trained": lambda model, tokenizer: model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5),
    "nameless": lambda model, tokenizer: setattr(model, "name_or_path", ""),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_model_object_is_saved_with_its_adapter(
    change: str, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    """If it was resized, changed in memory, or has no name, the base is saved next to the adapter, for stock peft."""
    folder = folder_of(tokenizer, tmp_path / "base", tie_word_embeddings=tied)
    model = resized(tokenizer, folder) if change == "resized" else loaded(folder)
    CHANGES[change](model, tokenizer)
    module = SFTModule(model, lora=LoRA(rank=4, target=["attention", "unembedding"]), tokenizer=tokenizer)
    module.optimizer_factory = sgd(0.3)
    trainer(tmp_path / "run").fit(module, SFTDataModule(chats(6), batch_size=3, show_example=False))
    module.save_pretrained(tmp_path / "adapter")
    wanted = logits(module.model)
    close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), wanted)
    (tmp_path / "adapter").rename(tmp_path / "moved")
    close(Start(str(tmp_path / "moved")).load(), wanted)
    close(load_for_scoring(str(tmp_path / "moved"), "CAUSAL_LM"), wanted)
    stops = json.loads((tmp_path / "moved" / "base" / "generation_config.json").read_text())["eos_token_id"]
    assert set(module.renderer.stop_token_ids) <= set(stops)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "moved")) == len(tokenizer)


def test_unchanged_model_object_is_not_saved_with_its_adapter(tokenizer: Any, tmp_path: Path) -> None:
    folder = folder_of(tokenizer, tmp_path / "base")
    for model in (loaded(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)):
        module = SFTModule(model, lora=OURS, tokenizer=tokenizer)
        module.save_pretrained(tmp_path / "adapter")
        assert not (tmp_path / "adapter" / "base").exists()
        named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(named) == folder
    module = SFTModule(str(folder), lora=OURS)
    module.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "base").exists()
    # A model merged in memory is in no folder either; without a Trainer, there is no folder for it.
    adapted(loaded(folder), "rslora").save_pretrained(tmp_path / "foreign")
    tokenizer.save_pretrained(tmp_path / "foreign")
    module = SFTModule(str(tmp_path / "foreign"), lora=OURS)
    module.save_pretrained(tmp_path / "adapter")
    close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), logits(module.model))


@pytest.mark.parametrize(("kind", "tied"), matrix("save_both", "tokens", "bias", "pissa"))
def test_model_object_with_an_adapter_is_trained_and_saved(
    kind: str, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    """With any kind of adapter, the reference does not change, and the saved folder has the logits of training."""
    folder = folder_of(tokenizer, tmp_path / "base", tie_word_embeddings=tied)
    start = adapted(loaded(folder), kind)
    before = logits(start)
    module = PreferenceModule(start, ImplicitReward(0.1), tokenizer=tokenizer, optimizer=sgd(0.05))
    data = PreferenceDataModule(pairs(4), batch_size=4, show_example=False)
    trainer(tmp_path / "run", max_steps=1).fit(module, data)
    wanted = logits(module.model)
    assert (wanted - before).abs().max() > 1e-3
    ids, loss_mask = IDS, torch.ones_like(IDS).float()
    loss_mask[:, 0] = 0
    assert isinstance(module.reference, Reference)
    reference = module.reference.logprobs(ids, loss_mask)[:, 1:]
    expected = before.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-4)
    module.save_pretrained(tmp_path / "adapter")
    close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), wanted)
    close(Start(str(tmp_path / "adapter")).load(), wanted)


def test_unsupported_adapters_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    base = loaded(folder_of(tokenizer, tmp_path / "base"))
    prompts = get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompts.save_pretrained(tmp_path / "prompts")
    tokenizer.save_pretrained(tmp_path / "prompts")
    named = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=A), adapter_name="mine")
    for model, lora, message in (
        (prompts, None, "PROMPT_TUNING"),
        (str(tmp_path / "prompts"), None, "PROMPT_TUNING"),
        (named, None, "named 'default'"),
        (adapted(base, "plain", trained=False), OURS, "already has an adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            SFTModule(model, lora=lora, tokenizer=tokenizer).configure_model()


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_lora_is_continued(kind: str) -> None:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": A, **KINDS[kind]})
    assert simple(config) == (kind in ("plain", "embedding", "head", "all_linear", "regex"))


def test_stop_tokens_of_training_are_saved_next_to_an_adapter(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    """Stock peft uses the base's generation config, which may have fewer stop tokens; a warning says so."""
    from transformers import GenerationConfig

    folder = folder_of(tokenizer, tmp_path / "base")
    GenerationConfig(eos_token_id=5).save_pretrained(folder)
    caplog.set_level("INFO", "rlhf_lightning")
    module = SFTModule(str(folder), lora=OURS)
    module.save_pretrained(tmp_path / "adapter")
    beside = GenerationConfig.from_pretrained(tmp_path / "adapter")
    assert set(module.renderer.stop_token_ids) <= set(beside.eos_token_id)
    assert beside.pad_token_id == module.tokenizer.pad_token_id
    assert "stock peft stops at the tokens of the base's generation config ([5])" in caplog.text


def test_reward_adapter_with_a_new_padding_token_loads_in_stock_peft(tokenizer: Any, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    tokenizer.pad_token = tokenizer.unk_token = None
    folder = folder_of(tokenizer, tmp_path / "base", architecture="llama")
    module = PreferenceModule(str(folder), RewardHead(), lora=OURS, optimizer=sgd(0.3))
    trainer(tmp_path / "run").fit(module, PreferenceDataModule(pairs(4), batch_size=4, show_example=False))
    module.save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert model.config.num_labels == 1
    rows = [module.renderer.exchange([_user(p["prompt"])], [_says(p["chosen"])]).ids for p in pairs(4)]
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    batch = saved.pad({"input_ids": rows}, return_tensors="pt")
    wanted = module.score([p["prompt"] for p in pairs(4)], [p["chosen"] for p in pairs(4)])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[:, 0], wanted, rtol=1e-5, atol=1e-5)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_frozen_or_merged_adapter_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    folder = folder_of(tokenizer, tmp_path / "base")
    adapted(loaded(folder), "plain").save_pretrained(tmp_path / "adapter")
    merged = adapted(loaded(folder), "plain")
    merged.merge_adapter()
    off = adapted(loaded(folder), "plain")
    off.base_model.disable_adapter_layers()
    for model, message in (
        (PeftModel.from_pretrained(loaded(folder), str(tmp_path / "adapter")), "is_trainable=True"),
        (off, "leave it enabled"),
        (merged, "unmerge_adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path / "run").fit(
                SFTModule(model, tokenizer=tokenizer), SFTDataModule(chats(4), batch_size=4, show_example=False)
            )


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """As if new tokens were added without saving their embeddings."""
    folder = folder_of(tokenizer, tmp_path / "base")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<unit>"])
    adapted(loaded(folder), "plain").save_pretrained(tmp_path / "adapter")
    larger.save_pretrained(tmp_path / "adapter")
    model = loaded(folder)
    model.resize_token_embeddings(len(larger))
    reference = PreferenceModule(model, ImplicitReward(reference=str(folder)), tokenizer=larger)
    for load in (lambda: Policy(str(tmp_path / "adapter")), reference.configure_model):
        with pytest.raises(ConfigError, match=r"has \d+ embeddings, so they do not match .*'<unit>'"):
            load()


def test_image_token_needs_no_embedding(tokenizer: Any) -> None:
    """The tokenizer of Gemma 3 1B has <image_soft_token>, which has no embedding and occurs in no row."""
    model = build_model(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    SFTModule(model, tokenizer=tokenizer).configure_model()
    tokenizer.add_tokens(["<image_tag>"])  # of text, which rows may have
    with pytest.raises(ConfigError, match="'<image_tag>'"):
        SFTModule(model, tokenizer=tokenizer).configure_model()


def saved(tokenizer: Any, root: Path, safe: bool = True, rows: int = 0, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter that peft saved to a folder, and its logits; on a base that was resized to `rows` embeddings."""
    base = loaded(folder_of(tokenizer, root / "base"))
    if rows:
        base.resize_token_embeddings(rows)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": A, **options}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(root / "adapter", safe_serialization=safe)
    return root / "adapter", logits(model)


def test_adapter_without_a_task_is_that_of_a_causal_model(tokenizer: Any, tmp_path: Path) -> None:
    folder, wanted = saved(tokenizer, tmp_path, task_type=None)
    close(load_for_scoring(str(folder), "CAUSAL_LM"), wanted)
    close(Start(str(folder)).load(), wanted)
    close(Start(str(folder), lora=OURS).load(), wanted)
    assert not has_head(str(folder))


def test_adapter_for_another_task_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    folder, _ = saved(tokenizer, tmp_path, task_type="TOKEN_CLS")
    with pytest.raises(ConfigError, match="is for the task TOKEN_CLS; only CAUSAL_LM and SEQ_CLS are supported"):
        Start(str(folder)).load()


def test_older_adapter_files_are_read_completely_or_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows = len(tokenizer) + 5
    folder, wanted = saved(tokenizer, tmp_path, safe=False, rows=rows, task_type="CAUSAL_LM", modules_to_save=BOTH)
    close(load_for_scoring(str(folder), "CAUSAL_LM"), wanted)
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    weights.pop(next(name for name in weights if ".lora_B." in name))
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match="is missing 1 weights"):
        Start(str(folder)).load()


def test_weights_that_an_adapters_config_leaves_out_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    folder, _ = saved(tokenizer, tmp_path, task_type="CAUSAL_LM")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(ConfigError, match=r"has 4 weights that its adapter_config.json does not use .*v_proj"):
        Start(str(folder)).load()


EXPERTS = {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_experts": 4}


@pytest.mark.parametrize(
    ("architecture", "target", "message"),
    [
        ("mixtral", ["attention", "mlp"], "experts of MixtralForCausalLM are not trained, .*mlp.experts.gate_up_proj"),
        ("qwen3_moe", ["all"], "experts of Qwen3MoeForCausalLM are not trained"),
        ("mixtral", ["attention"], None),
        ("glm4_moe", ["mlp"], r"instead of 6 other layers \(for example model.layers.0.mlp.down_proj\)"),
        ("llama", ["all"], None),
    ],
)
def test_layers_that_lora_leaves_out_give_a_warning(
    architecture: str, target: list[str], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(architecture, vocab_size=32, num_key_value_heads=2, head_dim=8, **sizes, **EXPERTS)
    Start(AutoModelForCausalLM.from_config(config), lora=LoRA(rank=2, target=target)).load()
    assert re.search(message, caplog.text) if message else not caplog.text


def test_target_that_peft_refuses_is_an_error() -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, state_size=4, n_groups=1, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"lora.target \['mlp'\]: .*Incompatible modules.* Give names of layers"):
        Start(Mamba2ForCausalLM(config), lora=LoRA(rank=2, target="mlp")).load()
