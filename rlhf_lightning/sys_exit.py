"""Stop signals, and how to tell them apart from user code that calls `sys.exit`."""

import signal
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_lightning.errors import UserError

if TYPE_CHECKING:
    from signal import _HANDLER

_state = {"watched": False, "asked": False}
"""`watched`: True while a command handles stop signals. `asked`: True once it received one."""
_OURS = (
    str(Path(__file__).parent),
    *(sysconfig.get_path(name) for name in ("purelib", "platlib")),
    # It ends the program after --help and --print_config, and may be installed in a folder of any name.
    *(getattr(find_spec("jsonargparse"), "submodule_search_locations", None) or ()),
)
_STANDARD = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<frozen")


class ProgramExit(Exception):
    """User code tried to exit the program. Callers handle it like any other failure of user code."""


def stop_signals() -> list[int]:
    """Signals with which the system ends a process: SIGTERM, and SIGHUP unless it is ignored (`nohup`)."""
    found = [int(signal.SIGTERM)]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(int(signal.SIGHUP))
    return found


def restore_handlers(before: "Mapping[int, _HANDLER]", ends: bool = False) -> None:
    """Restore signal handlers.

    Args:
        before: The handler that `signal.signal` returned for each signal.
        ends: True if a signal is ending the program. SIGTERM and SIGHUP are then ignored from now on, because they
            would interrupt the shutdown.
    """
    for number, handler in before.items():
        ignored = ends and number != signal.SIGINT
        signal.signal(number, signal.SIG_IGN if ignored else handler or signal.SIG_DFL)


@contextmanager
def watched() -> Iterator[None]:
    """Context manager for a command whose signal handlers call `note_signal`."""
    _state.update(watched=True, asked=False)
    try:
        yield
    finally:
        _state["watched"] = False


def note_signal() -> None:
    """Record that a stop signal was received."""
    _state["asked"] = True


def asked_to_end() -> bool:
    """True if the current command received a stop signal."""
    return _state["asked"]


@contextmanager
def no_exit() -> Iterator[None]:
    """Context manager for user code that turns `sys.exit`, and a `KeyboardInterrupt` without a signal, into an error.

    Raises:
        ProgramExit: With the traceback of the original exception.
    """
    try:
        yield
    except SystemExit as error:
        raise ProgramExit(f"sys.exit({error.code!r})").with_traceback(error.__traceback__) from None
    except KeyboardInterrupt as error:
        if _is_sent():
            raise
        raise ProgramExit("KeyboardInterrupt").with_traceback(error.__traceback__) from None


def _is_sent() -> bool:
    """True if a `KeyboardInterrupt` in this thread may come from a signal, which only the main thread receives."""
    return threading.current_thread() is threading.main_thread() and (_state["asked"] or not _state["watched"])


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD) and not is_library(file)  # site-packages is inside stdlib


def is_library(file: str) -> bool:
    """True for a file of this package or of an installed one, also one of another environment or of the system."""
    return file.startswith(_OURS) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def raised_at(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame of an exception outside the standard library, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if not _is_standard(frame.filename)), None)


def user_line(error: BaseException) -> str:
    """` (FILE:LINE in FUNCTION)` of the user code that raised an exception; empty if other code raised it."""
    last = raised_at(error)
    if last is None or is_library(last.filename):
        return ""
    return f" ({last.filename}:{last.lineno} in {last.name})"


def exit_of_user_code(error: BaseException) -> UserError | None:
    """The error to report for a `SystemExit` or `KeyboardInterrupt` of user code; None for any other exception."""
    if isinstance(error, KeyboardInterrupt) and _is_sent():
        return None
    if not (line := user_line(error)):
        return None
    what = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else "KeyboardInterrupt"
    return UserError(
        f"{what}{line} would have ended the program in the middle of the command. Raise an exception that describes "
        "the problem instead, or return."
    )
