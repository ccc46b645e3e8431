"""Sampling for a server in one thread: requests join and leave a batch while it runs."""

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf_lightning.generation.local_engine import BatchRow
from rlhf_lightning.serving.fields import RequestError
from rlhf_lightning.serving.sampling import Load, Row, Sampled

log = logging.getLogger(__name__)
FAILED = RequestError("sampling failed; the server's log has the reason", status=500, kind="server_error")


class RowBatch(Protocol):
    """Rows that are sampled together, for example a `SlotBatch`."""

    def add(self, row: BatchRow) -> None:
        """Add a row."""

    def cancel(self, row: BatchRow) -> None:
        """Stop sampling a row, if its response is not complete yet."""

    def step(self) -> bool:
        """Sample tokens of the rows; False if no row is left."""


@dataclass(eq=False)
class Job:
    """A row that is sampled for a request."""

    index: int
    row: BatchRow
    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Sampled | RequestError]"
    sent: int = 0
    """Number of tokens that the request has received."""
    cancelled: bool = False

    def send(self, item: Sampled | RequestError) -> None:
        """Pass something to the request, from the sampling thread."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            if not self.loop.is_closed():  # the server has ended
                raise

    def report(self) -> None:
        """Pass on the tokens that are new."""
        ids, logprobs = self.row.completion.ids[self.sent :], self.row.completion.logprobs[self.sent :]
        if ids and not self.cancelled:
            self.sent += len(ids)
            self.send(Sampled(self.index, ids, logprobs, self.row.completion.stop_reason if self.row.ended else None))


class ThreadSampler(ABC):
    """Samples the responses of all requests in one thread.

    Args:
        slots: Number of responses that are sampled at the same time.
        max_waiting: Number of responses that may wait for a slot.
    """

    def __init__(self, slots: int, max_waiting: int) -> None:
        self.slots, self.max_waiting = slots, max_waiting
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sampling")

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> Load:
        """How much there is to do."""
        return Load(len(self._active), len(self._waiting))

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `RequestError` for responses that cannot be sampled as they are asked for.

        Args:
            rows: The responses.
        """
        return  # anything can be sampled

    async def sample(self, rows: Sequence[Row]) -> AsyncGenerator[Sampled, None]:
        """Sample responses. They are cancelled when the iteration is closed.

        Args:
            rows: The responses.

        Yields:
            New tokens of one of them.

        Raises:
            RequestError: If too many responses wait, or a row cannot be sampled.
        """
        self.check(rows)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Sampled | RequestError]()
        jobs = [
            Job(index, BatchRow(tuple(ids), params, seed), loop, queue)
            for index, (ids, params, seed, _) in enumerate(rows)
        ]
        self._add(jobs)
        try:
            left = len(jobs)
            while left:
                item = await queue.get()
                if isinstance(item, RequestError):
                    raise item
                left -= item.finish_reason is not None
                yield item
        finally:
            self._cancel(jobs)

    def _add(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            if self._stopping:
                raise RequestError("the server is shutting down", status=503, kind="server_error")
            # A request with more responses than may wait is taken if nobody else waits.
            if self._waiting and len(self._waiting) + len(jobs) > self.max_waiting:
                raise RequestError(
                    f"{len(self._waiting)} responses are waiting already; try again later",
                    code="rate_limit_exceeded",
                    status=429,
                    kind="rate_limit_error",
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def _cancel(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in jobs:
                job.cancelled = True
                if job in self._waiting:
                    self._waiting.remove(job)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._active.append(job)
            try:
                self._sample(job)
            except Exception:
                log.exception("sampling failed")
                for one in self._active:
                    one.send(FAILED)
            self._active.clear()

    @abstractmethod
    def _sample(self, job: Job) -> None:
        """Sample a job, and those that come while it runs."""

    def _may_join(self, row: BatchRow) -> bool:
        """False if a row must wait until the running batch is empty."""
        return True

    def _next(self) -> Job | None:
        """Wait for a job; None if the thread ends."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            return None if self._stopping else self._waiting.popleft()

    def _take(self, most: int) -> list[Job]:
        """The next waiting jobs, up to the first that may not join the batch."""
        taken: list[Job] = []
        with self._changed:
            while not self._stopping and self._waiting and len(taken) < most and self._may_join(self._waiting[0].row):
                taken.append(self._waiting.popleft())
        return taken

    def _run_batch(self, first: Job, batch: RowBatch) -> None:
        """Sample until no job is left that may join the batch."""
        batch.add(first.row)
        while batch.step():
            for job in self._active:
                job.report()
            for job in [job for job in self._active if job.cancelled or job.row.ended or self._stopping]:
                batch.cancel(job.row)
                self._active.remove(job)
            for job in self._take(self.slots - len(self._active)):
                batch.add(job.row)
                self._active.append(job)
