"""Places where nothing is half done, so that long work without a training step can be left there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_OPEN: list[tuple[Callable[[], None], int]] = []


@contextmanager
def safe_points(leave: Callable[[], None]) -> Iterator[None]:
    """Within, each `safe_point` of this thread calls `leave`, which raises where the work is to be left."""
    _OPEN.append((leave, threading.get_ident()))
    try:
        yield
    finally:
        _OPEN.pop()


def safe_point() -> None:
    """Say that nothing is half done here."""
    # Tools and environments may run in threads of their own, from which nothing can be left.
    if _OPEN and _OPEN[-1][1] == threading.get_ident():
        _OPEN[-1][0]()
