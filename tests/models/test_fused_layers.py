"""Fused layers compute what the layers' own modules compute, and keep less for backward."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from rlhf_lightning.models.fused_layers import (
    MLPFunction,
    NormProductFunction,
    ResidualProductFunction,
    RotaryFunction,
)
from rlhf_lightning.models.lora import LoRA, base_of
from rlhf_lightning.models.packed_forward import Hidden, PackedForward
from rlhf_lightning.models.packing import prefix_lengths
from rlhf_lightning.models.projection import LayerWeights, Projection
from rlhf_lightning.models.sharding import layers_of
from tests.helpers.packed import close, gradients, graph_names, model_of, rows_of

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "sliding_window": 4},  # a window that Llama does not have
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
}


def adapted(model: Any) -> Any:
    """The model with an adapter that changes its results."""
    model = get_peft_model(model, LoRA(rank=3, alpha=4).config(model, "CAUSAL_LM"))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def forward_of(model: Any) -> PackedForward:
    return PackedForward(model, base_of(model).get_decoder())


def states_of(forward: PackedForward, batch: dict[str, Tensor]) -> Hidden:
    return forward(batch["input_ids"], batch["loss_mask"].bool(), prefix_lengths(batch["loss_mask"]))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_fused_layers_equal_their_modules(
    architecture: str, lora: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, and gradients of adapters or of all weights; norms of transformers are float32 in any model."""
    model = model_of(architecture, tokenizer, **MODELS[architecture])
    model = (adapted(model) if lora else model).double()
    forward = forward_of(model)
    batch = rows_of((6, (4, 7)), (9, (3,)))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for weights in (LayerWeights(torch.float64), None):
        monkeypatch.setattr(forward, "_layer_weights", lambda weights=weights: weights)
        hidden = states_of(forward, batch).states
        assert ("MLPFunction" in graph_names(hidden)) == (weights is not None)
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=hidden.dtype)
        found.append((hidden.detach(), gradients(model, (hidden * direction).sum())))
    (fused, by_fused), (own, by_own) = found
    torch.testing.assert_close(fused, own, rtol=1e-5, atol=1e-6)
    close(by_fused, by_own, 1e-5)


def projection(*sizes: tuple[int, int], bias: bool = True) -> Projection:
    layers = nn.ModuleDict({f"l{i}_proj": nn.Linear(*size, bias=bias) for i, size in enumerate(sizes)})
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["l0_proj"], init_lora_weights=False), layers)
    layers = layers.double()
    for parameter in layers.parameters():
        parameter.requires_grad_()
    return Projection(list(layers.values()), torch.float64)


def checked(function: Callable[..., Tensor], *tensors: Tensor) -> bool:
    return torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-5)


def with_parameters(projections: list[Projection], function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """The function of the given parameters: those of the projections are copies of them."""
    left = list(values)
    for one in projections:
        for part, value in zip(one._parts, left, strict=False):
            one._place(part).copy_(value.detach() * part.scale)
        left = left[len(one._parts) :]
    return function(*values)


def test_gradients_of_functions() -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    joint, output = projection((4, 3), (4, 2)), projection((3, 4), bias=False)
    gate_up, down = projection((4, 3), (4, 3)), projection((3, 4))
    x, norm, states = random(5, 4), random(4), random(5, 3)

    def normed(x: Tensor, norm: Tensor, *parameters: Tensor) -> Tensor:
        apply = partial(NormProductFunction.apply, x, norm, 1e-5, joint)
        return with_parameters([joint], apply, *parameters)

    def added(x: Tensor, states: Tensor, *parameters: Tensor) -> Tensor:
        return with_parameters([output], partial(ResidualProductFunction.apply, x, states, output), *parameters)

    def mlp(x: Tensor, norm: Tensor, *parameters: Tensor) -> Tensor:
        apply = partial(MLPFunction.apply, x, norm, 1e-5, gate_up, down)
        return with_parameters([gate_up, down], apply, *parameters)

    assert checked(normed, x, norm, *joint.parameters)
    assert checked(added, x, states, *output.parameters)
    assert checked(mlp, x, norm, *gate_up.parameters, *down.parameters)
    angles = torch.randn(5, 1, 4, dtype=torch.float64)
    assert checked(lambda states: RotaryFunction.apply(states, angles.cos(), angles.sin()), random(5, 2, 4))


def test_only_autocast_of_plain_models_is_fused(tokenizer: Any) -> None:
    """Float32 results stay those of the modules; a hook sees what they compute; dropout is theirs."""
    batch = rows_of((6, (4, 7)))

    def fuses(model: Any) -> bool:
        return "MLPFunction" in graph_names(states_of(forward_of(model), batch).states)

    with torch.autocast("cpu", torch.bfloat16):
        assert fuses(model_of("qwen3", tokenizer))
        assert not fuses(model_of("gemma2", tokenizer))
        dropping = model_of("qwen3", tokenizer, attention_dropout=0.1).train()
        assert not fuses(dropping)
        assert fuses(dropping.eval())
        for register in ("register_forward_hook", "register_full_backward_hook"):
            hooked = model_of("qwen3", tokenizer)
            getattr(layers_of(hooked)[0].mlp, register)(lambda module, *values: None)
            assert not fuses(hooked)
        lora_dropout = LoRA(dropout=0.1).config(model_of("qwen3", tokenizer), "CAUSAL_LM")
        assert not fuses(get_peft_model(model_of("qwen3", tokenizer), lora_dropout).train())
    assert not fuses(model_of("qwen3", tokenizer))


def test_autocast_leaves_float64(tokenizer: Any) -> None:
    """As it leaves it in the modules of a model."""
    model, batch = model_of("llama", tokenizer).double(), rows_of((6, (4, 7)))
    expected = states_of(forward_of(model), batch).states
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(states_of(forward_of(model), batch).states, expected)


@pytest.mark.parametrize("architecture", MODELS)
def test_fused_layers_are_near_float32(architecture: str, tokenizer: Any) -> None:
    forward = forward_of(adapted(model_of(architecture, tokenizer, **MODELS[architecture])))
    batch = rows_of((6, (4, 7)), (9, (3, 5)), (12, (4, 4)))
    wanted = states_of(forward, batch).states
    assert forward.copied_bytes == 0
    with torch.autocast("cpu", torch.bfloat16):
        found = states_of(forward, batch).states
        layers = layers_of(forward.model)
        assert forward.copied_bytes == 2 * sum(p.numel() for layer in layers for p in layer.parameters())
    assert (found - wanted).norm() < 2e-2 * wanted.norm()


def test_fused_layer_keeps_what_its_docstring_says(tokenizer: Any) -> None:
    batch, tokens, kept = rows_of((60, (40, 30)), (50, (30, 50))), 260, []
    for layers in (5, 4):
        model = adapted(model_of("llama", tokenizer, num_hidden_layers=layers))
        forward, found = forward_of(model), dict[int, torch.UntypedStorage]()

        def keep(tensor: Tensor, found: dict[int, torch.UntypedStorage] = found) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autocast("cpu", torch.bfloat16):
            states_of(forward, batch)  # compares fused layers with their modules first
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
                hidden = states_of(forward, batch)
        kept.append(sum(storage.nbytes() for storage in found.values()))
        del hidden
    config = model.config
    heads = config.num_attention_heads + config.num_key_value_heads
    numbers = 2 * config.intermediate_size + 2 * heads * model.get_base_model().model.layers[0].self_attn.head_dim
    outputs_of_first_factors, two_norms = 7 * 3, 2
    expected = 2 * (numbers + outputs_of_first_factors) + 4 * (2 * config.hidden_size + two_norms)
    assert kept[0] - kept[1] == tokens * expected


def test_fused_layers_follow_the_active_adapter(tokenizer: Any) -> None:
    """The reference of an adapted policy is the policy without its adapter, or with a frozen second one."""
    model = adapted(model_of("llama", tokenizer))
    forward = forward_of(model)
    batch = rows_of((6, (4, 7)))

    def states() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return states_of(forward, batch).states

    trained = states()
    with model.disable_adapter():
        base = states()
    assert (trained - base).norm() > 0.05 * base.norm()
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))  # which changes nothing yet
    model.set_adapter("reference")
    assert torch.equal(states(), base)
    model.set_adapter("default")
    assert torch.equal(states(), trained)


def test_copy_of_a_model_runs_its_own_weights(tokenizer: Any) -> None:
    model = model_of("llama", tokenizer)
    first, batch = forward_of(model), rows_of((6, (4, 7)))
    second = forward_of(copy.deepcopy(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = states_of(first, batch).states
        for layer in layers_of(model):
            for parameter in layer.parameters():
                parameter.zero_()
        assert not torch.equal(states_of(first, batch).states, before)
        assert torch.equal(states_of(second, batch).states, before)
