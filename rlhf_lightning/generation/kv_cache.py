"""KV cache for decoding: preallocated buffers with one slot per row, written in place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

STEP = 128
"""Minimum number of tokens that the buffers grow by."""


class PrefillCache(CacheLayerMixin):
    """Cache layer that keeps the keys and values of a prefill.

    Example:
        >>> layer = PrefillCache()
        >>> keys, values = layer.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
        >>> keys.shape  # [B, key heads, T, head size]
        torch.Size([1, 2, 5, 4])
    """

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
    """One layer's keys and values, `[slots, heads, capacity, size]`; each step writes one token per slot.

    Args:
        kv_cache: The cache that the layer belongs to.

    Example:
        ```python
        layers = [SlotLayer(kv_cache) for _ in range(model.config.num_hidden_layers)]
        ```
    """

    is_sliding = False

    def __init__(self, kv_cache: "SlotKVCache") -> None:
        super().__init__()
        self.kv_cache = kv_cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        device, dtype = key_states.device, key_states.dtype
        if torch.is_autocast_enabled(device.type) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device.type)  # attention would cast them to this in every step
        shape = self.kv_cache.count, key_states.shape[1], self.kv_cache.capacity
        self.values = value_states.new_zeros(*shape, value_states.shape[3], dtype=dtype)
        if self.kv_cache.transposed:
            self.keys = key_states.new_zeros(*shape[:2], key_states.shape[3], shape[2], dtype=dtype).transpose(2, 3)
        else:
            self.keys = key_states.new_zeros(*shape, key_states.shape[3], dtype=dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of each slot at its position.

        Returns:
            Keys and values up to the longest row, `[slots, heads, width, size]` each.
        """
        kv_cache = self.kv_cache
        assert self.keys is not None
        assert self.values is not None
        self.keys[kv_cache.numbers, :, kv_cache.positions] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[kv_cache.numbers, :, kv_cache.positions] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, : kv_cache.width], self.values[:, :, : kv_cache.width]

    def change_slots(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the first dimension of keys and values; transposed keys are changed as they are stored."""
        assert self.keys is not None
        assert self.values is not None
        transposed = self.kv_cache.transposed
        self.keys = change(self.keys.transpose(2, 3)).transpose(2, 3) if transposed else change(self.keys)
        self.values = change(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv_cache.width, 0

    def get_seq_length(self) -> int:
        return self.kv_cache.width - 1

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class SharedPrompts:
    """Slots in groups with equal prompts, so that attention reads the keys of a prompt once per group.

    Args:
        columns: Number of first positions that are equal within each group.
        members: The slots of each group, `[groups, largest group]`; small groups repeat their first slot.
        groups: Group of each slot, `[slots]`.
        ranks: Index of each slot in its row of `members`, `[slots]`.

    Example:
        >>> shared = SharedPrompts.of([[0, 3], [1]], slots=4, columns=16, device=torch.device("cpu"))
        >>> shared.members.tolist(), shared.groups.tolist(), shared.ranks.tolist()
        ([[0, 3], [1, 1]], [0, 1, 0, 0], [0, 0, 0, 1])
    """

    columns: int
    members: Tensor
    groups: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, members: Sequence[Sequence[int]], slots: int, columns: int, device: torch.device) -> "SharedPrompts":
        """The tensors for groups that are given as lists of slots; free slots get those of any group."""
        largest = max(map(len, members))
        padded = torch.tensor([[*group, *[group[0]] * (largest - len(group))] for group in members])
        groups, ranks = torch.zeros(slots, dtype=torch.long), torch.zeros(slots, dtype=torch.long)
        for number, group in enumerate(members):
            groups[group], ranks[group] = number, torch.arange(len(group))
        return cls(columns, padded.to(device), groups.to(device), ranks.to(device))

    def gather(self, states: Tensor) -> Tensor:
        """States of each group: `[slots, heads, queries, size]` → `[groups · heads, members · queries, size]`."""
        return states[self.members].transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def scatter(self, states: Tensor, heads: int) -> Tensor:
        """States of each slot, the reverse of `gather`."""
        count, largest = self.members.shape
        return states.unflatten(1, (largest, -1)).unflatten(0, (count, heads))[self.groups, :, self.ranks]

    def prompts(self, states: Tensor) -> Tensor:
        """Keys or values of each prompt: `[slots, heads, width, size]` → `[groups · heads, columns, size]`."""
        return states[:, :, : self.columns][self.members[:, 0]].flatten(0, 1)


class SlotKVCache:
    """KV cache with a slot for each of `count` rows.

    Args:
        layers: Number of layers of the model.
        count: Number of slots.
        device: Where the buffers are.
        transposed: Store the tokens of a key's component next to each other; `keys` are a view with the usual shape.

    Attributes:
        positions: Position of the next token of each slot, `[count]`.
        width: 1 more than the largest position in use.
        capacity: Number of tokens per slot that fit in the buffers.
        shared: Slots with equal prompts, if attention is to compute them in groups.

    Example:
        >>> kv_cache = SlotKVCache(layers=2, count=4, device=torch.device("cpu"))
        >>> kv_cache.reserve(tokens=10, limit=64)
        >>> kv_cache.capacity
        64
    """

    def __init__(self, layers: int, count: int, device: torch.device, transposed: bool = False) -> None:
        self.count, self.capacity, self.width, self.transposed = count, 0, 0, transposed
        self.shared: SharedPrompts | None = None
        self.numbers = torch.arange(count, device=device)
        self.positions = torch.zeros(count, dtype=torch.long, device=device)
        self.layers = [SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=self.layers)

    def reserve(self, tokens: int, limit: int) -> None:
        """Grow the buffers to rows of at least `tokens` tokens.

        Growing copies all keys and values, so the capacity grows by at least half, up to `limit`.
        """
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens, min(limit, max(self.capacity * 3 // 2, tokens + STEP)))
        for layer in self.layers:
            if layer.is_initialized:
                old = layer.keys, layer.values
                layer.lazy_initialization(*old)
                for new, filled in zip((layer.keys, layer.values), old, strict=True):
                    new[:, :, : filled.shape[2]] = filled

    def fill(self, prefilled: list[PrefillCache], slots: Tensor, columns: Tensor, indices: Tensor) -> None:
        """Write prompts into slots.

        Args:
            prefilled: Keys and values of a prefill, per layer.
            slots: Slot of each token, `[n]`.
            columns: Position of each token in its slot, `[n]`.
            indices: Index of each token in the prefill, `[n]`.
        """
        for layer, prefill in zip(self.layers, prefilled, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(prefill.keys, prefill.values)
            for buffer, states in ((layer.keys, prefill.keys), (layer.values, prefill.values)):
                buffer[slots, :, columns] = states[0].transpose(0, 1)[indices].to(buffer.dtype)

    def add_slots(self, more: int) -> None:
        """Add free slots.

        Args:
            more: Number of new slots.
        """
        self.count += more
        self.numbers = torch.arange(self.count, device=self.numbers.device)
        self.positions = F.pad(self.positions, (0, more))
        for layer in self.layers:
            if layer.is_initialized:
                layer.change_slots(lambda states: F.pad(states, (0, 0, 0, 0, 0, 0, 0, more)))

    def select(self, kept: Tensor) -> None:
        """Keep only the slots in `kept`, `[n]`, in that order."""
        self.count, self.numbers, self.positions = len(kept), self.numbers[: len(kept)], self.positions[kept]
        for layer in self.layers:
            if layer.is_initialized:
                layer.change_slots(lambda states: states[kept])
