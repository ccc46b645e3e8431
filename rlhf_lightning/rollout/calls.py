"""Calls of a user's code (environments, tools, rewards): sync or async, side by side, within a time limit.

All coroutines of a process run on one event loop in a thread of its own: what a client opened in one turn is still
usable in the next, and a notebook, whose main thread has a loop already, can play episodes too.
"""

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlhf_lightning.errors import ConfigError, UserError
from rlhf_lightning.interrupts import no_exit
from rlhf_lightning.models.safe_points import safe_point

Call = Callable[[], Any]
WORKERS = 256
"""Plain functions that run in threads at once."""


class TimeLimitError(UserError):
    """A call took longer than it may."""


@dataclass
class Outcome:
    """What became of a call: its value, or the exception that it raised."""

    value: Any = None
    error: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Told to other ranks: many exceptions cannot be made again from what they hold.
        return {"value": self.value, "error": self.error and UserError(f"{type(self.error).__name__}: {self.error}")}


def check_limit(name: str, limit: float | None) -> None:
    """Raise `ConfigError` unless a time limit is None or above 0."""
    if limit is not None and not limit > 0:
        raise ConfigError(f"{name} is {limit}; it must be above 0 (seconds), or null for no limit")


def run_calls(calls: Sequence[Call], limit: float | None = None) -> list[Outcome]:
    """Run every call; what it raises is its outcome.

    Without a limit plain functions run here, one after the other, and what can be awaited is awaited together. With
    one, plain functions run in threads side by side. A call's time begins when it does.

    Args:
        limit: seconds of one call. A thread cannot be stopped: a plain function that hangs is left behind.
    """
    safe_point()
    if limit is not None:
        return _together([partial(within, call, limit) for call in calls], limit)
    outcomes = []
    for call in calls:
        safe_point()
        outcomes.append(_here(call))
    waiting = [i for i, outcome in enumerate(outcomes) if inspect.isawaitable(outcome.value)]
    if waiting:
        settled = _together([partial(_settle, outcomes[i].value) for i in waiting], None)
        for i, outcome in zip(waiting, settled, strict=True):
            outcomes[i] = outcome
    return outcomes


async def within(call: Call, limit: float | None) -> Any:
    """The value of a call that must end within `limit` seconds; a plain function runs in a thread.

    Raises:
        TimeLimitError: it did not.
    """
    if _is_async(call):
        with no_exit():
            return await _limited(call(), limit)
    async with _loop().gate:
        value = await _limited(_in_thread(call), limit)
    return await _limited(value, limit) if inspect.isawaitable(value) else value


def _here(call: Call) -> Outcome:
    try:
        with no_exit():
            return Outcome(call())
    except Exception as error:  # noqa: BLE001 - kept, for the caller to decide on
        return Outcome(error=error)


async def _settle(value: Awaitable[Any]) -> Any:
    return await value


async def _limited(value: Awaitable[Any], limit: float | None) -> Any:
    try:
        async with asyncio.timeout(limit) as scope:
            return await value
    except TimeoutError:
        if scope.expired():
            raise TimeLimitError(f"it took longer than its limit of {limit:g} s") from None
        raise


def _is_async(call: Call) -> bool:
    function: Any = call
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _in_thread(call: Call) -> Any:
    """A daemon thread of its own: one that hangs keeps neither a pool nor the end of the process waiting."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()

    def deliver(outcome: Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def work() -> None:
        torch.set_grad_enabled(False)  # a thread does not inherit it
        outcome = _here(call)
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, outcome)

    threading.Thread(target=work, daemon=True).start()
    outcome = await future
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


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
            # A task of the user's that ends the program ends the loop; whoever awaits the task is told.
            with suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()
                break

    def answers(self, seconds: float) -> bool:
        """Whether it gets to run something within so many seconds."""
        alive = threading.Event()
        self.loop.call_soon_threadsafe(alive.set)
        return alive.wait(seconds)


_CURRENT: list[_EventLoop] = []


def _loop() -> _EventLoop:
    # A forked process has its parent's objects, but not its threads.
    if not _CURRENT or _CURRENT[0].process != os.getpid():
        _CURRENT[:] = [_EventLoop()]
    return _CURRENT[0]


def _together(coroutines: Sequence[Callable[[], Awaitable[Any]]], limit: float | None) -> list[Outcome]:
    """Await all of them on the event loop. One that blocks the loop for longer than the limit ends them all."""
    found: list[Outcome | None] = [None] * len(coroutines)

    async def keep(i: int) -> None:
        try:
            with no_exit():
                found[i] = Outcome(await coroutines[i]())
        except Exception as error:  # noqa: BLE001 - kept, for the caller to decide on
            found[i] = Outcome(error=error)

    async def everything() -> None:
        await asyncio.gather(*(keep(i) for i in range(len(coroutines))))

    loop = _loop()
    future = asyncio.run_coroutine_threadsafe(everything(), loop.loop)
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
    blocked = TimeLimitError(f"an async call held the event loop for longer than {limit} s (it blocks without await)")
    return [outcome or Outcome(error=blocked) for outcome in list(found)]
