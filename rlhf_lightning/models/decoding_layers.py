"""Linear layers while a CPU decodes: few rows at a time, and the same weights for every token."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.models.lora import base_of

FEW = 64
"""Number of rows up to which a CPU computes `(W xᵀ)ᵀ` faster than `x Wᵀ`."""


@contextmanager
def decoding_layers(model: nn.Module) -> Iterator[None]:
    """Context manager that speeds up linear layers for decoding on a CPU. Gradients are not supported within it.

    In full precision, products of at most `FEW` rows have the faster order of factors. Under autocast, the weights are
    converted once instead of for every token, with the same results; the copies take half the memory of the weights.
    Adapters are not merged: rounded to bfloat16, a sum of base and update would lose small updates. All other cases
    run unchanged.

    Args:
        model: A Hugging Face model, or a `PeftModel` around one.
    """
    weight = next(model.parameters())
    layers: list[nn.Linear] = []
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
        layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
        if torch.is_autocast_enabled("cpu"):
            layers = _converted(layers, model)
        else:
            for layer in layers:
                layer.forward = partial(_few_rows, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _converted(layers: list[nn.Linear], model: nn.Module) -> list[nn.Linear]:
    """Make layers compute with converted weights; returns those that do. The head stays wide (`Backbone.logits`)."""
    head = base_of(model).get_output_embeddings()
    wide = set(head.modules()) if head is not None else set()
    dtype = torch.get_autocast_dtype("cpu")
    layers = [layer for layer in layers if layer not in wide and type(layer.weight) is nn.Parameter]
    for layer in layers:
        weight, bias = layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
        layer.forward = partial(_narrow, weight=weight, bias=bias)  # type: ignore[method-assign]
    return layers


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)


def _few_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`, computed as `(W xᵀ)ᵀ` for up to `FEW` rows."""
    rows = x.numel() // x.shape[-1]
    if rows > FEW:
        return F.linear(x, layer.weight, layer.bias)
    out = (layer.weight @ x.reshape(rows, -1).t()).t().contiguous()
    return (out if layer.bias is None else out + layer.bias).view(*x.shape[:-1], -1)
