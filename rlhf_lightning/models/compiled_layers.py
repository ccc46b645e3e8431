"""Decoder layers compiled by `torch.compile`, where the machine has a compiler."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from rlhf_lightning.errors import ConfigError, first_line
from rlhf_lightning.models.lora import base_of
from rlhf_lightning.models.sharding import layers_of

log = logging.getLogger(__name__)

Backend = str | Callable[..., Any]
"""A backend of `torch.compile`."""


class CompileTimer:
    """Seconds that `torch.compile` has spent in this process.

    Example:
        ```python
        timer = CompileTimer()
        torch.compile(torch.sin)(torch.zeros(2))
        timer.lap()  # seconds, above 0
        timer.lap()  # 0.0
        ```
    """

    def __init__(self) -> None:
        # Not at the top of the module, because this import takes a second.
        from torch._dynamo.callback import on_compile_end, on_compile_start

        self._begun = self._seconds = 0.0
        on_compile_start(self._start)
        on_compile_end(self._end)

    def _start(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._begun

    def lap(self) -> float:
        """Seconds since the previous call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def compile_layers(model: nn.Module, device: torch.device, backend: Backend = "inductor") -> CompileTimer | None:
    """Compile each decoder layer separately: one graph serves all of them, and weights keep their names.

    Args:
        model: A Hugging Face model, or a `PeftModel` around one.
        device: Where the model will run.
        backend: A backend of `torch.compile`.

    Returns:
        Counts the seconds of compilation, which begins in the first step; None if nothing can be compiled here, which
        is logged.

    Raises:
        ConfigError: If the stack of decoder layers is not found.
    """
    layers = layers_of(model)
    if not layers:
        raise ConfigError(
            f"model.compile: no stack of decoder layers was found in {type(base_of(model)).__name__}; set it to false"
        )
    if reason := _obstacle(device, backend):
        log.warning(
            "model.compile: the layers run uncompiled, because torch.compile fails here (%s). On a CPU it needs a C++ "
            "compiler, such as g++",
            reason,
        )
        return None
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return CompileTimer()


def _obstacle(device: torch.device, backend: Backend) -> str | None:
    """Why not even a sine can be compiled, for example because there is no C++ compiler; None if it can."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        torch.compile(_sine, backend=backend)(torch.zeros(2, device=device))
    except BackendCompilerFailed as error:
        return first_line(error)
    return None


def _sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def uncompiled() -> AbstractContextManager[Any]:
    """Context manager in which compiled layers run as they were before.

    PyTorch has one such switch for all threads, and two threads that set and restore it at the same time could leave it
    on. So only the main thread uses it: other threads sample from a copy without compiled layers.
    """
    main = threading.current_thread() is threading.main_thread()
    return torch.compiler.set_stance("force_eager") if main else nullcontext()
