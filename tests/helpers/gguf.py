"""GGUF files as llama.cpp's conversion writes them, of tiny models of transformers."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
CONTROL, NORMAL, UNUSED = 3, 1, 5


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    kind: str,
    store: str = "F32",
    pre: str = "gpt-2",
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write a model and its tokenizer.

    Args:
        path: The file.
        model: A model of transformers.
        tokenizer: Its tokenizer, byte-level BPE.
        kind: llama.cpp's name of the architecture.
        store: Type of the matrices.
        pre: llama.cpp's name of the pre-tokenizer.
        extra: Metadata besides, or in place of the model's.
        tensors: Further tensors.
        without: Keys that are left out.
    """
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

    config = model.config
    writer = GGUFWriter(str(path), kind)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.sliding_window": getattr(config, "sliding_window", None) if kind.startswith("gemma") else None,
    }
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    metadata: dict[str, Any] = {f"{kind}.{key}": value for key, value in numbers.items() if value is not None}
    metadata |= {
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.freq_base": rope["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
        **vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0]),
        **(extra or {}),
    }
    for key, value in metadata.items():
        if key in without or value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_key_value(key, value, GGUFValueType.ARRAY)
    for name, weight in {**model.state_dict(), **(tensors or {})}.items():
        stored = gguf_name(name, kind)
        if stored in without or (stored == "output.weight" and config.tie_word_embeddings):
            continue
        data = converted(weight, stored, kind, config).float().numpy()
        if data.ndim == 1:
            writer.add_tensor(stored, data)
        else:
            raw = GGMLQuantizationType[store]
            writer.add_tensor(stored, quants.quantize(data, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Tokens, their types and merges, filled up to the rows of the embedding."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["id"] for token in backend["added_tokens"] if token["special"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in backend["model"]["merges"]]
    return {
        "tokenizer.ggml.tokens": [by_id.get(number, f"[PAD{number}]") for number in range(rows)],
        "tokenizer.ggml.token_type": [
            CONTROL if number in special else NORMAL if number in by_id else UNUSED for number in range(rows)
        ],
        "tokenizer.ggml.merges": merges,
    }


def gguf_name(name: str, kind: str) -> str:
    """llama.cpp's name of a weight."""
    stem, _, suffix = name.rpartition(".")
    names = {**NAMES, **(GEMMA if kind in ("gemma2", "gemma3") else {})}
    if stem in names:
        return f"{names[stem]}.{suffix}"
    parts = stem.split(".")
    if parts[:2] != ["model", "layers"]:
        return name
    return f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.{suffix}"


def converted(weight: torch.Tensor, name: str, kind: str, config: Any) -> torch.Tensor:
    """What the conversion does to a weight: llama.cpp turns neighboring numbers, transformers the two halves."""
    if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        rest = weight.shape[1:]
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest)
        return halves.transpose(1, 2).reshape(weight.shape).contiguous()
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    return weight


def text(value: str | bytes) -> bytes:
    """A text as it stands in a header."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def header(tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    """The first 24 bytes of a file."""
    return magic + struct.pack("<IQQ", version, tensors, keys)
