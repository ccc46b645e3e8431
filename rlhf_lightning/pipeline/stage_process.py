"""Runs a stage in its own process, and forwards signals to it, so that the stage can write a checkpoint."""

import os
import signal
import subprocess
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from rlhf_lightning.sys_exit import restore_handlers, stop_signals

if TYPE_CHECKING:
    from signal import _HANDLER

PATIENCE = 10.0
"""Seconds after a second Ctrl-C until the stage is killed."""


PARENT = "RLHF_PIPELINE"
"""Environment variable with the descriptor of a pipe, which closes when the pipeline's process ends."""
_watched: list[int] = []


def watch_parent() -> None:
    """Send this process SIGTERM when the pipeline that started it ends, even by SIGKILL."""
    file = os.environ.pop(PARENT, None)  # child processes do not inherit the pipe
    if file is None:
        return
    _watched.append(int(file))

    def watch() -> None:
        os.read(int(file), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="pipeline").start()


def parent_is_watched() -> bool:
    """True if a pipeline started this process."""
    return bool(_watched)


class StageProcess:
    """Context manager that forwards Ctrl-C, SIGTERM and SIGHUP to the process of the running stage.

    The stage has its own process group, so that Ctrl-C in a terminal reaches it only once, through this process. After
    the first signal, the stage writes a checkpoint of its last step and stops. A second Ctrl-C stops it at once; after
    10 more seconds it is killed. Ctrl-Z suspends both processes; `fg` or `bg` resumes both.

    Example:
        >>> import sys
        >>> with StageProcess() as process:
        ...     process.run([sys.executable, "-c", "raise SystemExit(3)"])
        3
    """

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = 0
        self._process: subprocess.Popen | None = None
        self._before: dict[int, _HANDLER] = {}

    def __enter__(self) -> "StageProcess":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in [signal.SIGINT, *stop_signals()]}
            self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._halt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restore_handlers(self._before)

    def run(self, command: list[str]) -> int:
        """Run a command and return its exit code. If this process is killed, the command gets SIGTERM."""
        read, write = os.pipe()
        try:
            with subprocess.Popen(
                command, process_group=0, pass_fds=[read], env={**os.environ, PARENT: str(read)}
            ) as self._process:
                try:
                    return self._process.wait()
                except BaseException:
                    self._kill()  # the child must not outlive this process
                    raise
                finally:
                    self._process = None
        finally:
            os.close(read)
            os.close(write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._interrupts += number == signal.SIGINT
        process = self._process
        if process is None or process.poll() is not None:
            raise KeyboardInterrupt
        with suppress(ProcessLookupError):
            if number == signal.SIGINT:  # to the whole process group with the stage's ranks, as a terminal does
                os.killpg(process.pid, number)
            else:
                process.send_signal(signal.SIGTERM)
        if self._interrupts == 2:
            timer = threading.Timer(PATIENCE, self._kill)
            timer.daemon = True
            timer.start()

    def _halt(self, number: int, frame: FrameType | None) -> None:
        self._tell(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # returns when this process is resumed
        self._tell(signal.SIGCONT)

    def _tell(self, number: int) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def _kill(self) -> None:
        self._tell(signal.SIGKILL)
