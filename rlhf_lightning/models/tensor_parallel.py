"""Tensor parallelism: splits layers over the ranks that compute a row together, by transformers' plan for the model.

Layers in the plan have a part of their weight, and run as in transformers; all other layers are replicated. All weights
become DTensors of one mesh, as gradient clipping and optimizers require.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from rlhf_lightning.errors import ConfigError
from rlhf_lightning.models.lora import base_of, is_quantized

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig

T = TypeVar("T", bound=Tensor | None)
WHOLE, SUMMED = "replicate", "replicated_with_grad_allreduce"
"""Styles of replicated weights. With the second, each rank sees only its own heads, so gradients must be summed.
transformers (5.23) sums them in a hook, which also sums gradients of earlier micro-batches again; here, a DTensor sums
them."""
ADAPTERS = {
    "colwise": (WHOLE, "colwise"),
    "colwise_gather_output": (WHOLE, "colwise_gather_output"),
    "rowwise": ("rowwise", WHOLE),
    "rowwise_split_input": ("rowwise_split_input", WHOLE),
}
"""Placements of an adapter's matrices A and B, by the style of their layer."""
STYLES = {*ADAPTERS, "embedding_rowwise", WHOLE, SUMMED}
"""Supported styles of a plan. Styles of experts, latent attention and packed weights are untested, and refused."""


def parallelize(model: nn.Module, mesh: "DeviceMesh") -> None:
    """Split a model over a one-dimensional mesh.

    All ranks must have loaded the same weights and call this together.

    Args:
        model: The model, with or without an adapter.
        mesh: The `tensor_parallel` mesh.

    Raises:
        ConfigError: If transformers has no plan for the model, or its plan is not supported.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    styles = layer_styles(model, mesh.size())
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in list(model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and not hasattr(parameter, "device_mesh"):  # a tied head is already split
                owners.setdefault(id(parameter), []).append((module, name))
    for places in owners.values():
        _split_weight(places, [styles.get(module, WHOLE) for module, _ in places], mesh)
    for module in {module for places in owners.values() for module, _ in places}:
        style = styles.get(module, WHOLE)
        if style in (WHOLE, SUMMED):
            _run_local(module, summed=style == SUMMED)
        else:
            ALL_PARALLEL_STYLES[style].install_forward(module, mesh)


def layer_styles(model: nn.Module, size: int) -> dict[nn.Module, str]:
    """Style of each layer that is split, including those of adapters; all other layers are replicated.

    Args:
        model: The model, with or without an adapter.
        size: Number of ranks.

    Raises:
        ConfigError: See `parallelize`.
    """
    base = base_of(model)
    if not hasattr(base, "tp_plan"):
        return {}  # a head added by this package
    name, plan = type(base).__name__, base.tp_plan
    if not plan:
        raise ConfigError(
            f"tensor_parallel_size: transformers has no tensor-parallel plan for {name}; set tensor_parallel_size: 1"
        )
    if odd := sorted(set(plan.values()) - STYLES):
        raise ConfigError(
            f"tensor_parallel_size: transformers' plan for {name} has the styles {', '.join(odd)}, which are not "
            "supported; set tensor_parallel_size: 1"
        )
    if is_quantized(model):
        raise ConfigError("tensor_parallel_size and lora.quantize are not supported together; leave out one of them")
    _check(model, base.config.get_text_config(), size)
    found: dict[nn.Module, str] = {}
    for path, module in base.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is None:
            continue
        if not hasattr(module, "base_layer"):
            found[module] = style
        elif style not in ADAPTERS or not hasattr(module, "lora_A"):
            raise ConfigError(
                f"tensor_parallel_size: the layer {path} ({style}) cannot have an adapter; remove it from lora.target"
            )
        else:
            found[module.base_layer] = style
            for part, of_adapter in zip((module.lora_A, module.lora_B), ADAPTERS[style], strict=True):
                found |= dict.fromkeys(part.values(), of_adapter)
    return found


def _check(model: nn.Module, config: "PretrainedConfig", size: int) -> None:
    """Raise `ConfigError` if the numbers of heads are not divisible by the number of ranks, or dropout is on."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or size
        if heads % size:
            raise ConfigError(f"tensor_parallel_size is {size}, which does not divide the model's {heads} {name}")
    # Ranks would have to drop the same elements of replicated tensors, and different elements of split tensors.
    for module in model.modules():
        dropped = [getattr(module, name, 0.0) for name in ("attention_dropout", "dropout_p", "resid_dropout")]
        dropped.append(module.p if isinstance(module, nn.Dropout) else 0.0)
        if any(isinstance(rate, float) and rate > 0 for rate in dropped):
            raise ConfigError(
                "tensor_parallel_size: dropout is not supported; set lora.dropout and the model's own dropout to 0"
            )


def _split_weight(places: list[tuple[nn.Module, str]], styles: list[str], mesh: "DeviceMesh") -> None:
    """Replace a weight with a DTensor, in all modules that it is tied to."""
    from torch.distributed.tensor import Replicate, distribute_tensor
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    made = []
    for (module, name), style in zip(places, styles, strict=True):
        before = module.get_parameter(name)
        if style in (WHOLE, SUMMED):
            # Broadcasts the values of the first rank, because a new adapter or head is initialized at random.
            module._parameters[name] = nn.Parameter(distribute_tensor(before.detach(), mesh, [Replicate()]))
        else:
            ALL_PARALLEL_STYLES[style].shard_param(module, name, mesh)
        after: Any = module._parameters[name]
        made.append(after.requires_grad_(before.requires_grad))
    if any(one.placements != made[0].placements for one in made):
        raise ConfigError(
            f"tensor_parallel_size: transformers' plan splits tied weights in different ways ({', '.join(styles)}), "
            "which is not supported; set tensor_parallel_size: 1"
        )
    for module, name in places:
        module._parameters[name] = made[0]


def _run_local(module: nn.Module, summed: bool) -> None:
    """Make a module run with its replicated weights as plain tensors, because inputs and outputs are plain, too."""
    forward: Callable[..., Tensor] = module.forward

    def run(*args: Tensor, **kwargs: Tensor) -> Tensor:
        own = dict(module._parameters)
        plain: dict[str, Any] = {name: local(weight, summed) for name, weight in own.items()}
        module._parameters.update(plain)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(own)

    module.forward = run


def local(weight: T, summed: bool = False) -> T | Tensor:
    """A replicated weight as a plain tensor.

    Args:
        weight: A DTensor, or a plain tensor, which is returned unchanged.
        summed: If True, gradients are summed over ranks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not isinstance(weight, DTensor):
        return weight
    return weight.to_local(grad_placements=[Partial() if summed else Replicate()])
