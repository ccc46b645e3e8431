"""Models whose weights are split over ranks (FSDP2).

Such a model gathers the weights of a layer from all ranks to run it, so all ranks must run it equally often: they
agree on a number before (`max_over_ranks`), or have it gathered for a while (`unsharded`), or go in step (`SynchronizedCalls`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.tensor_parallel import parallelize


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder's layers, found by their number; none where no stack has it."""
    base = base_of(model)
    if not hasattr(base, "config"):
        return []
    count = base.config.get_text_config().num_hidden_layers
    # The decoder first: a vision tower may have as many layers.
    places = [base.get_decoder()] if hasattr(base, "get_decoder") else []
    for place in [*places, base.base_model]:
        for stack in place.modules():
            if isinstance(stack, nn.ModuleList) and len(stack) == count:
                return list(stack)
    return []


def shard(model: nn.Module, mesh: Any) -> None:
    """Split the weights over the ranks of a mesh: layer by layer, and what is outside the layers.

    Args:
        mesh: `data_parallel` × `tensor_parallel`; what layers compute is split by the second.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if mesh["tensor_parallel"].size() > 1:
        parallelize(model, mesh["tensor_parallel"])
    mesh = mesh["data_parallel"]
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    # Given back after a forward as well: what stays gathered in an evaluation would be the weights of an older step.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.run_inside = MethodType(_call, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_inside")
    model.inside = False  # type: ignore[assignment]


def _call(model: nn.Module, function: Callable[[], Any]) -> Any:
    return function()


def is_sharded(model: Any) -> bool:
    """Whether `shard` was called for it."""
    return hasattr(model, "run_inside")


def run_unsharded(model: Any, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, which uses parts of `model` by themselves: its decoder, its head.

    A model that is split gathers what it holds outside its layers when it is called as a whole; this is such a call.
    """
    if not is_sharded(model) or model.inside:
        return function(*args)
    model.inside = True
    try:
        return model.run_inside(partial(function, *args))
    finally:
        model.inside = False


def runs_unsharded(model: Any) -> bool:
    """Whether this is within `run_unsharded`, with the weights outside the layers of a split model gathered."""
    return is_sharded(model) and model.inside


# -- together -----------------------------------------------------------------------------------------------------


def max_over_ranks(number: int, model: Any) -> int:
    """The largest `number` of all ranks, where they must run `model` equally often; elsewhere the number itself."""
    if not is_sharded(model) or torch.distributed.get_world_size() == 1:
        return number
    value = torch.tensor(number, device=next(model.parameters()).device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value)


def fits_unsharded(model: Any, wanted: bool | None) -> bool:
    """Whether to gather a split model: as `wanted`, or where no rank would need more than half of its free memory."""
    if wanted is not None:
        return wanted
    device = next(model.parameters()).device
    if device.type != "cuda":
        return True
    # What torch holds and does not use is free as well.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + held
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    return not max_over_ranks(int(needed > free / 2), model)


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """All weights on every rank, so that each may run the model as often as it likes; all ranks must enter together.

    Without gradients, and without changing weights.
    """
    parts = [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]
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
    """Runs a model on all ranks as often as on the one that needs it most, one call at a time.

    Args:
        model: split over ranks. idle: one call of it, for ranks that have nothing left to compute.
    """

    def __init__(self, model: Any, idle: Callable[[], Any]) -> None:
        self.model, self.idle = model, idle

    def call(self) -> None:
        """Said before each call."""
        max_over_ranks(1, self.model)

    def finish(self) -> None:
        """Go along until all ranks have come here."""
        while max_over_ranks(0, self.model):
            self.idle()


@contextmanager
def unsharded_or_synchronized(
    model: Any, gather: bool | None, idle: Callable[[], Any]
) -> Iterator[SynchronizedCalls | None]:
    """Ranks run `model` as often as each likes: gathered where that fits (see `fits_unsharded`), else by what is yielded."""
    if not is_sharded(model):
        yield None
    elif fits_unsharded(model, gather):
        with unsharded(model):
            yield None
    else:
        lock = SynchronizedCalls(model, idle)
        yield lock
        lock.finish()


# -- weights ------------------------------------------------------------------------------------------------------


def full_tensor(value: Tensor) -> Tensor:
    """A tensor gathered from all ranks, where it is split; all ranks must call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def copy_weight(weight: Tensor, value: Tensor) -> None:
    """Copy a tensor into a weight, either of which may be split; all ranks must call it."""
    if hasattr(weight, "device_mesh") and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        split_weight: Any = weight
        value = distribute_tensor(value.to(weight.device), split_weight.device_mesh, split_weight.placements)
    elif hasattr(value, "device_mesh") and not hasattr(weight, "device_mesh"):
        value = full_tensor(value)
    weight.copy_(value)


def full_state_dict(model: Any) -> dict[str, Tensor] | None:
    """The state dict of a split model, gathered, on the CPU of rank 0 (others get an empty one); None for others."""
    if not is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if found and first.setdefault(id(parameter), name) != name:
            found[name] = found[first[id(parameter)]]  # tied, and to be seen as such by what saves it
    return found
