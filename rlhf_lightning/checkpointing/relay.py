"""What tells the ranks of a run that one of them was signalled."""

import itertools
import os
import signal
import threading
import time
from contextlib import suppress

import torch
from torch.distributed import DistError

EVERY = 0.5
"""Seconds from one time that a rank looks whether another was signalled to the next."""


class Relay:
    """Tells all ranks that one of them was signalled, by the store through which they found each other.

    A rank that waits for others in a collective runs no Python, no handler either: a thread is told of the signal by
    the interpreter's wakeup descriptor. It does not take the place of one that is there (that of an event loop).

    Args:
        numbers: the signals that it tells of.
    """

    _runs = itertools.count()
    """Ranks fit equally often, so that each fit has a key of its own."""
    _open: "Relay | None" = None

    def __init__(self, numbers: set[int]) -> None:
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._key, self._next, self._heard = f"rlhf_lightning/stop/{next(self._runs)}", 0.0, False
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            os.close(self._writer)
            os.close(reader)
            self._writer = -1
            return
        Relay._open = self
        threading.Thread(target=self._watch, args=(reader, numbers), daemon=True, name="stop signals").start()

    @classmethod
    def of_ranks(cls, numbers: set[int]) -> "Relay | None":
        """One where there are other ranks."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return cls(numbers) if several else None

    def heard(self) -> bool:
        """Whether a rank was signalled; asked of the store now and then."""
        if not self._heard and time.monotonic() >= self._next:
            with suppress(DistError):  # the first rank is gone: the next collective says so, in better words
                self._heard = self._store.check([self._key])
            self._next = time.monotonic() + EVERY
        return self._heard

    def tell(self) -> None:
        """Tell them."""
        with suppress(DistError):  # as above
            self._store.set(self._key, "1")

    def close(self) -> None:
        """End the thread."""
        if self._writer != -1:
            signal.set_wakeup_fd(-1)
            os.close(self._writer)
            self._writer, Relay._open = -1, None

    def _watch(self, reader: int, numbers: set[int]) -> None:
        while found := os.read(reader, 64):
            if numbers & set(found):
                self.tell()
        os.close(reader)

    @classmethod
    def _forget(cls) -> None:
        """In a forked process, whose signals are no concern of the run."""
        if cls._open is not None:
            signal.set_wakeup_fd(-1)
            cls._open = None


os.register_at_fork(after_in_child=Relay._forget)
