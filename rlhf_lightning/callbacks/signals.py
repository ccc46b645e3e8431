"""Ctrl-C and SIGTERM as a wish to stop, which a run grants where it can go on from exactly."""

import logging
import signal
import threading
from typing import Any

log = logging.getLogger(__name__)
WATCHED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While it is on, the first Ctrl-C or SIGTERM only sets `asked`; a second Ctrl-C is raised where it falls."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def on(self) -> None:
        """Take the place of the handlers that are there, Lightning's too: it would stop between micro-batches."""
        self.asked = False
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.signal(number, self._handle) for number in WATCHED}

    def off(self) -> None:
        """Put them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            name = signal.Signals(number).name
            log.warning("%s: stopping after this optimizer step, with a checkpoint; Ctrl-C stops at once", name)
        self.asked = True
