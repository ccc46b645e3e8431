"""Tiny models."""

from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.quickstart.model import make_tokenizer

TEXTS = [
    "Hello there, how are you today? I am fine, thank you.",
    "user\nassistant\nsystem\n",
    "one two three four five",
]


def build_model(
    tokenizer: Any, seed: int = 0, architecture: str = "qwen3", task: str = "CAUSAL_LM", **options: Any
) -> Any:
    """A tiny model of an architecture, with random weights large enough that outputs differ."""
    import transformers

    names = {
        "qwen3": "Qwen3",
        "qwen2": "Qwen2",
        "mistral": "Mistral",
        "gemma3": "Gemma3",
        "phi": "Phi",
        "phi3": "Phi3",
        "bloom": "Bloom",
        "mamba": "Mamba",
        "falcon": "Falcon",
        "llama": "Llama",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
        "gpt2": "GPT2",
        "cohere": "Cohere",
        "neox": "GPTNeoX",
    }
    config_name = "Gemma3TextConfig" if architecture == "gemma3" else f"{names[architecture]}Config"
    config_class = getattr(transformers, config_name)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    common |= {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 256}
    if architecture == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
        common.pop("max_position_embeddings")
    elif architecture in ("bloom", "mamba", "falcon"):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
        sizes |= {
            "bloom": {"n_head": 4},
            "mamba": {"state_size": 4, "time_step_rank": 4},
            "falcon": {"num_attention_heads": 4, "alibi": False},
        }[architecture]
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        if architecture not in ("neox", "phi"):
            sizes["num_key_value_heads"] = 2
        if architecture in ("mistral", "gemma2", "gemma3", "phi3"):
            sizes["sliding_window"] = 5
        if architecture in ("qwen3", "gemma", "gemma2", "gemma3"):
            sizes["head_dim"] = 8
        if architecture == "gemma2":  # before transformers 5.23 it is sdpa, which leaves its cap out
            sizes["attn_implementation"] = "eager"
        sizes["initializer_range"] = 0.2
        sizes["tie_word_embeddings"] = architecture != "neox"
    config = config_class(**{**common, **sizes, **options})
    suffix = "ForCausalLM" if task == "CAUSAL_LM" else "ForSequenceClassification"
    if architecture == "gpt2":
        suffix = "LMHeadModel" if task == "CAUSAL_LM" else suffix
    if task == "SEQ_CLS":
        config.num_labels = 1
    torch.manual_seed(seed)
    return getattr(transformers, f"{names[architecture]}{suffix}")(config).eval()


def save_small_model(folder: Path, context: int) -> Path:
    """Save a tiny model of a shape that vLLM's kernels support, and return its folder."""
    tokenizer = make_tokenizer(TEXTS * 5)
    model = build_model(
        tokenizer, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=context, initializer_range=0.12,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
