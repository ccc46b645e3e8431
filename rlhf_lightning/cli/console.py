"""Handles standard streams that are closed at the start or break during a run."""

import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

log = logging.getLogger(__name__)
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of writing to a pipe whose reader has exited, or to a closed terminal."""
BROKEN_PIPE = 141
"""Exit code of a command whose reader has exited, as for a process killed by SIGPIPE."""


def open_standard_streams() -> None:
    """Open standard streams that the caller closed (`>&-`) on the null device.

    Otherwise a file of the run would get the descriptor of the stream.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


class SteadyStream:
    """A text stream that discards its output once its reader has exited.

    Args:
        stream: Standard output or standard error.

    Example:
        >>> stream = SteadyStream(sys.stderr)
        >>> stream.flush()
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or discard it."""
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
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        # C libraries and child processes write to the same descriptor, so it is redirected.
        _lead_nowhere(self._stream)
        log.warning(
            "the reader of %s has exited; the run continues, and its log file contains the log", self._stream.name
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_console() -> Iterator[None]:
    """Context manager in which a broken standard stream does not end the run."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (SteadyStream(stream) for stream in before)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def silence() -> None:
    """Discard the rest of standard output; otherwise Python prints an error at exit."""
    _lead_nowhere(sys.stdout)


def _lead_nowhere(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
