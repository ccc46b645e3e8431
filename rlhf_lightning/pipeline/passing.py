"""Signals to a pipeline are passed to the stage that runs, which stops in good order."""

import os
import signal
import subprocess
import threading
from contextlib import suppress
from typing import Any

PATIENCE = 10.0
"""Seconds that a stage has after a second Ctrl-C."""


class Passing:
    """While it is entered, Ctrl-C and SIGTERM go to the process that is waited for, if there is one.

    A stage has a process group of its own, so that Ctrl-C in a terminal reaches it once, through here. The first asks
    it to stop after its step, with a checkpoint; a second Ctrl-C stops it at once, or kills it after 10 seconds.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = 0
        self._process: subprocess.Popen | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Passing":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def run(self, command: list[str]) -> int:
        """Run a command to its end; its exit code."""
        with subprocess.Popen(command, process_group=0) as self._process:
            try:
                return self._process.wait()
            except BaseException:
                self._kill()  # nothing that was started here outlives it
                raise
            finally:
                self._process = None

    def _handle(self, number: int, frame: Any) -> None:
        self.asked = True
        self._interrupts += number == signal.SIGINT
        process = self._process
        if process is None or process.poll() is not None:
            raise KeyboardInterrupt
        with suppress(ProcessLookupError):
            if number == signal.SIGINT:  # as a terminal does it: the ranks that the stage started as well
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        if self._interrupts == 2:
            timer = threading.Timer(PATIENCE, self._kill)
            timer.daemon = True
            timer.start()

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
