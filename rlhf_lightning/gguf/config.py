"""Translates the architecture of a GGUF file: its config and weight names, as transformers has them."""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_lightning.gguf.header import Header
from rlhf_lightning.types import JSON

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""The `model_type` of transformers for each supported architecture."""

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {  # gemma2 and gemma3 also normalize the output of each block
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LARGEST = 2**22
"""Largest number of layers, heads or dimensions that is accepted before comparing it with the weights."""
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with divisors of the rotary frequencies; llama.cpp stores the RoPE scaling of Llama 3 in it."""


def config_of(header: Header, rope_factors: Tensor | None = None) -> dict[str, JSON]:
    """Build the arguments of `AutoConfig.for_model` for the model in a file.

    Args:
        header: The file's header.
        rope_factors: The tensor `rope_freqs.weight`, if the file has it.

    Raises:
        ConfigError: If the architecture is not supported, or a size is missing or does not match the weights.
    """
    kind = header.text("general.architecture")
    if kind not in ARCHITECTURES:
        raise header.refuse(
            f"its architecture is {kind or 'not given'}; supported are {', '.join(ARCHITECTURES)}. Use the folder or "
            "Hub id of the model instead"
        )
    if (parts := header.whole("split.count") or 1) > 1:
        raise header.refuse(f"it is one of {parts} parts; join them with llama-gguf-split --merge")
    if header.whole(f"{kind}.expert_count"):
        raise header.refuse(
            "it is a mixture of experts, which is not supported. Use the folder or Hub id of the model instead"
        )
    settings = _sizes(header, kind)
    rope = _rope(header, kind, rope_factors, settings["head_dim"])
    bias = {part: f"blk.0.{part}.bias" in header.tensors for part in ("attn_q", "ffn_up")}
    common: dict[str, JSON] = {
        "model_type": ARCHITECTURES[kind],
        **settings,
        "rms_norm_eps": _decimal(header.number(f"{kind}.attention.layer_norm_rms_epsilon") or 1e-6),
        "max_position_embeddings": header.whole(f"{kind}.context_length") or 2048,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": rope,
        **{name: header.whole(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()},
    }
    if kind == "llama":
        common |= {"attention_bias": bias["attn_q"], "mlp_bias": bias["ffn_up"]}
    elif kind == "qwen3":
        common["attention_bias"] = bias["attn_q"]
    elif kind in ("gemma2", "gemma3"):
        common |= _gemma(header, kind, settings, rope)
    return common


_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _sizes(header: Header, kind: str) -> dict[str, int]:
    """Read the sizes of the model. Compares the number of layers with the weights; `folder` compares the others."""

    def size(key: str) -> int:
        value = header.whole(f"{kind}.{key}")
        if not value or value > LARGEST:
            raise header.refuse(f"{kind}.{key} is {value}; it must be from 1 to {LARGEST}")
        return value

    layers, heads, hidden = size("block_count"), size("attention.head_count"), size("embedding_length")
    found = {int(match[1]) for name in header.tensors if (match := _LAYER.fullmatch(name))}
    if found != set(range(len(found))) or layers != len(found):
        raise header.refuse(f"{kind}.block_count is {layers}, but the file has the weights of {len(found)} layers")
    grouped = "attention.head_count_kv"
    named = ("attention.key_length", *(["rope.dimension_count"] if kind == "llama" else []))
    dimension = next((size(key) for key in named if f"{kind}.{key}" in header.metadata), None)
    if not dimension and hidden % heads:
        raise header.refuse(f"{kind}.embedding_length is {hidden}, which is not divisible by the {heads} heads")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise header.refuse("it has no embedding (token_embd.weight), so the model is incomplete")
    return {
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size(grouped) if f"{kind}.{grouped}" in header.metadata else heads,
        "head_dim": dimension or hidden // heads,
        "vocab_size": embedding.shape[0],
    }


def _gemma(header: Header, kind: str, settings: dict[str, int], rope: dict[str, JSON]) -> dict[str, JSON]:
    """Additional settings of Gemma 2 and 3."""
    # Only the 27B models scale attention by hidden_size / heads; llama.cpp recognizes them by their layers, too.
    largest = settings["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[kind]
    scale = settings["hidden_size"] // settings["num_attention_heads"] if largest else settings["head_dim"]
    found: dict[str, JSON] = {"query_pre_attn_scalar": scale}
    if window := header.whole(f"{kind}.attention.sliding_window"):
        found["sliding_window"] = window
    if kind == "gemma2":
        for name, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
            found[name] = _decimal(header.number(f"gemma2.{name}") or default)
    else:
        local = _decimal(header.number("gemma3.rope.freq_base_swa") or 10000.0)
        found["rope_parameters"] = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return found


def _rope(header: Header, kind: str, factors: Tensor | None, head_dim: int) -> dict[str, JSON]:
    """Settings of the rotary position embedding."""
    theta = _decimal(header.number(f"{kind}.rope.freq_base") or 10000.0)
    scaling = header.text(f"{kind}.rope.scaling.type") or "none"
    factor = header.number(f"{kind}.rope.scaling.factor")
    if factors is not None:
        return {"rope_theta": theta, **_llama3(header, factors, theta, head_dim)}
    if scaling == "none" or factor in (None, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        raise header.refuse(f"{kind}.rope.scaling.type is {scaling!r}; supported are linear and yarn")
    rope: dict[str, JSON] = {"rope_type": scaling, "rope_theta": theta, "factor": factor}
    if original := header.whole(f"{kind}.rope.scaling.original_context_length"):
        rope["original_max_position_embeddings"] = original
    return rope


def _llama3(header: Header, factors: Tensor, theta: float, head_dim: int) -> dict[str, JSON]:
    """Settings of Llama 3's RoPE scaling that result in the given divisors of the frequencies."""
    low, high, original = 1.0, 4.0, 8192
    factor = float(f"{factors.max():.4g}")
    wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise header.refuse(
            f"{ROPE_FACTORS} is not the scaling of Llama 3.1 to 3.3. Use the folder or Hub id of the model instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _decimal(value: float) -> float:
    """The shortest decimal number that rounds to a float32, for example 1e-05 for 9.999999747378752e-06."""
    return next(short for digits in range(1, 18) if _same_float32(short := float(f"{value:.{digits}g}"), value))


def _same_float32(a: float, b: float) -> bool:
    return bool(torch.tensor(a, dtype=torch.float32) == torch.tensor(b, dtype=torch.float32))


def weight_names(header: Header) -> dict[str, str]:
    """Map the name of each weight in the file to its name in transformers.

    Args:
        header: The file's header.

    Raises:
        ConfigError: If the file has a weight that transformers' model does not have.
    """
    kind = header.text("general.architecture")
    parts = {**_PARTS, **(_GEMMA_NORMS if kind in ("gemma2", "gemma3") else _NORMS)}
    found = {}
    for name in header.tensors:
        layer = _LAYER.fullmatch(name)
        if name == ROPE_FACTORS:
            continue
        if name in _OUTSIDE:
            found[name] = _OUTSIDE[name]
        elif layer and layer[2] in parts:
            found[name] = f"model.layers.{int(layer[1])}.{parts[layer[2]]}.{layer[3]}"
        else:
            raise header.refuse(
                f"it has the weight {name!r:.80}, which the {kind} model of transformers does not have. Use the folder "
                "or Hub id of the model instead"
            )
    return found


def restored(kind: str, config: "PretrainedConfig") -> Callable[[str, Tensor], Tensor]:
    """Make a function that reverses the changes of llama.cpp's conversion to a weight.

    The conversion permutes the rows of Llama's query and key projections, and adds 1 to Gemma's norms.

    Args:
        kind: The architecture.
        config: Its config.
    """

    def restore(name: str, weight: Tensor) -> Tensor:
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind == "llama" and f".{part}." in name:
                rest = weight.shape[1:]
                halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *rest)
                return halves.transpose(1, 2).reshape(weight.shape)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            return weight.float() - 1
        return weight

    return restore
