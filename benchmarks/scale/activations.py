"""Activation bytes of a decoder of any shape, by a linear model fitted to small models.

For each layer and token, the bytes that autograd saves are linear in the hidden size, the width of all query heads and
of all key heads, the intermediate size and the number of heads, plus a constant; outside the layers, in the hidden size
and the size of a head. The coefficients are fitted by least squares to small models, whose saved bytes
`models.memory.activation_bytes` counts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from benchmarks.steps.flops import Shape
from rlhf_lightning.models.backbone import Backbone
from rlhf_lightning.models.memory import activation_bytes
from rlhf_lightning.models.packed_forward import PackedForward

TOKENS = (1024, 2048)
FITTED = [
    Shape(32, 48, 1, 4, 2, 8, 64),
    Shape(64, 48, 1, 4, 2, 8, 64),
    Shape(32, 96, 1, 4, 2, 8, 64),
    Shape(32, 48, 1, 8, 2, 8, 64),
    Shape(32, 48, 1, 4, 4, 8, 64),
    Shape(32, 48, 1, 4, 2, 16, 64),
    Shape(32, 48, 2, 4, 2, 8, 64),
    Shape(64, 48, 2, 4, 2, 8, 64),
    Shape(32, 48, 2, 4, 2, 16, 64),
    Shape(32, 48, 1, 8, 2, 16, 64),
    Shape(64, 96, 3, 8, 4, 16, 64),
]
HELD_OUT = [Shape(48, 80, 2, 6, 3, 8, 96), Shape(96, 160, 4, 8, 2, 16, 128), Shape(128, 256, 3, 16, 8, 8, 512)]
"""Shapes that check the fit; they are not used for it."""


def small_model(shape: Shape, family: str) -> Any:
    """A model of a shape with random weights; `family` is `Qwen3` or `Llama`."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**config_of(shape))
    with torch.random.fork_rng():
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    # A model with hooks runs its own modules, as on a GPU; the layers fused on a CPU save less.
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def config_of(shape: Shape) -> dict[str, Any]:
    """Arguments of a transformers config."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }


def measured(shape: Shape, family: str, precision: str) -> float:
    """Bytes that a small model saves per additional token; `precision` is `32-true`, `bf16-mixed` or `bf16-true`.

    Bytes that do not grow with tokens are not included, such as autocast's bfloat16 copies of the weights.
    """
    model = small_model(shape, family)
    model = model.bfloat16() if precision == "bf16-true" else model
    forward, context = PackedForward(model, Backbone(model).decoder), _context(precision)
    few, more = (activation_bytes(forward, count, context) for count in TOKENS)
    return (more - few) / (TOKENS[1] - TOKENS[0])


def _context(precision: str) -> Callable[[], Any]:
    if precision != "bf16-mixed":
        return nullcontext
    return lambda: torch.autocast("cpu", dtype=torch.bfloat16)


def terms(shape: Shape) -> list[float]:
    """The quantities that the bytes are linear in."""
    wide = [
        shape.hidden,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
        shape.intermediate,
        shape.heads,
        shape.heads / shape.kv_heads,  # the bias of attention over short rows in bfloat16
        1,
    ]
    return [*(shape.layers * size for size in wide), shape.hidden, shape.head_dim]


@cache
def law(family: str, precision: str) -> tuple[float, ...]:
    """Bytes per token for each of `terms`."""
    table = torch.tensor([terms(shape) for shape in FITTED], dtype=torch.float64)
    found = torch.tensor([measured(shape, family, precision) for shape in FITTED], dtype=torch.float64)
    return tuple(torch.linalg.lstsq(table, found[:, None], driver="gelsd").solution[:, 0].tolist())


def predicted(shape: Shape, family: str, precision: str, tokens: int) -> float:
    """Estimated bytes."""
    return tokens * sum(a * b for a, b in zip(law(family, precision), terms(shape), strict=True))


def errors(family: str, precision: str, shapes: Sequence[Shape] = tuple(HELD_OUT)) -> list[float]:
    """Relative error on shapes that were not used for the fit."""
    return [predicted(shape, family, precision, 1) / measured(shape, family, precision) - 1 for shape in shapes]
