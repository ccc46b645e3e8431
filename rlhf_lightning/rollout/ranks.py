"""What the ranks of a run tell each other between rounds."""

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
