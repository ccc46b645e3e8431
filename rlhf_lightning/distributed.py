"""Communication between the ranks of a run.

Ranks of one tensor-parallel group compute the same rows, so together they count as one data rank. Outside code (a
reward, an environment, an external engine) runs on the group's leader only, which sends the result to the others.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
_MESH: "list[DeviceMesh]" = []


class _SafePoints(threading.local):
    """The callbacks of this thread's open `safe_points` contexts, innermost last."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []


_OPEN = _SafePoints()
_ALONE: list[bool] = []
"""Not empty while the leader runs a function of `run_on_leader`, for which the other ranks of its group wait."""
_LEAVING = "leaves this round"
"""The value that a rank passes to `gather` to leave a round; see `leave_if`."""


class RoundLeft(KeyboardInterrupt):
    """All ranks leave a round early. Not an `Exception`, so that user code does not catch it."""


def use_mesh(mesh: "DeviceMesh | None") -> None:
    """Set the `data_parallel` × `tensor_parallel` mesh of the current run; None to unset it."""
    _MESH[:] = [] if mesh is None or mesh["tensor_parallel"].size() == 1 else [mesh]


def data_rank() -> int:
    """Index of this rank's value in the result of `gather`."""
    if _MESH:
        return int(_MESH[0]["data_parallel"].get_local_rank())
    return torch.distributed.get_rank() if is_distributed() else 0


def is_leader() -> bool:
    """True on the first of the ranks that compute the same rows."""
    return not _MESH or _MESH[0]["tensor_parallel"].get_local_rank() == 0


def rank_count() -> int:
    """Number of ranks, counting every rank of a tensor-parallel group."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def gather(value: T, every: bool = False) -> list[T]:
    """The values of all data ranks, in order, on every rank. All ranks must call it.

    Args:
        value: This rank's value; it must be picklable.
        every: If True, gather from every rank rather than one per data rank, for values that depend on a rank's shard
            of the weights.

    Raises:
        RoundLeft: If a rank leaves the current round (`leave_if`).
    """
    values = [value]
    if is_distributed():
        group = _MESH[0]["data_parallel"].get_group() if _MESH and not every else None
        values = [value] * torch.distributed.get_world_size(group)  # placeholders
        torch.distributed.all_gather_object(values, value, group=group)
    if any(isinstance(found, str) and found == _LEAVING for found in values):
        raise RoundLeft
    return values


def leave_if(asked: bool) -> None:
    """Raise `RoundLeft` if `asked`; the other ranks raise it in their next call of `gather`.

    The next collective operation of the round must therefore be `gather`.
    """
    if asked:
        gather(_LEAVING)


@contextmanager
def safe_points(leave: Callable[[], None]) -> Iterator[None]:
    """Context manager in which each `safe_point` of this thread calls `leave`.

    Args:
        leave: Called at each safe point; raises an exception to interrupt the work.
    """
    _OPEN.callbacks.append(leave)
    try:
        yield
    finally:
        _OPEN.callbacks.pop()


def safe_point() -> None:
    """Mark a point at which the work may be interrupted."""
    # Only in the thread that opened the context, because tools and environments may run in other threads.
    if _OPEN.callbacks:
        _OPEN.callbacks[-1]()


def run_on_leader(function: Callable[[], T]) -> T:
    """Run `function` on the leader; all ranks of its group get its result or raise its error.

    Args:
        function: Called without arguments; its result must be picklable.

    Raises:
        UserError: On the other ranks, if `function` raised on the leader.
    """
    if not _MESH:
        return function()
    group = _MESH[0]["tensor_parallel"].get_group()
    found: list[Any] = [None, None]
    error: Exception | None = None
    if is_leader():
        _ALONE.append(True)
        try:
            found[0] = function()
        except Exception as raised:  # noqa: BLE001 - raised below, after the other ranks were told
            error, found[1] = raised, f"{type(raised).__name__}: {raised}"
        finally:
            _ALONE.pop()
    torch.distributed.broadcast_object_list(found, group=group, group_src=0)
    if found[1] is not None:
        raise error or UserError(found[1])
    return found[0]


def broadcast(value: Tensor) -> Tensor:
    """Return the leader's tensor on all ranks that compute the same rows; within `run_on_leader`, `value` itself."""
    if _MESH and not _ALONE:
        value = value.contiguous()
        torch.distributed.broadcast(value, group=_MESH[0]["tensor_parallel"].get_group(), group_src=0)
    return value


def is_distributed() -> bool:
    """True in a run of several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def even_chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Split `items` into chunks of `size`, with empty chunks added so that all ranks get the same number.

    A sharded model (`models.sharding`) must run the same number of times on all ranks.

    Args:
        items: This rank's items.
        size: Items per chunk.

    Example:
        >>> list(even_chunks([1, 2, 3], 2))
        [[1, 2], [3]]
    """
    for start in range(0, max(gather(len(items))), size):
        yield items[start : start + size]
