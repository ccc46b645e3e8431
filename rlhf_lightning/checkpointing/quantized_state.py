"""Quantized optimizer state in checkpoints: stored as plain tensors, and rebuilt by the classes of torchao.

`torch.load` refuses torchao's tensor subclasses with a function as `map_location`, which Lightning always passes, and
with `weights_only` unless torchao was imported before. Plain tensors can be read by everyone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rlhf_lightning.types import StateDict

    Stored: TypeAlias = dict[str, str | dict[str, Tensor] | list[bool | torch.dtype | torch.Size]]

CLASSES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}
"""The classes, and the modules that define them. Nothing else is imported, whatever a checkpoint contains."""
CLASS, TENSORS, ATTRIBUTES = "tensor_subclass", "tensors", "attributes"


def as_plain(state: "list[StateDict]") -> "list[StateDict]":
    """Copy the states of optimizers, with plain tensors in the place of quantized ones.

    Args:
        state: `optimizer_states` of a checkpoint. It is not changed.
    """
    return tree_map(_plain, state)


def as_quantized(state: "list[StateDict]") -> "list[StateDict]":
    """The inverse of `as_plain`.

    Raises:
        UserError: If torchao is missing, or has no such class.
    """
    return tree_map(_quantized, state, is_leaf=_is_stored)


def _plain(value: "Tensor") -> "Tensor | Stored":
    kind = type(value)
    if CLASSES.get(kind.__name__) != kind.__module__ or not is_traceable_wrapper_subclass(value):
        return value
    names, attributes = value.__tensor_flatten__()
    return {
        CLASS: kind.__name__,
        TENSORS: {name: getattr(value, name) for name in names},
        ATTRIBUTES: list(attributes),
    }


def _is_stored(value: "Tensor | Stored") -> bool:
    return isinstance(value, dict) and value.keys() == {CLASS, TENSORS, ATTRIBUTES}


def _quantized(value: "Tensor | Stored") -> "Tensor":
    if not isinstance(value, dict):
        return value
    name = str(value[CLASS])
    if name not in CLASSES:
        raise UserError(f"the checkpoint has optimizer state of an unknown class, {name!r}; it was not written by fit")
    try:
        kind = getattr(import_module(CLASSES[name]), name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the optimizer state of the checkpoint is quantized by torchao ({name}), which needs the package "
            f"{error.name}; install it with pip install torchao"
        ) from error
    return kind.__tensor_unflatten__(value[TENSORS], value[ATTRIBUTES])
