"""The results of requests, until clients have retrieved them."""

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.tinker.replies import Reply

RETRIEVED, ABANDONED = 300.0, 3600.0
"""Seconds for which a result is kept after a client has retrieved it, and if no client does."""


@dataclass
class _Result:
    """The future of a request, and when it was done or first retrieved, in seconds of the clock."""

    future: Future[Reply]
    done: float | None = None
    retrieved: float | None = None


class Results:
    """The futures of requests by their ids.

    A client may retrieve a result again within five minutes, because the connection may break before it has arrived.
    A result that no client retrieves is dropped after an hour.

    Args:
        clock: Returns the time in seconds.

    Example:
        >>> results = Results()
        >>> request_id = results.add(Future())
        >>> results.get(request_id).done()
        False
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._results: dict[str, _Result] = {}

    def add(self, future: Future[Reply]) -> str:
        """Keep a future; returns the id of its request.

        Args:
            future: The future.
        """
        self._results = {name: one for name, one in self._results.items() if not self._is_stale(one)}
        request_id = secrets.token_hex(8)
        result = self._results[request_id] = _Result(future)

        def finish(_: Future[Reply]) -> None:
            result.done = self._clock()

        future.add_done_callback(finish)
        return request_id

    def get(self, request_id: str) -> Future[Reply]:
        """The future of a request.

        Args:
            request_id: Id of the request.

        Raises:
            RequestError: If it is unknown.
        """
        found = self._results.get(request_id)
        if found is None:
            raise RequestError(
                f"the request {request_id[:80]!r} is unknown: the server was started again, or its result was "
                "retrieved long ago",
                status=404,
            )
        if found.future.done() and found.retrieved is None:
            found.retrieved = self._clock()
        return found.future

    def _is_stale(self, result: _Result) -> bool:
        """True if nobody is expected to retrieve a result any more."""
        if result.retrieved is not None:
            return self._clock() > result.retrieved + RETRIEVED
        return result.done is not None and self._clock() > result.done + ABANDONED
