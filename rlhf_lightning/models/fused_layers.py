"""Decoder layers of Llama-like models on a CPU under autocast to bfloat16: few products, little kept for backward.

Autocast converts weights and states for every product, and autograd keeps inputs and outputs of every operation. Here
query, key and value are one product, gate and up another; the adapters (LoRA) of layers with the same input are two
products. Norms and the activation are computed again in backward, so that a layer keeps its two residual states, the
rotated queries and keys, the values, the output of attention, and gate and up. The precisions are those of autocast:
factors and outputs of products are bfloat16, everything else is float32.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf_lightning.models import last_layer
from rlhf_lightning.models.attention import packed_attention
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.packing import PackedLayout
from rlhf_lightning.models.projection import LayerWeights, Projection, is_plain_linear, unadapted
from rlhf_lightning.models.sharding import is_sharded, layers_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose layers are computed here, and by `FusedDecoder`."""


class NormProductFunction(torch.autograd.Function):
    """Autograd function: `apply(x, norm_weight, eps, projection, *projection.parameters)` → `[n, out]`.

    The projection of an RMS norm; `x` is `[n, H]`. The norm is computed again in backward.

    Example:
        >>> projection = Projection([nn.Linear(4, 2, bias=False)], torch.float32)
        >>> NormProductFunction.apply(torch.ones(3, 4), torch.ones(4), 1e-6, projection, *projection.parameters).shape
        torch.Size([3, 2])
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, eps: float, projection: Projection, *parameters: Tensor
    ) -> Tensor:
        """Compute the output."""
        with torch.autocast("cpu", enabled=False):
            norm = _inverse_norm(x, eps)
            out, down = projection(_normed(x, norm, norm_weight, projection.dtype))
        ctx.projection = projection
        ctx.save_for_backward(x, norm_weight, norm, down)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the states, the norm's weight and the parameters."""
        x, norm_weight, norm, down = ctx.saved_tensors
        projection: Projection = ctx.projection
        needed = ctx.needs_input_grad[4:]
        with torch.autocast("cpu", enabled=False):
            by_down = projection.by_down(grad)
            states = _normed(x, norm, norm_weight, projection.dtype) if projection.reads_input(needed) else None
            gradients = projection.gradients(needed, grad, states, down, by_down)
            by_x = by_weight = None
            if any(ctx.needs_input_grad[:2]):  # not in the first layer, if only adapters are trained
                by_states = projection.by_input(grad, by_down)
                by_weight = _by_norm_weight(by_states, x, norm) if ctx.needs_input_grad[1] else None
                by_x = _norm_backward(by_states, x, norm, norm_weight) if ctx.needs_input_grad[0] else None
        return by_x, by_weight, None, None, *gradients


class ResidualProductFunction(torch.autograd.Function):
    """Autograd function: `apply(x, states, projection, *projection.parameters)` → `x + projection(states)`, `[n, H]`.

    Example:
        >>> projection = Projection([nn.Linear(2, 4, bias=False)], torch.float32)
        >>> states = torch.zeros(3, 2)
        >>> ResidualProductFunction.apply(torch.ones(3, 4), states, projection, *projection.parameters).shape
        torch.Size([3, 4])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, states: Tensor, projection: Projection, *parameters: Tensor) -> Tensor:
        """Compute the output."""
        with torch.autocast("cpu", enabled=False):
            out, down = projection(states)
            ctx.projection = projection
            ctx.save_for_backward(states, down)
            return x + out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both states and the parameters."""
        states, down = ctx.saved_tensors
        projection: Projection = ctx.projection
        with torch.autocast("cpu", enabled=False):
            narrow = grad.to(projection.dtype)
            by_down = projection.by_down(narrow)
            by_states = projection.by_input(narrow, by_down)
            gradients = projection.gradients(ctx.needs_input_grad[3:], narrow, states, down, by_down)
        return grad, by_states, None, *gradients


class MLPFunction(torch.autograd.Function):
    """Autograd function: `apply(x, norm_weight, eps, gate_up, down, *parameters)` → `x + MLP(norm(x))`, `[n, H]`.

    The MLP is `down(silu(gate) · up)`; `parameters` are those of `gate_up` and `down`. Norm and activation are computed
    again in backward.

    Example:
        >>> gate_up = Projection([nn.Linear(4, 6), nn.Linear(4, 6)], torch.float32)
        >>> down = Projection([nn.Linear(6, 4)], torch.float32)
        >>> parameters = [*gate_up.parameters, *down.parameters]
        >>> MLPFunction.apply(torch.ones(3, 4), torch.ones(4), 1e-6, gate_up, down, *parameters).shape
        torch.Size([3, 4])
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        gate_up: Projection,
        down: Projection,
        *parameters: Tensor,
    ) -> Tensor:
        """Compute the output."""
        with torch.autocast("cpu", enabled=False):
            norm = _inverse_norm(x, eps)
            hidden, hidden_down = gate_up(_normed(x, norm, norm_weight, gate_up.dtype))
            gate, up = hidden.chunk(2, -1)
            out, out_down = down(F.silu(gate).mul_(up))
            ctx.gate_up, ctx.down = gate_up, down
            ctx.save_for_backward(x, norm_weight, norm, hidden, hidden_down, out_down)
            return x + out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the states, the norm's weight and the parameters."""
        x, norm_weight, norm, hidden, hidden_down, out_down = ctx.saved_tensors
        gate_up: Projection = ctx.gate_up
        down: Projection = ctx.down
        needed = ctx.needs_input_grad[5:]
        first, second = needed[: len(gate_up.parameters)], needed[len(gate_up.parameters) :]
        with torch.autocast("cpu", enabled=False):
            narrow = grad.to(down.dtype)
            by_down = down.by_down(narrow)
            by_act = down.by_input(narrow, by_down)
            gate, up = hidden.chunk(2, -1)
            act = F.silu(gate)
            by_hidden = torch.empty_like(hidden)
            by_gate, by_up = by_hidden.chunk(2, -1)
            torch.mul(by_act, act, out=by_up)
            torch.ops.aten.silu_backward.grad_input(by_act.mul_(up), gate, grad_input=by_gate)
            of_down = down.gradients(second, narrow, act.mul_(up), out_down, by_down)
            del act, by_act
            by_down = gate_up.by_down(by_hidden)
            by_states = gate_up.by_input(by_hidden, by_down)
            states = _normed(x, norm, norm_weight, gate_up.dtype) if gate_up.reads_input(first) else None
            of_gate_up = gate_up.gradients(first, by_hidden, states, hidden_down, by_down)
            by_weight = _by_norm_weight(by_states, x, norm) if ctx.needs_input_grad[1] else None
            by_x = _norm_backward(by_states, x, norm, norm_weight).add_(grad) if ctx.needs_input_grad[0] else None
        return by_x, by_weight, None, None, None, *of_gate_up, *of_down


class RotaryFunction(torch.autograd.Function):
    """Autograd function: `apply(states, cos, sin)` → rotary position embedding of `[n, heads, size]`.

    `cos` and `sin` are `[n, 1, size]`, for halves of a head that are rotated against each other. Nothing else is kept
    for backward.

    Example:
        >>> RotaryFunction.apply(torch.ones(3, 2, 4), torch.ones(3, 1, 4), torch.zeros(3, 1, 4)).shape
        torch.Size([3, 2, 4])
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute the output."""
        ctx.save_for_backward(cos, sin)  # not the signed sines, because all layers share these
        return rotate(states.to(cos.dtype), cos, signed_sines(sin)).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the states."""
        cos, sin = ctx.saved_tensors
        wide = grad.to(cos.dtype)
        return (wide * cos).add_((wide * signed_sines(sin)).roll(grad.shape[-1] // 2, -1)).to(grad.dtype), None, None


def signed_sines(sin: Tensor) -> Tensor:
    """The sines of rotary embeddings with the first half of a head negated, as `rotate` takes them."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], -1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[n, heads, size]`, without autograd functions of its own.

    With `sin` from `signed_sines`, rotate_half(x) · sin is x with its halves exchanged · sin.

    Args:
        states: Queries and keys.
        cos: `[n, 1, size]`, of the same type.
        sin: Likewise.
    """
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def _inverse_norm(x: Tensor, eps: float) -> Tensor:
    """1 / √(mean of squares + eps), `[n, 1]`."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, norm: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The states `[n, H]` after the norm."""
    return (x * norm).mul_(weight).to(dtype)


def _norm_backward(grad: Tensor, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a norm's input: `r g − x r³ mean(g x)`, with r the inverse norm and g the weighted gradient."""
    weighted = grad * weight
    slope = (weighted * x).mean(-1, keepdim=True).mul_(norm**3)
    return weighted.mul_(norm).addcmul_(x, slope, value=-1)


def _by_norm_weight(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Gradient of a norm's weight, `[H]`."""
    return (grad * x).mul_(norm).sum(0)


def install(model: nn.Module) -> bool:
    """Make the decoder layers of a model follow `PackedLayout.weights`; without it they run unchanged.

    Args:
        model: A Hugging Face model, or a `PeftModel` around one.

    Returns:
        False if its layers are not computed here.
    """
    config = base_of(model).config.get_text_config()
    layers = layers_of(model)
    if not layers or not all(_is_known(layer, config) for layer in layers):
        return False
    for layer in layers:
        layer.forward = partial(_forward, layer, config)
    return True


def _is_known(layer: nn.Module, config: "PretrainedConfig") -> bool:
    """True for a layer of one of `MODELS` with SwiGLU; a subclass may compute something else."""
    own = vars(layer).get("forward")
    return (
        config.model_type in MODELS
        and config.hidden_act == "silu"
        and type(layer).__module__.startswith(f"transformers.models.{config.model_type}.")
        and (own is None or (isinstance(own, partial) and own.func is _forward))
    )


def runs(model: nn.Module) -> bool:
    """True if the layers of a model can be fused at present: on a CPU, not sharded, without dropout and hooks.

    A model with hooks runs its own modules, because a hook may read or change what they compute. Autocast leaves
    products of float64 as they are, so a model in float64 runs its own modules, too.

    Args:
        model: A model for which `install` returned True.
    """
    weight = next(model.parameters())
    if is_sharded(model) or weight.device.type != "cpu" or weight.dtype == torch.float64:
        return False
    layers, dropout = layers_of(model), base_of(model).config.get_text_config().attention_dropout
    return all(_is_plain(layer) and not (dropout and layer.training) for layer in layers)


def _is_plain(layer: "LlamaDecoderLayer") -> bool:
    """True for a layer without hooks of others, compilation, dropout and unusual adapters."""
    if getattr(layer, "_compiled_call_impl", None) is not None:
        return False
    for module in layer.modules():
        if last_layer.has_other_hooks(module) or module._backward_pre_hooks or module._backward_hooks:
            return False
    parts = (*layer.self_attn.named_children(), *layer.mlp.named_children())
    return all(_is_plain_linear(module) for name, module in parts if name.endswith("_proj"))


def _is_plain_linear(module: nn.Module) -> bool:
    """True for a linear layer, or peft's LoRA around one with at most one active adapter of the plain kind."""
    if not is_plain_linear(module):
        return False
    if unadapted(module) is module:
        return True
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear

    if not isinstance(module, LoraLayer) or type(module) not in (Linear,) or module.merged or "forward" in vars(module):
        return False
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not active:
        return True
    name, *more = active
    dropout, second = module.lora_dropout[name], module.lora_B[name]
    return (
        not more
        and name not in module.lora_variant
        and type(second) is nn.Linear
        and second.bias is None
        and type(second.weight) is nn.Parameter
        and not (isinstance(dropout, nn.Dropout) and dropout.training and dropout.p)
    )


def _forward(
    layer: "LlamaDecoderLayer", config: "PretrainedConfig", hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The layer's forward: fused if the layout has weights, and otherwise its own."""
    layout = kwargs.get("layout")
    if not isinstance(layout, PackedLayout) or layout.weights is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    inputs = layer, config, layout, layout.weights, kwargs["position_embeddings"], hidden_states
    if layer.gradient_checkpointing and layer.training:  # transformers' own forward does this within itself
        return checkpoint(_fused, *inputs, use_reentrant=False)
    return _fused(*inputs)


def _fused(
    layer: "LlamaDecoderLayer",
    config: "PretrainedConfig",
    layout: PackedLayout,
    weights: LayerWeights,
    position_embeddings: tuple[Tensor, Tensor],
    hidden_states: Tensor,
) -> Tensor:
    """The fused forward of a layer, `[1, n, H]`."""
    attention, mlp = layer.self_attn, layer.mlp
    cos, sin = (part[0, :, None] for part in position_embeddings)
    x = hidden_states[0]
    qkv = weights.projection(attention.q_proj, attention.k_proj, attention.v_proj)
    norm = layer.input_layernorm
    states = NormProductFunction.apply(x, norm.weight, norm.variance_epsilon, qkv, *qkv.parameters)
    states = states.unflatten(-1, (-1, attention.head_dim))
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if hasattr(attention, "q_norm"):
        query, key, value = states.split([heads, key_heads, key_heads], 1)
        rotated = torch.cat([attention.q_norm(query), attention.k_norm(key)], 1)
    else:
        rotated, value = states.split([heads + key_heads, key_heads], 1)
    query, key = RotaryFunction.apply(rotated, cos, sin).split([heads, key_heads], 1)
    # A view of all states would keep them for backward.
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value.contiguous()))
    # Llama's layers have no window, whatever their config says.
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    attended = packed_attention(query, key, value, layout, attention.scaling, window)[0].flatten(1)
    output = weights.projection(attention.o_proj)
    x = ResidualProductFunction.apply(x, attended, output, *output.parameters)
    gate_up, down = weights.projection(mlp.gate_proj, mlp.up_proj), weights.projection(mlp.down_proj)
    norm = layer.post_attention_layernorm
    parameters = (*gate_up.parameters, *down.parameters)
    states = MLPFunction.apply(x, norm.weight, norm.variance_epsilon, gate_up, down, *parameters)
    return states[None]
