"""Decoding steps as CUDA graphs: one launch instead of hundreds. CUDA only; see benchmarks/gpu."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lightning.generation.kv_cache import SlotKVCache

Step = Callable[[SlotKVCache, Tensor], Tensor]


class GraphedStep:
    """A decoding step, recorded once per set of buffers and then replayed.

    A graph reads and writes fixed memory: the cache's buffers, their positions, and a tensor that tokens are copied
    into. It therefore always attends over the full capacity; keys beyond a row's position are masked.

    Args:
        step: Computes logits `[slots, V]` from the cache and the last tokens `[slots]`.

    Example:
        ```python
        step = GraphedStep(engine.step)
        logits = step(kv_cache, tokens)  # recorded by the first call
        ```
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self._buffers: tuple[int, ...] = ()

    def __call__(self, kv_cache: SlotKVCache, tokens: Tensor) -> Tensor:
        """Logits after `tokens` `[slots]`, `[slots, V]`; the next call overwrites them."""
        kv_cache.width = kv_cache.capacity
        buffers = (kv_cache.positions.data_ptr(), *(layer.keys.data_ptr() for layer in kv_cache.layers))
        if buffers != self._buffers:
            self._record(kv_cache, tokens)
            self._buffers = buffers
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits

    def _record(self, kv_cache: SlotKVCache, tokens: Tensor) -> None:
        """Record the step on the current buffers."""
        self._tokens = tokens.clone()
        # Warm up, because libraries initialize themselves in the first calls, which a graph must not contain. Each call
        # writes the same keys to the same positions, so extra calls change nothing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(kv_cache, self._tokens)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self.step(kv_cache, self._tokens)
