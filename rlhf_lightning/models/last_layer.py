"""The last decoder layer computes only wanted positions: nothing after it reads the others.

Its keys and values are computed at all positions; queries, attention, feed-forward and norms only at wanted ones. For a
reward model, which reads one token of each row, this leaves out nearly the whole layer.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlhf_lightning.models.packing import PackedLayout


class KeyValueRequest:
    """Layout for which attention raises `KeysAndValues` instead of computing anything."""


class KeysAndValues(Exception):
    """The keys and values of a layer, as its attention received them.

    Args:
        key: `[1, key heads, n, size]`.
        value: `[1, key heads, n, size]`.

    Example:
        >>> KeysAndValues(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)).key.shape
        torch.Size([1, 2, 5, 4])
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


@dataclass(frozen=True)
class KeptLayout:
    """Layout of a layer that computes only some positions of a packed row.

    Attributes:
        full: Layout of the whole packed row.
        kept: Increasing indices of the computed positions in the packed row, `[m]`.
        key: Keys of all positions, `[1, key heads, n, size]`.
        value: Values of all positions, `[1, key heads, n, size]`.

    Example:
        ```python
        layout = KeptLayout(full, kept=torch.tensor([4, 9]), key=key, value=value)
        ```
    """

    full: PackedLayout
    kept: Tensor
    key: Tensor
    value: Tensor


def install(layer: nn.Module) -> None:
    """Make a decoder layer follow `PackedLayout.kept`; it runs unchanged if that is None.

    The hook stays, because a layer whose activations are recomputed runs again in backward.
    """
    if _keep not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_keep, with_kwargs=True)


def has_other_hooks(module: nn.Module) -> bool:
    """True if a module has forward hooks other than that of `install`."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(hook is not _keep for hook in hooks)


def _keep(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Compute keys and values of all positions, and reduce the layer's inputs to the kept ones."""
    full = kwargs.get("layout")
    if not isinstance(full, PackedLayout) or full.kept is None:
        return None
    try:
        layer.forward(*args, **{**kwargs, "layout": KeyValueRequest()})
    except KeysAndValues as found:
        layout = KeptLayout(full, full.kept, found.key, found.value)
    else:
        raise RuntimeError("the last layer does not call the installed attention")
    reduced = {name: _reduced(value, layout) for name, value in kwargs.items()}
    return tuple(_reduced(value, layout) for value in args), {**reduced, "layout": layout}


def _reduced(value: Any, layout: KeptLayout) -> Any:
    """Tensors `[1, n, …]` at the kept positions, also in tuples; everything else unchanged."""
    if isinstance(value, tuple):
        return tuple(_reduced(part, layout) for part in value)
    if isinstance(value, Tensor) and value.shape[:2] == (1, len(layout.full.rows)):
        return value[:, layout.kept]
    return value
