"""What is kept in the memory of the CPU: activations until backward needs them, models until they run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf_lightning.errors import ConfigError

log = logging.getLogger(__name__)
LEAST = 2**20
"""Bytes below which a tensor is not worth a copy."""
Packed = Tensor | tuple[Tensor, torch.device]


class ActivationOffload(saved_tensors_hooks):
    """While it is entered, what autograd saves on a device goes to the CPU, and comes back when backward needs it.

    Weights stay where they are, and a tensor that several operations save is copied once. Copies are in order with the
    kernels of the current stream, from and to pinned memory: the CPU does not wait for them. Inside gradient
    checkpointing only the inputs of layers are saved, so only these are moved.

    Args:
        device: the type of device that tensors are moved away from. least: bytes of a tensor that is moved.
    """

    def __init__(self, device: str = "cuda", least: int = LEAST) -> None:
        self.device, self.least = device, least
        self.moved = 0
        """Bytes that were copied since it was made."""
        self._copies: dict[Any, tuple[StorageWeakRef, Packed]] = {}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Packed:
        size = tensor.numel() * tensor.element_size()
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if tensor.device.type != self.device or size < self.least or weight or type(tensor) is not Tensor:
            return tensor
        # A reference to the storage: as long as it is held, no other storage has its number.
        storage = StorageWeakRef(tensor.untyped_storage())
        key = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key not in self._copies:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=self.device == "cuda", requires_grad=False)
            copy.copy_(tensor.detach(), non_blocking=True)
            self._copies[key] = storage, (copy, tensor.device)
            self.moved += size
        return self._copies[key][1]

    def _unpack(self, packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        copy, device = packed
        return copy.to(device, non_blocking=True)

    def __enter__(self) -> "ActivationOffload":  # type: ignore[override]
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._copies.clear()
        super().__exit__(*args)


class Place:
    """Where a frozen model is: on a device of its own, or on the CPU except while it runs.

    The parts of a Lightning module move with it; a model with a place does not, but is cast as it is. Its weights are
    not copied back after use: those on the CPU are kept, and shown again.

    Args:
        model: frozen. device: where it stays and runs. offload: it rests on the CPU and runs where the module is.
    """

    def __init__(self, model: nn.Module, device: str | None = None, offload: bool = False) -> None:
        self.model, self.offload = model, offload
        self.rest = torch.device("cpu" if device is None else device)
        self.work = self.rest
        """The device that it runs on."""
        model.to(self.rest)
        self._applied = model._apply
        # On the object: a wrapper around it would rename its weights.
        model._apply = MethodType(Place._apply_at_rest, self)  # type: ignore[method-assign]

    def _apply_at_rest(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.offload:
            self.work = fn(torch.empty(0)).device
        self._applied(lambda tensor: fn(tensor).to(self.rest), recurse)
        return self.model

    @contextmanager
    def there(self) -> Iterator[torch.device]:
        """The model where it runs, for a while."""
        tensors = [] if self.work == self.rest else [*self.model.parameters(), *self.model.buffers()]
        home = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(self.work, non_blocking=True)
        try:
            yield self.work
        finally:
            for tensor, data in zip(tensors, home, strict=True):
                tensor.data = data


def check_place(name: str, device: str | None, offload: bool) -> None:
    """Raise `ConfigError` where a device does not exist here, or is named beside `offload`."""
    if device is None:
        return
    if offload:
        raise ConfigError(f"{name}: device says where it stays, offload moves it to and fro; set one of them")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{name}: there is no device {device!r} here ({reason})") from error
