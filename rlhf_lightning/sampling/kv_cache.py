"""The keys and values of rows that are being written: buffers that are filled in place, a slot for each row."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

STEP = 128
"""Tokens that the buffers grow by at least."""


class PrefillCache(CacheLayerMixin):
    """A layer that only keeps what a prefill computed."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class SlotLayer(CacheLayerMixin):
    """Keys and values `[slots, heads, capacity, size]` of one layer; each step writes one token of every row."""

    is_sliding = False

    def __init__(self, slots: "SlotKVCache") -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        device, dtype = key_states.device, key_states.dtype
        if torch.is_autocast_enabled(device.type) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device.type)  # what attention casts them to, once instead of every step
        self.keys, self.values = (
            states.new_zeros(self.slots.count, states.shape[1], self.slots.capacity, states.shape[3], dtype=dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a token of each row at its position; all keys and values up to the longest row."""
        slots = self.slots
        assert self.keys is not None
        assert self.values is not None
        self.keys[slots.numbers, :, slots.positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[slots.numbers, :, slots.positions] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, : slots.width], self.values[:, :, : slots.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width - 1

    def get_max_length(self) -> int:
        return -1


class SlotKVCache:
    """The cache of `count` rows.

    `positions` `[count]` is where each row's next token goes; `width` is 1 more than the largest of them in use.
    """

    def __init__(self, layers: int, count: int, device: torch.device) -> None:
        self.count, self.capacity, self.width = count, 0, 0
        self.numbers = torch.arange(count, device=device)
        self.positions = torch.zeros(count, dtype=torch.long, device=device)
        self.layers = [SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=self.layers)

    def reserve(self, tokens: int, limit: int) -> None:
        """Room for rows of `tokens`; grows by half, since growing copies everything, up to `limit`."""
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens, min(limit, max(self.capacity * 3 // 2, tokens + STEP)))
        for layer in self.layers:
            if layer.is_initialized:
                old = layer.keys, layer.values
                layer.lazy_initialization(*old)
                for new, filled in zip((layer.keys, layer.values), old, strict=True):
                    new[:, :, : filled.shape[2]] = filled

    def fill(self, prefilled: list[PrefillCache], slots: Tensor, columns: Tensor, places: Tensor) -> None:
        """Write prompts: token i goes to column `columns[i]` of slot `slots[i]` from place `places[i]` of a prefill."""
        for layer, found in zip(self.layers, prefilled, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(found.keys, found.values)
            for buffer, states in ((layer.keys, found.keys), (layer.values, found.values)):
                buffer[slots, :, columns] = states[0].transpose(0, 1)[places].to(buffer.dtype)

    def select(self, kept: Tensor) -> None:
        """Only the slots in `kept` go on."""
        self.count, self.numbers, self.positions = len(kept), self.numbers[: len(kept)], self.positions[kept]
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[kept], layer.values[kept]
