"""Linear layers that share an input as one matrix product, with their adapters, and its gradients."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradients = list[Tensor | None]


class Part(NamedTuple):
    """A parameter of a projection, and where it is in the joined weights.

    Attributes:
        kind: `weight` or `bias` of a linear layer, `a` or `b` of its adapter.
        parameter: The parameter.
        rows: Outputs of the layer.
        ranks: Ranks of the adapter.
        scale: Factor of the joined weight: that of the adapter for `b`, 1 for the others.
    """

    kind: Literal["weight", "bias", "a", "b"]
    parameter: Tensor
    rows: slice
    ranks: slice
    scale: float


class Projection:
    """Linear layers with the same input as one product, with their adapters as two more.

    The output is `h Wᵀ + c + (h Aᵀ) Bᵀ`, with the weights and first factors concatenated, and the second factors, with
    their scales, on the diagonal of B.

    Args:
        layers: Linear layers, or peft's `Linear` around them.
        dtype: Type of the products; the weights are copied.

    Attributes:
        parameters: The parameters of the layers, which `gradients` follows.

    Example:
        >>> projection = Projection([nn.Linear(4, 2), nn.Linear(4, 3)], torch.float32)
        >>> out, down = projection(torch.zeros(5, 4))
        >>> out.shape
        torch.Size([5, 5])
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parts: list[Part] = []
        row = rank = 0
        for layer in layers:
            linear = linear_of(layer)
            like: Tensor = linear.weight
            rows = slice(row, row := row + linear.out_features)
            self._parts.append(Part("weight", linear.weight, rows, slice(0), 1.0))
            if linear.bias is not None:
                self._parts.append(Part("bias", linear.bias, rows, slice(0), 1.0))
            if (factors := _factors(layer)) is not None:
                a, b, scale = factors
                ranks = slice(rank, rank := rank + len(a))
                self._parts += [Part("a", a, rows, ranks, 1.0), Part("b", b, rows, ranks, scale)]
        self.parameters = [part.parameter for part in self._parts]
        inputs = like.shape[1]
        self.weight = like.new_empty(row, inputs, dtype=dtype)
        kinds = {part.kind for part in self._parts}
        self.bias = like.new_zeros(row, dtype=dtype) if "bias" in kinds else None
        self.a = like.new_empty(rank, inputs, dtype=dtype) if "a" in kinds else None
        self.b = like.new_zeros(row, rank, dtype=dtype) if "a" in kinds else None
        with torch.no_grad():
            for part in self._parts:
                self._place(part).copy_(part.parameter)
                if part.kind == "b":
                    self._place(part).mul_(part.scale)

    def _place(self, part: Part) -> Tensor:
        """The part's place in the joined weights."""
        found = {"weight": self.weight, "bias": self.bias, "a": self.a, "b": self.b}[part.kind]
        assert found is not None
        if part.kind == "b":
            return found[part.rows, part.ranks]
        return found[part.ranks if part.kind == "a" else part.rows]

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs `[n, out]`, and those of the first factors `[n, ranks]`, for states `[n, in]`."""
        out = F.linear(states, self.weight, self.bias)
        if self.a is None or self.b is None:
            return out, None
        down = F.linear(states, self.a)
        return out.addmm_(down, self.b.t()), down

    def by_down(self, grad: Tensor) -> Tensor | None:
        """Gradient of the first factors' outputs, from that of the outputs, `[n, out]`; None without adapters."""
        return None if self.b is None else grad @ self.b

    def by_input(self, grad: Tensor, by_down: Tensor | None) -> Tensor:
        """Gradient of the input, from that of the outputs and `by_down`."""
        found = grad @ self.weight
        return found if self.a is None or by_down is None else found.addmm_(by_down, self.a)

    def gradients(
        self, needed: Sequence[bool], grad: Tensor, states: Tensor | None, down: Tensor | None, by_down: Tensor | None
    ) -> Gradients:
        """Gradients of the parameters.

        Args:
            needed: True for each parameter that needs one.
            grad: Gradient of the outputs, `[n, out]`.
            states: The input, `[n, in]`; may be None if `reads_input` is False.
            down: Outputs of the first factors, `[n, ranks]`.
            by_down: Their gradient.
        """
        found: dict[str, Tensor] = {}
        for kind in {part.kind for part, need in zip(self._parts, needed, strict=True) if need}:
            if kind == "bias":
                found[kind] = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
            elif kind == "b":
                assert down is not None
                found[kind] = (down.t() @ grad).t()  # faster than the same product without the transposes
            else:
                factor = grad if kind == "weight" else by_down
                assert factor is not None
                assert states is not None
                found[kind] = factor.t() @ states
        gradients: Gradients = []
        for part, need in zip(self._parts, needed, strict=True):
            if not need:
                gradients.append(None)
            elif part.kind == "b":
                gradients.append(found["b"][part.rows, part.ranks].to(part.parameter.dtype).mul_(part.scale))
            else:
                index = part.ranks if part.kind == "a" else part.rows
                gradients.append(found[part.kind][index].to(part.parameter.dtype))
        return gradients

    def reads_input(self, needed: Sequence[bool]) -> bool:
        """True if a needed gradient depends on the input."""
        return any(need and part.kind in ("weight", "a") for part, need in zip(self._parts, needed, strict=True))


class LayerWeights:
    """Copies of the weights of fused layers in the type of the products; all token groups of a forward pass share them.

    Args:
        dtype: Type of the products.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._found: dict[int, Projection] = {}

    def projection(self, *layers: nn.Module) -> Projection:
        """The projection of linear layers with the same input."""
        found = self._found.get(id(layers[0]))
        if found is None:
            found = self._found[id(layers[0])] = Projection(layers, self.dtype)
        return found


def unadapted(module: nn.Module) -> nn.Module:
    """The layer below an adapter, or the layer itself."""
    found: nn.Module = getattr(module, "base_layer", module)
    return found


def linear_of(module: nn.Module) -> nn.Linear:
    """`unadapted` of a module that is a linear layer, or an adapter around one."""
    layer = unadapted(module)
    assert isinstance(layer, nn.Linear)
    return layer


def is_plain_linear(module: nn.Module) -> bool:
    """True if `unadapted` gives a linear layer that computes what its weight says: not quantized, parametrized, …"""
    layer = unadapted(module)
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and "forward" not in vars(layer)


def _factors(module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """Both factors and the scale of the active adapter of a layer; None if there is none."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or module.disable_adapters:
        return None
    for name in module.active_adapters:
        if name in module.lora_A:
            a, b = (getattr(module, part)[name].weight for part in ("lora_A", "lora_B"))
            return a, b, float(module.scaling[name])
    return None
