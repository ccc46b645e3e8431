"""Calls of user code (environments, tools, rewards): sync or async, concurrently, with a time limit.

All coroutines of a process run on one event loop in a separate thread. A client that is opened in one turn therefore
remains usable in the next, and episodes can run in a notebook, whose main thread already has a running loop.
"""

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from rlhf_lightning.distributed import safe_point
from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.sys_exit import no_exit

T = TypeVar("T")
Call = Callable[[], T | Awaitable[T]]
WORKERS = 256
"""Maximum number of plain functions that run in threads at the same time."""


class TimeLimitError(UserError):
    """A call exceeded its time limit."""


@dataclass
class Outcome(Generic[T]):
    """The result of a call: its value, or the exception that it raised.

    Example:
        >>> (outcome,) = run_calls([lambda: 1 / 0])
        >>> outcome.value, outcome.error
        (None, ZeroDivisionError('division by zero'))
    """

    value: Any = None
    error: Exception | None = None

    def result(self) -> T:
        """The value; raises the exception that the call raised."""
        if self.error is not None:
            raise self.error
        value: T = self.value
        return value

    def __getstate__(self) -> dict[str, T | UserError | None]:
        # The error is sent to other ranks as text, because many exceptions cannot be unpickled.
        return {"value": self.value, "error": self.error and UserError(f"{type(self.error).__name__}: {self.error}")}


def check_limit(name: str, limit: float | None) -> None:
    """Raise `ConfigError` unless a time limit is None or above 0 seconds.

    Args:
        name: Name of the setting, for the error message.
        limit: The limit in seconds.
    """
    if limit is not None and not limit > 0:
        raise ConfigError(f"{name} is {limit}; it must be above 0 (seconds), or null for no limit")


def run_calls(calls: Sequence[Call[T]], limit: float | None = None) -> list[Outcome[T]]:
    """Run every call, and return its value or exception.

    Without a limit, plain functions run one after the other in this thread, and awaitables are awaited concurrently.
    With a limit, plain functions run concurrently in threads. A call's time starts when the call does.

    Args:
        calls: Functions without arguments, sync or async.
        limit: Seconds that one call may take. A thread cannot be stopped, so a plain function that hangs is abandoned.

    Returns:
        The outcomes, in the order of the calls.

    Example:
        >>> [outcome.value for outcome in run_calls([lambda: 1, lambda: 2])]
        [1, 2]
    """
    safe_point()
    if limit is not None:
        return _together([partial(within, call, limit) for call in calls], limit)
    outcomes = []
    for call in calls:
        safe_point()
        outcomes.append(_here(call))
    pending = {i: outcome.value for i, outcome in enumerate(outcomes) if isinstance(outcome.value, Awaitable)}
    awaited = iter(_together([partial(_await, value) for value in pending.values()], None) if pending else ())
    return [
        next(awaited) if i in pending else Outcome(outcome.value, outcome.error) for i, outcome in enumerate(outcomes)
    ]


async def within(call: Call[T], limit: float | None) -> T:
    """Run a call with a time limit; a plain function runs in a thread.

    Args:
        call: A function without arguments, sync or async.
        limit: Seconds; None for no limit.

    Returns:
        The call's value.

    Raises:
        TimeLimitError: If the call takes longer.
    """
    if _is_async(call):
        with no_exit():
            value = call()
    else:
        async with _loop().gate:
            value = await _limited(_in_thread(call), limit)
    return await _limited(value, limit) if isinstance(value, Awaitable) else value


def _here(call: Callable[[], T]) -> Outcome[T]:
    """Run a call in this thread."""
    try:
        with no_exit():
            return Outcome(call())
    except Exception as error:  # noqa: BLE001 - returned, for the caller to handle
        return Outcome(error=error)


async def _await(value: Awaitable[T]) -> T:
    """Await a value."""
    return await value


async def _limited(value: Awaitable[T], limit: float | None) -> T:
    """Await a value for at most `limit` seconds."""
    try:
        async with asyncio.timeout(limit) as scope:
            return await value
    except TimeoutError:
        if scope.expired():
            raise TimeLimitError(f"the call exceeded its time limit of {limit:g} s") from None
        raise


def _is_async(call: Call[T]) -> bool:
    """True if calling it returns a coroutine."""
    function: Callable[..., T | Awaitable[T]] = call
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _in_thread(call: Callable[[], T]) -> T:
    """Run a call in a new daemon thread, so that a hanging call blocks neither a pool nor the exit of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome[T]] = loop.create_future()

    def deliver(outcome: Outcome[T]) -> None:
        if not future.done():
            future.set_result(outcome)

    def work() -> None:
        torch.set_grad_enabled(False)  # threads do not inherit the setting
        outcome = _here(call)
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, outcome)

    threading.Thread(target=work, daemon=True).start()
    return (await future).result()


# -- the event loop ---------------------------------------------------------------------------------------------------


class _EventLoop:
    """An event loop that runs in a daemon thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.gate = asyncio.Semaphore(WORKERS)
        self.process = os.getpid()
        threading.Thread(target=self._run, daemon=True, name="environments").start()

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        while True:
            # User code that exits the program ends the loop; the exception is raised where the task is awaited.
            with suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()
                break

    def answers(self, seconds: float) -> bool:
        """True if the loop runs a callback within `seconds`."""
        called = threading.Event()
        self.loop.call_soon_threadsafe(called.set)
        return called.wait(seconds)


_CURRENT: list[_EventLoop] = []


def _loop() -> _EventLoop:
    """The event loop of this process."""
    # A forked process inherits the objects of its parent, but not the threads.
    if not _CURRENT or _CURRENT[0].process != os.getpid():
        _CURRENT[:] = [_EventLoop()]
    return _CURRENT[0]


def _together(coroutines: Sequence[Callable[[], Awaitable[T]]], limit: float | None) -> list[Outcome[T]]:
    """Await all coroutines concurrently on the event loop.

    If one of them blocks the loop for longer than the limit, all unfinished ones fail.
    """
    outcomes: list[Outcome[T] | None] = [None] * len(coroutines)

    async def run(i: int) -> None:
        try:
            with no_exit():
                outcomes[i] = Outcome(await coroutines[i]())
        except Exception as error:  # noqa: BLE001 - returned, for the caller to handle
            outcomes[i] = Outcome(error=error)

    async def run_all() -> None:
        await asyncio.gather(*(run(i) for i in range(len(coroutines))))

    loop = _loop()
    future = asyncio.run_coroutine_threadsafe(run_all(), loop.loop)
    try:
        while True:
            try:
                future.result(limit)
                break
            except TimeoutError:
                assert limit is not None
                if not loop.answers(limit):
                    _CURRENT.clear()
                    break
    except BaseException:
        future.cancel()
        raise
    blocked = TimeLimitError(f"an async call blocked the event loop for longer than {limit} s (it does not await)")
    return [outcome or Outcome(error=blocked) for outcome in list(outcomes)]
