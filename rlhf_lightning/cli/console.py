"""Standard streams that may be closed, or go away while a run goes on."""

import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

log = logging.getLogger(__name__)
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What a write gives when its reader has ended, or the terminal is closed."""
BROKEN_PIPE = 141
"""Exit code of a command whose reader has ended, as a shell shows it for a process that SIGPIPE ended."""


def open_standard_streams() -> None:
    """Give those that the caller has closed (`>&-`) to the null device; a file of the run would take their place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


class SteadyStream:
    """A stream of text that goes nowhere once nobody reads it any more.

    Args:
        stream: standard output or standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose, a text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        # Libraries in C and processes that are started write to the same descriptor.
        _lead_nowhere(self._stream)
        log.warning("%s has no reader any more; the run goes on, and its log file has what it says", self._stream.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_console() -> Iterator[None]:
    """Around a run: that its output is not read any more does not end it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (SteadyStream(stream) for stream in before)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def silence() -> None:
    """Send what is left of standard output nowhere: at its exit Python would complain of it."""
    _lead_nowhere(sys.stdout)


def _lead_nowhere(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
