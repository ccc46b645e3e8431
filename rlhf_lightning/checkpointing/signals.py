"""Handles Ctrl-C, SIGTERM and SIGHUP as requests to stop at a point where the run can be resumed exactly."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from rlhf_lightning.sys_exit import asked_to_end, note_signal, restore_handlers, stop_signals, watched

if TYPE_CHECKING:
    from signal import _HANDLER

    from rlhf_lightning.checkpointing.relay import Relay

log = logging.getLogger(__name__)


@contextmanager
def ended_once() -> Iterator[None]:
    """Context manager for a command, in which Ctrl-C and the first SIGTERM or SIGHUP raise `KeyboardInterrupt`.

    Schedulers may send several signals in a row (one to each process of a group). Further SIGTERM and SIGHUP are
    ignored, because they would interrupt the shutdown that the first signal started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        first = not asked_to_end()
        note_signal()
        if first or number == signal.SIGINT:
            raise KeyboardInterrupt

    keys = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    before = {number: signal.signal(number, handle) for number in (*keys, *stop_signals())}
    try:
        with watched():
            yield
    finally:
        restore_handlers(before, ends=asked_to_end())


class StopSignals:
    """While on, the first Ctrl-C, SIGTERM or SIGHUP sets `asked`, and a second Ctrl-C raises `KeyboardInterrupt`.

    Example:
        >>> signals = StopSignals()
        >>> signals.on()
        >>> signals.heard()
        False
        >>> signals.off()
    """

    def __init__(self) -> None:
        self.asked = self._interrupted = False
        self._before: dict[int, _HANDLER] = {}
        self._relay: Relay | None = None

    def heard(self) -> bool:
        """True if this rank received a signal, or knows that another rank did. Cheap enough to call for every batch."""
        if self._relay is None or self._relay.heard():
            return self.asked or self._relay is not None
        if self.asked:
            self._relay.tell()
        return self.asked

    def on(self) -> None:
        """Install the handlers. They also replace Lightning's handlers, which would stop between micro-batches."""
        self.asked = self._interrupted = False
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.signal(number, self._handle) for number in [int(signal.SIGINT), *stop_signals()]}
        # Imported here, because commands that do not train use this module without importing torch.
        from rlhf_lightning.checkpointing.relay import Relay

        self._relay = Relay.of_ranks(set(self._before))

    def off(self) -> None:
        """Restore the previous handlers. If the run ends by a signal, SIGTERM and SIGHUP are ignored from now on."""
        restore_handlers(self._before, ends=self.asked)
        self._before = {}
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        interrupt = number == signal.SIGINT
        # A launcher passes a terminal's Ctrl-C on as SIGTERM, which may arrive before the Ctrl-C itself.
        if interrupt and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or interrupt
        if not self.asked:
            more = "; a second Ctrl-C stops at once" if interrupt else ""
            log.warning("%s: stopping at the next safe point, with a checkpoint%s", signal.Signals(number).name, more)
        self.asked = True
        note_signal()
