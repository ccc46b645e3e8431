"""Points at which long work outside a training step can be interrupted, because nothing is incomplete there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_OPEN: list[tuple[Callable[[], None], int]] = []


@contextmanager
def safe_points(leave: Callable[[], None]) -> Iterator[None]:
    """Context in which each `safe_point` of this thread calls `leave`.

    Args:
        leave: Raises an exception if the work is to be interrupted.
    """
    _OPEN.append((leave, threading.get_ident()))
    try:
        yield
    finally:
        _OPEN.pop()


def safe_point() -> None:
    """Mark a point at which the work may be interrupted."""
    # Only in the thread that opened them: tools and environments may run in other threads.
    if _OPEN and _OPEN[-1][1] == threading.get_ident():
        _OPEN[-1][0]()
