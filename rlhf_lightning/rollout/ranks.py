"""What the ranks of a run tell each other between rounds."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank, in their order. All ranks must call it."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items`, `size` at a time, in as many parts on every rank: where a rank has fewer, empty ones follow.

    What is split over ranks (`models.sharding`) must be run equally often by all of them.
    """
    for start in range(0, max(gather(len(items))), size):
        yield items[start : start + size]
