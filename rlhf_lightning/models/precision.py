"""Which tensors and products stay in float32 at a narrower precision."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)


def logprob_rounding(dtype: torch.dtype, layers: int, wide_head: bool) -> float:
    """Bound on the mean |difference|, in nats, of a token's log-probability between two forward passes that only round.

    ε·√layers for the hidden states, whose rounding errors add up like a random walk over the layers (Higham, "Accuracy
    and Stability of Numerical Algorithms", 2002, section 2.8), plus 16·ε/3 for narrow logits: those of magnitude 16 to
    32 are multiples of 16·ε, and two numbers that are uniform within such a step differ by a third of it.

    Args:
        dtype: Type of the layers' computations; ε is its machine epsilon, 2⁻⁷ for bfloat16 and 2⁻¹⁰ for float16.
        layers: Number of layers.
        wide_head: True if logits are computed in float32 or wider.

    Example:
        >>> round(logprob_rounding(torch.bfloat16, layers=30, wide_head=True), 3)
        0.043
    """
    eps = torch.finfo(dtype).eps
    return float(eps * (layers**0.5 + (0 if wide_head else 16 / 3)))


def sparing(fn: Callable[[Tensor], Tensor], spared: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    """Wrap the `fn` of `Module._apply` so that the tensors for which `spared` is True keep their dtype.

    Args:
        fn: A move or a cast.
        spared: Returns True for tensors that keep their dtype.
    """

    @functools.wraps(fn)  # torchmetrics reads its name
    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrowed = moved.dtype in NARROW and tensor.dtype not in NARROW and tensor.is_floating_point()
        return tensor.to(moved.device) if narrowed and spared(tensor) else moved

    return apply


def cast_weights_only(
    fn: Callable[[Tensor], Tensor], module: nn.Module, heads: Iterable[nn.Module]
) -> Callable[[Tensor], Tensor]:
    """Wrap `fn` so that a narrowing cast applies to a module's weights, but not to heads and rotary frequencies.

    Rotary frequencies that are rounded to 8 bits are wrong by whole turns after a few thousand tokens (transformers
    always keeps them in float32). Other buffers are used together with the weights, and are cast. Metric sums are not
    buffers, and are not cast. Heads are linear layers with one output; a narrow type would round their small updates
    to 0.

    Args:
        fn: A move or a cast.
        module: The module that is cast.
        heads: Value and score heads in it.
    """
    exact = {id(p) for head in heads for p in head.parameters()}
    cast = {id(t) for p in module.parameters() for t in (p, p.grad) if t is not None and id(p) not in exact}
    cast |= {id(buffer) for name, buffer in module.named_buffers() if "inv_freq" not in name}
    return sparing(fn, lambda tensor: id(tensor) not in cast)


def weights_alone(plugin: Any) -> None:
    """Make Lightning's `bf16-true` and `16-true` cast only weights, not batches or the default dtype.

    Otherwise, Lightning rounds all numbers of a batch (log-probabilities, advantages, margins), and all tensors that a
    step or a reward creates, to 8 bits.

    Args:
        plugin: The trainer's precision plugin.
    """
    precision = str(getattr(plugin, "precision", ""))
    if "64" in precision:
        return
    plugin.convert_input = lambda data: data
    if precision.endswith("16-true"):
        plugin.forward_context = plugin.tensor_init_context = nullcontext


class _Rounding:
    """The number of users of PyTorch's setting for float32 products, and the value that it had before.

    The setting holds for the whole process. A thread may sample while a step trains, so the last user restores it.
    """

    lock = Lock()
    users = 0
    before = "highest"


@contextmanager
def rounded_factors() -> Iterator[None]:
    """Context manager in which matrix products of float32 tensors may round their factors, but not their sums.

    On a CPU, oneDNN then computes them: with AMX it multiplies in bfloat16 and adds in float32; on other processors it
    computes in float32, on those of AMD twice as fast as the library that PyTorch uses otherwise. The setting holds for
    all threads of the process.
    """
    with _Rounding.lock:
        if _Rounding.users == 0:
            _Rounding.before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
        _Rounding.users += 1
    try:
        yield
    finally:
        with _Rounding.lock:
            _Rounding.users -= 1
            if _Rounding.users == 0:
                torch.set_float32_matmul_precision(_Rounding.before)
