"""Which weights a vLLM worker holds. The functions here run in the worker, on its model (`LLM.apply_model`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rlhf_lightning.generation.digest import digest

if TYPE_CHECKING:
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from rlhf_lightning.models.lora import LoRAFactors

PROBED = 16
"""Number of columns of a weight that are read through its layer where vLLM keeps only a repacked copy."""


@dataclass(frozen=True)
class Held:
    """A weight that vLLM holds, or that it computes with.

    Attributes:
        name: Its Hugging Face name.
        probed: True if it is read through its layer, `PROBED` columns of it.

    Example:
        >>> Held("lm_head.weight", probed=True).name
        'lm_head.weight'
    """

    name: str
    probed: bool


def columns(width: int) -> Tensor:
    """Indices of the columns that are probed in a weight with `width` columns, evenly spaced."""
    return torch.linspace(0, width - 1, min(PROBED, width)).round().long()


def held_weights(model: nn.Module) -> dict[Held, torch.dtype]:
    """The weights of a vLLM model that can be read, with their precision.

    vLLM fuses layers (`packed_modules_mapping`), and on a CPU keeps repacked copies of linear layers only. Those are
    read by applying the layer to unit vectors, which gives columns of its weight without rounding.
    """
    return {Held(name, probed): parameter.dtype for _, parameter, names, probed in _parameters(model) for name in names}


def digests(model: nn.Module, sizes: Mapping[str, int]) -> dict[Held, int]:
    """Digests of the weights that a vLLM model holds.

    Args:
        model: The model.
        sizes: Number of rows of each weight, by its Hugging Face name. Others are left out.

    Returns:
        The digest of each weight in `sizes` that can be read; of its columns only if it is probed.
    """
    found = {}
    for module, parameter, names, probed in _parameters(model):
        if not all(name in sizes for name in names):
            continue
        value = _probe(module) if probed else parameter.detach()
        start = 0
        for name in names:
            found[Held(name, probed)] = digest(value[start : start + sizes[name]])
            start += sizes[name]
    return found


def expected(tensor: Tensor, probed: bool, dtype: torch.dtype) -> int:
    """The digest that `digests` gives if vLLM holds this weight.

    Args:
        tensor: The weight.
        probed: See `Held`.
        dtype: The precision in which vLLM holds it.
    """
    return digest((tensor[:, columns(tensor.shape[1]).to(tensor.device)] if probed else tensor).to(dtype))


def expected_digests(name: str, tensor: Tensor, held: Mapping[Held, torch.dtype]) -> dict[Held, int]:
    """The digests that `digests` gives for a weight, whole and probed, as far as vLLM's model has it.

    Args:
        name: Its Hugging Face name.
        tensor: The weight.
        held: See `held_weights`.
    """
    keys = (Held(name, False), Held(name, True))
    return {key: expected(tensor, key.probed, held[key]) for key in keys if key in held}


def differing(model: nn.Module, folder: Path) -> list[str]:
    """Names of the weights that a vLLM model holds, but not as they are in a folder.

    Args:
        model: The model, not split over several workers.
        folder: Folder with files of safetensors, with Hugging Face names.
    """
    held = held_weights(model)
    sizes: dict[str, int] = {}
    wanted: dict[Held, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                if tensor.dim():
                    sizes[name] = len(tensor)
                wanted |= expected_digests(name, tensor, held)
    found = digests(model, sizes)
    return sorted({key.name for key in found if found[key] != wanted[key]})


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter, list[str], bool]]:
    """Module, parameter, Hugging Face names of the weights in it, in order of their rows, and whether it is probed."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    seen: dict[int, list[str]] = {}
    for place, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            names = [f"{name}.{kind}" for name in _checkpoint_names(model, place.removesuffix(".base_layer"))]
            # A head that is tied to the embeddings has their weight, and on a CPU a repacked copy of it.
            names = seen.setdefault(id(parameter), names)
            repacked = isinstance(module, ParallelLMHead) and parameter.device.type == "cpu" and kind == "weight"
            if parameter.numel():
                yield module, parameter, names, False
            if repacked or not parameter.numel():
                yield module, parameter, names, True


def _checkpoint_names(model: nn.Module, place: str) -> list[str]:
    """Hugging Face names of the layers that vLLM fuses into the module at `place`; its own name if it is not fused."""
    owner, dot, last = place.rpartition(".")
    fused = getattr(model, "packed_modules_mapping", {})
    return [owner + dot + part for part in fused.get(last, [last])]


def _probe(module: "LinearBase | ParallelLMHead") -> Tensor:
    """Columns of the weight with which a linear layer computes, `[outputs, PROBED]`."""
    width = module.input_size if hasattr(module, "input_size") else module.embedding_dim
    chosen = columns(width)
    units = torch.zeros(len(chosen), width, dtype=module.weight.dtype, device=module.weight.device)
    units[torch.arange(len(chosen)), chosen] = 1.0
    result: Tensor = module.quant_method.apply(module, units, None)
    return result.T


def adapter_digests(model: nn.Module, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int]]:
    """Digests of the adapter that a vLLM model with one slot for adapters holds.

    Args:
        model: The model.
        shapes: Outputs, rank and inputs of the adapter of each layer, by its Hugging Face name.

    Returns:
        The digests of both factors, by the layer's name. Layers that are not in `shapes` are included if their adapter
        is not zero.
    """
    found = {}
    for place, module in model.named_modules():
        if not hasattr(module, "lora_a_stacked"):
            continue
        layers, slots = _adapted_layers(model, place), zip(*_slots(module), strict=True)
        for layer, (a, b) in zip(layers, slots, strict=True):
            if layer in shapes:
                outputs, rank, inputs = shapes[layer]
                a, b = a[:rank, :inputs], b[:outputs, :rank]
            elif not (a.any() and b.any()):
                continue
            found[layer] = digest(a), digest(b)
    return found


def adapted_layers(model: nn.Module) -> set[str]:
    """Hugging Face names of the layers that may have an adapter in a vLLM model."""
    return {
        layer
        for place, module in model.named_modules()
        if hasattr(module, "lora_a_stacked")
        for layer in _adapted_layers(model, place)
    }


def _adapted_layers(model: nn.Module, place: str) -> list[str]:
    # vLLM adds the adapter of the head where it computes logits.
    return _checkpoint_names(model, "lm_head" if place == "logits_processor" else place)


def _slots(module: "BaseLayerWithLoRA") -> tuple[list[Tensor], list[Tensor]]:
    """The first slot of both factors, for each of the fused layers."""
    pair = module.lora_a_stacked, module.lora_b_stacked
    a, b = ([part[0, 0] for part in ((one,) if isinstance(one, Tensor) else one)] for one in pair)
    return a, b


def expected_adapter(factors: "LoRAFactors", dtype: torch.dtype) -> tuple[int, int]:
    """The digests that `adapter_digests` gives if vLLM holds these factors, in its precision `dtype`."""
    return digest(factors.a.to(dtype)), digest(factors.b.to(dtype))
