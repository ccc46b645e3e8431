"""How `rlhf serve` and `rlhf tinker` end: running requests have some time to finish.

Then each gets an error in the form of its API.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.serving.replies import error_response, event
from rlhf_lightning.sys_exit import restore_handlers, stop_signals

log = logging.getLogger(__name__)
GRACE = 5.0
"""Seconds that running requests have to finish."""
LIMIT = GRACE + 2
"""Seconds after the first stop signal at which the process ends, even if a forward pass or a filter still runs."""
SHUTTING_DOWN = RequestError("the server is shutting down", status=503, kind="server_error")


class Shutdown:
    """How far the shutdown of a server has come.

    Args:
        grace: Seconds that running requests have to finish.

    Attributes:
        begun: Set when new requests are refused.
        over: Set when running requests are ended.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self.begun, self.over = asyncio.Event(), asyncio.Event()

    def begin(self) -> None:
        """Refuse new requests, and end the running ones after `grace` seconds. Called in the server's event loop."""
        self.begun.set()
        asyncio.get_running_loop().call_later(self.grace, self.over.set)


class EndAtShutdown:
    """Middleware that refuses requests during a shutdown, and ends the running ones when their time is over.

    A request without a response gets status 503, a stream an error as its last event.

    Args:
        app: The application.
        shutdown: The shutdown of the server.
    """

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        self.app, self.shutdown = app, shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        last_sent = ""

        async def send_noted(message: Message) -> None:
            nonlocal last_sent
            await send(message)
            more = message["type"] == "http.response.start" or message.get("more_body", False)
            last_sent = "part" if more else "end"

        if self.shutdown.begun.is_set():
            await error_response(SHUTTING_DOWN)(scope, receive, send)
            return
        work = asyncio.ensure_future(self._handle(scope, receive, send_noted))
        over = asyncio.ensure_future(self.shutdown.over.wait())
        try:
            await asyncio.wait((work, over), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work  # raises its error
        finally:
            for task in (work, over):
                task.cancel()
            await asyncio.gather(work, over, return_exceptions=True)
        if not last_sent:
            await error_response(SHUTTING_DOWN)(scope, receive, send)
        elif last_sent == "part":  # only streams have several parts
            await send({"type": "http.response.body", "body": event(SHUTTING_DOWN.body())})

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class ApiHttpServer(uvicorn.Server):
    """A web server whose running requests end by `Shutdown`. Its caller handles signals, see `ended_by_signals`.

    Args:
        config: Settings of the web server.
        shutdown: The shutdown that `EndAtShutdown` follows.

    Attributes:
        ending: The shutdown.
    """

    def __init__(self, config: uvicorn.Config, shutdown: Shutdown) -> None:
        super().__init__(config)
        self.ending = shutdown
        # Clients that do not read their error are disconnected after a further second.
        config.timeout_graceful_shutdown = int(shutdown.grace) + 1

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the handlers of signals as they are."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the running requests, and close the sockets.

        Args:
            sockets: The sockets.
        """
        if self.server_state.tasks:
            log.warning("shutting down: running requests have %g s to finish", self.ending.grace)
        self.ending.begin()
        await super().shutdown(sockets)


@contextmanager
def ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Context manager in which the first stop signal ends a server, and a second Ctrl-C ends the process at once.

    The process also ends `LIMIT` seconds after the first signal, even after this context. A thread that is in a forward
    pass, or that waits for a judge, cannot be interrupted otherwise, and nobody waits for its result any more.

    Args:
        server: The server.
    """
    limit = threading.Timer(LIMIT, os._exit, (0,))
    limit.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        if not server.should_exit:
            server.should_exit = True
            limit.start()
        elif number == signal.SIGINT:
            os._exit(130)

    numbers = [int(signal.SIGINT), *stop_signals()]
    before = {
        number: signal.signal(number, handle) for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        restore_handlers(before, ends=server.should_exit)
