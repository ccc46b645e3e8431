"""Models whose weights are sharded over ranks: by FSDP2, or by DeepSpeed (ZeRO-3).

A sharded model gathers the weights of each layer from all ranks when it runs, so all ranks must run it equally often.
They agree on the number of calls in advance (`max_over_ranks`), gather the whole model temporarily (`unsharded`), or
synchronize every call (`SynchronizedCalls`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.tensor_parallel import parallelize

P = ParamSpec("P")
R = TypeVar("R")
if TYPE_CHECKING:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from torch.distributed.device_mesh import DeviceMesh

    class ShardedModel(nn.Module):
        """The attributes that `shard` adds to a model."""

        inside: bool
        """True while the weights outside the layers are gathered."""

        def run_inside(self, function: Callable[[], R]) -> R: ...


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, found as the stack of `num_hidden_layers` modules; empty if there is none."""
    base = base_of(model)
    if not hasattr(base, "config"):
        return []
    count = base.config.get_text_config().num_hidden_layers
    # The decoder first, because a vision tower may have the same number of layers.
    places = [base.get_decoder()] if hasattr(base, "get_decoder") else []
    for place in [*places, base.base_model]:
        for stack in place.modules():
            if isinstance(stack, nn.ModuleList) and len(stack) == count:
                return list(stack)
    return []


def shard(model: nn.Module, mesh: "DeviceMesh") -> None:
    """Shard the weights over the ranks of a mesh: layer by layer, then the weights outside the layers.

    Args:
        model: The model to shard.
        mesh: `data_parallel` × `tensor_parallel`. Weights are sharded over the first, computation over the second.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if mesh["tensor_parallel"].size() > 1:
        parallelize(model, mesh["tensor_parallel"])
    mesh = mesh["data_parallel"]
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    # Reshard after every forward; weights that stay gathered during an evaluation would be those of an older step.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.run_inside = MethodType(_call, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_inside")
    model.inside = False  # type: ignore[assignment]


def _call(model: nn.Module, function: Callable[[], R]) -> R:
    """Call a function. This is a method of the model, so that FSDP gathers the outer weights around the call."""
    return function()


class ZeRO3:
    """Weights that DeepSpeed shards over ranks. Without `gathered`, each weight is empty outside of its module's call.

    DeepSpeed gathers the weights of a module when it is called, and only within a step of training those that are used
    otherwise, such as the head's.

    Args:
        module: The trained module, with all models in it.
        offload: DeepSpeed's hooks of the module.
    """

    def __init__(self, module: nn.Module, offload: "DeepSpeedZeRoOffload") -> None:
        self.module, self._offload, self.is_whole = module, offload, False

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context manager in which every rank holds all weights of the module, as if they were not sharded.

        All ranks must enter it together. Within it, weights must not change.
        """
        if self.is_whole:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        # Otherwise a layer would release its weights after its first call. DeepSpeed has no public function for it; TRL
        # and DeepSpeed-Chat do the same.
        weights = list(self.module.parameters())
        for weight in weights:
            weight.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
        for hook in (*self._offload.forward_hooks, *self._offload.backward_hooks):
            hook.remove()
        self._offload.forward_hooks, self._offload.backward_hooks = [], []
        with GatheredParameters(weights):
            self.is_whole = True
            try:
                yield
            finally:
                self.is_whole = False
        self._offload._register_deepspeed_module(self._offload.module)


def use_zero3(module: nn.Module, models: Iterable[nn.Module], offload: "DeepSpeedZeRoOffload") -> ZeRO3:
    """Record that DeepSpeed shards the weights of a module, and of the models in it.

    Args:
        module: The trained module.
        models: Models in it, which `is_sharded` is asked about.
        offload: DeepSpeed's hooks of the module.
    """
    zero3 = ZeRO3(module, offload)
    for model in models:
        model.zero3 = zero3  # type: ignore[assignment]
    return zero3


def zero3_of(model: nn.Module) -> ZeRO3 | None:
    """The sharding of a model by DeepSpeed (ZeRO-3), if there is one."""
    found = getattr(model, "zero3", None)
    return found if isinstance(found, ZeRO3) else None


def zero3_gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager in which all weights of the module are gathered on every rank, if DeepSpeed shards them.

    All ranks must enter it together. Within it, weights must not change. It may be nested.
    """
    zero3 = zero3_of(model)
    return nullcontext() if zero3 is None else zero3.gathered()


def is_sharded(model: nn.Module) -> bool:
    """True if the model's weights are sharded, and not gathered at present by `ZeRO3.gathered`."""
    zero3 = zero3_of(model)
    return uses_fsdp(model) if zero3 is None else not zero3.is_whole


def uses_fsdp(model: nn.Module) -> "TypeGuard[ShardedModel]":
    """True if `shard` was called on the model."""
    return hasattr(model, "run_inside")


def run_unsharded(model: nn.Module, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function that uses submodules of `model` directly, such as its decoder or its head.

    FSDP gathers the weights outside the layers only if the model is called through a registered method, as done here.
    DeepSpeed gathers each weight when it is used.
    """
    if not uses_fsdp(model) or model.inside:
        return function(*args, **kwargs)
    model.inside = True
    try:
        return model.run_inside(partial(function, *args, **kwargs))
    finally:
        model.inside = False


def runs_unsharded(model: nn.Module) -> bool:
    """True within a forward pass of a sharded model: no other backward pass may run in it."""
    return model.inside if uses_fsdp(model) else is_sharded(model)


# -- synchronization ----------------------------------------------------------------------------------------------


def max_over_ranks(number: int, model: nn.Module) -> int:
    """The maximum of `number` over ranks if `model` is sharded, so that all run it equally often; else `number`."""
    if not is_sharded(model) or torch.distributed.get_world_size() == 1:
        return number
    value = torch.tensor(number, device=next(model.parameters()).device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value)


def fits_unsharded(model: nn.Module, wanted: bool | None) -> bool:
    """True if a sharded model should be gathered on every rank.

    Args:
        model: The sharded model.
        wanted: The user's choice; None to decide by memory.

    Returns:
        `wanted` or, if it is None, True if no rank would need more than half of its free memory.
    """
    if wanted is not None:
        return wanted
    device = next(model.parameters()).device
    if device.type != "cuda":
        return True
    # Memory that torch reserves but does not use counts as free.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + held
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    return not max_over_ranks(int(needed > free / 2), model)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context manager that gathers all weights on every rank, so that ranks may run the model independently.

    All ranks must enter it together. Within the context, gradients must be off, and weights must not change.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


class SynchronizedCalls:
    """Makes all ranks run a sharded model as often as the rank with the most calls, one call at a time.

    Args:
        model: The sharded model.
        idle: Runs the model once, for ranks that have no call left.

    Example:
        ```python
        calls = SynchronizedCalls(model, idle=lambda: model(dummy_ids))
        for batch in batches:  # ranks may have different numbers of batches
            calls.call()
            model(batch)
        calls.finish()
        ```
    """

    def __init__(self, model: nn.Module, idle: Callable[[], None]) -> None:
        self.model, self.idle = model, idle

    def call(self) -> None:
        """Announce a call of the model; invoke it before each one."""
        max_over_ranks(1, self.model)

    def finish(self) -> None:
        """Run `idle` until all ranks have finished."""
        while max_over_ranks(0, self.model):
            self.idle()


@contextmanager
def unsharded_or_synchronized(
    model: nn.Module, gather: bool | None, idle: Callable[[], None]
) -> Iterator[SynchronizedCalls | None]:
    """Context manager in which ranks may run `model` independently.

    Args:
        model: The model, sharded or not.
        gather: See `fits_unsharded`.
        idle: See `SynchronizedCalls`.

    Yields:
        None if the model is not sharded or was gathered; otherwise the `SynchronizedCalls` that must announce calls.
    """
    if not is_sharded(model):
        yield None
    elif fits_unsharded(model, gather):
        with unsharded(model):
            yield None
    else:
        calls = SynchronizedCalls(model, idle)
        yield calls
        calls.finish()


# -- weights ------------------------------------------------------------------------------------------------------


def full_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight as if it were not sharded; one that DeepSpeed shards is empty itself."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def full_tensor(value: Tensor) -> Tensor:
    """Gather a tensor from all ranks if it is sharded; all ranks must call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def copy_weight(weight: Tensor, value: Tensor) -> None:
    """Copy a tensor into a weight; either may be sharded. All ranks must call this."""
    if hasattr(weight, "placements") and hasattr(weight, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    elif hasattr(value, "device_mesh") and not hasattr(weight, "device_mesh"):
        value = full_tensor(value)
    weight.copy_(value)


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather the state dict of a model on the CPU of rank 0; empty on other ranks, None if FSDP2 does not shard it."""
    if not uses_fsdp(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if found and first.setdefault(id(parameter), name) != name:
            found[name] = found[first[id(parameter)]]  # share tied weights, so that saving sees them as tied
    return found
