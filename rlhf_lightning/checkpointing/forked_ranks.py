"""A launcher of forked and spawned ranks that stops them on a signal, so that the run can be resumed."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch.multiprocessing import ProcessExitedException

from rlhf_lightning.sys_exit import note_signal, restore_handlers, stop_signals

if TYPE_CHECKING:
    from signal import _HANDLER

    from rlhf_lightning.types import StateDict

INTERRUPTED = 130


class _StoppableLauncher(_MultiProcessingLauncher):
    """Lightning's launcher, extended to forward stop signals to the ranks, and to end once the ranks have stopped.

    Without this, torch gives an interrupted rank the exit code 0, and Lightning waits forever for its result. And a
    signal to the main process only would end it and kill its ranks before they save a checkpoint.
    """

    def __init__(self, launcher: _MultiProcessingLauncher) -> None:
        super().__init__(launcher._strategy, launcher._start_method)
        self._handlers: dict[int, _HANDLER] = {}
        """Signal handlers that forked ranks restore."""

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return super().launch(function, *args, trainer=trainer, **kwargs)
        asked = False

        def pass_on(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked = True
            for rank in multiprocessing.active_children():
                rank.terminate()  # SIGTERM even for Ctrl-C: a terminal sends SIGINT to the ranks itself

        before = {number: signal.signal(number, pass_on) for number in (int(signal.SIGINT), *stop_signals())}
        self._handlers = before
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except ProcessExitedException as error:
            if not asked and error.exit_code != INTERRUPTED:
                raise
            note_signal()
            raise KeyboardInterrupt from error
        finally:
            self._handlers = {}
            restore_handlers(before)

    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        restore_handlers(self._handlers)
        try:
            super()._wrapping_function(*args, **kwargs)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def __getstate__(self) -> "StateDict":
        return {**super().__getstate__(), "_handlers": {}}  # spawned ranks inherit no handlers


def make_forked_ranks_stoppable(trainer: Trainer) -> None:
    """Replace Lightning's launcher of forked or spawned ranks; other launchers stay unchanged.

    Args:
        trainer: The Trainer, before its run.
    """
    strategy = trainer.strategy
    if type(strategy.launcher) is _MultiProcessingLauncher:
        strategy._launcher = _StoppableLauncher(strategy.launcher)
