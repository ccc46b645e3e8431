"""Signals to a pipeline are passed to the stage that runs, which stops in good order."""

import os
import signal
import subprocess
import threading
from contextlib import suppress
from typing import Any

PATIENCE = 10.0
"""Seconds that a stage has after a second Ctrl-C."""


PARENT = "RLHF_PIPELINE"
"""Environment variable of a stage: the end of a pipe that closes when its pipeline is gone."""
_watched: list[int] = []


def watch_parent() -> None:
    """Stop as by SIGTERM when the pipeline that started this process is gone, by kill -9 too."""
    file = os.environ.pop(PARENT, None)  # processes that this one starts do not have the pipe
    if file is None:
        return
    _watched.append(int(file))

    def watch() -> None:
        os.read(int(file), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="pipeline").start()


def parent_is_watched() -> bool:
    """Whether a pipeline has started this process."""
    return bool(_watched)


class StageProcess:
    """While it is entered, Ctrl-C, SIGTERM and the end of the terminal go to the process that is waited for, if any.

    A stage has a process group of its own, so that Ctrl-C in a terminal reaches it once, through here. The first asks
    it to stop after its step, with a checkpoint; a second Ctrl-C stops it at once, or kills it after 10 seconds.
    Ctrl-Z halts both, and `fg` or `bg` lets both go on.
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = 0
        self._process: subprocess.Popen | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StageProcess":
        if threading.current_thread() is threading.main_thread():
            heeded = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
                heeded.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._handle) for number in heeded}
            self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._halt)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def run(self, command: list[str]) -> int:
        """Run a command to its end; its exit code. Where this process is killed, the command is asked to stop."""
        read, write = os.pipe()
        try:
            with subprocess.Popen(
                command, process_group=0, pass_fds=[read], env={**os.environ, PARENT: str(read)}
            ) as self._process:
                try:
                    return self._process.wait()
                except BaseException:
                    self._kill()  # nothing that was started here outlives it
                    raise
                finally:
                    self._process = None
        finally:
            os.close(read)
            os.close(write)

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
                process.send_signal(signal.SIGTERM)
        if self._interrupts == 2:
            timer = threading.Timer(PATIENCE, self._kill)
            timer.daemon = True
            timer.start()

    def _halt(self, *_: Any) -> None:
        self._tell(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # returns when something lets this process go on
        self._tell(signal.SIGCONT)

    def _tell(self, number: int) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _kill(self) -> None:
        self._tell(signal.SIGKILL)
