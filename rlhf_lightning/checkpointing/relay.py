"""Notifies all ranks of a run that one of them received a signal."""

import itertools
import os
import signal
import threading
import time
from contextlib import suppress

import torch
from torch.distributed import DistError

from rlhf_lightning.distributed import is_distributed

EVERY = 0.5
"""Seconds between two checks of the store."""


class Relay:
    """Notifies all ranks that one of them received a signal, through the store of the process group.

    A rank that waits in a collective runs no Python code, and so no signal handler. Instead, the interpreter's wakeup
    descriptor notifies a thread of the signal. An existing wakeup descriptor (of an event loop) stays in place.

    Args:
        numbers: Signals to report.

    Example:
        >>> relay = Relay.of_ranks({int(signal.SIGTERM)})  # None in a run with one process
    """

    _runs = itertools.count()
    """Counts relays. All ranks call `fit` the same number of times, so this gives each `fit` its own key."""
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
        """Make a relay if there are other ranks."""
        return cls(numbers) if is_distributed() else None

    def heard(self) -> bool:
        """True if a rank received a signal. The store is only checked every `EVERY` seconds."""
        if not self._heard and time.monotonic() >= self._next:
            with suppress(DistError):  # rank 0 is gone; the next collective gives a clearer error
                self._heard = self._store.check([self._key])
            self._next = time.monotonic() + EVERY
        return self._heard

    def tell(self) -> None:
        """Notify the other ranks."""
        with suppress(DistError):  # rank 0 is gone; see `heard`
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
        """Detach a forked process; its signals do not concern the run."""
        if cls._open is not None:
            signal.set_wakeup_fd(-1)
            cls._open = None


os.register_at_fork(after_in_child=Relay._forget)
