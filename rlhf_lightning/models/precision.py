"""What stays in float32 where a model is cast to a narrower type."""

import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)


def sparing(fn: Callable[[Tensor], Tensor], spared: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    """`fn` of `Module._apply` (a move, a cast) such that the tensors that are `spared` keep their type."""

    @functools.wraps(fn)  # torchmetrics goes by its name
    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrowed = moved.dtype in NARROW and tensor.dtype not in NARROW and tensor.is_floating_point()
        return tensor.to(moved.device) if narrowed and spared(tensor) else moved

    return apply


def cast_weights_only(
    fn: Callable[[Tensor], Tensor], module: nn.Module, heads: Iterable[nn.Module]
) -> Callable[[Tensor], Tensor]:
    """`fn` such that a cast to a narrower type reaches the weights of a module, and neither heads nor buffers.

    Buffers are frequencies of rotary embeddings, which rounded to 8 bits are wrong by whole turns at a few thousand
    tokens (transformers keeps them in float32 whatever it loads), and sums of metrics. The heads are linear layers of
    one output whose updates a narrow type would round away. A head that is sharded goes with its shards' group.
    """
    exact = {id(p) for head in heads for p in head.parameters() if not hasattr(p, "placements")}
    weights = {id(t) for p in module.parameters() for t in (p, p.grad) if t is not None and id(p) not in exact}
    return sparing(fn, lambda tensor: id(tensor) not in weights)


def weights_alone(plugin: Any) -> None:
    """Have Lightning's `bf16-true` and `16-true` cast weights, and leave batches and the default type as they are.

    By itself it rounds every number of a batch (log-probabilities, advantages, margins) to 8 bits before a step, and
    every tensor that a step or a reward makes (what is logged, random numbers).
    """
    precision = str(getattr(plugin, "precision", ""))
    if "64" in precision:
        return
    plugin.convert_input = lambda data: data
    if precision.endswith("16-true"):
        plugin.forward_context = plugin.tensor_init_context = nullcontext
