"""Decoding steps as CUDA graphs: one launch instead of hundreds. Runs on CUDA only; see benchmarks/gpu."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lightning.sampling.kv_cache import SlotKVCache

Step = Callable[[SlotKVCache, Tensor], Tensor]


class GraphedStep:
    """A step of the engine, recorded once for each set of buffers and then replayed.

    A graph reads and writes fixed memory: the slots' buffers, their positions, and a tensor of tokens that is copied
    into. So all keys up to the capacity are looked at, those beyond a row's position behind the mask.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self._buffers: tuple[int, ...] = ()

    def __call__(self, slots: SlotKVCache, tokens: Tensor) -> Tensor:
        """The logits after `tokens`; overwritten by the next call."""
        slots.width = slots.capacity
        buffers = (slots.positions.data_ptr(), *(layer.keys.data_ptr() for layer in slots.layers))
        if buffers != self._buffers:
            self._record(slots, tokens)
            self._buffers = buffers
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits

    def _record(self, slots: SlotKVCache, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        # Libraries set themselves up in the first calls, which a graph must not contain. Each writes the same keys to
        # the same places, so that calls more or less change nothing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(slots, self._tokens)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self.step(slots, self._tokens)
