"""Ctrl-C, SIGTERM and SIGHUP as requests to stop, which a run obeys where it can be resumed exactly."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.checkpointing.relay import Relay

from rlhf_lightning.user_exits import asked_to_end, note_signal, watched

log = logging.getLogger(__name__)


def ends() -> list[int]:
    """Signals by which a system ends a process: SIGTERM, and SIGHUP unless it is ignored (`nohup`)."""
    found = [int(signal.SIGTERM)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(int(signal.SIGHUP))
    return found


@contextmanager
def ended_once() -> Iterator[None]:
    """Context of a command in which Ctrl-C and the first SIGTERM or SIGHUP raise `KeyboardInterrupt`.

    Such signals come in bursts (a scheduler sends one to each process of a group). Further SIGTERM and SIGHUP are
    ignored, because they would interrupt the shutdown that the first one started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        first = not asked_to_end()
        note_signal()
        if first or number == signal.SIGINT:
            raise KeyboardInterrupt

    keys = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    before = {number: signal.signal(number, handle) for number in (*keys, *ends())}
    try:
        with watched():
            yield
    finally:
        for number, handler in before.items():
            ending = asked_to_end() and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ending else handler or signal.SIG_DFL)


class StopSignals:
    """While it is on, the first Ctrl-C, SIGTERM or SIGHUP sets `asked`; a second Ctrl-C raises `KeyboardInterrupt`.

    Example:
        >>> signals = StopSignals()
        >>> signals.on()
        >>> signals.heard()
        False
        >>> signals.off()
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}
        self._relay: Relay | None = None

    def heard(self) -> bool:
        """True if this rank was signaled, or knows of another rank that was. Cheap enough for every batch."""
        if self._relay is None or self._relay.heard():
            return self.asked or self._relay is not None
        if self.asked:
            self._relay.tell()
        return self.asked

    def on(self) -> None:
        """Install the handlers. They also replace Lightning's, which would stop between micro-batches."""
        self.asked = False
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.signal(number, self._handle) for number in [int(signal.SIGINT), *ends()]}
        # Imported here, because commands that do not train use this module and start without torch.
        from rlhf_lightning.checkpointing.relay import Relay

        self._relay = Relay.of_ranks(set(self._before))

    def off(self) -> None:
        """Restore the previous handlers. If the run ends by a signal, SIGTERM and SIGHUP are ignored from now on."""
        for number, handler in self._before.items():
            ending = self.asked and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ending else handler or signal.SIG_DFL)
        self._before = {}
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            name = signal.Signals(number).name
            log.warning("%s: stopping at the next safe point, with a checkpoint; Ctrl-C stops at once", name)
        self.asked = True
        note_signal()
