"""`trainer.precision: auto` chooses between `32-true` and `bf16-mixed` by what this machine computes faster."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

PAYS = 1.25
"""A layer must be this many times as fast in bfloat16; rounding is not accepted for less."""
OPERATIONS = 5e9
"""About as many operations are measured, which takes less than a second on one core."""
FEATURES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "ARM BF16"}
"""Flags of Linux for instructions that multiply in bfloat16."""


@dataclass(frozen=True)
class MeasuredPrecision:
    """How many times as fast a processor is in bfloat16 as in float32.

    Attributes:
        feature: The processor's instructions for bfloat16.
        product: Ratio of a matrix product.
        layer: Ratio of a training step of a layer under autocast, in which bfloat16 also costs conversions.

    Example:
        >>> MeasuredPrecision("AMX", product=4.0, layer=2.5).precision
        'bf16-mixed'
    """

    feature: str
    product: float
    layer: float

    @property
    def pays(self) -> bool:
        """True if training in bfloat16 is worth its rounding."""
        return self.layer >= PAYS

    @property
    def precision(self) -> str:
        """The value of `trainer.precision`."""
        return "bf16-mixed" if self.pays else "32-true"

    def __str__(self) -> str:
        return (
            f"bf16 ({self.feature}): measured {self.layer:.1f} times float32 here (matrix products {self.product:.1f})"
        )


def measure_precision(hidden: int = 576, intermediate: int = 1536) -> MeasuredPrecision:
    """Measure the gated feed-forward block of a transformer, forward and backward, on the CPU.

    Args:
        hidden: Hidden size of the model.
        intermediate: Size of its feed-forward layers.
    """
    tokens = int(min(512, max(16, OPERATIONS / (18 * hidden * intermediate))))
    states = torch.ones(tokens, hidden)
    up, gate, down = (
        torch.full(size, 1e-3, requires_grad=True)
        for size in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    )

    def layer(enabled: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled, cache_enabled=False):
            normed = F.rms_norm(states, (hidden,))
            out = states + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
        torch.autograd.grad(out.sum(), (up, gate, down))

    def product(left: Tensor, right: Tensor) -> None:
        left @ right.t()

    wide, narrow = (states, up.detach()), (states.bfloat16(), up.detach().bfloat16())
    with torch.enable_grad():
        found = [
            _ratio(lambda: product(*wide), lambda: product(*narrow)),
            _ratio(lambda: layer(False), lambda: layer(True)),
        ]
    return MeasuredPrecision(_feature(), *found)


def _ratio(wide: Callable[[], None], narrow: Callable[[], None]) -> float:
    """Least CPU time of `wide` over that of `narrow`, measured in turns."""
    least = [float("inf")] * 2
    for _ in range(3):  # the first call also prepares the kernels
        for i, run in enumerate((wide, narrow)):
            start = time.process_time()
            run()
            least[i] = min(least[i], time.process_time() - start)
    return least[0] / max(least[1], 1e-9)


def _feature() -> str:
    """The processor's instructions for bfloat16, from Linux's list of flags."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    return next((name for flag, name in FEATURES.items() if flag in flags), "no instructions known")
