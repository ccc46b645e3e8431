"""liger-kernel without CUDA: its functions in plain torch, and its kernels in Triton's interpreter."""

import os
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.models import liger


class Stand:
    """Stands in for `liger_kernel.transformers.functional`; counts the calls of each function."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def liger_rms_norm(self, x: Tensor, weight: Tensor, eps: float, in_place: bool = True) -> Tensor:
        self.calls["norm"] += 1
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def liger_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        self.calls["swiglu"] += 1
        return torch.nn.functional.silu(gate) * up

    def liger_rope(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        self.calls["rope"] += 1
        query, key = (self._rotated(states, cos[:, None], sin[:, None]) for states in (query, key))
        return query, key

    def _rotated(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = states.chunk(2, -1)
        return states * cos + torch.cat([-right, left], -1) * sin


def stand_in(monkeypatch: pytest.MonkeyPatch, stand: Any) -> None:
    """Use other functions, as if they were liger-kernel's and the CPU had CUDA."""
    monkeypatch.setattr(liger, "DEVICE", "cpu")
    monkeypatch.setattr(liger, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(liger, "_functions", lambda: stand)


INSTALLED = find_spec("triton") is not None and find_spec("liger_kernel") is not None
INTERPRETS = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
"""True if this process runs kernels in Triton's interpreter, which must be chosen before Triton is imported."""


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run liger's own kernels on CPU tensors, in Triton's interpreter.

    The interpreter (Triton 3.9) lacks two things that these kernels use: methods of numbers that are arguments, and the
    device library's `rsqrt`, for which it returns None.
    """
    import liger_kernel.ops.rms_norm
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if type(argument) is not float:
            return convert(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(liger, "DEVICE", "cpu")
    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
