"""Scoring, LoRA, sampling and model folders give the results of stock transformers and peft."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.data.batching import pad_tokens
from rlhf_lightning.data.tokenizers import load_tokenizer
from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.heads import init_head, pad_token
from rlhf_lightning.models.loading import Start, check_vocabulary
from rlhf_lightning.models.lora import LoRA
from rlhf_lightning.models.reference import Reference
from rlhf_lightning.models.saving import save_model
from rlhf_lightning.models.scorers import LoadedModel, RewardHead, SequenceLogprob
from rlhf_lightning.models.token_logprobs import TokenLogprobs
from tests.helpers.models import build_model

ARCHITECTURES = ["qwen3", "llama", "gemma2", "gpt2", "cohere", "neox"]


def random_rows(tokenizer: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, len(tokenizer), (n,), generator=generator).tolist() for n in lengths]
    return pad_tokens(rows, [[0, 0] + [1] * (n - 2) for n in lengths], tokenizer.pad_token_id)


def plain_logprobs(model: Any, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """Each row alone, with all logits."""
    result = torch.zeros(batch["loss_mask"].shape, dtype=torch.float64)
    for i, length in enumerate(batch["lengths"].tolist()):
        ids = batch["input_ids"][i : i + 1, :length]
        logp = (model(ids).logits.double() / temperature).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        result[i, 1:length] = logp * batch["loss_mask"][i, 1:length]
    return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_those_of_the_plain_forward(tokenizer: Any, architecture: str, temperature: float) -> None:
    options = {"gemma2": {"final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.25}}.get(architecture, {})
    model = build_model(tokenizer, architecture=architecture, **options).double()
    batch = random_rows(tokenizer, [9, 5, 3])
    batch["loss_mask"] = batch["loss_mask"].double()
    token_logprobs = TokenLogprobs(model)
    assert token_logprobs.backbone.separable, "the head should run on kept positions only"
    plain = plain_logprobs(model, batch, temperature)
    output = token_logprobs(batch["input_ids"], batch["loss_mask"], temperature, details=True)
    torch.testing.assert_close(output.logprobs, plain, rtol=1e-9, atol=1e-9)
    assert output.entropy is not None
    assert (output.entropy[batch["loss_mask"] == 0] == 0).all()

    (plain.sum() * 0.3).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    chunked = TokenLogprobs(model, logit_bytes=4 * len(tokenizer) * 2)  # two rows at a time, recomputed in backward
    (chunked(batch["input_ids"], batch["loss_mask"], temperature).logprobs.sum() * 0.3).backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            # HF norms compute in float32 even in a float64 model.
            assert (parameter.grad - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name


def test_model_with_custom_logits_is_run_as_a_whole(tokenizer: Any) -> None:
    model = build_model(tokenizer)
    plain = model.forward
    model.forward = lambda *args, **kwargs: _shifted(plain(*args, **kwargs))
    token_logprobs = TokenLogprobs(model)
    assert not token_logprobs.backbone.separable
    batch = random_rows(tokenizer, [6])
    logp = model(batch["input_ids"]).logits.log_softmax(-1)[0, :-1].gather(-1, batch["input_ids"][0, 1:, None])[:, 0]
    torch.testing.assert_close(
        token_logprobs(batch["input_ids"], batch["loss_mask"]).logprobs[0, 2:], logp[1:], rtol=1e-5, atol=1e-5
    )


def _shifted(out: Any) -> Any:
    out.logits = out.logits * 1.5
    return out


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_targets_are_found_by_structure(tokenizer: Any, architecture: str) -> None:
    model = build_model(tokenizer, architecture=architecture)
    groups = {target: set(LoRA(target=[target]).layer_names(model)) for target in ("attention", "mlp", "unembedding")}
    assert all(groups.values())
    assert not groups["attention"] & groups["mlp"]
    assert len(groups["unembedding"]) == 1
    assert set(LoRA(target=["all"]).layer_names(model)) == set.union(*groups.values())
    assert len(Start(model, lora=LoRA(target=["all"], rank=2)).load().peft_config["default"].target_modules) > 2
    with pytest.raises(ConfigError, match="matches no layer; use attention"):
        LoRA(target=["atention"]).layer_names(model)


def perturb(model: Any, scale: float = 0.3) -> None:
    """Change trainable weights, so that an adapter is not the identity."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("target", [["attention"], ["all"]])
def test_adapter_is_continued_or_merged(base: str, tokenizer: Any, tmp_path: Path, target: list[str]) -> None:
    from peft import AutoPeftModelForCausalLM

    model = Start(base, lora=LoRA(rank=2, target=target)).load()
    perturb(model)
    wanted = logits(model)
    folder = tmp_path / "adapter"
    save_model(model, tokenizer, folder, [2])
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), wanted)

    continued = Start(str(folder), lora=LoRA(rank=2, target=target))
    torch.testing.assert_close(logits(continued.load()), wanted)
    assert not continued.fresh_adapter
    for start in (Start(str(folder)), Start(str(folder), lora=LoRA(rank=4, target=["mlp"]))):
        torch.testing.assert_close(logits(start.load(tmp_path / "stage")), wanted, rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "stage" / "merged")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == (target != ["all"])


def test_merged_model_of_another_adapter_is_not_reused(base: str, tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for name, scale in (("a", 0.3), ("b", 0.6), ("a", 0.3)):
        torch.manual_seed(0)  # of the adapter's first weights
        model = Start(base, lora=LoRA(rank=2)).load()
        perturb(model, scale)
        save_model(model, tokenizer, tmp_path / name, [2])
        merged = Start(str(tmp_path / name)).load(tmp_path / "stage")
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
        found.append(logits(merged))
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)


def test_reference_is_the_start_model(base: str, tokenizer: Any, tmp_path: Path) -> None:
    batch = random_rows(tokenizer, [8, 6])
    adapter = Start(base, lora=LoRA(rank=2)).load()
    perturb(adapter)
    save_model(adapter, tokenizer, tmp_path / "adapter", [2])
    cases = [
        (Start(base), "copy"),
        (Start(base, lora=LoRA(rank=2)), "disabled"),
        (Start(str(tmp_path / "adapter"), lora=LoRA(rank=2)), "adapter"),
    ]
    for start, mode in cases:
        model = start.load()
        before = TokenLogprobs(model)(batch["input_ids"], batch["loss_mask"]).logprobs.detach()
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        reference = Reference(model, start.fresh_adapter)
        assert reference.mode == mode
        perturb(model)
        torch.testing.assert_close(reference.logprobs(batch["input_ids"], batch["loss_mask"]), before)
        after = TokenLogprobs(model)(batch["input_ids"], batch["loss_mask"]).logprobs.detach()
        assert not torch.allclose(after, before)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
        torch.testing.assert_close(
            TokenLogprobs(model)(batch["input_ids"], batch["loss_mask"]).logprobs.detach(), after
        )


# -- scorers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "gpt2"])
def test_reward_head_equals_stock_pooling(tokenizer: Any, architecture: str) -> None:
    model = build_model(tokenizer, architecture=architecture, task="SEQ_CLS")
    init_head(model)
    scorer = RewardHead().build(LoadedModel(model, tokenizer, [tokenizer.eos_token_id]))
    batch = random_rows(tokenizer, [9, 4, 7])
    attention = (torch.arange(9)[None] < batch["lengths"][:, None]).long()
    stock = model(batch["input_ids"], attention_mask=attention).logits[:, 0]
    torch.testing.assert_close(scorer(batch), stock, rtol=1e-5, atol=1e-5)
    for i, length in enumerate(batch["lengths"].tolist()):
        torch.testing.assert_close(
            model(batch["input_ids"][i : i + 1, :length]).logits[0, 0], stock[i], rtol=1e-5, atol=1e-5
        )


def test_head_initialization(tokenizer: Any) -> None:
    model = build_model(tokenizer, task="SEQ_CLS", hidden_size=256)
    init_head(model)
    assert 0.8 < float(model.score.weight.std() * 257**0.5) < 1.2


def test_sequence_logprob(tokenizer: Any) -> None:
    model = build_model(tokenizer)
    batch = random_rows(tokenizer, [9, 4])
    plain = plain_logprobs(model, batch)
    for normalized in (False, True):
        scorer = SequenceLogprob(length_normalized=normalized, beta=2.0).build(LoadedModel(model, tokenizer, [2]))
        wanted = 2 * plain.sum(-1) / (batch["loss_mask"].sum(-1) if normalized else 1)
        torch.testing.assert_close(scorer(batch).double(), wanted, rtol=1e-5, atol=1e-5)


def test_padding_token_is_never_a_stop_token(tokenizer: Any) -> None:
    assert pad_token(tokenizer, [tokenizer.eos_token_id]) == "<|pad|>"
    size = len(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.convert_tokens_to_ids(pad_token(tokenizer, [tokenizer.eos_token_id])) != tokenizer.eos_token_id
    assert len(tokenizer) == size


# -- wrong models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such folder"),
        ("a/b/c.ckpt", "Lightning checkpoint"),
        ("EMPTY", "neither config.json nor"),
        (
            "no/such-model",
            r"cannot be loaded: no such folder \(seen from .*cannot be reached. Use a folder that exists.$",
        ),
    ],
)
def test_missing_models_are_reported(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Start(str(tmp_path) if source == "EMPTY" else source).load()


def test_mismatched_tokenizers_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not match"):
        check_vocabulary(build_model(tokenizer, vocab_size=len(tokenizer) - 1), tokenizer)
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(build_model(tokenizer))
    with pytest.raises(ConfigError, match="neither a file nor a template"):
        load_tokenizer(None, tokenizer, chat_template="missing.jinja")


def test_reward_model_folder_loads_in_stock_transformers(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model(tokenizer, task="SEQ_CLS")
    save_model(model, tokenizer, tmp_path / "rm", [2])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_weights_that_the_model_does_not_use_give_a_warning(
    task: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_model(tokenizer, architecture="llama", num_hidden_layers=3, tie_word_embeddings=False).save_pretrained(
        tmp_path
    )
    Start(str(tmp_path), task).load()
    assert "does not use" not in caplog.text
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    Start(str(tmp_path), task).load()
    assert re.search(r"have 9 weights that Llama\w+ does not use \(for example model\.layers\.2\.", caplog.text)
