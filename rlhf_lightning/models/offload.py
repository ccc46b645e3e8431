"""Offloads to CPU memory: activations until the backward pass needs them, and frozen models while they do not run."""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf_lightning.errors import ConfigError, first_line

log = logging.getLogger(__name__)
LEAST = 2**20
"""Size in bytes below which a tensor is not copied."""
Packed = Tensor | tuple[Tensor, torch.device]


class ActivationOffload(saved_tensors_hooks):
    """Context manager that moves tensors saved by autograd to the CPU, and returns them when backward needs them.

    Weights are not moved, and a tensor saved by several operations is copied once. Copies are ordered with the kernels
    of the current stream and use pinned memory, so the CPU does not wait for them. With gradient checkpointing,
    autograd saves only the inputs of layers, so only these are moved.

    Args:
        device: Type of the device to move tensors from.
        least: Smallest size of a tensor that is moved, in bytes.

    Example:
        ```python
        offload = ActivationOffload()
        with offload:
            loss = model(input_ids).logits.float().mean()
        loss.backward()
        print(offload.moved)
        ```
    """

    def __init__(self, device: str = "cuda", least: int = LEAST) -> None:
        self.device, self.least = device, least
        self.moved = 0
        """Bytes copied so far."""
        self._copies: dict[tuple[Hashable, ...], tuple[StorageWeakRef, Packed]] = {}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Packed:
        """Copy a saved tensor to the CPU if it is large enough."""
        size = tensor.numel() * tensor.element_size()
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if tensor.device.type != self.device or size < self.least or weight or type(tensor) is not Tensor:
            return tensor
        # While this reference exists, no other storage can have the same cdata.
        storage = StorageWeakRef(tensor.untyped_storage())
        key = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key not in self._copies:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=self.device == "cuda", requires_grad=False)
            copy.copy_(tensor.detach(), non_blocking=True)
            self._copies[key] = storage, (copy, tensor.device)
            self.moved += size
        return self._copies[key][1]

    def _unpack(self, packed: Packed) -> Tensor:
        """Return a saved tensor on its original device."""
        if isinstance(packed, Tensor):
            return packed
        copy, device = packed
        return copy.to(device, non_blocking=True)

    def __exit__(self, *args: object) -> None:
        self._copies.clear()
        super().__exit__(*args)


class Placement:
    """Places a frozen model on its own device, or on the CPU except while it runs.

    Submodules of a Lightning module move with it; a model with a `Placement` does not move, but it is cast with the
    module. Weights are not copied back after use: the CPU copies are kept and restored.

    Args:
        model: The frozen model.
        device: Device on which it stays and runs.
        offload: Keep it on the CPU, and run it on the device of the Lightning module.

    Example:
        ```python
        placement = Placement(reference, offload=True)
        with placement.on_device() as device:
            logits = reference(input_ids.to(device)).logits
        ```
    """

    def __init__(self, model: nn.Module, device: str | None = None, offload: bool = False) -> None:
        self.model, self.offload = model, offload
        self.rest = torch.device("cpu" if device is None else device)
        self.work = self.rest
        """The device that it runs on."""
        model.to(self.rest)
        self._applied = model._apply
        # Replaced on the instance, because a wrapping module would rename the weights.
        model._apply = MethodType(Placement._apply_at_rest, self)  # type: ignore[method-assign]

    def _apply_at_rest(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`_apply` of the model (a move or a cast) that does not change its resting device."""
        if self.offload:
            self.work = fn(torch.empty(0)).device
        self._applied(lambda tensor: fn(tensor).to(self.rest), recurse)
        return self.model

    @contextmanager
    def on_device(self) -> Iterator[torch.device]:
        """Context manager in which the model is on the device where it runs; yields the device."""
        tensors = [] if self.work == self.rest else [*self.model.parameters(), *self.model.buffers()]
        home = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.work, non_blocking=True)
        try:
            yield self.work
        finally:
            for tensor, data in zip(tensors, home, strict=True):
                tensor.data = data


def placements(module: nn.Module) -> list[Placement]:
    """The placements of a module's submodules."""
    owners = (getattr(vars(one).get("_apply"), "__self__", None) for one in module.modules())
    return [owner for owner in owners if isinstance(owner, Placement)]


def check_place(name: str, device: str | None, offload: bool) -> None:
    """Check the placement of a frozen model.

    Args:
        name: Name of the section of settings, for the message.
        device: The device; None for that of the module.
        offload: True if the model is offloaded.

    Raises:
        ConfigError: If the device does not exist, or is given together with `offload`.
    """
    if device is None:
        return
    if offload:
        raise ConfigError(f"{name}: device keeps the model on one device, but offload moves it; set only one of them")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{name}: this machine has no device {device!r} ({first_line(error)})") from error
