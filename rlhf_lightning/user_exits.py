"""Who ends a program: a person or the system by a signal, or code of the user's that calls `sys.exit`."""

import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_lightning.errors import UserError

_state = {"watched": False, "asked": False}
"""Whether a command looks at the signals that end it, and whether one has come."""
_OURS = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("purelib", "platlib")))
_STANDARD = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<frozen")


class ProgramExit(Exception):
    """Code of the user's would have ended the program; for whoever called it this is a failure as any other."""


@contextmanager
def watched() -> Iterator[None]:
    """Around a command whose handlers of signals call `note_signal`."""
    _state.update(watched=True, asked=False)
    try:
        yield
    finally:
        _state["watched"] = False


def note_signal() -> None:
    """A signal has come that ends a program."""
    _state["asked"] = True


def asked_to_end() -> bool:
    """Whether such a signal has come to the command under way."""
    return _state["asked"]


@contextmanager
def no_exit() -> Iterator[None]:
    """Around code of the user's: `sys.exit` there is an error, and so is a `KeyboardInterrupt` that nobody has sent.

    Raises:
        ProgramExit: with the traceback of what was raised.
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
    """Whether a `KeyboardInterrupt` that was raised here may be a person's: signals come to the main thread only."""
    return threading.current_thread() is threading.main_thread() and (_state["asked"] or not _state["watched"])


def _is_standard(file: str) -> bool:
    return file.startswith(_STANDARD) and not file.startswith(_OURS)  # other packages are installed within


def raised_at(error: BaseException) -> traceback.FrameSummary | None:
    """Where an exception comes from; the line that called Python's own library, not the one within."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if not _is_standard(frame.filename)), None)


def user_line(error: BaseException) -> str:
    """` (FILE:LINE in FUNCTION)` of the user's code that an exception comes from; empty where it is not the user's."""
    last = raised_at(error)
    if last is None or last.filename.startswith(_OURS):
        return ""
    return f" ({last.filename}:{last.lineno} in {last.name})"


def exit_of_user_code(error: BaseException) -> UserError | None:
    """What to say of a `SystemExit` or `KeyboardInterrupt` that code of the user's has raised; None for any other."""
    if isinstance(error, KeyboardInterrupt) and _is_sent():
        return None
    if not (line := user_line(error)):
        return None
    what = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else "KeyboardInterrupt"
    return UserError(
        f"{what}{line} would have ended the program in the middle of the command. Raise an exception that says what is "
        "wrong, or return."
    )
