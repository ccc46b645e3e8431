"""Llama-like decoders on a CPU, computed for sampling: few large products and no module calls.

A decoding step multiplies a few rows by every weight of the model, so it is bound by reading weights and by the
overhead of calls. Here query, key and value are one product, gate and up another, and oneDNN gets the weights in its
own layout, once per `generate` call.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.generation.kv_cache import PrefillCache, SharedPrompts, SlotKVCache
from rlhf_lightning.models.attention import Decoding, packed_attention
from rlhf_lightning.models.attention import kept_attention as attention_of_kept
from rlhf_lightning.models.fused_layers import MODELS, rotate, signed_sines
from rlhf_lightning.models.last_layer import KeptLayout, has_other_hooks
from rlhf_lightning.models.lora import LoRAFactors, base_of, is_adapted, lora_factors, lora_obstacles
from rlhf_lightning.models.packing import PackedLayout
from rlhf_lightning.models.precision import rounded_factors
from rlhf_lightning.models.projection import is_plain_linear, linear_of, unadapted
from rlhf_lightning.models.sharding import is_sharded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles depend only on the position."""
ROWS = 32
"""Number of rows for which oneDNN chooses its layout of the weights; products of other sizes use the same one."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer, given by its index: query, key and value `[n, heads, size]` → `[m, heads · size]`."""


@dataclass(frozen=True)
class _Norm:
    """RMS norm over the last dimension, in float32 even for wider states, as in transformers.

    Attributes:
        weight: `[size]`, or `[heads, size]` if heads have different weights.
        eps: Added to the mean square.
    """

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32 and self.weight.dim() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class _Product:
    """One matrix product for linear layers with the same input, whose outputs are concatenated.

    In float32 and wider, adapters are merged into the copy of the weights. In bfloat16 they are not: rounded to
    bfloat16, a sum of weight and update would lose small updates, and differ from training, which adds the adapter's
    output, `x + B A x`. There the first factors `A` are further rows of the weight, and the second ones are on the
    diagonal of one weight.

    Args:
        layers: The layers.
        adapters: The factors of each layer's adapter; None for a layer without one.
        dtype: Type of weights and outputs.
    """

    def __init__(self, layers: Sequence[nn.Linear], adapters: Sequence[LoRAFactors | None], dtype: torch.dtype) -> None:
        self.dtype, self.outputs = dtype, sum(layer.out_features for layer in layers)
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        biases: list[Tensor | None] = [layer.bias for layer in layers]
        biases = [None if bias is None else bias.detach().to(dtype) for bias in biases]
        self.up: Tensor | None = None
        """The second factors of the adapters; None without adapters that are not merged."""
        if any(adapters):
            empty = [(weight.new_zeros(0, weight.shape[1]), weight[:, :0]) for weight in weights]
            factors = [pair or none for pair, none in zip(adapters, empty, strict=True)]
            if dtype.itemsize >= torch.float32.itemsize:
                with torch.autocast(weights[0].device.type, enabled=False):
                    pairs = zip(weights, factors, strict=True)
                    weights = [torch.addmm(weight, b.to(dtype), a.to(dtype)) for weight, (a, b) in pairs]
            else:
                weights += [a.to(dtype) for a, _ in factors]
                biases += [None] * len(factors)
                self.up = _packed(torch.block_diag(*(b for _, b in factors)).to(dtype))
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            filled = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
            self.bias = torch.cat(filled)
        self.weight = _packed(torch.cat(weights))

    def __call__(self, x: Tensor) -> Tensor:
        out = _linear(x.to(self.dtype), self.weight, self.bias)
        if self.up is None:
            return out
        out, low = out.tensor_split([self.outputs], -1)
        return out.add_(_linear(low.contiguous(), self.up, None))


def _packed(weight: Tensor) -> Tensor:
    """The weight in the layout of oneDNN, if oneDNN computes in its type; otherwise the weight."""
    fits = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if not (fits and torch.backends.mkldnn.is_available()):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return packed


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@dataclass(frozen=True)
class _Layer:
    before_attention: _Norm
    qkv: _Product
    head_norm: _Norm | None
    output: _Product
    before_mlp: _Norm
    gate_up: _Product
    activation: Callable[[Tensor], Tensor]
    down: _Product


class FusedDecoder:
    """The decoder of a Llama-like model in a given precision, with its own copy of the weights.

    Products and keys and values are in `dtype`; hidden states, norms, rotary embeddings, scores and softmax in float32
    or wider.

    Args:
        model: A model for which `supports` is True.
        dtype: Precision of the products.

    Example:
        ```python
        decoder = FusedDecoder(model, torch.bfloat16)
        states = decoder.step(kv_cache, tokens)
        ```
    """

    def __init__(self, model: "PreTrainedModel | PeftModel", dtype: torch.dtype) -> None:
        base, self.dtype = base_of(model), dtype
        config = base.config.get_text_config()
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        decoder = base.get_decoder()
        names = {id(module): name for name, module in base.named_modules()}
        adapters = dict(lora_factors(model)) if is_adapted(model) else {}
        wide = torch.promote_types(next(decoder.parameters()).dtype, torch.float32)

        def norm(module: "LlamaRMSNorm") -> _Norm:
            return _Norm(module.weight.detach().to(wide), module.variance_epsilon)

        def head_norm(attention: "Qwen3Attention") -> _Norm:
            counts = self.heads, self.key_heads
            norms = [norm(attention.q_norm), norm(attention.k_norm)]
            weight = [one.weight.expand(count, -1) for one, count in zip(norms, counts, strict=True)]
            return _Norm(torch.cat(weight), norms[0].eps)

        def product(*modules: nn.Module) -> _Product:
            found = [adapters.get(names[id(module)]) for module in modules]
            return _Product([linear_of(module) for module in modules], found, dtype)

        self.layers = []
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            normed = hasattr(attention, "q_norm")
            self.layers.append(
                _Layer(
                    norm(layer.input_layernorm),
                    product(attention.q_proj, attention.k_proj, attention.v_proj),
                    head_norm(attention) if normed else None,
                    product(attention.o_proj),
                    norm(layer.post_attention_layernorm),
                    product(mlp.gate_proj, mlp.up_proj),
                    mlp.act_fn,
                    product(mlp.down_proj),
                )
            )
        self.embeddings, self.rotary, self.norm = decoder.embed_tokens, decoder.rotary_emb, norm(decoder.norm)
        self.wide = wide
        self.size, self.scale = attention.head_dim, attention.scaling
        head = base.get_output_embeddings()
        self.head: _Product | None = None
        """The head in its own precision; None if it is not a plain layer."""
        self.rounds_head = head.weight.dtype != dtype
        if _is_plain(head) and not hasattr(head, "base_layer"):
            with self._head_precision():
                self.head = _Product([head], [None], head.weight.dtype)

    def logits(self, states: Tensor) -> Tensor | None:
        """Outputs of the head `[n, V]` for states `[n, H]`; None if the head is not a plain layer.

        Under autocast they are those of `Backbone.logits`: float32, of factors that may be rounded to bfloat16.
        """
        if self.head is None:
            return None
        with self._head_precision(), torch.autocast(states.device.type, enabled=False):
            return self.head(states)

    def _head_precision(self) -> AbstractContextManager[None]:
        return rounded_factors() if self.rounds_head else nullcontext()

    def prefill(self, ids: Tensor, layout: PackedLayout, ends: Tensor) -> tuple[list[PrefillCache], Tensor]:
        """Compute prompts.

        Args:
            ids: The tokens of all prompts, `[n]`.
            layout: Their layout.
            ends: Increasing indices of the tokens whose states are returned, `[m]`.

        Returns:
            Keys and values per layer, and the states at `ends`, `[m, H]`.
        """
        cache = [PrefillCache() for _ in self.layers]
        last = len(self.layers) - 1

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
            cache[index].update(k, v)
            if index < last:
                return packed_attention(q, k, v, layout, self.scale)[0].flatten(1)
            return attention_of_kept(q[:, :, ends], KeptLayout(layout, ends, k, v), self.scale)[0].flatten(1)

        return cache, self._run(ids, layout.columns, attend, ends)

    def step(self, kv_cache: SlotKVCache, tokens: Tensor) -> Tensor:
        """Feed the last token of every slot.

        Args:
            kv_cache: A cache with transposed keys.
            tokens: Last token of each slot, `[slots]`.

        Returns:
            States of these tokens, `[slots, H]`.
        """
        groups, shared = self.heads // self.key_heads, kv_cache.shared
        bias = Decoding(kv_cache.positions, kv_cache.width).bias(None, self.key_heads, groups, self.wide)
        if shared:
            bias = bias[..., shared.columns :]

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = kv_cache.layers[index].update(key[:, :, None], value[:, :, None])
            if shared:
                return self._attend_in_groups(query, keys, values, bias, shared)
            # Query heads that share keys are the rows of one product. Scores are in float32, as in training.
            q, k = query.reshape(-1, groups, self.size).to(self.wide), keys.flatten(0, 1).transpose(1, 2).to(self.wide)
            weights = torch.baddbmm(bias, q, k, alpha=self.scale).softmax(-1).to(self.dtype)
            return torch.bmm(weights, values.flatten(0, 1)).view(len(query), -1)

        return self._run(tokens, kv_cache.positions, attend)

    def _attend_in_groups(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, shared: SharedPrompts
    ) -> Tensor:
        """Attention of a step in which each group of slots reads the keys and values of its prompt once.

        Args:
            query: `[slots, heads, size]`.
            keys: `[slots, key heads, width, size]`.
            values: As `keys`.
            bias: Added to the scores of the positions after the shared ones.
            shared: The groups.

        Returns:
            `[slots, heads · size]`.
        """
        count, heads, first = len(query), self.key_heads, shared.columns
        q = query.view(count, heads, -1, self.size).to(self.wide)
        # Products of the prompts of all groups, then of the positions that each slot has alone, under one softmax.
        prompts = shared.prompts(keys).transpose(1, 2).to(self.wide)
        scores = self.scale * shared.scatter(torch.bmm(shared.gather(q), prompts), heads)
        own = keys[:, :, first:].flatten(0, 1).transpose(1, 2).to(self.wide)
        own_scores = torch.baddbmm(bias, q.flatten(0, 1), own, alpha=self.scale).unflatten(0, (count, heads))
        weights = torch.cat([scores, own_scores], -1).softmax(-1).to(self.dtype)
        of_prompts = torch.bmm(shared.gather(weights[..., :first]), shared.prompts(values))
        of_own = torch.bmm(weights[..., first:].flatten(0, 1), values[:, :, first:].flatten(0, 1))
        return (shared.scatter(of_prompts, heads).flatten(0, 1) + of_own).view(count, -1)

    def _run(self, ids: Tensor, positions: Tensor, attend: Attend, ends: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm, of all tokens or of those at `ends`.

        Args:
            ids: Token ids, `[n]`.
            positions: Their positions, `[n]`.
            attend: Attention; in the last layer it returns the tokens at `ends`.
            ends: The tokens that the last layer computes; None for all.
        """
        device = ids.device.type
        with torch.autocast(device, enabled=False):
            x = F.embedding(ids, self.embeddings.weight).to(self.wide)
            cos, sin = (part[0, :, None] for part in self.rotary(x, position_ids=positions[None]))
            sin = signed_sines(sin)
            for index, layer in enumerate(self.layers):
                states = layer.qkv(layer.before_attention(x)).unflatten(-1, (-1, self.size))
                rotated, value = states.split([self.heads + self.key_heads, self.key_heads], 1)
                if layer.head_norm is not None:
                    rotated = layer.head_norm(rotated)
                rotated = rotate(rotated.to(self.wide), cos, sin).to(self.dtype)
                query, key = rotated.split([self.heads, self.key_heads], 1)
                attended = attend(index, query, key, value)
                if ends is not None and index == len(self.layers) - 1:
                    x = x[ends]
                x = x + layer.output(attended)
                gate, up = layer.gate_up(layer.before_mlp(x)).chunk(2, -1)
                x += layer.down(layer.activation(gate) * up)
            return self.norm(x)


def supports(model: "PreTrainedModel | PeftModel") -> bool:
    """True if `FusedDecoder` can compute the model: Llama-like, on a CPU, not sharded, adapters of LoRA's plain kind.

    A model with hooks runs its own modules, because a hook may read or change what they compute.

    Args:
        model: A causal model, or a `PeftModel` around one.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    if next(model.parameters()).device.type != "cpu" or is_sharded(model) or config.model_type not in MODELS:
        return False
    decoder = base.get_decoder()
    # A subclass may compute something else.
    if not type(decoder).__module__.startswith("transformers.models.") or getattr(config, "sliding_window", None):
        return False
    if decoder.rotary_emb.rope_type not in ROTARY or type(decoder.embed_tokens) is not nn.Embedding:
        return False
    if is_adapted(model) and not set(lora_obstacles(model)) <= {"trained weights of the base"}:
        return False
    if any(has_other_hooks(module) for module in base.modules()):
        return False
    return all(_is_plain(module) for module in _projections(decoder))


def copied_bytes(model: "PreTrainedModel | PeftModel", size: int) -> int:
    """Bytes of the weights that `FusedDecoder` copies while it samples, without those of adapters.

    Args:
        model: A causal model, or a `PeftModel` around one.
        size: Bytes of a number in the products.

    Returns:
        0 if `FusedDecoder` does not compute the model.
    """
    if not supports(model):
        return 0
    head = base_of(model).get_output_embeddings().weight
    return size * sum(linear_of(one).weight.numel() for one in _projections(base_of(model).get_decoder())) + head.nbytes


def _projections(decoder: "LlamaModel") -> list[nn.Module]:
    """The linear layers of a Llama-like decoder, or the adapters around them."""
    return [
        module
        for layer in decoder.layers
        for part in (layer.self_attn, layer.mlp)
        for name, module in part.named_children()
        if name.endswith("_proj")
    ]


def _is_plain(module: nn.Module) -> bool:
    """True for a linear layer as it is, or below one active adapter that is not merged."""
    from peft.tuners.lora import LoraLayer

    if not is_plain_linear(module):
        return False
    if not isinstance(module, LoraLayer):
        return unadapted(module) is module
    return not module.disable_adapters and not module.merged and list(module.active_adapters) == ["default"]
